"""The comparison: what each activation function does to the same network, as one picture for a talk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.errors import UsageError
from neuronscope.writers.pictures.axis import StepAxis, percent, ticks
from neuronscope.writers.pictures.canvas import Canvas, draw_steps
from neuronscope.writers.pictures.colours import FRAME, INK, MUTED, SERIES, Colour, ink_on, mix, share_colours
from neuronscope.writers.pictures.panel import Line, Panel, Shade

__all__ = ["Curve", "Spike", "comparison"]

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]

_WIDTH, _HEIGHT, _MARGIN, _SCALE = 1920, 1080, 64, 2
_LEFT, _RIGHT = 132, 1290  # where the plots begin, and where the tables do
_PLOT, _LABELS = 850, 280  # width of a plot, and of the labels at its lines' ends


@dataclass(frozen=True)
class Curve:
    """What became of one network design over some seeds (``R`` seeds, ``S`` points in time, ``L`` layers).

    Attributes:
        label: What it is called: ``ReLU``.
        steps: Optimizer steps, rising, ``(S,)``.
        dead_percent: Dead neurons in percent, float64 ``(R, S)``; NaN = not measured.
        dormant_percent: Dormant neurons in percent, float64 ``(R, S)``; NaN = not measured.
        accuracy: Test accuracy at the end, in percent, float64 ``(R,)``.
        dead_by_layer: Dead neurons of each layer at the end, in percent, float64 ``(R, L)``; NaN = not measured.
        layers: The layers' names, ``L``.
    """

    label: str
    steps: npt.NDArray[np.int64]
    dead_percent: FloatArray
    dormant_percent: FloatArray
    accuracy: FloatArray
    dead_by_layer: FloatArray
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        seeds = len(self.accuracy)
        wanted = {
            "dead_percent": (seeds, len(self.steps)),
            "dormant_percent": (seeds, len(self.steps)),
            "dead_by_layer": (seeds, len(self.layers)),
        }
        for name, shape in wanted.items():
            if np.shape(getattr(self, name)) != shape:
                raise UsageError(
                    f"Expected argument `{name}` of curve {self.label!r} to have shape {shape}, "
                    f"but got {np.shape(getattr(self, name))}."
                )


@dataclass(frozen=True)
class Spike:
    """A stretch of steps to shade, in which something was done to the training.

    Attributes:
        first: First step of it.
        last: Last step of it.
        label: What was done: ``learning rate x 30``.
    """

    first: float
    last: float
    label: str


def comparison(curves: Sequence[Curve], *, title: str, subtitle: str = "", spike: Spike | None = None) -> ByteArray:
    """Draw dead and dormant shares over time, test accuracy, and dead share by layer, of several designs.

    Lines are means over seeds; bands and whiskers are one standard deviation each way.

    Args:
        curves: One to ten designs, in the order in which the tables list them.
        title: The finding, as one sentence.
        subtitle: How it was found: data, network, seeds.
        spike: A stretch of steps to shade.

    Returns:
        uint8 ``(1080, 1920, 3)``.

    Raises:
        UsageError: There is no curve, or more than there are colours.
    """
    if not 1 <= len(curves) <= len(SERIES):
        raise UsageError(f"Expected argument `curves` to hold 1 to {len(SERIES)} curves, but got {len(curves)}.")
    canvas = Canvas(_WIDTH, _HEIGHT, _SCALE)
    lines = canvas.wrap(title, 52, _WIDTH - 2 * _MARGIN, 2)
    for index, line in enumerate(lines):
        canvas.text((_MARGIN, 92 + 62 * index), line, 52, bold=True)
    y = 92 + 62 * (len(lines) - 1)
    canvas.text((_MARGIN, y + 48), canvas.fit(subtitle, 28, _WIDTH - 2 * _MARGIN), 28, MUTED)
    top = y + 126
    axis = StepAxis(
        min(float(c.steps[0]) for c in curves), max(float(c.steps[-1]) for c in curves), left=_LEFT, width=_PLOT
    )
    split = top + round((_HEIGHT - 110 - top) * 0.58)
    shade = Shade(spike.first, spike.last, spike.label) if spike else None
    for heading, name, low, high in (
        ("Dead neurons", "dead_percent", top, split - 50),
        ("Dormant neurons, not dead", "dormant_percent", split + 24, _HEIGHT - 110),
    ):
        panel = Panel(canvas, axis, float(low), float(high), labels=_LABELS, shade=shade)
        panel.draw(heading, [_line(c, getattr(c, name), i) for i, c in enumerate(curves)], name_shade=low == top)
    draw_steps(canvas, axis, _HEIGHT - 110, 24)
    canvas.text((_LEFT + _PLOT / 2, _HEIGHT - 42), "optimizer step", 24, MUTED, "ms")
    row = min(50, (_HEIGHT - 236 - top) // (2 * len(curves)))
    _accuracies(canvas, curves, top, row)
    _layers(canvas, curves, top + row * len(curves) + 100, row)
    seeds = {len(curve.accuracy) for curve in curves}
    note = f"mean ± standard deviation of {min(seeds)} seeds" if len(seeds) == 1 else "mean ± standard deviation"
    if seeds == {1}:
        note = "one seed: no deviation is known"
    canvas.text((_WIDTH - _MARGIN, _HEIGHT - 42), note, 24, MUTED, "rs")
    return canvas.array()


def _line(curve: Curve, values: FloatArray, index: int) -> Line:
    mean, deviation = _mean(values)
    return Line(curve.label, SERIES[index], curve.steps.astype(np.float64), mean, deviation)


def _mean(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation over seeds; NaN where a seed was not measured, no deviation for one seed."""
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(axis=0), deviation


