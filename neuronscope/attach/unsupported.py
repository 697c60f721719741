"""Recognize tensors that cannot be counted, and say why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from neuronscope.attach.compiling import is_recorded

__all__ = [
    "BATCHED_GRADIENT",
    "CAPTURED",
    "IN_OPERATOR",
    "IN_TRANSFORM",
    "describe_input",
    "in_transform",
    "is_wrapped",
    "unsupported_reason",
    "unwrapped",
]

# Under names that are quick to find.
_count_transforms = torch._C._functorch.get_dynamic_layer_stack_depth
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_count_modes = torch._C._len_torch_dispatch_stack

#: Why calls inside a function transform are not measured.
IN_TRANSFORM = (
    "it ran inside a function transform (`torch.vmap`, `torch.func`), whose tensors cannot be read: these calls were "
    "not counted, and any others were. Call the model outside of the transform to have it counted"
)
#: Why calls inside an operator of higher order are not measured.
IN_OPERATOR = (
    "it ran inside an operator that is given functions, traces them and runs them itself (`{}`): these calls were not "
    "counted, and any others were. Call the functions without it to have it counted"
)
#: Why gradients that are batched tensors are not measured.
BATCHED_GRADIENT = (
    "its gradients came in batches (`is_grads_batched=True`, `vectorize=True`, `torch.vmap`), whose tensors cannot be "
    "read: these were not counted, and any others were. Take them one at a time to have them counted"
)


#: Why a call that was captured in a CUDA graph is not measured.
CAPTURED = (
    "it was captured in a CUDA graph, whose replays run no Python, so that they cannot be counted: a capture is "
    "counted if the same step ran watched and observed before it, and no rows in it are of several experts"
)


def in_transform(tensor: Tensor) -> bool:
    """Return whether a function transform runs or has left this tensor batched, so that its numbers cannot be read.

    Transforms are ``torch.vmap`` and those of ``torch.func``, one of which records a graph (``linearize``). Gradients
    are batched outside of them too, if they are taken with ``is_grads_batched=True``, or by
    ``torch.autograd.functional`` with ``vectorize=True``.

    Args:
        tensor: Any tensor that ``torch.compile`` is not tracing.

    >>> in_transform(torch.zeros(2))
    False
    >>> seen = []
    >>> _ = torch.vmap(lambda row: seen.append(in_transform(row)) or row)(torch.zeros(3, 2))
    >>> seen
    [True]
    """
    return bool(_count_transforms() or _is_batched(tensor) or (_count_modes() and is_recorded()))


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor stands for another one inside a function transform.

    >>> is_wrapped(torch.zeros(2))
    False
    """
    return bool(_is_wrapped(tensor))


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor that transforms were given, of one that stands for it inside them.

    >>> seen, given = [], torch.zeros(3, 2)
    >>> _ = torch.vmap(lambda row: seen.append(unwrapped(row)) or row)(given)
    >>> seen[0] is given
    True
    """
    while _is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def unsupported_reason(tensor: Tensor) -> str:
    """Return why a tensor cannot be counted; ``""`` if it can.

    >>> unsupported_reason(torch.zeros(2, device="meta"))
    'tensors of type Tensor on meta cannot be counted'
    """
    if tensor.is_nested:
        return "nested tensors cannot be counted"
    odd = type(tensor) is not Tensor and isinstance(tensor, FakeTensor)
    if odd or tensor.is_meta or tensor.layout is not torch.strided:
        return f"tensors of type {type(tensor).__name__} on {tensor.device.type} cannot be counted"
    return ""


def describe_input(x: Any) -> str:
    """Describe the input of an activation that is not a floating-point tensor with dimensions.

    >>> describe_input(torch.zeros(2, dtype=torch.int64)), describe_input(torch.tensor(1.0)), describe_input(None)
    ('int64 tensors', 'float32 tensors without dimensions', 'an input of type NoneType')
    """
    if not isinstance(x, Tensor):
        return f"an input of type {type(x).__name__}"
    kind = str(x.dtype).removeprefix("torch.")
    return f"{kind} tensors" if x.dim() else f"{kind} tensors without dimensions"
