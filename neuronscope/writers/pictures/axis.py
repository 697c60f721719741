"""Place windows on an axis of optimizer steps, by their steps and not by their index."""

from __future__ import annotations

import math

import numpy as np

from neuronscope.arrays import FloatArray, IntArray

__all__ = ["StepAxis", "spread", "ticks"]


class StepAxis:
    """Maps optimizer steps to pixel columns.

    Args:
        first: Step at the left edge.
        last: Step at the right edge; replaced by ``first + 1`` if it is not above ``first``.
        left: Pixel of the left edge.
        width: Width in pixels.
    """

    def __init__(self, first: float, last: float, left: float, width: int) -> None:
        self.first, self.last = float(first), float(last if last > first else first + 1)
        self.left, self.width = left, width

    @classmethod
    def of_windows(cls, windows: list[IntArray], left: float, width: int) -> StepAxis:
        """Return the axis that holds all windows.

        Args:
            windows: Last steps of the windows of each layer, rising, int64 ``(W,)`` each.
            left: Pixel of the left edge.
            width: Width in pixels.
        """
        seen = [steps for steps in windows if len(steps)]
        if not seen:
            return cls(0, 1, left, width)
        return cls(min(float(window_edges(s)[0]) for s in seen), max(int(s[-1]) for s in seen), left, width)

    def x(self, step: float) -> float:
        """Return the pixel of a step."""
        return self.left + (step - self.first) / (self.last - self.first) * self.width

    def windows_of_columns(self, steps: IntArray) -> tuple[IntArray, IntArray]:
        """Return the first and last-plus-one window under each pixel column, int64 ``(width,)``; equal if none is.

        A window covers the steps since the one before, up to its last one in ``steps``, rising, int64 ``(W,)``. A
        column includes every window that it touches, so that a window narrower than a pixel still shows.
        """
        edges = window_edges(steps)
        bounds = self.first + (self.last - self.first) * np.arange(self.width + 1) / self.width
        low = np.searchsorted(edges, bounds[:-1], side="right") - 1
        high = np.searchsorted(edges, bounds[1:], side="left")
        outside = (bounds[1:] <= edges[0]) | (bounds[:-1] >= edges[-1])
        low, high = np.clip(low, 0, len(steps)), np.clip(high, 0, len(steps))
        return low.astype(np.int64), np.where(outside, low, np.maximum(high, low)).astype(np.int64)

    def ticks(self, most: int) -> list[int]:
        """Return at most ``most`` round steps within the axis."""
        return [int(step) for step in ticks(self.first, self.last, most) if float(step).is_integer()]


def window_edges(steps: IntArray) -> FloatArray:
    """Return the step where each window begins, by their last steps, and where the last ends, float64 ``(W + 1,)``.

    It is not known where the first window began: it is drawn as long as the second, or from step 0 if it is alone.
    """
    first = max(0, 2 * int(steps[0]) - int(steps[1])) if len(steps) > 1 else 0
    return np.concatenate(([min(float(first), float(steps[0]) - 0.5)], steps.astype(np.float64)))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) in ``[low, high]``.

    Args:
        low: Lower end.
        high: Upper end.
        most: Most numbers.

    >>> ticks(0, 1000, 6)
    [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]
    """
    span = high - low
    if span <= 0 or most < 1:
        return [low]
    power = 10.0 ** (math.floor(math.log10(span / most)) - 1)
    for _ in range(4):
        for factor in (1, 2, 5):
            apart = factor * power
            first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
            if last - first + 1 <= most:
                return [n * apart for n in range(first, last + 1)]
        power *= 10
    return [low]


def spread(wanted: list[float], apart: float, low: float, high: float) -> list[float]:
    """Return places for labels, rising, as near as possible to where they are wanted, so that they do not overlap.

    Args:
        wanted: Wanted places, rising.
        apart: Least distance between neighbours.
        low: Lowest place.
        high: Highest place; exceeded only if there is not enough room.

    >>> spread([10.0, 11.0, 50.0], 10.0, 0.0, 100.0)
    [5.5, 15.5, 50.0]
    """
    blocks: list[tuple[float, int]] = []  # (middle, labels) of runs that touch
    for place in wanted:
        middle, size = place, 1
        while True:
            middle = min(max(middle, low + apart * (size - 1) / 2), max(high - apart * (size - 1) / 2, low))
            if not blocks or middle - apart * size / 2 >= blocks[-1][0] + apart * blocks[-1][1] / 2:
                break
            before, labels = blocks.pop()
            middle = (before * labels + middle * size) / (labels + size)
            size += labels
        blocks.append((middle, size))
    return [middle + apart * (i - (size - 1) / 2) for middle, size in blocks for i in range(size)]
