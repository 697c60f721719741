"""Find the torch functions of a name: ``torch.relu``, ``Tensor.relu`` and ``functional.relu`` are different objects.

A function mode receives the very object that was called, so each table of functions needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["spellings"]


def spellings(*names: str, in_place: bool = False) -> frozenset[Callable[..., Any]]:
    """Return every function of these names in ``torch.nn.functional``, ``torch`` and ``Tensor``.

    A name that this version of torch does not have is left out.

    Args:
        names: Names of functions or methods, such as ``relu`` or ``__mul__``.
        in_place: Whether to return the functions that end in an underscore too.

    >>> spellings("conv2d") == {torch.nn.functional.conv2d, torch.conv2d}
    True
    >>> torch.Tensor.relu_ in spellings("relu"), torch.Tensor.relu_ in spellings("relu", in_place=True)
    (False, True)
    >>> spellings("no_such_function")
    frozenset()
    """
    spelled = [*names, *(f"{name}_" for name in names if in_place)]
    found = (getattr(home, name, None) for home in (functional, torch, Tensor) for name in spelled)
    return frozenset(function for function in found if callable(function))
