"""Find the call that a recomputed call repeats: reentrant activation checkpointing runs its segments again, last first.

Its first forward runs without gradients, so that only the recomputed calls can receive them. The calls of a module that
several segments share are numbered from zero again in each recomputed segment. When the gradients of a segment arrive,
all calls of the segment have been made, and they are the last calls of the forward that were not yet repeated.
"""

from __future__ import annotations

__all__ = ["Recomputation"]

Place = tuple[str, str]


class Recomputation:
    """The calls of each place (path, function) that were made without gradients and will be made again.

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
        """Note a call that was made without gradients, inside a forward that has them.

        Args:
            place: Path and function of the site.
            call: Number of the call in the forward.
        """
        self._due.setdefault(place, []).append(call)

    def next_number(self, place: Place) -> int:
        """Note a call that is made in a backward pass, and return its number within the recomputed segment."""
        if self._fired:  # gradients have arrived since: another segment begins
            for done, count in self._made.items():
                del self._due.get(done, [])[-count:]
            self._made.clear()
            self._fired = False
        number = self._made.get(place, 0)
        self._made[place] = number + 1
        return number

    def forward_call(self, place: Place, number: int) -> int:
        """Return the number in the forward of a call of the recomputed segment; called when its gradient has arrived.

        Args:
            place: Path and function of the site.
            number: Number of the call within the segment.
        """
        self._fired = True
        due, made = self._due.get(place, []), self._made.get(place, 0)
        return due[number - made] if made <= len(due) and number < made else number

    def clear(self) -> None:
        """Forget all calls: an optimizer step is over."""
        self._due.clear()
        self._made.clear()
        self._fired = False
