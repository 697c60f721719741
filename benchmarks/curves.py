"""Curves: one picture of what watching costs against each of the things it may grow with, drawn by matplotlib.

Sizes and times have logarithmic axes, so that what is linear runs along a straight line of slope 1, drawn thin beside
it. Steps have plain ones, from 0: what is constant is level. The paper is the one of Neuronscope's own pictures, which
is no page's white or black and can be read on both.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuronscope.errors import MissingExtraError
from neuronscope.writers.pictures.colours import FRAME, INK, MUTED, PAPER, SERIES, Colour

__all__ = ["Curve", "draw", "draw_panel", "load_figure"]

_FEW = 5  # sizes that have a tick each on a plain axis
_WIDTH, _HEIGHT, _DPI = 11.0, 3.8, 110  # the width of a picture and the height of a row, in inches


@dataclass(frozen=True)
class Curve:
    """What an observed step costs against one thing.

    Attributes:
        title: What is varied, and beside what.
        unit: What ``sizes`` are numbers of.
        sizes: Rising, ``S`` of them.
        lines: Seconds, ``S`` of them, by what they are called.
        grows: Whether linear growth is what is expected; otherwise none is.
        what: What costs.
    """

    title: str
    unit: str
    sizes: Sequence[int]
    lines: Mapping[str, Sequence[float]]
    grows: bool
    what: str = "an observed step"


def load_figure() -> Any:
    """Matplotlib's ``Figure``.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise MissingExtraError(
            "Expected matplotlib for drawing curves, but it is not installed: pip install matplotlib"
        ) from error


def draw(curves: Sequence[Curve]) -> bytes:
    """A picture with a panel a curve, two in a row, as PNG."""
    rows = -(-len(curves) // 2)
    figure = load_figure()(figsize=(_WIDTH, _HEIGHT * rows), dpi=_DPI, facecolor=_hex(PAPER), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    for panel, curve in zip(panels, curves, strict=False):
        draw_panel(panel, curve)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return content.getvalue()


def draw_panel(panel: Any, curve: Curve) -> None:
    """One curve, with its guide, on one of matplotlib's ``Axes``."""
    panel.set_facecolor(_hex(PAPER))
    panel.set_title(curve.title, loc="left", color=_hex(INK), fontsize=11)
    panel.set_xlabel(curve.unit, color=_hex(INK))
    panel.set_ylabel(f"{curve.what} costs, µs", color=_hex(INK))
    panel.tick_params(which="both", colors=_hex(MUTED))
    panel.grid(color=_hex(FRAME), linewidth=0.6)
    for edge in panel.spines.values():
        edge.set_color(_hex(FRAME))
    panel.plot(*_guide(curve), "--", color=_hex(MUTED), linewidth=1, label="linear" if curve.grows else "constant")
    for colour, (name, seconds) in zip(SERIES, curve.lines.items(), strict=False):
        times = [1e6 * each for each in seconds]
        panel.plot(curve.sizes, times, "o-", color=_hex(colour), linewidth=1.8, markersize=4.5, label=name)
    if curve.grows:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(curve.sizes, [f"{size:,}" for size in curve.sizes])
        panel.minorticks_off()
    else:
        panel.set_xlim(0, None)
        panel.set_ylim(0, 1.5e6 * max(max(seconds) for seconds in curve.lines.values()))
        if len(curve.sizes) > _FEW:
            panel.xaxis.set_major_formatter("{x:,.0f}")
        else:
            panel.set_xticks(curve.sizes, [f"{size:,}" for size in curve.sizes])
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.legend(frameon=False, labelcolor=_hex(INK), loc="upper left", fontsize=9)


def _guide(curve: Curve) -> tuple[list[float], list[float]]:
    """A line of slope 1 that ends where the first of the lines does; or a level one that begins where it does."""
    first = next(iter(curve.lines.values()))
    ends = [float(curve.sizes[0]), float(curve.sizes[-1])]
    if not curve.grows:
        return ends, [1e6 * first[0]] * 2
    return ends, [1e6 * first[-1] * end / ends[1] for end in ends]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
