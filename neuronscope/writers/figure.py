"""Draw a report as a figure of matplotlib: dead neurons over the steps, and the labels of the worst layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronscope.arrays import ByteArray
from neuronscope.errors import requiring
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import Report
from neuronscope.writers import wording
from neuronscope.writers.formatting import plural, visible
from neuronscope.writers.pictures import colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "LayerBar", "Panels", "draw", "draw_panels"]

#: Most layers that have a bar, and most of them that have a curve.
BARS, CURVES = 20, 5
#: Most characters of a layer's name.
_LONGEST = 40
#: Most lookups of a layer's labels for the curve of the whole network; of more windows, some are left out.
_LOOKUPS = 100_000

_COLOURS = {
    "dead": colours.DEAD,
    "not finite": colours.NOT_FINITE,
    "silent": colours.SILENT,
    "cut off": colours.CUT_OFF,
    "dormant": colours.DORMANT,
    "suspected": colours.ALIVE_HIGH,
    "unseen": colours.UNSEEN_STRIPE,
    "unknown": colours.UNSEEN_STRIPE,
}


@dataclass(frozen=True)
class Curve:
    """The share of dead neurons over optimizer steps."""

    name: str  # whose share it is
    steps: Sequence[float]  # the steps, ascending
    percent: Sequence[float]  # the share at each step; NaN where nothing was measured


@dataclass(frozen=True)
class LayerBar:
    """A layer's bar."""

    name: str
    neurons: int  # its number of neurons
    counts: Mapping[str, int]  # how many of them bear each label

    def share(self, label: str) -> float:
        """Return the neurons with a label in percent of the layer's."""
        return 100.0 * self.counts.get(label, 0) / self.neurons if self.neurons else 0.0


@dataclass(frozen=True)
class Panels:
    """What a figure shows."""

    title: str  # the first line
    basis: str  # the second line: what the verdicts are based on
    layers: Sequence[LayerBar]  # the layers, worst first
    labels: Sequence[str]  # the labels that bars show, from left to right
    curves: Sequence[Curve] = ()  # the curves, that of the whole network first; without any there is one panel only
    stepped: bool = False  # whether a curve keeps its height until its next step


def draw(report: Report, figure: Any = None) -> Figure:
    """Draw a report.

    Args:
        report: The report.
        figure: A ``Figure`` or ``SubFigure`` of matplotlib to draw into; a new one by default.
    """
    labels = ("dead", "not finite", "silent", "cut off", "dormant", "unseen")
    bars = []
    for site in wording.worst_first(report.layers):
        codes = np.bincount(site.judgement.labels(), minlength=len(LABELS))
        counts = {label: int(codes[LABELS.index(label)]) for label in labels}
        bars.append(LayerBar(f"{site.name} {wording.mark(site)}".rstrip(), site.neurons, counts))
    return draw_panels(Panels(wording.title(report), wording.based_on(report), bars, labels, _curves(report)), figure)


def _curves(report: Report) -> list[Curve]:
    steps = report.totals.steps()
    steps = steps[:: -(-len(steps) * len(report.layers) // _LOOKUPS) or 1] if len(steps) else steps
    last = report.totals.steps()[-1:]
    steps = np.union1d(steps, last)
    if not steps.size:
        return []
    shares = [_dead_percent(report.totals.labels_at(int(step))) for step in steps]
    curves = [Curve("all layers", steps.tolist(), shares)]
    ill = [site for site in report.headline_layers if site.dead and site.history.steps.size]
    for site in sorted(ill, key=wording.severity, reverse=True)[:CURVES]:
        percents = [_dead_percent(site.history.labels(window)) for window in range(len(site.history.steps))]
        curves.append(Curve(site.name, site.history.steps.tolist(), percents))
    return curves if len(report.headline_layers) > 1 else curves[:1]


def _dead_percent(labels: ByteArray) -> float:
    """Return the dead neurons in percent of those that were observed and gave finite outputs."""
    counts = np.bincount(labels, minlength=len(LABELS))
    judged = int(counts.sum() - counts[LABELS.index("unseen")] - counts[LABELS.index("not finite")])
    return 100.0 * int(counts[LABELS.index("dead")]) / judged if judged else float("nan")


def draw_panels(panels: Panels, figure: Any = None) -> Figure:
    """Draw panels; fonts, sizes, backgrounds and grids are those of matplotlib's current style.

    Args:
        panels: What is drawn.
        figure: See :func:`draw`.
    """
    with requiring("matplotlib", "`plot()`", "matplotlib"):
        from matplotlib.figure import Figure
    ill = [bar for bar in panels.layers if any(map(bar.share, panels.labels))]
    bars = (ill if ill and len(panels.layers) > BARS else panels.layers)[:BARS]
    height = 1.2 + 0.26 * max(len(bars), 3)
    if figure is None:
        size = (10.0, height + (3.2 if panels.curves else 0.8))
        figure = Figure(figsize=size, layout="constrained")
    heights = [3.0, height] if panels.curves else [1.0]
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    figure.suptitle(f"{panels.title}\n{panels.basis}", fontsize="medium", parse_math=False, wrap=True)
    if panels.curves:
        _draw_curves(axes[0], panels)
    if bars:
        _draw_bars(axes[-1], bars, panels)
    else:
        axes[-1].text(0.5, 0.5, "No layer was seen, so there is nothing to draw.", ha="center", va="center")
        axes[-1].set(xticks=[], yticks=[])
        axes[-1].set_axis_off()
    drawn: Figure = figure
    return drawn


def _draw_curves(axes: Axes, panels: Panels) -> None:
    for place, curve in enumerate(panels.curves):
        axes.plot(
            curve.steps,
            curve.percent,
            label=f" {name}" if (name := _short(curve.name)).startswith("_") else name,  # matplotlib leaves out "_…"
            color=colours.as_hex(colours.SERIES[place]),
            drawstyle="steps-post" if panels.stepped else "default",
            linewidth=2.5 if place == 0 else 1.3,
            marker="o" if len(curve.steps) < 10 else None,
            markersize=4,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("dead neurons (%)")
    axes.set_ylim(0, max(1.0, 1.05 * axes.get_ylim()[1]))
    _legend(axes)


def _draw_bars(axes: Axes, bars: Sequence[LayerBar], panels: Panels) -> None:
    places = np.arange(len(bars))
    left = np.zeros(len(bars))
    for label in panels.labels:
        shares = np.array([bar.share(label) for bar in bars])
        if shares.any():
            axes.barh(places, shares, left=left, label=label, color=colours.as_hex(_COLOURS[label]))
        left += shares
    axes.set_yticks(places, [_short(bar.name) for bar in bars], parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    more = len(panels.layers) - len(bars)
    left_out = f"; {plural(more, 'more layer')} not shown" if more else ""
    axes.set_xlabel(f"neurons (%){left_out}")
    if left.any():
        _legend(axes)


def _legend(axes: Axes) -> None:
    """Put a legend beside the axes."""
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(name: str) -> str:
    """Return a layer's name, without its beginning if it is long: the end tells layers apart."""
    name = visible(name)
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
