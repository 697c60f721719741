"""Draw the demo's picture with matplotlib: dead and dormant neurons over time, test accuracy, dead neurons by layer."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronscope.demo.conclusions import headline
from neuronscope.demo.results import Comparison, Moment
from neuronscope.errors import MissingExtraError
from neuronscope.writers.formatting import percent
from neuronscope.writers.pictures.axis import spread, ticks
from neuronscope.writers.pictures.colours import (
    FRAME,
    INK,
    MUTED,
    PAPER,
    SERIES,
    UNSEEN_STRIPE,
    Colour,
    ink_on,
    mix,
    share_colours,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison_png", "draw_comparison", "house_style", "import_matplotlib"]

#: The variants in the picture and their short names; more curves could not be told apart.
_SHOWN = {
    "ReLU": "ReLU",
    "LeakyReLU": "LeakyReLU",
    "GELU": "GELU",
    "SiLU": "SiLU",
    "Mish": "Mish",
    "Tanh": "Tanh",
    "ReLU-BatchNorm": "ReLU + BN",
    "ReLU-no-spike": "no spike",
}
#: Each variant has the same colour in every picture.
_COLOURS = dict(zip(_SHOWN, SERIES, strict=False))

_INCHES, _DPI = (12.8, 7.2), 150
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
    """Return the picture of a comparison as PNG, 1920 x 1080 pixels.

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
    figure.text(0.03, 0.937, headline(result), fontsize=18, fontweight="bold")
    figure.text(0.03, 0.894, _subtitle(result), fontsize=11, color=_hex(MUTED))
    names = [name for name in result.labels if name in _SHOWN]
    lines = figure.add_gridspec(2, 1, left=0.066, right=0.5, top=0.805, bottom=0.095, hspace=0.24, height_ratios=(4, 3))
    tables = figure.add_gridspec(2, 1, left=0.765, right=0.975, top=0.805, bottom=0.13, hspace=0.44)
    dead, dormant = figure.add_subplot(lines[0]), figure.add_subplot(lines[1])
    _draw_shares(dead, result, names, "Dead neurons", lambda moment: moment.dead)
    _draw_shares(dormant, result, names, "Dormant neurons, not dead", lambda moment: moment.dormant)
    dead.tick_params(labelbottom=False)
    dormant.set_xlabel("optimizer step")
    before, after = (result.runs[0].scans[place].step for place in result.around_spike)
    for panel in (dead, dormant):
        panel.axvspan(before, after, color=_hex(UNSEEN_STRIPE), alpha=0.4, linewidth=0, zorder=0.5)
    spike = f"learning rate × {result.recipe['spike_factor']:g}"
    dead.annotate(
        spike, (before, 1), (0, 5), xycoords=("data", "axes fraction"), textcoords="offset points", color=_hex(MUTED)
    )  # fmt: skip
    _draw_accuracy(figure.add_subplot(tables[0]), result, names)
    _draw_layers(figure.add_subplot(tables[1]), result, names)
    seeds = len(result.seeds)
    note = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed, so no deviation"
    figure.text(0.975, 0.028, note, ha="right", color=_hex(MUTED))
    return figure


def _subtitle(result: Comparison) -> str:
    recipe, seeds = result.recipe, len(result.seeds)
    return (
        f"MLP of {recipe['layers']} × {recipe['width']} neurons on {recipe['images']} handwritten digits, Adam; "
        f"{seeds} seed{'s' if seeds > 1 else ''}, the same initial weights and batches for all"
    ) + ("; no spike: ReLU without it" if "ReLU-no-spike" in result.labels else "")


