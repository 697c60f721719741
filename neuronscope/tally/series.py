"""Keep what a training logged (learning rate, loss, gradient norm) by optimizer step, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["SERIES", "Series"]

#: Names of the series. More of them would not fit on a page.
SERIES = ("learning_rate", "loss", "gradient_norm")
#: Maximum number of points of a series.
MOST_POINTS = 256

Point = tuple[int, float]


class Series:
    """Hold points ``(step, value)`` by name, at most one for each so many steps, evenly spread over the run.

    Of neighbours that share a place, the highest value is kept with its step: a spike of one step stays, however long
    the run is.

    >>> series = Series()
    >>> for step in range(10_000):
    ...     series.note(step, {"learning_rate": 0.06 if step == 305 else 0.001, "accuracy": 1.0})
    >>> points = series.points()
    >>> list(points), len(points["learning_rate"]), (305, 0.06) in points["learning_rate"]
    (['learning_rate'], 157, True)
    """

    def __init__(self) -> None:
        self._points: dict[str, list[Point]] = {}
        self._strides = dict.fromkeys(SERIES, 1)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Add values at a step.

        Args:
            step: The optimizer step. Points at later steps are forgotten: the run was taken up at an earlier one.
            values: Numbers by name. Those that are none of :data:`SERIES` are left out.
        """
        for name in SERIES:
            if name not in values:
                continue
            value = float(values[name])  # now: a tensor may be changed in place later, and keeps a graph alive
            points = self._points.setdefault(name, [])
            while points and points[-1][0] > step:
                points.pop()
            self._add(points, (step, value), self._strides[name])
            if len(points) > MOST_POINTS:
                self._strides[name] *= 2
                thinned = self._points[name] = []
                for point in points:
                    self._add(thinned, point, self._strides[name])

    @staticmethod
    def _add(points: list[Point], point: Point, stride: int) -> None:
        if points and points[-1][0] // stride == point[0] // stride:
            points[-1] = max(points[-1], point, key=_height)
        else:
            points.append(point)

    def points(self) -> dict[str, tuple[Point, ...]]:
        """Return the points by name, steps ascending."""
        return {name: tuple(points) for name, points in self._points.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the points as tensors, float64 ``(P, 2)`` by name."""
        return {name: torch.tensor(points, dtype=torch.float64) for name, points in self._points.items() if points}

    @classmethod
    def from_state(cls, state: Any) -> Series:
        """Return what :meth:`state_dict` saved. What is damaged is left out: no verdict depends on it."""
        series = cls()
        for name in SERIES:
            saved = state.get(name) if isinstance(state, Mapping) else None
            if isinstance(saved, torch.Tensor) and saved.dim() == 2 and saved.shape[1] == 2:
                for step, value in saved.to(torch.float64).tolist():
                    if math.isfinite(step) and step >= 0:
                        series.note(int(step), {name: value})
        return series


def _height(point: Point) -> float:
    return point[1] if math.isfinite(point[1]) else math.inf
