"""One plot of lines over steps: means with their bands, each line named where it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.writers.pictures.axis import StepAxis, percent, spread, ticks
from neuronscope.writers.pictures.canvas import Canvas
from neuronscope.writers.pictures.colours import FRAME, INK, MUTED, Colour, mix

__all__ = ["Line", "Panel", "Shade"]

FloatArray = npt.NDArray[np.float64]

_SHADE: Colour = (190, 186, 172)


@dataclass(frozen=True)
class Line:
    """A mean and its deviation, in percent, over steps; NaN breaks the line. All ``(S,)``."""

    label: str
    colour: Colour
    steps: FloatArray
    mean: FloatArray
    deviation: FloatArray


@dataclass(frozen=True)
class Shade:
    """A stretch of steps to shade, and what to call it."""

    first: float
    last: float
    label: str


class Panel:
    """A plot on a canvas.

    Args:
        canvas: What to draw on.
        axis: The step axis, shared by panels that lie above each other.
        top: Pixel of the upper edge.
        bottom: Pixel of the lower edge, which is 0 %.
        labels: Width kept at the right for the lines' names.
        shade: A stretch of steps to shade.
    """

    def __init__(
        self, canvas: Canvas, axis: StepAxis, top: float, bottom: float, *, labels: int, shade: Shade | None
    ) -> None:
        self._canvas, self._axis, self._top, self._bottom = canvas, axis, top, bottom
        self._labels, self._shade = labels, shade
        self._most = 1.0

    def draw(self, heading: str, lines: Sequence[Line], *, name_shade: bool) -> None:
        """Draw everything.

        Args:
            heading: What the lines show.
            lines: The lines; a later one lies above an earlier one.
            name_shade: Whether to name the shaded stretch.
        """
        canvas, axis = self._canvas, self._axis
        highest = [float(np.nanmax(line.mean + line.deviation)) for line in lines if np.isfinite(line.mean).any()]
        self._most = min(max([1.0, *(value * 1.06 for value in highest)]), 100.0)
        right = axis.left + axis.width
        if self._shade:
            x, y = max(axis.x(self._shade.first), axis.left), min(axis.x(self._shade.last), right)
            canvas.area([(x, self._top), (y, self._top), (y, self._bottom), (x, self._bottom)], _SHADE, 0.45)
            if name_shade:
                after = axis.left - 68 + canvas.text_width(heading, 30) + 40
                start = max((x + y - canvas.text_width(self._shade.label, 24)) / 2, after)
                text = canvas.fit(self._shade.label, 24, right + self._labels - start)
                canvas.text((start, self._top - 14), text, 24, mix(_SHADE, INK, 0.65))
        canvas.text((axis.left - 68, self._top - 24), heading, 30, bold=True)
        for value in ticks(0.0, self._most, 6):
            canvas.line([(axis.left, self._y(value)), (right, self._y(value))], MUTED if value == 0 else FRAME)
            canvas.text((axis.left - 12, self._y(value) + 8), f"{value:g}%", 24, MUTED, "rs")
        for line in lines:
            self._band(line)
        for line in lines:
            for run in _runs(np.isfinite(line.mean)):
                points = [(axis.x(line.steps[i]), self._y(line.mean[i])) for i in run]
                canvas.line(points, line.colour, 4.5)
        self._names(lines)

    def _y(self, value: float) -> float:
        return self._bottom - value / self._most * (self._bottom - self._top)

    def _band(self, line: Line) -> None:
        low = np.clip(line.mean - line.deviation, 0.0, self._most)
        high = np.clip(line.mean + line.deviation, 0.0, self._most)
        for run in _runs(np.isfinite(line.mean)):
            upper = [(self._axis.x(line.steps[i]), self._y(high[i])) for i in run]
            lower = [(self._axis.x(line.steps[i]), self._y(low[i])) for i in reversed(run)]
            self._canvas.area(upper + lower, line.colour, 0.2)

    def _names(self, lines: Sequence[Line]) -> None:
        """Name each line at its end; where ends lie close, names move apart and thin lines lead to them."""
        ends: list[tuple[float, float, Line, float]] = []
        for line in lines:
            known = np.flatnonzero(np.isfinite(line.mean))
            if len(known):
                value = float(line.mean[known[-1]])
                ends.append((self._y(value), self._axis.x(line.steps[known[-1]]), line, value))
        ends.sort(key=lambda end: (end[0], end[2].label))
        apart = min(34.0, (self._bottom - self._top + 16) / max(len(ends), 1))
        size = max(14, math.floor(apart * 0.8))
        places = spread([end[0] for end in ends], apart, self._top + 4, self._bottom - 2)
        right = self._axis.left + self._axis.width
        for (y, x, line, value), place in zip(ends, places, strict=True):
            self._canvas.line([(x + 4, y), (right + 30, place)], mix(line.colour, (255, 255, 255), 0.35), 1.5)
            end = percent(value / 100)
            name = self._canvas.fit(line.label, size, self._labels - 46 - self._canvas.text_width(f" {end}", size))
            self._canvas.text((right + 36, place + size * 0.34), f"{name} {end}", size, mix(line.colour, INK, 0.15))


def _runs(known: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Stretches of neighbouring indices at which ``known`` is true."""
    indices = np.flatnonzero(known)
    return [run.tolist() for run in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if len(run)]
