"""Check the parts of a saved state: a file may be damaged, and what is wrong must not come out later as a count.

Each function raises ValueError if the part is anything else than what it returns, and :func:`reading` makes a
StateError of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch

from neuronscope.errors import StateError

__all__ = ["MOST", "array", "integer", "integers", "mapping", "reading"]

#: No run counts so many. What is below can be added up without an overflow.
MOST = 2**60


@contextlib.contextmanager
def reading(what: str, state: Any) -> Iterator[None]:
    """Raise StateError if a part of a state that is read inside is missing, or is not what it can be.

    Args:
        what: What was saved, for the message: ``state of a census``.
        state: The state.
    """
    try:
        yield
    except StateError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StateError(f"Expected the saved {what}, but got {type(state).__name__}: {error}.") from error


def integer(state: Mapping[str, Any], name: str, low: int = 0, high: int = MOST) -> int:
    """Return an integer of a state.

    Args:
        state: The state.
        name: Its key.
        low: The least that it can be.
        high: The most that it can be.
    """
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:40]} and not an integer from {low} to {high}")
    return value


def integers(state: Mapping[str, Any], name: str, low: int = 0, high: int = MOST) -> list[int]:
    """Return a list of integers of a state, saved as a list or as a tensor ``(W,)``.

    Args:
        state: The state.
        name: Its key.
        low: The least that each can be.
        high: The most that each can be.
    """
    value = state[name]
    if isinstance(value, torch.Tensor):
        return [int(each) for each in array(state, name, torch.int64, (len(value) if value.dim() else 0,), low, high)]
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__} and not a list")
    return [integer({name: each}, name, low, high) for each in value]


def array(
    state: Mapping[str, Any], name: str, dtype: torch.dtype, shape: tuple[int, ...], low: float = 0, high: float = MOST
) -> npt.NDArray[Any]:
    """Return a tensor of a state as an array of its own.

    Args:
        state: The state.
        name: Its key.
        dtype: Its dtype.
        shape: Its shape.
        low: The least that each number can be.
        high: The most that each number can be.
    """
    value = state[name]
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{name} is {type(value).__name__} and not a tensor with numbers")
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)} and not {dtype} {shape}")
    numbers = value.detach().cpu().numpy().copy()
    wrong = numbers[~((numbers >= low) & (numbers <= high))]
    if wrong.size:
        raise ValueError(f"{name} has {wrong[0]}, which is not from {low} to {high}")
    return numbers


def mapping(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping of a state whose keys are names.

    Args:
        state: The state.
        name: Its key.
    """
    value = state[name]
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} is {type(value).__name__} and not a mapping of names")
    return value
