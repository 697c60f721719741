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
from neuronscope.errors import requiring
from neuronscope.writers.formatting import percent
from neuronscope.writers.pictures import colours
from neuronscope.writers.pictures.axis import spread
from neuronscope.writers.pictures.colours import Colour, as_hex, mix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison_png", "draw_comparison", "house_style", "import_matplotlib"]

#: A picture for documents, on light paper.
PAPER, INK, MUTED, FRAME = (247, 246, 243), (33, 37, 43), (80, 86, 94), (205, 205, 200)

#: The variants that have lines, their short names and colours; more lines could not be told apart.
_LINES = {
    "ReLU": ("ReLU", colours.SERIES[0]),
    "GELU": ("GELU", colours.SERIES[2]),
    "SiLU": ("SiLU", colours.SERIES[3]),
    "ReLU-BatchNorm": ("with BN", colours.SERIES[6]),
    "ReLU-no-spike": ("no spike", colours.SERIES[7]),
}

#: As narrow as what is in it allows: on a phone, the picture is as wide as the screen and still can be read.
_WIDTH, _ROW, _DPI = 6.0, 0.212, 200  # a picture's width and a row's height in inches
_LEFT = 0.2 / _WIDTH  # where titles and the names of rows begin
_PANELS = ((0.58, 0.62, 1.22, 1.3), (3.44, 0.62, 1.22, 1.3))  # left, height over the rows, width and height in inches
_BARS = (2.05, 0.42, 1.3)  # left, bottom and width in inches
_HEAD = 3.3  # inches from the rows to the upper edge
_COLUMNS = (3.95, 4.78, 5.82)  # right edges in inches
_LABEL_POINTS = 13.5  # minimum distance between the labels at the ends of lines


_STYLE: dict[str, Any] = {
    "font.size": 11,
    "text.color": as_hex(INK),
    "figure.facecolor": as_hex(PAPER),
    "savefig.facecolor": as_hex(PAPER),
    "axes.facecolor": as_hex(PAPER),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": as_hex(MUTED),
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlecolor": as_hex(INK),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    "grid.color": as_hex(FRAME),
    "grid.linewidth": 0.8,
    **{f"{axis}tick.{what}": value for axis in "xy" for what, value in (("color", as_hex(MUTED)), ("major.size", 0))},
    "xtick.major.pad": 5,
    "lines.linewidth": 2.2,
    "lines.solid_joinstyle": "round",
}


def import_matplotlib() -> None:
    """Import matplotlib. The demo calls this first, so that it fails before training if matplotlib is missing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with requiring("matplotlib", "the demo's picture", "'neuronscope[demo]'"):
        importlib.import_module("matplotlib.figure")
        importlib.import_module("matplotlib.style")


@contextmanager
def house_style() -> Iterator[None]:
    """Use our matplotlib settings inside, and restore the user's on exit."""
    import_matplotlib()
    from matplotlib.style import context

    with context(["default", _STYLE]):
        yield


