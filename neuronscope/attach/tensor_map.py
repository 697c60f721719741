"""Remember facts about the tensors of a forward, by identity, in eager mode and while ``torch.compile`` traces."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext, comptime

from neuronscope.attach.compiling import is_tracing

__all__ = ["TensorMap"]

Known = TypeVar("Known", bound=tuple[Any, ...])


class TensorMap(Generic[Known]):
    """A map from living tensors to facts about them, keyed by identity; it keeps no tensor alive.

    While ``torch.compile`` traces, the facts are an attribute of the fake tensor that stands for a traced tensor. They
    are written and read by functions that the compiler runs instead of tracing them, so that they are not part of the
    graph. Traced Python code cannot do this: an attribute cannot be set on a member of a traced tuple, and stays on the
    real tensors that a graph returns; a list would make every tensor in it an output of the graph.

    Args:
        name: Name of the attribute.

    >>> known, tensor = TensorMap("size"), torch.ones(2)
    >>> known.put(tensor, (2,))
    >>> known.get(tensor), known.get(torch.ones(2))
    ((2,), None)
    """

    def __init__(self, name: str) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Known]] = {}
        attribute = f"_neuronscope_{name}"
        read_last: list[Any] = []

        def write(context: ComptimeContext) -> None:
            value = _one(context.get_local("value").as_python_constant())
            setattr(context.get_local("tensor").as_fake(), attribute, value)

        def read(context: ComptimeContext) -> None:
            read_last[:] = [getattr(context.get_local("tensor").as_fake(), attribute, None)]

        def neuronscope_known() -> Any:
            return read_last.pop() if read_last else None  # nothing was read if a graph is recorded for export

        # torch.compile runs these while it traces; the first two read the local variables of their caller.
        self._write, self._read = write, read
        self._constant = torch.compiler.assume_constant_result(neuronscope_known)

    def put(self, tensor: Tensor, value: Known) -> None:
        """Remember ``value`` for ``tensor``.

        Args:
            tensor: Any tensor.
            value: A tuple of primitives.
        """
        if is_tracing():
            comptime(self._write)
        else:
            self._known[id(tensor)] = (weakref.ref(tensor), value)

    def get(self, tensor: Tensor) -> Known | None:
        """Return what was last remembered for ``tensor``, or ``None``."""
        if is_tracing():
            comptime(self._read)
            traced: Known | None = self._constant()
            return traced
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def maybe_any(self) -> bool:
        """Whether anything may be remembered; always true while ``torch.compile`` traces, which cannot tell."""
        return bool(self._known) or is_tracing()


@functools.lru_cache(maxsize=1024, typed=True)
def _one(value: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the first tuple that was equal to this one: the compiler keeps a name for each object that it receives."""
    return value
