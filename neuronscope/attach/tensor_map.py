"""Find the tensors in nested values, and remember facts about the tensors of a forward, by identity."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

__all__ = ["TensorMap", "nested_tensors"]

Known = TypeVar("Known")


class TensorMap(Generic[Known]):
    """A map from living tensors to facts about them, keyed by identity; it keeps no tensor alive.

    Attributes:
        entries: For each tensor, by its ``id``: a reference to it, and the fact. The tensor may be dead, and another
            one may have its ``id``.

    >>> import torch
    >>> known, tensor = TensorMap(), torch.ones(2)
    >>> known.put(tensor, 2)
    >>> known.get(tensor), known.get(torch.ones(2))
    (2, None)
    """

    #: Number of entries beyond which those of dead tensors are removed.
    MOST = 20_000

    def __init__(self) -> None:
        self.entries: dict[int, tuple[weakref.ref[Tensor], Known]] = {}
        self._most = self.MOST

    def put(self, tensor: Tensor, value: Known) -> None:
        """Remember ``value`` for ``tensor``.

        Args:
            tensor: Any tensor.
            value: The fact.
        """
        known = self.entries
        if len(known) >= self._most:
            for key in [key for key, (reference, _) in known.items() if reference() is None]:
                del known[key]
            self._most = max(self.MOST, 2 * len(known))
        known[id(tensor)] = (weakref.ref(tensor), value)

    def get(self, tensor: Tensor) -> Known | None:
        """Return what was last remembered for ``tensor``, or ``None``."""
        entry = self.entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()


def nested_tensors(values: Any) -> Iterable[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif not isinstance(value, (int, float, str)):
                yield from nested_tensors(value)
    elif isinstance(values, Mapping):  # asked last, because this takes longest
        for value in values.values():
            yield from nested_tensors(value)
