"""Number the activations of one name that the same units of one call are given to, within a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuronscope.attach.origins import PICKED, UNKNOWN, Origin

__all__ = ["Counts", "Ordinals"]

#: How many activations there were so far: of some units and of a name, at all positions or at some.
Counts = dict[tuple[Any, ...], int]

#: Of more activations in a forward, those behind are not remembered for the next one.
_MOST = 20_000
#: Stands for what the begin of a forward was given, and for counts that were changed.
_NOTHING = Origin.of(UNKNOWN)


class _Numbered:
    """An activation that was numbered, and the one that came after it the last time.

    Attributes:
        origin: What it was given.
        activation: Its name.
        ordinal: Its number.
        place: How many came before it.
        next: The one that came after it.
    """

    __slots__ = ("activation", "next", "ordinal", "origin", "place")

    def __init__(self, origin: Origin, activation: str, ordinal: int, place: int) -> None:
        self.origin = origin
        self.activation = activation
        self.ordinal = ordinal
        self.place = place
        self.next: _Numbered | None = None


class Ordinals:
    """The numbers of the activations of a forward.

    A number follows from the activations that came before. So as long as a forward applies the same activations to the
    same units in the same order as the last one, each has the number that it had there, and nothing is counted.

    >>> from neuronscope.attach.origins import UNKNOWN
    >>> ordinals, origin = Ordinals(), Origin.of(UNKNOWN)
    >>> [ordinals.number(origin, name) for name in ("relu", "relu", "tanh")]
    [0, 1, 0]
    >>> ordinals.clear()
    >>> [ordinals.number(origin, name) for name in ("relu", "tanh", "relu")]
    [0, 0, 1]
    """

    def __init__(self) -> None:
        self._counts: Counts = {}
        self._begin = self._last = _Numbered(_NOTHING, "", 0, 0)
        self._counted = self._last  # up to this one ``_counts`` are complete

    def clear(self) -> None:
        """Begin anew, because a forward begins or a step is over."""
        self._last = self._counted = self._begin
        if self._counts:
            self._counts.clear()

    def number(self, origin: Origin, activation: str) -> int:
        """Return the number of an activation among those of its name that the same units of one call are given to.

        Those of other positions, as the steps of a sequence, are not among them: their counts add up. Positions that
        data picked are taken for others each time, but not beside an activation that all positions are given to.

        Args:
            origin: What it is given.
            activation: Its name.
        """
        known = self._last.next
        if known is not None and known.origin is origin and known.activation == activation:
            self._last = known
            return known.ordinal
        counts, every = self._complete(), (origin.unit_set, activation)
        if not origin.part:
            found = counts.get(every, 0)
        else:
            found = counts.get((*every, ()), 0)  # behind the last that all positions are given to
            if all(first != PICKED for _, first, _, _ in origin.part):
                found = max(found, counts.get((*every, origin.part), 0))
        number = _Numbered(origin, activation, found, self._last.place + 1)
        self._count(number)
        if number.place < _MOST:
            self._last.next = number
        self._last = self._counted = number
        return found

    def counts(self) -> Counts:
        """Return how many activations there were so far."""
        return dict(self._complete())

    def restore(self, counts: Mapping[tuple[Any, ...], int]) -> None:
        """Take the counts to be what :meth:`counts` returned before."""
        self._counts = dict(counts)
        self._leave_path()

    def add(self, place: tuple[Any, ...], count: int) -> None:
        """Add activations that were applied in a graph.

        Args:
            place: As in :meth:`counts`.
            count: Their number.
        """
        counts = self._complete()
        counts[place] = counts.get(place, 0) + count
        self._leave_path()

    def _leave_path(self) -> None:
        """Note that the counts do not follow from the activations alone that were numbered in this forward."""
        self._last = self._counted = _Numbered(_NOTHING, "", 0, _MOST)

    def _complete(self) -> Counts:
        """Return the counts, after adding the activations that were the same as in the last forward."""
        known = self._counted
        while known is not self._last:
            known = known.next or self._last
            self._count(known)
        self._counted = known
        return self._counts

    def _count(self, number: _Numbered) -> None:
        origin, counts, after = number.origin, self._counts, number.ordinal + 1
        every = (origin.unit_set, number.activation)
        counts[(*every, origin.part)] = after
        counts[every] = max(after, counts.get(every, 0))
