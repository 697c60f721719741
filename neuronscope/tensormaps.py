"""What is known of the tensors of a forward, by identity, in eager mode and where ``torch.compile`` traces."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext, comptime

__all__ = ["TensorMap"]

Known = TypeVar("Known", bound=tuple[Any, ...])


class TensorMap(Generic[Known]):
    """A map from living tensors to what is known of them, keyed by identity; it keeps no tensor alive.

    While ``torch.compile`` traces, what is known is an attribute of the fake tensor that stands for a traced one. It is
    written and read by functions that the compiler runs instead of tracing them, so that the graph holds nothing of it.
    Traced Python cannot do the same: an attribute cannot be set on a member of a traced tuple, and stays on the real
    tensors that a graph returns; a list would make every tensor in it an output of the graph.

    Args:
        name: Of the attribute.

    >>> known, tensor = TensorMap("size"), torch.ones(2)
    >>> known.put(tensor, (2,))
    >>> known.get(tensor), known.get(torch.ones(2))
    ((2,), None)
    """

    def __init__(self, name: str) -> None:
        self._attribute = f"_neuronscope_{name}"
        self._known: dict[int, tuple[weakref.ref[Tensor], Known]] = {}

    def put(self, tensor: Tensor, value: Known) -> None:
        """Remember ``value``, a tuple of primitives, for ``tensor``."""
        if torch.compiler.is_compiling():
            _put_traced(tensor, self._attribute, value)
        else:
            self._known[id(tensor)] = (weakref.ref(tensor), value)

    def get(self, tensor: Tensor) -> Known | None:
        """What was last remembered for ``tensor``, or ``None``."""
        if torch.compiler.is_compiling():
            traced: Known | None = _get_traced(tensor, self._attribute)
            return traced
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def maybe_any(self) -> bool:
        """Whether anything may be known; while ``torch.compile`` traces there is no telling."""
        return bool(self._known) or torch.compiler.is_compiling()


def _put_traced(tensor: Tensor, attribute: str, value: tuple[Any, ...]) -> None:
    """Remember ``value`` for a traced tensor; :func:`_write` reads these arguments by their names."""
    comptime(_write)


def _get_traced(tensor: Tensor, attribute: str) -> Any:
    """Return what is known of a traced tensor; :func:`_read` reads these arguments by their names."""
    comptime(_read)
    return neuronscope_known()


_found: list[Any] = []  # what was read last


def _write(context: ComptimeContext) -> None:
    fake = context.get_local("tensor").as_fake()
    attribute = context.get_local("attribute").as_python_constant()
    setattr(fake, attribute, _one(context.get_local("value").as_python_constant()))


def _read(context: ComptimeContext) -> None:
    fake = context.get_local("tensor").as_fake()
    _found[:] = [getattr(fake, context.get_local("attribute").as_python_constant(), None)]


@torch.compiler.assume_constant_result
def neuronscope_known() -> Any:
    """Return what was read last; the compiler makes it a constant of the trace, of this name."""
    return _found.pop()


@functools.lru_cache(maxsize=1024, typed=True)
def _one(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the first tuple that was equal to this one: the compiler keeps a name for each object, not for each value."""
    return value