def _draw_shares(
    panel: Axes, result: Comparison, names: list[str], title: str, counts: Callable[[Moment], tuple[int, ...]]
) -> None:
    """Draw one fraction of the neurons over the steps, and name each line at its end.

    Args:
        panel: The axes.
        result: The comparison.
        names: Names of the variants to draw.
        title: Title of the panel.
        counts: A function that returns the affected neurons in each layer at a moment.
    """
    panel.set_title(title, x=-0.083, pad=14)
    panel.grid(axis="x", visible=False)
    steps = [scan.step for scan in result.runs[0].scans]
    ends: list[tuple[float, str, str]] = []
    for name in names:
        shares = np.array([[100 * sum(counts(scan)) / result.neurons for scan in run.scans] for run in result.of(name)])
        mean, deviation = shares.mean(axis=0), shares.std(axis=0, ddof=1) if len(shares) > 1 else 0.0
        colour = _hex(_COLOURS[name])
        style = "--" if name == "ReLU-no-spike" else "-"
        panel.fill_between(steps, np.maximum(mean - deviation, 0), mean + deviation, color=colour, alpha=0.16, lw=0)
        panel.plot(steps, mean, style, color=colour, label=_SHOWN[name], clip_on=False)
        ends.append((float(mean[-1]), f"{_SHOWN[name]}  {percent(float(mean[-1]))}", _text_colour(name)))
    panel.set_xlim(steps[0], steps[-1])
    panel.set_ylim(0, min(100.0, max(1.0, panel.get_ylim()[1])))
    panel.yaxis.set_major_formatter("{x:g}%")
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


def _draw_accuracy(panel: Axes, result: Comparison, names: list[str]) -> None:
    """Draw the test accuracy of each variant as a dot with its deviation, and write the numbers next to it."""
    panel.set_title("Test accuracy, %", x=-0.36, pad=14)
    panel.grid(axis="y", visible=False)
    for index, name in enumerate(names):
        accuracy = result.spread(name, lambda run: 100 * run.accuracy)
        panel.errorbar(
            accuracy.mean, index, xerr=accuracy.deviation, fmt="o", color=_hex(_COLOURS[name]), markersize=7,
            elinewidth=2.6, ecolor=_hex(mix(_COLOURS[name], PAPER, 0.35)),
        )  # fmt: skip
        text = f"{accuracy.mean:.1f}" + ("" if accuracy.deviation is None else f" ± {accuracy.deviation:.1f}")
        panel.annotate(text, (1, index), xycoords=("axes fraction", "data"), ha="right", va="center_baseline")
    panel.margins(x=0.1)
    low, high = panel.get_xlim()
    panel.set_xlim(low, high + 0.6 * (high - low))  # room for the texts
    panel.set_xticks(ticks(low, high, 3))
    panel.xaxis.set_major_formatter("{x:g}")
    _name_rows(panel, names)


def _draw_layers(panel: Axes, result: Comparison, names: list[str]) -> None:
    """Draw a table of the percentage of dead neurons in each layer at the end, with cells coloured by value."""
    panel.set_title("Dead by layer at the end, %", x=-0.36, pad=10)
    panel.grid(visible=False)
    width = result.recipe["width"]
    shares = np.array([result.by_layer(name, lambda run: run.end.dead) for name in names]) / width
    colours = share_colours(shares)
    panel.imshow(colours, aspect="auto", interpolation="nearest")
    for row, layer in np.ndindex(shares.shape):
        red, green, blue = (int(channel) for channel in colours[row, layer])
        text = percent(100.0 * float(shares[row, layer])).rstrip(" %")
        panel.text(
            layer, row, text, ha="center", va="center_baseline", fontsize=10, color=_hex(ink_on((red, green, blue)))
        )
    for edge in np.arange(0.5, shares.shape[0] - 1):
        panel.axhline(edge, color=_hex(PAPER), linewidth=2)
    for edge in np.arange(0.5, shares.shape[1] - 1):
        panel.axvline(edge, color=_hex(PAPER), linewidth=2)
    panel.set_xticks(range(shares.shape[1]), [str(layer + 1) for layer in range(shares.shape[1])])
    panel.set_xlabel("layer")
    _name_rows(panel, names)


def _name_rows(panel: Axes, names: list[str]) -> None:
    """Label the rows in the colours of the lines, the first at the top."""
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_yticks(range(len(names)), [_SHOWN[name] for name in names])
    panel.tick_params(axis="y", pad=0)
    for name, label in zip(names, panel.get_yticklabels(), strict=True):
        label.set(color=_text_colour(name), ha="left", x=-0.36)


def _text_colour(name: str) -> str:
    return _hex(mix(_COLOURS[name], INK, 0.2))
