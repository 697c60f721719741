"""Draw the demo's picture with matplotlib: dead and dormant neurons over time, and all variants at the end."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronscope.demo.conclusions import headline
from neuronscope.demo.results import Comparison
from neuronscope.errors import MissingExtraError
from neuronscope.writers.formatting import percent
from neuronscope.writers.pictures.axis import spread
from neuronscope.writers.pictures.colours import (
    ALIVE_LOW,
    DEAD,
    DORMANT,
    SERIES,
    UNSEEN_STRIPE,
    Colour,
    mix,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison_png", "draw_comparison", "house_style", "import_matplotlib"]

#: A picture for documents, on light paper.
PAPER, INK, MUTED, FRAME = (247, 246, 243), (33, 37, 43), (80, 86, 94), (205, 205, 200)

#: The variants that have lines, their short names and colours; more lines could not be told apart.
_LINES = {
    "ReLU": ("ReLU", SERIES[0]),
    "GELU": ("GELU", SERIES[2]),
    "SiLU": ("SiLU", SERIES[3]),
    "ReLU-BatchNorm": ("ReLU + BN", SERIES[6]),
    "ReLU-no-spike": ("no spike", SERIES[7]),
}

_INCHES, _DPI = (9.6, 6.4), 200
_BARS = (0.665, 0.085, 0.09, 0.68)  # left, bottom, width and height, as fractions of the picture
_ROWS_FROM = 0.48  # where the names left of the bars begin
_LABEL_POINTS = 14.5  # minimum distance between the labels at the ends of lines


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


_STYLE: dict[str, Any] = {
    "font.size": 11,
    "text.color": _hex(INK),
    "figure.facecolor": _hex(PAPER),
    "savefig.facecolor": _hex(PAPER),
    "axes.facecolor": _hex(PAPER),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": _hex(MUTED),
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlecolor": _hex(INK),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    "grid.color": _hex(FRAME),
    "grid.linewidth": 0.8,
    **{f"{axis}tick.{what}": value for axis in "xy" for what, value in (("color", _hex(MUTED)), ("major.size", 0))},
    "xtick.major.pad": 5,
    "lines.linewidth": 2.2,
    "lines.solid_joinstyle": "round",
}


def import_matplotlib() -> None:
    """Import matplotlib. The demo calls this first, so that it fails before training if matplotlib is missing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
        importlib.import_module("matplotlib.style")
    except ImportError as error:
        raise MissingExtraError(
            "Expected matplotlib for the demo's picture, but it is not installed: pip install 'neuronscope[demo]'"
        ) from error


@contextmanager
def house_style() -> Iterator[None]:
    """Use our matplotlib settings inside, and restore the user's on exit."""
    import_matplotlib()
    from matplotlib.style import context

    with context(["default", _STYLE]):
        yield


