"""Draws when neurons died, as the path of an SVG that needs no script."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.checkpoints.postmortem_report import PostmortemReport

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
        layers: The same for each layer with dated deaths, by its index in the report, each on its own scale.
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


def timeline(report: PostmortemReport) -> Timeline | None:
    """Return the timeline of a post-mortem; ``None`` if no death is dated."""
    dated = {
        index: steps
        for index, layer in enumerate(report.layers)
        if (steps := layer.since[layer.dead_mask & (layer.since >= 0)]).size
    }
    if not dated:
        return None
    last = max(report.global_step or 0, *(int(steps.max()) for steps in dated.values()))
    bins = min(BINS, last + 1)
    counts = {index: np.histogram(steps, bins=bins, range=(0, last + 1))[0] for index, steps in dated.items()}
    total = np.sum(list(counts.values()), axis=0)
    layers = {index: _bars(one) for index, one in counts.items()}
    return Timeline(_bars(total), layers, int(total.max()), bins, last, (last + 1) / bins)


def _bars(counts: npt.NDArray[np.int64]) -> str:
    """Return bars as one path; a bar that is not zero is always high enough to be seen."""
    heights = np.maximum(np.round(HEIGHT * counts / counts.max()), 4)
    return "".join(f"M{at} {HEIGHT:g}v-{heights[at]:g}h1v{heights[at]:g}z" for at in np.flatnonzero(counts).tolist())
