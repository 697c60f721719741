"""Draw a post-mortem as a figure of matplotlib: deaths over the steps, and the labels of the worst layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.writers import postmortem_wording as wording
from neuronscope.writers.figure import Curve, LayerBar, Panels, draw_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(report: PostmortemReport, figure: Any = None) -> Figure:
    """Draw a post-mortem. The curve counts dead neurons whose step is known; dates by a clock are estimates.

    Args:
        report: The post-mortem.
        figure: A ``Figure`` or ``SubFigure`` of matplotlib to draw into; a new one by default.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    labels = ("dead", "not finite", "silent", "suspected", "unknown")
    bars = []
    for layer in report.layers:
        counts = {
            "dead": layer.dead,
            "suspected": layer.suspected,
            **{label: layer.count(label) for label in ("not finite", "silent", "unknown")},
        }
        bars.append(LayerBar(layer.name, layer.neurons, counts))
    bars.sort(key=lambda bar: [-bar.share(label) for label in labels])
    title, basis = wording.title(report), wording.based_on(report)
    return draw_panels(Panels(title, basis, bars, labels, _curve(report), stepped=True), figure)


def _curve(report: PostmortemReport) -> list[Curve]:
    """Return how many neurons had died by each step, of those that are dead now."""
    since = [layer.since[layer.dead_mask] for layer in report.headline_layers]
    dated = np.sort(np.concatenate(since)) if since else np.zeros(0)
    dated = np.maximum(dated[dated >= -1], 0)
    if not dated.size or not report.neurons:
        return []
    steps, counts = np.unique(dated, return_counts=True)
    percent = 100.0 * np.cumsum(counts) / report.neurons
    end = max(int(steps[-1]), report.global_step or 0)
    return [Curve("dead now, by step of death", [*steps.tolist(), end], [*percent.tolist(), percent[-1]])]
