"""Say which calls of torch functions give numbers of their tensors to the program, which may then compute otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuronscope.attach.torch_functions import spellings

__all__ = ["reads_out"]

# Functions that return a property of a tensor other than its numbers.
_METADATA = spellings(
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__", "element_size"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device", "__hash__", "__repr__"),
    *("data_ptr", "untyped_storage", "is_pinned", "is_shared", "type", "is_inference", "dim_order", "requires_grad_"),
) | {torch.is_tensor}
# Functions whose result has a shape that depends on numbers, or which share memory without sharing its version.
_LEAKS = spellings(
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose"),
) | {Tensor.data.__get__, Tensor.data.__set__}  # type: ignore[attr-defined]
_PICKS = (Tensor.__getitem__, torch.where)


def reads_out(
    function: Callable[..., Any], args: tuple[Any, ...], output: Any, *, gives_tensors: bool, masks: bool
) -> bool:
    """Return whether a call gives numbers to the program, or decides a shape by them.

    Args:
        function: The function.
        args: The positional arguments of the call.
        output: What it returned.
        gives_tensors: Whether there is a tensor in what it returned.
        masks: Whether one of its tensors holds truth values or bytes, and depends on the input.

    >>> x = torch.ones(2)
    >>> reads_out(Tensor.item, (x[0],), 1.0, gives_tensors=False, masks=False)
    True
    >>> reads_out(Tensor.size, (x,), x.shape, gives_tensors=False, masks=False)
    False
    """
    if function in _LEAKS or (masks and function in _PICKS and (function is not torch.where or len(args) == 1)):
        return True
    if function is Tensor.__getitem__ and any(isinstance(each, Tensor) for each in _limits(args[1])):
        return True
    getter = getattr(function, "__name__", "") == "__get__"
    return output is not None and not getter and function not in _METADATA and not gives_tensors


def _limits(index: Any) -> list[Any]:
    """Return the limits of the slices in an index."""
    parts = index if isinstance(index, tuple) else (index,)
    return [each for part in parts if isinstance(part, slice) for each in (part.start, part.stop, part.step)]
