"""Say and draw which neurons died and revived between several checkpoints, for every writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import BoolArray, IntArray
from neuronscope.checkpoints.verdict.checkpoint_timeline import DIED, REVIVED, CheckpointTimeline, LayerTimeline
from neuronscope.checkpoints.verdict.evidence import BASES
from neuronscope.writers.console import Column
from neuronscope.writers.formatting import NONE, UNKNOWN, count, is_are, plural, visible

__all__ = [
    "CHECKPOINT_COLUMNS",
    "EXPLANATION",
    "TIMELINE_COLUMNS",
    "Chart",
    "CheckpointRow",
    "TimelineRow",
    "chart",
    "checkpoint_rows",
    "findings",
    "layer_rows",
]

#: What the numbers of the tables mean.
EXPLANATION = (
    "died: dead here and not at the checkpoint before; the last gradient came between the steps that are given. What a "
    "later checkpoint shows counts too. unknown: not known, or only suspected."
)
#: The columns of a checkpoint's row after the name, fields of :class:`CheckpointRow`.
CHECKPOINT_COLUMNS = (
    Column("dead", "dead"),
    Column("died", "died"),
    Column("revived", "revived", optional=True),
    Column("unknown", "unknown", narrowest=70, optional=True),
    Column("died in", "where", right=False, narrowest=60, wraps=True),
    Column("file", "file", right=False, narrowest=100, wraps=True),
)
#: Those of a layer over several checkpoints, fields of :class:`TimelineRow`.
TIMELINE_COLUMNS = (
    Column("neurons", "neurons", narrowest=100),
    Column("dead at\nfirst", "first"),
    Column("died", "died"),
    Column("revived", "revived", optional=True),
    Column("dead at\nlast", "last"),
    Column("died when", "when", right=False, wraps=True),
    Column("revived when", "back", right=False, narrowest=80, wraps=True, optional=True),
    Column("how sure", "basis", right=False, narrowest=110, wraps=True),
)
#: Width and height of a drawing.
WIDTH, HEIGHT = 1000, 100
#: Most rows of checkpoints.
MOST_CHECKPOINTS = 40
#: Most gaps between checkpoints that the cell of a layer names.
MOST_GAPS = 4


@dataclass(frozen=True)
class CheckpointRow:
    """The table cells of one checkpoint."""

    name: str  # its step
    tone: str  # ``alarm`` (not finite), ``bad`` (neurons died), ``warn`` (neurons revived) or ``calm``
    dead: str
    died: str
    revived: str
    unknown: str
    where: str  # in which layers neurons died
    file: str  # name of the file or folder


@dataclass(frozen=True)
class TimelineRow:
    """The table cells of one layer."""

    name: str
    tone: str
    neurons: str
    first: str  # dead neurons at the first checkpoint
    died: str
    revived: str
    last: str  # dead neurons at the last one
    when: str  # between which steps neurons died
    back: str  # between which steps neurons revived
    basis: str  # bases of the deaths
    drawing: str  # SVG path of the number of dead neurons over the steps


@dataclass(frozen=True)
class Chart:
    """The drawing of a timeline: SVG paths over ``0 0 WIDTH HEIGHT``."""

    dead: str  # an area: the number of dead neurons, from each checkpoint to the next
    died: str  # a bar over the steps before each checkpoint: the neurons that died, upwards from the middle
    revived: str  # the same downwards: those that revived
    most_dead: int  # the largest number of dead neurons
    most_events: int  # the largest number of deaths or revivals before one checkpoint
    marks: list[float]  # the place of each checkpoint, from 0 to ``WIDTH``
    steps: int  # step of the last checkpoint


def findings(timeline: CheckpointTimeline) -> list[str]:
    """Return what happened between the checkpoints as plain sentences."""
    first, last = timeline.checkpoints[0], timeline.checkpoints[-1]
    if len(timeline.checkpoints) == 1:
        sentences = [f"Only the checkpoint of step {count(first.step)} could be examined, so there is no timeline."]
    else:
        died, revived = timeline.count(DIED), timeline.count(REVIVED)
        at_first, later, back, at_last = int(died[0]), int(died[1:].sum()), int(revived.sum()), int(timeline.dead[-1])
        whole = (
            f"Over {count(len(timeline.checkpoints))} checkpoints, steps {count(first.step)} to {count(last.step)}: "
            f"{plural(at_first, 'neuron')} {is_are(at_first)} dead at the first, {count(later)} died later and "
            f"{count(back)} revived; {count(at_last)} {is_are(at_last)} dead at the last."
        )
        sentences = [whole]
        if (unconfirmed := at_first + later - back - at_last) > 0:
            were = "was" if unconfirmed == 1 else "were"
            sentences.append(
                f"{plural(unconfirmed, 'neuron')} {were} dead at a checkpoint, and a later one leaves it open."
            )
        if later:
            worst = int(died[1:].argmax()) + 1
            since, until = timeline.checkpoints[worst - 1].step, timeline.checkpoints[worst].step
            sentences.append(
                f"Most deaths were seen between steps {count(since)} and {count(until)}: {count(int(died[worst]))}."
            )
    if left_out := len(timeline.left_out):
        unreadable = sum(one.unreadable for one in timeline.left_out)
        they = "it" if unreadable == 1 else "they"
        why = f", {count(unreadable)} of them because {they} could not be read" if unreadable else ""
        sentences.append(f"{plural(left_out, 'checkpoint')} {is_are(left_out)} left out{why}: see the notes.")
    return sentences


def checkpoint_rows(timeline: CheckpointTimeline) -> tuple[list[CheckpointRow], str]:
    """Return the table cells of the checkpoints, and a sentence about those that were left out (or ``""``).

    Of many checkpoints, the first, the last and those with the most deaths and revivals are shown.
    """
    dead, unknown = timeline.dead, timeline.unknown
    died, revived = timeline.count(DIED), timeline.count(REVIVED)
    places = np.arange(len(timeline.checkpoints))
    if places.size > MOST_CHECKPOINTS:
        weight = (died + revived).astype(np.float64)
        weight[[0, -1]] = np.inf
        places = np.sort(np.argsort(-weight, kind="stable")[:MOST_CHECKPOINTS])
    rows = []
    for at in places.tolist():
        point = timeline.checkpoints[at]
        tone = "alarm" if point.not_finite else "bad" if died[at] else "warn" if revived[at] else "calm"
        rows.append(
            CheckpointRow(
                name=f"step {count(point.step)}",
                tone=tone,
                dead=_number(dead[at]),
                died=_number(died[at]),
                revived=_number(revived[at]),
                unknown=_number(unknown[at]),
                where=_where(timeline, at) + (f"; {count(point.not_finite)} not finite" if point.not_finite else ""),
                file=visible(point.path.replace("\\", "/").rstrip("/").rpartition("/")[2]),
            )
        )
    left_out = len(timeline.checkpoints) - len(rows)
    return rows, f"… {plural(left_out, 'more checkpoint')} with no more deaths and revivals" if left_out else ""


def layer_rows(timeline: CheckpointTimeline, most: int = 40) -> tuple[list[TimelineRow], str]:
    """Return the table cells of the layers in which a neuron died or revived, and a sentence about the others.

    Args:
        timeline: The timeline.
        most: Most rows. Of more layers, those with the most deaths and revivals are shown.
    """
    eventful = [layer for layer in timeline.headline_layers if layer.neuron.size]
    shown = {id(layer) for layer in sorted(eventful, key=lambda layer: -layer.neuron.size)[:most]}
    steps = [point.step for point in timeline.checkpoints]
    rows = [_layer_row(layer, steps) for layer in eventful if id(layer) in shown]
    fewer, none = len(eventful) - len(rows), len(timeline.headline_layers) - len(eventful)
    parts = [f"{plural(fewer, 'more layer')} with no more deaths and revivals"] if fewer else []
    parts += [f"{plural(none, 'layer')} in which none died or revived"] if none else []
    return rows, f"… {' and '.join(parts)}" if parts else ""


def chart(timeline: CheckpointTimeline) -> Chart | None:
    """Return the drawing of a timeline; ``None`` if there are fewer than two checkpoints."""
    steps = [point.step for point in timeline.checkpoints]
    if len(steps) < 2:
        return None
    died, revived = timeline.count(DIED), timeline.count(REVIVED)
    most = max(int(died.max()), int(revived.max()), 1)
    bars: tuple[list[str], list[str]] = ([], [])
    for at, end in enumerate(steps):
        start = steps[at - 1] if at else 0
        left, width = _place(start, steps), _place(end, steps) - _place(start, steps)
        for parts, number, sign in ((bars[0], died[at], -1), (bars[1], revived[at], 1)):
            if number:
                height = sign * max(HEIGHT / 2 * int(number) / most, 3)
                parts.append(f"M{left:.1f} {HEIGHT / 2:g}v{height:.1f}h{max(width - 1, 1):.1f}v{-height:.1f}z")
    return Chart(
        dead=_area(timeline.dead, steps, int(timeline.dead.max())),
        died="".join(bars[0]),
        revived="".join(bars[1]),
        most_dead=int(timeline.dead.max()),
        most_events=most,
        marks=[round(_place(step, steps), 1) for step in steps],
        steps=steps[-1],
    )


def _place(step: int, steps: Sequence[int]) -> float:
    return WIDTH * step / max(steps[-1], 1)


def _area(dead: IntArray, steps: Sequence[int], most: int) -> str:
    """Return an area of the height of ``dead``: from each checkpoint to the next, as from its step on."""
    if most <= 0:
        return ""
    path = f"M{_place(steps[0], steps):.1f} {HEIGHT}"
    for at, number in enumerate(dead.tolist()):
        end = _place(steps[min(at + 1, len(steps) - 1)], steps)
        path += f"V{HEIGHT - HEIGHT * max(number, 0) / most:.1f}H{end:.1f}"
    return f"{path}V{HEIGHT}z"


def _layer_row(layer: LayerTimeline, steps: Sequence[int]) -> TimelineRow:
    died, revived = layer.events(DIED), layer.events(REVIVED)
    by_basis = [(basis, int((layer.basis[died] == code).sum())) for code, basis in enumerate(BASES)]
    return TimelineRow(
        name=visible(layer.name),
        tone="bad" if layer.dead[-1] > 0 else "warn",
        neurons=count(layer.neurons),
        first=_number(layer.dead[0]),
        died=_number(int((died & (layer.checkpoint > 0)).sum())),
        revived=_number(int(revived.sum())),
        last=_number(layer.dead[-1]),
        when=_when(layer, died),
        back=_when(layer, revived),
        basis=", ".join(f"{count(number)} {basis}" for basis, number in by_basis if number) or NONE,
        drawing=_area(layer.dead, steps, int(layer.dead.max())),
    )


def _when(layer: LayerTimeline, events: BoolArray) -> str:
    """Say between which steps events happened, by the checkpoint that shows them first."""
    places = np.unique(layer.checkpoint[events])
    parts = []
    for at in places[:MOST_GAPS]:
        here = events & (layer.checkpoint == at)
        early, late = int(layer.earliest[here].min()), int(layer.latest[here].max())
        if late < 0:
            steps = "since the beginning"
        elif early < 0:
            steps = f"by step {count(late)}"
        else:
            steps = f"at step {count(late)}" if early == late else f"at steps {count(early)}–{count(late)}"
        parts.append(f"{count(int(here.sum()))} {steps}")
    rest = events & np.isin(layer.checkpoint, places[MOST_GAPS:])
    return "; ".join([*parts, f"{count(int(rest.sum()))} later"] if rest.any() else parts) or NONE


def _where(timeline: CheckpointTimeline, at: int) -> str:
    """Name the three layers in which the most neurons died before a checkpoint, the most first."""
    numbers = [
        (int((layer.events(DIED) & (layer.checkpoint == at)).sum()), layer.name) for layer in timeline.headline_layers
    ]
    found = sorted((one for one in numbers if one[0]), key=lambda one: -one[0])
    named = [f"{visible(name)} ({count(number)})" for number, name in found[:3]]
    return ", ".join([*named, f"{count(len(found) - 3)} more"] if len(found) > 3 else named) or NONE


def _number(value: int) -> str:
    return UNKNOWN if value < 0 else count(int(value)) if value else NONE
