"""Draw the overview: which layers are dying, and since when. Rows are layers, columns windows, colours dead shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from neuronscope.arrays import ByteArray, FloatArray, IntArray
from neuronscope.report.report import Report
from neuronscope.writers.formatting import count, plural, share
from neuronscope.writers.grouping import shared_prefix
from neuronscope.writers.pictures import colours
from neuronscope.writers.pictures.axis import StepAxis
from neuronscope.writers.pictures.canvas import Canvas, draw_steps, stripes
from neuronscope.writers.pictures.colours import Colour, mix, share_colours
from neuronscope.writers.pictures.site_rows import Row, rows_of
from neuronscope.writers.wording import anything_seen, excluded_words, provisional_note

__all__ = ["MOST_ROWS", "overview"]


#: Rows that fit on a picture that is shown small; more layers are grouped by their path.
MOST_ROWS = 24

# TensorBoard shows a picture at some 390 x 215 pixels, and leaves out pixels without smoothing: at twice that size,
# with strokes two pixels thick, one can still read it.
_WIDTH, _HEIGHT, _MARGIN = 784, 430, 16
_TOP, _BOTTOM = 116, 38  # above and below the grid
_NAMES, _NUMBERS, _SILENT = 220, 190, 90  # the columns beside the grid; the last one only if a neuron is silent
_TITLE, _TEXT = 36, 22


def overview(report: Report) -> ByteArray:
    """Draw a report as one picture of all its layers over all its windows, uint8 ``(H, 784, 3)``.

    It is 430 high for up to a dozen rows, and 30 more for each line below them: if the picture shows more than dead
    shares, if some layers are not in the totals, and if the window is too short for the policy.
    """
    rows = rows_of(report, MOST_ROWS)
    height = min(56, max(22, (_HEIGHT - _TOP - _BOTTOM) // max(len(rows), 1)))
    size = 22 if height >= 24 else 20
    bottom = _TOP + max(len(rows), 1) * height
    rare = _rare(rows)
    note = provisional_note(report, report.examples) if report.observed_neurons else ""
    marks = "   ".join(f"{mark} {words}" for mark, words in excluded_words(report))
    canvas = Canvas(_WIDTH, bottom + _BOTTOM + sum(30 for line in (rare, marks, note) if line))
    room, right = _WIDTH - 2 * _MARGIN, _WIDTH - _MARGIN
    canvas.text((_MARGIN, 42), canvas.fit(_headline(report), _TITLE, room), _TITLE, bold=True)
    canvas.text((_MARGIN, 72), canvas.fit(_subtitle(report, rows), _TEXT, room), _TEXT, colours.MUTED)
    prefix = shared_prefix([row.label for row in rows])
    names = [row.label[len(prefix) :] + (f" {row.mark}" if row.mark else "") for row in rows]
    widest = max((canvas.text_width(name, size) for name in [*names, prefix]), default=0)
    left = _MARGIN + round(min(max(widest, 60), _NAMES)) + 14
    columns = ("dead", "silent", "dormant") if report.silent else ("dead", "dormant")
    width = right - _NUMBERS - (_SILENT if report.silent else 0) - left
    axis = StepAxis.of_windows([row.steps for row in rows], left, width)
    canvas.text((_MARGIN, _TOP - 12), canvas.fit(prefix, _TEXT, left - _MARGIN - 20), _TEXT, colours.MUTED)
    _scale(canvas, left, _TOP - 12)
    last = 104 if report.silent else 96
    edges = dict(zip(columns, (right - last - _SILENT, right - last, right)[-len(columns) :], strict=True))
    for column, edge in edges.items():
        canvas.text((edge, _TOP - 12), column, _TEXT, colours.MUTED, "rs")
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        baseline = _TOP + (index + 0.5) * height + 8
        canvas.text((_MARGIN, baseline), canvas.fit(name, size, _NAMES), size)
        canvas.pixels((left, _TOP + index * height), _strip(row, axis, height))
        _numbers(canvas, row, edges, baseline, size)
    canvas.box((left - 1, _TOP - 1, left + width + 1, bottom + 1), outline=colours.FRAME)
    if not any(len(row.steps) for row in rows):
        missing = "no window is closed yet" if rows else "no layer was watched"
        canvas.notice((left + width / 2, (_TOP + bottom) / 2), missing, _TEXT)
    else:
        draw_steps(canvas, axis, bottom, _TEXT)
    x = float(_MARGIN)
    for text, colour in rare:
        x = _swatch(canvas, x, bottom + _BOTTOM + 10, text, colour)
    canvas.text((_MARGIN, canvas.height - (42 if note else 12)), canvas.fit(marks, 20, room), 20)
    canvas.text((_MARGIN, canvas.height - 12), canvas.fit(note, 20, room), 20)
    return canvas.array()


def _headline(report: Report) -> str:
    observed = report.observed_neurons
    broken = report.not_finite_neurons
    if not report.layers:
        return "Nothing was watched"
    if not observed:
        return "No neuron in the totals yet" if anything_seen(report) else "No neuron has been observed yet"
    if broken:
        return f"{share(broken, observed)} of neurons give NaN or infinity"
    found = [("dead", report.dead), ("silent", report.silent), ("dormant", report.dormant)]
    if not any(number for _, number in found):
        return "No neuron is dead or dormant"
    shown = [(label, number) for label, number in found if number or label != "silent"]
    return ", ".join(f"{share(number, observed)} {label}" for label, number in shown)


def _subtitle(report: Report, rows: list[Row]) -> str:
    parts = [report.model, report.phase, f"step {count(report.global_step)}", plural(report.neurons, "neuron")]
    if len(rows) < len(report.layers):
        parts.append(f"{count(len(report.layers))} layers in {plural(len(rows), 'group')}")
    return " · ".join(parts)


def _numbers(canvas: Canvas, row: Row, edges: Mapping[str, float], baseline: float, size: int) -> None:
    """Write a row's shares by label, each at the right edge of its column."""
    for label, edge in edges.items():
        number = getattr(row, label)
        text = share(number, row.observed) if not row.broken else ("NaN" if label == "dead" else "")
        canvas.text((edge, baseline), text, size, colours.INK if number or row.broken else colours.MUTED, "rs")


