"""What can be counted: tensors that hold numbers now, and will be seen each time that they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["BATCHED_GRADIENT", "IN_TRANSFORM", "empty_now", "in_transform", "uncountable", "what"]

#: Why calls in a function transform are not measured.
IN_TRANSFORM = (
    "it ran inside a function transform (`torch.vmap`, `torch.func`), whose tensors cannot be read: these calls were "
    "not counted, and any others were"
)
#: Why gradients that are batched tensors are not measured.
BATCHED_GRADIENT = (
    "its gradients came in batches (`is_grads_batched=True`, `vectorize=True`, `torch.vmap`), whose tensors cannot be "
    "read: these were not counted, and any others were"
)


def empty_now(tensor: Tensor) -> bool:
    """Whether a plain tensor holds nothing while this code runs: on ``meta``, or while a CUDA graph is captured.

    A capture notes what the device is to do and does none of it; a replay does it, and runs no Python.

    Args:
        tensor: Not one that ``torch.compile`` traces.

    >>> empty_now(torch.zeros(2)), empty_now(torch.zeros(2, device="meta"))
    (False, True)
    """
    return tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def in_transform(tensor: Tensor) -> bool:
    """Return whether a function transform runs, or left this tensor batched, so that its numbers cannot be read.

    Transforms are ``torch.vmap`` and those of ``torch.func``. Tensors are batched outside of them too, where a gradient
    is taken with ``is_grads_batched=True``, or by ``torch.autograd.functional`` with ``vectorize=True``.

    Args:
        tensor: Any; only of one that ``torch.compile`` traces it is not known whether it was batched before.

    >>> in_transform(torch.zeros(2))
    False
    >>> seen = []
    >>> _ = torch.vmap(lambda row: seen.append(in_transform(row)) or row)(torch.zeros(3, 2))
    >>> seen
    [True]
    """
    if _transforms() > 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(tensor)


def _count_transforms() -> int:
    """Return how many function transforms run, one inside another."""
    return torch._C._functorch.get_dynamic_layer_stack_depth()


_transforms = torch.compiler.assume_constant_result(_count_transforms)  # run for real where a graph is traced


def uncountable(tensor: Tensor) -> str:
    """Why a tensor cannot be counted, or ``""``.

    >>> uncountable(torch.zeros(2, device="meta"))
    'tensors of type Tensor on meta cannot be counted'
    """
    if tensor.is_nested:
        return "nested tensors cannot be counted"
    odd = type(tensor) is not Tensor and isinstance(tensor, FakeTensor)
    if odd or tensor.is_meta or tensor.layout is not torch.strided:
        return f"tensors of type {type(tensor).__name__} on {tensor.device.type} cannot be counted"
    if empty_now(tensor):
        return (
            "it was captured in a CUDA graph, whose replays run no Python, so that they cannot be counted: call the "
            "model without a graph while it is watched, or leave the graph to `torch.compile`"
        )
    return ""


def what(x: Any) -> str:
    """What an activation was given, in words, where it is no activation tensor.

    >>> what(torch.zeros(2, dtype=torch.int64)), what(torch.tensor(1.0)), what(None)
    ('int64 tensors', 'float32 tensors without dimensions', 'an input of type NoneType')
    """
    if not isinstance(x, Tensor):
        return f"an input of type {type(x).__name__}"
    kind = str(x.dtype).removeprefix("torch.")
    return f"{kind} tensors" if x.dim() else f"{kind} tensors without dimensions"
