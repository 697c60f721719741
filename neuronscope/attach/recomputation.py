"""Which call a recomputed one is: reentrant activation checkpointing runs segments again, the last one first.

Its first forward runs without gradients, so that only the recomputation can be asked for them; and there a module that
is shared by several segments starts to be called from one again. When the gradients of a segment come, all its calls
have been made, and they are the last ones that are still due.
"""

from __future__ import annotations

__all__ = ["Recomputation"]

Place = tuple[str, str]


class Recomputation:
    """The calls of each place (path, function) that were made without gradients and are due to be made again.

    >>> due = Recomputation()
    >>> for call in (0, 1, 2):
    ...     due.add(("relu", ""), call)
    >>> due.next_number(("relu", "")), due.next_number(("relu", ""))
    (0, 1)
    >>> due.forward_call(("relu", ""), 0), due.forward_call(("relu", ""), 1)
    (1, 2)
    >>> due.next_number(("relu", "")), due.forward_call(("relu", ""), 0)
    (0, 0)
    """

    def __init__(self) -> None:
        self._due: dict[Place, list[int]] = {}
        self._made: dict[Place, int] = {}
        self._fired = False

    def add(self, place: Place, call: int) -> None:
        """A call was made without gradients, in a forward that has them."""
        self._due.setdefault(place, []).append(call)

    def next_number(self, place: Place) -> int:
        """A call is made in a backward pass; gives its number within the segment that is recomputed."""
        if self._fired:  # gradients came since: another segment begins
            for done, count in self._made.items():
                del self._due.get(done, [])[-count:]
            self._made.clear()
            self._fired = False
        number = self._made.get(place, 0)
        self._made[place] = number + 1
        return number

    def forward_call(self, place: Place, number: int) -> int:
        """The call that the ``number``-th of the segment was in the forward; asked when its gradient has come."""
        self._fired = True
        due, made = self._due.get(place, []), self._made.get(place, 0)
        return due[number - made] if made <= len(due) and number < made else number

    def clear(self) -> None:
        """An optimizer step is over."""
        self._due.clear()
        self._made.clear()
        self._fired = False
