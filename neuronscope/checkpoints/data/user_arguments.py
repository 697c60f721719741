"""Givens: what the user hands over to be called or gone through, made ready; its faults told in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from torch import Tensor

from neuronscope.checkpoints.model.load_model import load_named
from neuronscope.errors import UsageError

__all__ = ["batches_of", "first_of", "loss_of", "told"]


def batches_of(data: Iterable[Any] | str | Callable[[], Iterable[Any]] | None) -> Iterable[Any] | None:
    """The user's batches, made where they are still to be made.

    Args:
        data: Batches, a function that makes them, ``pkg.mod:name`` of either, or ``None``.

    Raises:
        UsageError: It is nothing of the kind, or the function fails.

    >>> list(batches_of(lambda: [1, 2]))
    [1, 2]
    """
    found: Any = load_named(data, "data") if isinstance(data, str) else data
    if callable(found) and not hasattr(found, "__iter__"):
        try:
            found = found()
        except Exception as error:
            raise UsageError(f"Expected `data` to make batches, but it gave {told(error)}") from error
    if found is not None and not isinstance(found, Tensor) and not hasattr(found, "__iter__"):
        raise UsageError(f"Expected argument `data` to be an iterable of batches, but got {type(found).__name__}.")
    return (found,) if isinstance(found, Tensor) else found


def loss_of(loss: Callable[[Any, Any], Tensor] | str | None) -> Callable[[Any, Any], Tensor] | None:
    """The user's loss, looked up where it is named.

    Args:
        loss: The function, its ``pkg.mod:name``, or ``None``.

    Raises:
        UsageError: It cannot be called.
    """
    found: Any = load_named(loss, "loss") if isinstance(loss, str) else loss
    if found is not None and not callable(found):
        raise UsageError(f"Expected argument `loss` to be called with (output, batch), but got {type(found).__name__}.")
    checked: Callable[[Any, Any], Tensor] | None = found
    return checked


def first_of(batches: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """The first batch, and batches that still begin with it, also where they can be gone through but once.

    Args:
        batches: Any batches; where there are none at all (``None``), there is no first one.

    Raises:
        UsageError: There is none in them, or the first one fails.

    >>> first, every = first_of(iter([1, 2]))
    >>> first, list(every)
    (1, [1, 2])
    """
    if batches is None:
        return None, None
    try:
        iterator = iter(batches)
        first = next(iterator)
    except StopIteration:
        raise UsageError("Expected argument `data` to yield at least one batch, but it gave none.") from None
    except Exception as error:
        raise UsageError(f"Expected `data` to give batches, but it gave {told(error)}") from error
    return first, (batches if iter(batches) is not iterator else chain([first], iterator))


def told(error: Exception) -> str:
    """A user's error in one line.

    Args:
        error: What was raised.

    >>> told(KeyError("labels"))
    "KeyError: 'labels'"
    """
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
