"""What ranks learn from one sum besides totals: the latest and the first step of any, and whether all say the same.

A collective does one operation with all of its numbers. Counts need a sum, steps a maximum and a minimum: here these
are told by sums too, exactly, so that one collective does for all.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from neuronscope.count.pending_counts import NEVER

__all__ = ["SAYING", "PlainSteps", "StepWords", "Steps", "said_by_all", "saying"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float64]

_LOWEST = -1022  # float64 has the powers of two from 2**-1022 to 2**1023, without those of fewer bits below
_POWERS = 2046
_LIMB_BITS, _LIMBS = 16, 4

#: Words of :func:`saying`.
SAYING = 2 * _LIMBS


class Steps(Protocol):
    """How steps travel, so that the ranks' own give the latest and the first of all."""

    nothing: int

    def latest(self, steps: IntArray) -> Numbers:
        """What a rank gives for its latest steps ``(N,)``, −1 = never."""

    def first(self, steps: IntArray) -> Numbers:
        """What a rank gives for its first steps ``(N,)``, ``NEVER`` = never."""

    def read_latest(self, numbers: Numbers) -> IntArray:
        """The latest steps of all ranks ``(N,)``, −1 = never."""

    def read_first(self, numbers: Numbers) -> IntArray:
        """The first steps of all ranks ``(N,)``, ``NEVER`` = never."""


class StepWords:
    """Steps as float64 words, whose *sum* over ranks tells the latest, or the first.

    Let ``b`` be the bits that the number of ranks ``R`` takes, so that ``R < 2**b``. A step that is ``o`` steps after a
    base known to all ranks travels as ``2**(b·o − 1022)``, and none at all as 0. Let ``w`` be the largest word that any
    rank gives. At least one gives it, at most all do, and nobody gives more: the sum is from ``w`` to ``R·w``, and that
    is less than ``2**b · w``. So its exponent tells ``w``, whatever others gave: ``o = (exponent + 1022) // b``.

    It holds in floating point, in any order of adding: a sum of ``k`` words is at most ``k·w``, which is a float64
    (``k`` is an integer below ``2**53`` and ``w`` a power of two), and rounding never takes a number past a float64;
    nor does adding what is not negative ever make a sum less than ``w``. First steps are counted backwards from the
    last that fits. There is room for ``2046 // b`` steps: 1023 for 2 or 3 ranks, 186 for 1,024, 102 for a million.

    Args:
        base: A step that none is before.
        ranks: ``R``, or more.

    >>> words = StepWords(base=100, ranks=3)
    >>> given = [words.latest(np.array([latest])) for latest in (107, -1, 105)]
    >>> words.read_latest(sum(given)).tolist()
    [107]
    """

    nothing = 0  # what a rank gives that knows of no step

    def __init__(self, base: int, ranks: int) -> None:
        self.base = base
        self._bits = ranks.bit_length()
        self.capacity = _POWERS // self._bits
        exponents = np.arange(self.capacity) * self._bits + _LOWEST
        self._words = np.append(np.ldexp(1.0, exponents), 0.0)

    def hold(self, first: int, last: int) -> bool:
        """Whether there is room for all steps from a first one to a last."""
        return self.base <= first and last < self.base + self.capacity

    def latest(self, steps: IntArray) -> FloatArray:
        """What a rank gives for its latest steps ``(N,)``, −1 = never."""
        return self._at(np.where(steps == -1, self.capacity, steps - self.base))

    def first(self, steps: IntArray) -> FloatArray:
        """What a rank gives for its first steps ``(N,)``, ``NEVER`` = never."""
        return self._at(np.where(steps == NEVER, self.capacity, self.base + self.capacity - 1 - steps))

    def _at(self, places: IntArray) -> FloatArray:
        if places.min(initial=0) < 0:  # numpy would count it from the end
            raise IndexError("a step that these words have no room for")
        return self._words[places]

    def read_latest(self, numbers: Numbers) -> IntArray:
        """The latest steps of all ranks ``(N,)``, −1 = never."""
        return np.where(numbers == 0, -1, self.base + self._places(numbers))

    def read_first(self, numbers: Numbers) -> IntArray:
        """The first steps of all ranks ``(N,)``, ``NEVER`` = never."""
        return np.where(numbers == 0, NEVER, self.base + self.capacity - 1 - self._places(numbers))

    def _places(self, numbers: Numbers) -> IntArray:
        _, exponents = np.frexp(numbers)  # of a fraction from 0.5 to 1: one more than the exponent of its first bit
        return (exponents.astype(np.int64) - 1 - _LOWEST) // self._bits


class PlainSteps:
    """Steps as they are, for a *maximum* over ranks: where :class:`StepWords` have no room for them."""

    nothing = -NEVER

    def latest(self, steps: IntArray) -> IntArray:
        """What a rank gives for its latest steps ``(N,)``, −1 = never."""
        return steps

    def first(self, steps: IntArray) -> IntArray:
        """What a rank gives for its first steps ``(N,)``, ``NEVER`` = never."""
        return -steps

    def read_latest(self, numbers: Numbers) -> IntArray:
        """The latest steps of all ranks ``(N,)``, −1 = never."""
        return np.maximum(numbers, -1).astype(np.int64)

    def read_first(self, numbers: Numbers) -> IntArray:
        """The first steps of all ranks ``(N,)``, ``NEVER`` = never."""
        return -numbers.astype(np.int64)


def saying(number: int) -> FloatArray:
    """A number of 64 bits as words ``(8,)``, whose sums tell whether all who gave them gave the same one.

    They are the number's four limbs ``h`` of 16 bits each, and their squares. Of ``n`` ranks that give ``h₁ … hₙ``,
    ``(Σh)² ≤ n·Σh²``, and both are equal only if all ``h`` are (Cauchy and Schwarz). The sums are of integers below
    ``2**53`` up to two million ranks, hence exact.
    """
    limbs = [number >> (_LIMB_BITS * place) & (2**_LIMB_BITS - 1) for place in range(_LIMBS)]
    return np.array([*limbs, *(limb**2 for limb in limbs)], dtype=np.float64)


def said_by_all(sums: FloatArray, ranks: int) -> int | None:
    """The number that so many ranks gave by :func:`saying`; ``None`` where not all gave the same.

    >>> said_by_all(saying(7) + saying(7), 2), said_by_all(saying(7) + saying(8), 2)
    (7, None)
    """
    numbers = [int(number) for number in sums]
    limbs, squares = numbers[:_LIMBS], numbers[_LIMBS:]
    if not ranks or any(limb**2 != ranks * square for limb, square in zip(limbs, squares, strict=True)):
        return None
    return sum(limb // ranks << (_LIMB_BITS * place) for place, limb in enumerate(limbs))
