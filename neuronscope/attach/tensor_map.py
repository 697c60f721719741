"""What is known of the tensors of a forward, by identity, in eager mode and where ``torch.compile`` traces."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["TensorMap"]

Known = TypeVar("Known", bound=tuple[Any, ...])


class TensorMap(Generic[Known]):
    """A map from living tensors to what is known of them, keyed by identity; it keeps no tensor alive.

    While ``torch.compile`` traces there are no weak references, and a list would make every tensor in it an output of
    the graph: there, what is known is an attribute of the traced tensor, and goes with it.

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
            setattr(tensor, self._attribute, value)
        else:
            self._known[id(tensor)] = (weakref.ref(tensor), value)

    def get(self, tensor: Tensor) -> Known | None:
        """What was last remembered for ``tensor``, or ``None``."""
        if torch.compiler.is_compiling():
            traced: Known | None = getattr(tensor, self._attribute, None)
            return traced
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def maybe_any(self) -> bool:
        """Whether anything may be known; while ``torch.compile`` traces there is no telling."""
        return bool(self._known) or torch.compiler.is_compiling()
