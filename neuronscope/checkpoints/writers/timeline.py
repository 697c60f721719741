"""Draws when neurons died, as the path of an SVG that needs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport

__all__ = ["HEIGHT", "Timeline", "timeline"]

#: Height of the drawing and of the highest bar.
HEIGHT = 100.0
#: Most bins that the run is divided into.
BINS = 120


@dataclass(frozen=True)
class Timeline:
    """Deaths in a network over the steps of its run.

    Attributes:
        path: An SVG path over ``0 0 BINS HEIGHT``: a bar for each bin in which neurons died.
        layers: The same for each shown layer with dated deaths, by its index among them, each on its own scale.
        most: Deaths in the highest bar.
        bins: Width of the drawing.
        steps: Steps of the run.
        width: Steps of one bin.
    """

    path: str
    layers: dict[int, str]
    most: int
    bins: int
    steps: int
    width: float


def timeline(report: PostmortemReport, shown: Sequence[LayerReport]) -> Timeline | None:
    """Return the timeline of a post-mortem; ``None`` if no death is dated.

    Args:
        report: The post-mortem.
        shown: The layers that get a timeline of their own.
    """
    steps = np.concatenate([np.zeros(0, dtype=np.int64), *map(_dated, report.layers)])
    if not steps.size:
        return None
    last = max(report.global_step or 0, int(steps.max()))
    bins = min(BINS, last + 1)

    def deaths(of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.histogram(of, bins=bins, range=(0, last + 1))[0]

    total = deaths(steps)
    layers = {index: _bars(deaths(found)) for index, layer in enumerate(shown) if (found := _dated(layer)).size}
    return Timeline(_bars(total), layers, int(total.max()), bins, last, (last + 1) / bins)


def _dated(layer: LayerReport) -> npt.NDArray[np.int64]:
    """Return the known steps at which neurons of a layer died, int64 ``(K,)``."""
    return layer.since[layer.dead_mask & (layer.since >= 0)]


def _bars(counts: npt.NDArray[np.int64]) -> str:
    """Return bars as one path; a bar that is not zero is always high enough to be seen."""
    heights = np.maximum(np.round(HEIGHT * counts / counts.max()), 4)
    return "".join(f"M{at} {HEIGHT:g}v-{heights[at]:g}h1v{heights[at]:g}z" for at in np.flatnonzero(counts).tolist())
