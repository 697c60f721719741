"""Say the sizes of tensors in integers, also of those that stand for tensors in a graph that is traced."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["plain_shape", "plain_size"]

_LARGE = 1_000_003  # a prime


def plain_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor in integers; ``()`` if it has none, as a nested one or a lazy module's parameter."""
    if tensor.is_nested or nn.parameter.is_lazy(tensor):
        return ()
    return tuple([size if type(size) is int else plain_size(size) for size in tensor.shape])


def plain_size(size: Any) -> Any:
    """Return a size as an integer; that of a symbolic size is the size with which the graph is traced.

    A size that data decides has none. It gets a large number of its own, so that no other size is taken for it.
    """
    if not isinstance(size, torch.SymInt):
        return size
    node = size.node
    if node.hint is not None:
        return int(node.hint)
    sizes = getattr(node.shape_env, "backed_var_to_val", {})
    large = {each: _LARGE + zlib.crc32(str(each).encode()) % _LARGE for each in node.expr.free_symbols}
    return int(node.expr.subs({each: sizes.get(each, number) for each, number in large.items()}))