def _accuracies(canvas: Canvas, curves: Sequence[Curve], top: float, row: int) -> None:
    canvas.text((_RIGHT, top - 24), "Test accuracy", 30, bold=True)
    means, deviations = (np.array(x) for x in zip(*[_mean(c.accuracy[:, None]) for c in curves], strict=True))
    means, deviations = means[:, 0], deviations[:, 0]
    known = np.isfinite(means)
    if not known.any():
        canvas.text((_RIGHT, top + 30), "not measured", 26, MUTED)
        return
    low, high = float((means - deviations)[known].min()), float((means + deviations)[known].max())
    pad = max(0.1 * (high - low), 0.05)
    low, high = low - pad, high + pad
    left, right = _RIGHT + 160, _WIDTH - _MARGIN - 170
    for tick in ticks(low, high, 4):
        x = left + (tick - low) / (high - low) * (right - left)
        canvas.line([(x, top), (x, top + row * len(curves))], FRAME)
        canvas.text((x, top + row * len(curves) + 26), f"{tick:g}%", 22, MUTED, "ms")
    for index, curve in enumerate(curves):
        y = top + (index + 0.5) * row
        colour = SERIES[index]
        canvas.text((_RIGHT, y + 9), canvas.fit(curve.label, 27, 150), 27, mix(colour, INK, 0.25))
        if not known[index]:
            canvas.text((_WIDTH - _MARGIN, y + 9), "n/a", 25, MUTED, "rs")
            continue
        x, half = (
            left + (means[index] - low) / (high - low) * (right - left),
            deviations[index] / (high - low) * (right - left),
        )
        canvas.line([(x - half, y), (x + half, y)], mix(colour, (255, 255, 255), 0.35), 5)
        canvas.dot((x, y), 8, colour)
        text = f"{means[index]:.1f}" + (f" ± {deviations[index]:.1f}" if len(curve.accuracy) > 1 else "") + "%"
        canvas.text((_WIDTH - _MARGIN, y + 9), text, 25, INK, "rs")


def _layers(canvas: Canvas, curves: Sequence[Curve], top: float, row: int) -> None:
    canvas.text((_RIGHT, top - 24), "Dead by layer at the end, %", 30, bold=True)
    left, right = _RIGHT + 160, _WIDTH - _MARGIN
    most = max(len(curve.layers) for curve in curves)
    written = (right - left) / max(most, 1) > canvas.text_width("<0.1", 22) + 6
    for index, curve in enumerate(curves):
        y = top + index * row
        canvas.text((_RIGHT, y + row / 2 + 9), canvas.fit(curve.label, 27, 150), 27, mix(SERIES[index], INK, 0.25))
        shares = curve.dead_by_layer.mean(axis=0) / 100
        width = (right - left) / max(len(shares), 1)
        for layer, share in enumerate(shares):
            box = (left + layer * width + 1, y + 2, left + (layer + 1) * width - 1, y + row - 2)
            if not np.isfinite(share):
                canvas.hatch(box)
                continue
            red, green, blue = (int(c) for c in share_colours(np.array([share]))[0])
            colour: Colour = (red, green, blue)
            canvas.box(box, colour)
            if written:
                text = percent(float(share)).rstrip("%")
                canvas.text((box[0] + width / 2 - 1, y + row / 2 + 8), text, 22, ink_on(colour), "ms")
    bottom = top + row * len(curves)
    layers = max((curve.layers for curve in curves), key=len)
    if not layers:
        return
    width = (right - left) / len(layers)
    if all(canvas.text_width(name, 22) < width - 4 for name in layers):
        for layer, name in enumerate(layers):
            canvas.text((left + (layer + 0.5) * width, bottom + 26), name, 22, MUTED, "ms")
    else:
        canvas.text((left, bottom + 26), canvas.fit(layers[0], 22, (right - left) / 2 - 10), 22, MUTED)
        canvas.text((right, bottom + 26), canvas.fit(layers[-1], 22, (right - left) / 2 - 10), 22, MUTED, "rs")