def _strip(row: Row, axis: StepAxis, height: int) -> ByteArray:
    """Draw a row of the grid, uint8 ``(height, width, 3)``: the worst window under each pixel column."""
    unseen = stripes(height, axis.width)
    if not len(row.steps):
        return unseen
    first, last = axis.windows_of_columns(row.steps)
    worst = _most(np.nan_to_num(row.share, nan=-1.0), first, last)
    strip = np.repeat(share_colours(np.maximum(worst, 0.0))[None], height, axis=0)
    strip[:, worst < 0.0] = unseen[:, worst < 0.0]
    strip[:, _most(row.not_finite.astype(np.float64), first, last) > 0.0] = colours.NOT_FINITE
    strip[-1:] = mix((255, 255, 255), colours.FRAME, 0.5)
    return strip


def _most(values: FloatArray, first: IntArray, last: IntArray) -> FloatArray:
    """Return the greatest value of each range of windows, float64 ``(R,)``; −1 for an empty range."""
    padded = np.append(values, -1.0)
    most = np.maximum.reduceat(
        padded, np.stack([first, np.maximum(last, first + 1)], axis=1).ravel().clip(0, len(values))
    )
    return np.where(last > first, most[::2], -1.0)


def _rare(rows: list[Row]) -> list[tuple[str, Colour | None]]:
    """Return what the picture shows besides dead shares: text and colour, ``None`` for stripes."""
    rare: list[tuple[str, Colour | None]] = []
    if any(np.isnan(row.share).any() for row in rows):
        rare.append(("not observed", None))
    if any(row.not_finite.any() for row in rows):
        rare.append(("NaN or infinity", colours.NOT_FINITE))
    return rare


def _scale(canvas: Canvas, x: float, baseline: float) -> None:
    """Draw the scale of dead shares: a colour for none, then from above none to all."""
    for text, shares in (("0 %", np.zeros(22)), (">0", np.linspace(1e-6, 1.0, 100))):
        canvas.text((x, baseline), text, _TEXT, colours.MUTED)
        x += canvas.text_width(text, _TEXT) + 6
        canvas.pixels((round(x), round(baseline - 15)), share_colours(shares[None].repeat(16, axis=0)))
        x += len(shares) + 10
    canvas.text((x - 4, baseline), "100 %", _TEXT, colours.MUTED)


def _swatch(canvas: Canvas, x: float, baseline: float, text: str, colour: Colour | None) -> float:
    box = (x, baseline - 16, x + 24, baseline)
    if colour is None:
        canvas.hatch(box)
    else:
        canvas.box(box, colour)
    canvas.text((x + 32, baseline), text, _TEXT, colours.MUTED)
    return x + 32 + canvas.text_width(text, _TEXT) + 30
