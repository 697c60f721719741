"""Remember facts about the tensors of a forward, by identity."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["TensorMap"]

Known = TypeVar("Known")


class TensorMap(Generic[Known]):
    """A map from living tensors to facts about them, keyed by identity; it keeps no tensor alive.

    >>> import torch
    >>> known, tensor = TensorMap(), torch.ones(2)
    >>> known.put(tensor, 2)
    >>> known.get(tensor), known.get(torch.ones(2))
    (2, None)
    """

    #: Number of entries beyond which those of dead tensors are removed.
    MOST = 20_000

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Known]] = {}
        self._most = self.MOST

    def put(self, tensor: Tensor, value: Known) -> None:
        """Remember ``value`` for ``tensor``.

        Args:
            tensor: Any tensor.
            value: The fact.
        """
        known = self._known
        if len(known) >= self._most:
            for key in [key for key, (reference, _) in known.items() if reference() is None]:
                del known[key]
            self._most = max(self.MOST, 2 * len(known))
        known[id(tensor)] = (weakref.ref(tensor), value)

    def get(self, tensor: Tensor) -> Known | None:
        """Return what was last remembered for ``tensor``, or ``None``."""
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
