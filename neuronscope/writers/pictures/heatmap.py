"""Draw the heat map of a layer: each neuron over all windows, dead ones first, so that one sees which died when.

One pixel may stand for many neurons. It then shows the *share* of dead among them, and always at least a visible part,
so that averaging does not hide dead neurons.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neuronscope.arrays import ByteArray, FloatArray, IntArray
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_MAX,
    LEVEL_NOT_FINITE,
    LEVEL_SILENT,
    LEVEL_UNSEEN,
    SiteReport,
)
from neuronscope.writers.formatting import count, plural, share
from neuronscope.writers.pictures import colours
from neuronscope.writers.pictures.axis import StepAxis, spread
from neuronscope.writers.pictures.canvas import Canvas, draw_steps, stripes
from neuronscope.writers.pictures.colours import Colour, mix
from neuronscope.writers.wording import not_in_totals

__all__ = ["heatmap", "order"]


_WIDTH, _MARGIN, _TOP, _HEIGHT, _BOTTOM = 784, 16, 88, 304, 38  # twice the size of a card on TensorBoard
_LABELS = 190  # width of the column of labels
_TITLE, _TEXT = 36, 22
#: A cell in which one neuron of many is dead shows at least this much red.
_LEAST_RED = 0.35

#: Groups of neurons from top to bottom: labels of the verdict, what they are called, their colour.
_GROUPS: tuple[tuple[tuple[str, ...], str, Colour], ...] = (
    (("dead",), "dead", colours.DEAD),
    (("not finite",), "NaN or inf", colours.NOT_FINITE),
    (("silent",), "silent", colours.SILENT),
    (("cut off",), "cut off", colours.CUT_OFF),
    (("dormant",), "dormant", colours.DORMANT),
    (("linear", "alive"), "alive", colours.ALIVE_HIGH),
    (("unseen",), "not seen", colours.UNSEEN_STRIPE),
)

#: Verdicts in the order in which their colours are mixed into a cell of several neurons.
_VERDICTS = (
    (LEVEL_DORMANT, colours.DORMANT),
    (LEVEL_CUT_OFF, colours.CUT_OFF),
    (LEVEL_SILENT, colours.SILENT),
    (LEVEL_NOT_FINITE, colours.NOT_FINITE),
    (LEVEL_DEAD, colours.DEAD),
)


def order(site: SiteReport) -> IntArray:
    """Return the neurons from top to bottom of the heat map, int64 ``(N,)``.

    Dead ones come first (born dead, then by the step at which they died), then not finite, silent, cut off, dormant
    ones, then living ones (most often zero first), and unseen ones last.
    """
    group = _group_of(site)
    dead = group == 0
    born = site.last_active_step < 0
    died = np.where(dead, np.where(born, -1, site.history.died_step), 0)
    return np.lexsort((np.arange(site.neurons), -np.nan_to_num(site.zero_output_fraction), died, group))


def heatmap(site: SiteReport, phase: str = "train", note: str = "") -> ByteArray:
    """Draw every neuron of a layer over all its windows, uint8 ``(430, 784, 3)``; 30 higher with a note.

    Args:
        site: The layer.
        phase: The phase of the report, for the title.
        note: A line below the picture.
    """
    canvas = Canvas(_WIDTH, _TOP + _HEIGHT + _BOTTOM + (30 if note else 0))
    room = _WIDTH - 2 * _MARGIN
    finding = f": {_finding(site)}"
    name = canvas.fit(site.name, _TITLE, room - canvas.text_width(finding, _TITLE) - 6)
    canvas.text((_MARGIN, 42), name + finding, _TITLE, bold=True)
    canvas.text((_MARGIN, 72), canvas.fit(_subtitle(site, phase), _TEXT, room), _TEXT, colours.MUTED)
    width = room - _LABELS
    axis = StepAxis.of_windows([site.history.steps], _MARGIN, width)
    some = bool(len(site.history.steps) and site.neurons)
    picture = _cells(site, axis) if some else stripes(_HEIGHT, width)
    canvas.pixels((_MARGIN, _TOP), picture)
    bottom = _TOP + len(picture)
    canvas.box((_MARGIN - 1, _TOP - 1, _MARGIN + width + 1, bottom + 1), outline=colours.FRAME)
    if some:
        draw_steps(canvas, axis, bottom, _TEXT)
        _brackets(canvas, site, _MARGIN + width + 6)
        _scale(canvas, _WIDTH - _MARGIN, _TOP + _HEIGHT + 28)
    else:
        canvas.notice((_MARGIN + width / 2, _TOP + _HEIGHT / 2), "no window is closed yet", _TEXT)
    canvas.text((_MARGIN, canvas.height - 12), canvas.fit(note, 20, room), 20)
    return canvas.array()


def _finding(site: SiteReport) -> str:
    observed, broken = site.observed_neurons, site.not_finite_neurons
    if not observed:
        return "not seen"
    return f"{share(broken, observed)} NaN or inf" if broken else f"{share(site.dead, observed)} dead"


def _subtitle(site: SiteReport, phase: str) -> str:
    parts = [site.activation, phase, f"{plural(site.neurons, 'neuron')}, dead first"]
    if site.dead:
        parts.append(f"{count(site.born_dead)} never fired, {count(site.died)} died")
    if words := not_in_totals(site):
        parts.insert(0, words)
    return " · ".join(parts)


def _group_of(site: SiteReport) -> IntArray:
    lookup = np.array([next(i for i, group in enumerate(_GROUPS) if label in group[0]) for label in LABELS])
    groups: IntArray = lookup[site.judgement.labels()]
    return groups


def _layout(site: SiteReport) -> tuple[IntArray, IntArray, int]:
    """Distribute neurons, sorted by :func:`order`, over rows of cells.

    Return the first neuron of each row, int64 ``(R,)``; the row at which each of the groups begins, and the end, int64
    ``(G + 1,)``; pixels to a row. If there are more neurons than rows, every group that is not empty still gets three
    rows: two dead neurons of four thousand must not vanish in a line too thin to see.
    """
    group = _group_of(site)
    sizes = np.array([(group == index).sum() for index in range(len(_GROUPS))])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if site.neurons <= _HEIGHT:
        return np.arange(site.neurons), starts, min(_HEIGHT // max(site.neurons, 1), 48)
    rows = np.where(sizes > 0, np.maximum(3, sizes * _HEIGHT // site.neurons), 0)
    rows[np.argmax(rows)] += _HEIGHT - rows.sum()
    low = [starts[g] + np.arange(rows[g]) * sizes[g] // rows[g] for g in range(len(sizes)) if rows[g]]
    return np.concatenate(low), np.concatenate([[0], np.cumsum(rows)]), 1


def _cells(site: SiteReport, axis: StepAxis) -> ByteArray:
    """Return the pixels, uint8 ``(h, w, 3)``: one neuron has its own colour, several in one cell have a mixture."""
    levels = site.history.levels[:, order(site)]
    spans = np.stack(axis.windows_of_columns(site.history.steps))
    (first, last), inverse = np.unique(spans, axis=1, return_inverse=True)  # many columns show the same windows
    column = inverse.ravel()  # numpy 2.0 alone gives it two dimensions
    low, _, repeat = _layout(site)

    def total(values: npt.NDArray[np.generic]) -> FloatArray:
        """Sum ``values (W, N)`` over the windows and neurons of each cell, ``(rows, spans)``."""
        by_row = np.add.reduceat(values, low, axis=1, dtype=np.float64)
        sums = np.concatenate([np.zeros((1, len(low))), np.cumsum(by_row, axis=0)])
        cells: FloatArray = (sums[last] - sums[first]).T
        return cells

    seen = total(levels != LEVEL_UNSEEN)
    parts = {code: total(levels == code) for code, _ in _VERDICTS}
    living = levels < LEVEL_MAX
    alive = total(living)
    zeros = total(np.where(living, levels, 0)) / np.maximum(alive, 1) / LEVEL_MAX
    colour = _lerp(_planes(colours.ALIVE_LOW), _planes(colours.ALIVE_HIGH), zeros)
    so_far = alive
    for code, of in _VERDICTS:
        if not parts[code].any():
            continue
        so_far = so_far + parts[code]
        part = parts[code] / np.maximum(so_far, 1)
        if code in (LEVEL_NOT_FINITE, LEVEL_DEAD):
            part = np.where(part > 0, _LEAST_RED + (1 - _LEAST_RED) * part, 0.0)
        colour = _lerp(colour, _planes(of), part)
    picture = _pixels(colour)[:, column].repeat(repeat, axis=0)
    unseen = (seen == 0)[:, column].repeat(repeat, axis=0)
    if unseen.any():
        picture[unseen] = stripes(*picture.shape[:2])[unseen]
    return picture


def _planes(colour: Colour) -> FloatArray:
    """Return a colour as planes of red, green and blue, ``(3, 1, 1)``."""
    return np.array(colour, float)[:, None, None]


def _lerp(low: FloatArray, high: FloatArray, share: FloatArray) -> FloatArray:
    """Mix planes ``(3, h, w)``; ``share (h, w)`` is the share of ``high``."""
    mixed: FloatArray = low + (high - low) * share
    return mixed


def _pixels(planes: FloatArray) -> ByteArray:
    """Return planes ``(3, h, w)`` as pixels, uint8 ``(h, w, 3)``."""
    return np.moveaxis(np.rint(planes).astype(np.uint8), 0, -1)


def _brackets(canvas: Canvas, site: SiteReport, x: float) -> None:
    """Write beside the picture which neurons lie where, and how many there are."""
    group = _group_of(site)
    sizes = [int((group == index).sum()) for index in range(len(_GROUPS))]
    _, rows, repeat = _layout(site)
    ends = _TOP + rows * repeat
    shown = [index for index, size in enumerate(sizes) if size]
    centres = [float(ends[i] + ends[i + 1]) / 2 for i in shown]
    for index, centre, y in zip(shown, centres, spread(centres, 28, _TOP + 10, _TOP + _HEIGHT - 10), strict=True):
        _, name, colour = _GROUPS[index]
        canvas.box((x, ends[index], x + 6, ends[index + 1]), colour)
        canvas.line([(x + 8, centre), (x + 16, y)], mix(colour, colours.INK, 0.2), 2)
        text = canvas.fit(f"{name} {count(sizes[index])}", _TEXT, _LABELS - 28)
        canvas.text((x + 21, y + 8), text, _TEXT, mix(colour, colours.INK, 0.45))


def _scale(canvas: Canvas, right: float, baseline: float) -> None:
    """Draw the scale of living neurons: how often their output is zero."""
    canvas.text((right, baseline), "zeros", _TEXT, colours.MUTED, "rs")
    right -= canvas.text_width("zeros", _TEXT) + 6
    ramp = _pixels(
        _lerp(_planes(colours.ALIVE_LOW), _planes(colours.ALIVE_HIGH), np.linspace(0, 1, 48)[None].repeat(16, 0))
    )
    canvas.text((right, baseline), "all", _TEXT, colours.MUTED, "rs")
    right -= canvas.text_width("all", _TEXT) + 6 + ramp.shape[1]
    canvas.pixels((round(right), round(baseline - 15)), ramp)
    canvas.text((right - 6, baseline), "no", _TEXT, colours.MUTED, "rs")