@house_style()
def comparison_png(result: Comparison) -> bytes:
    """Return the picture of a comparison as PNG, 1200 pixels wide; each variant adds a row to its height."""
    content = io.BytesIO()
    figure = draw_comparison(result)
    figure.savefig(content, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return content.getvalue()


@house_style()
def draw_comparison(result: Comparison) -> Figure:
    """Draw a comparison and return the figure. Lines are means over the seeds; bands and whiskers ± one deviation."""
    from matplotlib.figure import Figure

    left, bottom, width = _BARS
    rows = _ROW * len(result.networks)
    height = bottom + rows + _HEAD

    def axes(left: float, bottom: float, width: float, tall: float) -> Axes:
        return figure.add_axes((left / _WIDTH, bottom / height, width / _WIDTH, tall / height))

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    title, _, share = headline(result).partition(": ")
    figure.text(_LEFT, 1 - 0.45 / height, title, fontsize=21, fontweight="bold")
    figure.text(_LEFT, 1 - 0.745 / height, f"{share[:1].upper()}{share[1:]}", fontsize=12.5)
    names = [name for name in result.networks if name in _LINES]
    dead, dormant = (axes(x, bottom + rows + over, wide, tall) for x, over, wide, tall in _PANELS)
    _draw_shares(dead, result, names, "Dead neurons", "dead")
    _draw_shares(dormant, result, names, "Dormant, not dead", "dormant")
    before, after = (result.runs[0].scans[place].step for place in result.around_spike)
    for panel in (dead, dormant):
        panel.axvspan(before, after, color=as_hex(colours.UNSEEN_STRIPE), alpha=0.4, linewidth=0, zorder=0.5)
        panel.set_xlabel("optimizer step", fontsize=9.5, labelpad=2)
    spike = f"learning rate × {result.recipe['spike_factor']:g}"
    dead.annotate(
        spike, (before, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
        color=as_hex(MUTED), fontsize=9.5,
    )  # fmt: skip
    _draw_ends(axes(left, bottom, width, rows), result)
    figure.text(_LEFT, 0.152 / height, _subtitle(result), fontsize=9.5, color=as_hex(MUTED))
    return figure


def _subtitle(result: Comparison) -> str:
    recipe, seeds = result.recipe, len(result.seeds)
    return f"MLP of {recipe['layers']} hidden layers on {recipe['images']} digits, Adam; " + (
        f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed, so no deviation"
    )


def _draw_shares(panel: Axes, result: Comparison, names: list[str], title: str, label: str) -> None:
    """Draw one fraction of the neurons over the steps (a field of ``Moment``), and name each line at its end."""
    panel.set_title(title, x=-0.311, pad=17)
    panel.grid(axis="x", visible=False)
    steps = [scan.step for scan in result.runs[0].scans]
    ends: list[tuple[float, str, str]] = []
    for name in names:
        size = result.networks[name].neurons
        shares = np.array([[100 * sum(getattr(scan, label)) / size for scan in run.scans] for run in result.of(name)])
        mean, deviation = shares.mean(axis=0), shares.std(axis=0, ddof=1) if len(shares) > 1 else 0.0
        short, colour = _LINES[name][0], as_hex(_LINES[name][1])
        style = "--" if name == "ReLU-no-spike" else "-"
        panel.fill_between(steps, np.maximum(mean - deviation, 0), mean + deviation, color=colour, alpha=0.16, lw=0)
        panel.plot(steps, mean, style, color=colour, label=short, clip_on=False)
        ends.append((float(mean[-1]), f"{short}  {percent(float(mean[-1]))}", _text_colour(name)))
    panel.set_xlim(steps[0], steps[-1])
    panel.set_ylim(0, min(100.0, max(1.0, panel.get_ylim()[1])))
    panel.yaxis.set_major_formatter("{x:g} %")
    panel.locator_params(axis="y", nbins=5)
    panel.locator_params(axis="x", nbins=3)
    panel.tick_params(labelsize=9.5)
    _name_lines(panel, steps[-1], sorted(ends))


def _name_lines(panel: Axes, step: int, ends: list[tuple[float, str, str]]) -> None:
    """Write a label to the right of each line's end, with enough distance between labels to read them.

    ``ends`` has value, label and colour of each line, ascending by value.
    """
    height = panel.get_window_extent().height * 72 / _DPI
    most = panel.get_ylim()[1]
    places = spread([value / most * height for value, _, _ in ends], _LABEL_POINTS, 0.0, height)
    for place, (value, label, colour) in zip(places, ends, strict=True):
        panel.annotate(
            label, (step, value), (1.07, place / height), textcoords="axes fraction", va="center", color=colour,
            fontsize=10,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "lw": 0.9, "relpos": (0, 0.5), "shrinkB": 2},
        )  # fmt: skip


def _draw_ends(panel: Axes, result: Comparison) -> None:
    """Draw each variant at the end as a row: a bar of its dead and dormant neurons, and the numbers next to it."""
    panel.set_title("At the end, %", x=(_LEFT * _WIDTH - _BARS[0]) / _BARS[2], pad=4)
    panel.grid(visible=False)
    columns: list[tuple[str, Colour, Callable[[str], str]]] = [
        ("dead", colours.DEAD, lambda name: _percentage(result, name, "dead")),
        ("dormant", mix(colours.DORMANT, INK, 0.35), lambda name: _percentage(result, name, "dormant")),
        ("accuracy", INK, lambda name: _accuracy(result, name)),
    ]
    places = [edge / _WIDTH for edge in _COLUMNS]
    for row, (name, network) in enumerate(result.networks.items()):
        dead, dormant = result.share(name, "dead"), result.share(name, "dormant")
        parts = ((0, 1, colours.ALIVE_LOW), (0, dead, colours.DEAD), (dead, dormant, colours.DORMANT))
        for start, length, fill in parts:
            panel.barh(row, length, 0.66, start, color=as_hex(fill))
        colour, weight = (_text_colour(name), "bold") if name in _LINES else (as_hex(INK), "normal")
        panel.annotate(
            network.label, (_LEFT, row), xycoords=("figure fraction", "data"), va="center_baseline", color=colour,
            fontweight=weight,
        )  # fmt: skip
        for place, (_, _, cell) in zip(places, columns, strict=True):
            panel.annotate(
                cell(name), (place, row), xycoords=("figure fraction", "data"), ha="right", va="center_baseline"
            )  # fmt: skip
    for place, (heading, ink, _) in zip(places, columns, strict=True):
        panel.annotate(
            heading, (place, 1), (0, 4), xycoords=("figure fraction", "axes fraction"), textcoords="offset points",
            ha="right", color=as_hex(ink), fontsize=9.5, fontweight="bold",
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
    return as_hex(mix(_LINES[name][1], INK, 0.2))
