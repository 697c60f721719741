"""Find the torch functions of a name: ``torch.relu``, ``Tensor.relu`` and ``aten.relu.default`` are different objects.

A function mode receives the very object that was called, so each table of functions needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.nn import functional

__all__ = ["aten", "spellings"]


def spellings(*names: str, in_place: bool = False) -> frozenset[Callable[..., Any]]:
    """Return every function of these names in ``torch.nn.functional``, ``torch``, ``Tensor`` and ``torch.ops.aten``.

    Graphs of ``torch.export`` call the operators of ``torch.ops.aten``, each by one of its overloads. A name that this
    version of torch does not have is left out.

    Args:
        names: Names of functions or methods, such as ``relu`` or ``__mul__``.
        in_place: Whether to return the functions that end in an underscore too.

    >>> {torch.nn.functional.conv2d, torch.conv2d, torch.ops.aten.conv2d.default} <= spellings("conv2d")
    True
    >>> torch.Tensor.relu_ in spellings("relu"), torch.Tensor.relu_ in spellings("relu", in_place=True)
    (False, True)
    >>> spellings("no_such_function")
    frozenset()
    """
    spelled = [*names, *(f"{name}_" for name in names if in_place)]
    found = [getattr(home, name, None) for home in (functional, torch, Tensor) for name in spelled]
    return frozenset([*(function for function in found if callable(function)), *aten(*spelled)])


def aten(*names: str) -> Iterator[Callable[..., Any]]:
    """Yield the operators of these names in ``torch.ops.aten``, and each of their overloads on tensors.

    Those that write into an ``out`` are left out.

    Args:
        names: Names of operators.

    >>> [str(operator) for operator in aten("relu")]
    ['aten.relu', 'aten.relu.default']
    """
    for name in names:
        packet = getattr(torch.ops.aten, name, None)
        if isinstance(packet, OpOverloadPacket):
            yield packet
            overloads = [getattr(packet, name) for name in packet.overloads() if not name.endswith("out")]
            yield from (each for each in overloads if any("Tensor" in str(arg.type) for arg in each._schema.arguments))