@house_style()
def comparison_png(result: Comparison) -> bytes:
    """Return the picture of a comparison as PNG, 1920 x 1280 pixels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    content = io.BytesIO()
    figure = draw_comparison(result)
    figure.savefig(content, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return content.getvalue()


@house_style()
def draw_comparison(result: Comparison) -> Figure:
    """Draw a comparison and return the figure. Lines are means over the seeds; bands and whiskers ± one deviation.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI)
    title, _, share = headline(result).partition(": ")
    figure.text(0.03, 0.925, title, fontsize=21, fontweight="bold")
    figure.text(0.03, 0.873, f"{share[:1].upper()}{share[1:]}", fontsize=12.5)
    lines = figure.add_gridspec(2, 1, left=0.07, right=0.315, top=0.765, bottom=0.155, hspace=0.36)
    names = [name for name in result.networks if name in _LINES]
    dead, dormant = figure.add_subplot(lines[0]), figure.add_subplot(lines[1])
    _draw_shares(dead, result, names, "Dead neurons", "dead")
    _draw_shares(dormant, result, names, "Dormant neurons, not dead", "dormant")
    dead.tick_params(labelbottom=False)
    dormant.set_xlabel("optimizer step")
    before, after = (result.runs[0].scans[place].step for place in result.around_spike)
    for panel in (dead, dormant):
        panel.axvspan(before, after, color=_hex(UNSEEN_STRIPE), alpha=0.4, linewidth=0, zorder=0.5)
    spike = f"learning rate × {result.recipe['spike_factor']:g}"
    dead.annotate(
        spike, (before, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
        color=_hex(MUTED), fontsize=9.5,
    )  # fmt: skip
    _draw_ends(figure.add_axes(_BARS), result)
    figure.text(0.03, 0.03, _subtitle(result), fontsize=9.5, color=_hex(MUTED))
    return figure


def _subtitle(result: Comparison) -> str:
    recipe, seeds = result.recipe, len(result.seeds)
    return f"MLP of {recipe['layers']} hidden layers on {recipe['images']} handwritten digits, Adam; " + (
        f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed, so no deviation"
    )


def _draw_shares(panel: Axes, result: Comparison, names: list[str], title: str, label: str) -> None:
    """Draw one fraction of the neurons over the steps, and name each line at its end.

    Args:
        panel: The axes.
        result: The comparison.
        names: Names of the variants to draw.
        title: Title of the panel.
        label: A field of :class:`~neuronscope.demo.results.Moment` that has a number for each layer.
    """
    panel.set_title(title, x=-0.163, pad=18)
    panel.grid(axis="x", visible=False)
    steps = [scan.step for scan in result.runs[0].scans]
    ends: list[tuple[float, str, str]] = []
    for name in names:
        size = result.networks[name].neurons
        shares = np.array([[100 * sum(getattr(scan, label)) / size for scan in run.scans] for run in result.of(name)])
        mean, deviation = shares.mean(axis=0), shares.std(axis=0, ddof=1) if len(shares) > 1 else 0.0
        label, colour = _LINES[name][0], _hex(_LINES[name][1])
        style = "--" if name == "ReLU-no-spike" else "-"
        panel.fill_between(steps, np.maximum(mean - deviation, 0), mean + deviation, color=colour, alpha=0.16, lw=0)
        panel.plot(steps, mean, style, color=colour, label=label, clip_on=False)
        ends.append((float(mean[-1]), f"{label}  {percent(float(mean[-1]))}", _text_colour(name)))
    panel.set_xlim(steps[0], steps[-1])
    panel.set_ylim(0, min(100.0, max(1.0, panel.get_ylim()[1])))
    panel.yaxis.set_major_formatter("{x:g} %")
    panel.locator_params(axis="y", nbins=5)
    _name_lines(panel, steps[-1], sorted(ends))


def _name_lines(panel: Axes, step: int, ends: list[tuple[float, str, str]]) -> None:
    """Write a label to the right of each line's end, with enough distance between labels to read them.

    Args:
        panel: The axes.
        step: The last step.
        ends: Value, label and colour of each line, ascending by value.
    """
    height = panel.get_position().height * _INCHES[1] * 72
    most = panel.get_ylim()[1]
    places = spread([value / most * height for value, _, _ in ends], _LABEL_POINTS, 0.0, height)
    for place, (value, label, colour) in zip(places, ends, strict=True):
        panel.annotate(
            label, (step, value), (1.065, place / height), textcoords="axes fraction", va="center", color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "lw": 0.9, "relpos": (0, 0.5), "shrinkB": 2},
        )  # fmt: skip


def _draw_ends(panel: Axes, result: Comparison) -> None:
    """Draw each variant at the end as a row: a bar of its dead and dormant neurons, and the numbers next to it."""
    panel.set_title("At the end, %", x=(_ROWS_FROM - _BARS[0]) / _BARS[2], pad=18)
    panel.grid(visible=False)
    columns: list[tuple[float, str, Colour, Callable[[str], str]]] = [
        (0.797, "dead", DEAD, lambda name: _percentage(result, name, "dead")),
        (0.872, "dormant", mix(DORMANT, INK, 0.35), lambda name: _percentage(result, name, "dormant")),
        (0.98, "accuracy", INK, lambda name: _accuracy(result, name)),
    ]
    for row, (name, network) in enumerate(result.networks.items()):
        dead, dormant = result.share(name, "dead"), result.share(name, "dormant")
        for start, length, fill in ((0, 1, ALIVE_LOW), (0, dead, DEAD), (dead, dormant, DORMANT)):
            panel.barh(row, length, 0.66, start, color=_hex(fill))
        colour, weight = (_text_colour(name), "bold") if name in _LINES else (_hex(INK), "normal")
        panel.annotate(
            network.label, (_ROWS_FROM, row), xycoords=("figure fraction", "data"), va="center_baseline", color=colour,
            fontweight=weight,
        )  # fmt: skip
        for place, _, _, cell in columns:
            panel.annotate(
                cell(name), (place, row), xycoords=("figure fraction", "data"), ha="right", va="center_baseline"
            )  # fmt: skip
    for place, heading, ink, _ in columns:
        panel.annotate(
            heading, (place, 1), (0, 4), xycoords=("figure fraction", "axes fraction"), textcoords="offset points",
            ha="right", color=_hex(ink), fontsize=9.5, fontweight="bold",
        )  # fmt: skip
    panel.set_xlim(0, 1)
    panel.set_ylim(len(result.networks) - 0.5, -0.5)
    panel.set_xticks([])
    panel.set_yticks([])


def _percentage(result: Comparison, name: str, label: str) -> str:
    return percent(100.0 * result.share(name, label)).rstrip(" %")


def _accuracy(result: Comparison, name: str) -> str:
    accuracy = result.accuracy(name)
    return f"{accuracy.mean:.1f}" + ("" if accuracy.deviation is None else f" ± {accuracy.deviation:.1f}")


def _text_colour(name: str) -> str:
    return _hex(mix(_LINES[name][1], INK, 0.2))
