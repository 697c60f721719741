"""Derive from the verdicts on several checkpoints of one run which neurons died and revived between them.

At each checkpoint a neuron is *dead* (on a firm basis), *alive* or *unknown*. What a later checkpoint shows counts too:
a neuron that is dead at a checkpoint and got no gradient since an earlier one was dead there already.

A **death** is the first of consecutive checkpoints at which a neuron is dead. Its step, that of the last gradient, lies

- at the latest at that checkpoint;
- at the earliest at the latest of: the earliest step by the optimizer's bound, at any checkpoint of this death; the
  first step after the last checkpoint that shows a gradient after it; and the first step after the last checkpoint at
  which the neuron fired on the data.

A monitor's record has the exact step. A **revival** is the first checkpoint at which a neuron is alive again. Its step
lies after the last checkpoint at which it was dead. If a dead neuron got a gradient between two checkpoints and is dead
at the second, it revived and died again in between. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, IntArray
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS
from neuronscope.checkpoints.verdict.layer_verdicts import NO_BASIS, LayerReport
from neuronscope.judge.symptoms import UNDATED

__all__ = [
    "ALIVE",
    "DEAD",
    "UNKNOWN",
    "CheckpointTimeline",
    "GradientMasks",
    "LayerTimeline",
    "LeftOut",
    "TimelineBuilder",
    "TimelinePoint",
]


#: States of a neuron at a checkpoint.
UNKNOWN, ALIVE, DEAD = 0, 1, 2
#: Kinds of events.
DIED, REVIVED = 0, 1

_ALIVE_CLAIMS = [CLAIMS.index(claim) for claim in ("silent", "quiet", "alive")]
_MEASURED, _INFERRED = BASES.index("measured"), BASES.index("inferred")


@dataclass(frozen=True)
class LeftOut:
    """A checkpoint that the timeline does not include."""

    path: str  # the file or folder
    reason: str  # why it is left out
    unreadable: bool  # whether it could not be read or examined


@dataclass(frozen=True)
class TimelinePoint:
    """One checkpoint of the timeline."""

    path: str  # the file or folder
    step: int  # number of optimizer steps taken
    not_finite: int  # number of neurons that are NaN or infinite in it


@dataclass(frozen=True, eq=False)
class GradientMasks:
    """Which of ``N`` neurons got a gradient between a checkpoint and the one before it; those in neither: not known."""

    none: BoolArray  # those that got none, bool ``(N,)``
    some: BoolArray  # those that certainly got one, bool ``(N,)``


@dataclass(frozen=True, eq=False)
class LayerTimeline:
    """The deaths and revivals in a layer of ``N`` neurons over ``C`` checkpoints."""

    name: str  # the layer's name
    neurons: int  # ``N``
    in_headlines: bool  # whether totals include the layer
    dead: IntArray  # number of neurons that are dead at each checkpoint, int64 ``(C,)``; −1 = the layer is not in it
    unknown: IntArray  # number of neurons of which nothing is known at each checkpoint, int64 ``(C,)``
    neuron: IntArray  # the neuron of each of ``E`` events, int64 ``(E,)``; events are in the order of checkpoints
    kind: ByteArray  # whether it died (0) or revived (1), uint8 ``(E,)``
    #: Index of the first checkpoint that shows the event, int64 ``(E,)``. A death at index 0 came before the first
    #: checkpoint.
    checkpoint: IntArray
    earliest: IntArray  # the earliest step at which it happened, int64 ``(E,)``; −1 = since the beginning
    latest: IntArray  # the latest step, int64 ``(E,)``
    basis: ByteArray  # basis of the verdict at that checkpoint, an index into ``BASES``, uint8 ``(E,)``

    def events(self, kind: int) -> BoolArray:
        """Return which events are deaths (:data:`DIED`) or revivals (:data:`REVIVED`), bool ``(E,)``."""
        mask: BoolArray = self.kind == kind
        return mask

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as plain data."""
        return {
            "name": self.name,
            "neurons": self.neurons,
            "in_headlines": self.in_headlines,
            "dead": [None if number < 0 else number for number in self.dead.tolist()],
            "unknown": self.unknown.tolist(),
            "events": {
                "neuron": self.neuron.tolist(),
                "event": [("died", "revived")[kind] for kind in self.kind],
                "checkpoint": self.checkpoint.tolist(),
                "earliest": self.earliest.tolist(),
                "latest": self.latest.tolist(),
                "basis": [BASES[code] for code in self.basis],
            },
        }


@dataclass(frozen=True)
class CheckpointTimeline:
    """Deaths and revivals between the checkpoints of one run."""

    #: The ``C`` checkpoints in the order of their steps. The report is on the last one.
    checkpoints: tuple[TimelinePoint, ...]
    #: The layers of the last checkpoint that are in the totals, and those that are not, in order.
    layers: tuple[LayerTimeline, ...]
    left_out: tuple[LeftOut, ...] = ()  # checkpoints that are not included, and why

    @property
    def headline_layers(self) -> tuple[LayerTimeline, ...]:
        """The layers that totals include."""
        return tuple(layer for layer in self.layers if layer.in_headlines)

    @property
    def dead(self) -> IntArray:
        """Number of dead neurons at each checkpoint, int64 ``(C,)``; a layer that is not in a checkpoint adds none."""
        return self._sum(np.maximum(layer.dead, 0) for layer in self.headline_layers)

    @property
    def unknown(self) -> IntArray:
        """Number of neurons of which nothing is known at each checkpoint, int64 ``(C,)``."""
        return self._sum(layer.unknown for layer in self.headline_layers)

    def count(self, kind: int) -> IntArray:
        """Return how many deaths or revivals each checkpoint is the first to show, int64 ``(C,)``."""
        size = len(self.checkpoints)
        return self._sum(
            np.bincount(layer.checkpoint[layer.events(kind)], minlength=size) for layer in self.headline_layers
        )

    def _sum(self, parts: Any) -> IntArray:
        total: IntArray = np.sum([np.zeros(len(self.checkpoints), dtype=np.int64), *parts], axis=0)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the timeline as plain data."""
        died, revived = self.count(DIED), self.count(REVIVED)
        return {
            "checkpoints": [
                {
                    "path": point.path,
                    "step": point.step,
                    "dead": int(self.dead[at]),
                    "unknown": int(self.unknown[at]),
                    "died": int(died[at]),
                    "revived": int(revived[at]),
                    "not_finite": point.not_finite,
                }
                for at, point in enumerate(self.checkpoints)
            ],
            "layers": [layer.to_dict() for layer in self.layers],
            "left_out": [asdict(one) for one in self.left_out],
        }


@dataclass(frozen=True, eq=False)
class _State:
    """What one checkpoint shows of the ``N`` neurons of a layer."""

    state: ByteArray  # ``UNKNOWN``, ``ALIVE`` or ``DEAD``, uint8 ``(N,)``
    basis: ByteArray  # basis of that, uint8 ``(N,)``
    bound: IntArray  # the earliest step of the last gradient of dead neurons, int64 ``(N,)``; ``UNDATED`` = not known
    #: The exact step at which dead neurons died and others revived, int64 ``(N,)``; −1 = dead since the beginning,
    #: ``UNDATED`` = not known.
    exact: IntArray
    fires: BoolArray  # neurons that fire on the data, bool ``(N,)``
    gradients: GradientMasks | None  # which neurons got a gradient since the checkpoint before; ``None`` = not known

    @classmethod
    def of(cls, layer: LayerReport, gradients: GradientMasks | None) -> _State:
        alive = np.isin(layer.labels, _ALIVE_CLAIMS) & (layer.basis <= _INFERRED)
        state = np.where(layer.dead_mask, DEAD, np.where(alive, ALIVE, UNKNOWN)).astype(np.uint8)
        bound, exact = (np.full(layer.neurons, UNDATED, dtype=np.int64) for _ in range(2))
        fires = np.zeros(layer.neurons, dtype=np.bool_)
        for one in layer.evidence:
            at = one.neurons
            if one.source == "scan" and one.claim in ("alive", "silent"):
                fires[at] = True
            if one.since is None:
                continue
            if one.claim == "never trained" or (one.claim == "dead" and one.basis == "measured"):
                exact[at] = np.where(layer.dead_mask[at], np.maximum(exact[at], one.since), exact[at])
            elif one.claim == "alive" and one.basis == "measured":
                exact[at] = np.where(alive[at] & (one.since >= 0), np.maximum(exact[at], one.since), exact[at])
            elif one.claim == "no gradient" and one.source == "adam state" and one.measure.endswith("at most"):
                bound[at] = np.where(layer.dead_mask[at], np.maximum(bound[at], one.since), bound[at])
        if gradients is not None and gradients.none.shape != state.shape:
            gradients = None
        return cls(state, layer.basis, bound, exact, fires & alive, gradients)


@dataclass
class TimelineBuilder:
    """Collects the verdicts on one checkpoint after another, in the order of their steps.

    Of each neuron some bytes are kept, and nothing else of the reports but the last one's layers.
    """

    points: list[TimelinePoint] = field(default_factory=list)
    _states: list[dict[str, _State]] = field(default_factory=list)
    _layers: tuple[LayerReport, ...] = ()

    def add(
        self,
        path: str,
        step: int,
        layers: tuple[LayerReport, ...],
        gradients: Mapping[str, GradientMasks],
        renamed: Mapping[str, str],
    ) -> None:
        """Add a checkpoint.

        Args:
            path: The file or folder.
            step: Its step, larger than that of the one before.
            layers: The verdicts on it.
            gradients: Which neurons got a gradient since the checkpoint before, by the layer's name.
            renamed: The names of layers in the last checkpoint by those in this one, where they differ.
        """
        self.points.append(TimelinePoint(path, step, sum(layer.count("not finite") for layer in layers)))
        self._states.append(
            {renamed.get(layer.name, layer.name): _State.of(layer, gradients.get(layer.name)) for layer in layers}
        )
        self._layers = layers

    def build(self, left_out: tuple[LeftOut, ...] = ()) -> CheckpointTimeline:
        """Return the timeline of the layers of the last checkpoint, with the checkpoints that are not included."""
        steps = [point.step for point in self.points]
        layers = tuple(
            _layer_timeline(layer, [one.get(layer.name) for one in self._states], steps) for layer in self._layers
        )
        return CheckpointTimeline(tuple(self.points), layers, left_out)


def _layer_timeline(layer: LayerReport, found: list[_State | None], steps: list[int]) -> LayerTimeline:
    """Return the timeline of a layer, from what each checkpoint shows of it (``None``: nothing) and their steps."""
    neurons = layer.neurons
    parts = [one if one is not None and one.state.size == neurons else None for one in found]
    states = np.array([np.zeros(neurons, np.uint8) if one is None else one.state for one in parts])
    basis = np.array([np.full(neurons, NO_BASIS, np.uint8) if one is None else one.basis for one in parts])
    exacts = np.array([np.full(neurons, UNDATED) if one is None else one.exact for one in parts])
    pairs = [
        (at, one, later, later.gradients)
        for at, (one, later) in enumerate(pairwise(parts), start=1)
        if one is not None and later is not None and later.gradients is not None
    ]
    for at, _, _, gradients in pairs:
        # A record ends with its last window. A neuron that was dead there and got a gradient since may be alive.
        outdated = (exacts[at] != UNDATED) & (exacts[at] <= steps[at - 1]) & gradients.some & (states[at] == DEAD)
        states[at, outdated], exacts[at, outdated] = UNKNOWN, UNDATED
    for at, _, later, gradients in pairs:
        still_dead = (states[at - 1] == DEAD) & gradients.none & ~later.fires & (states[at] == UNKNOWN)
        states[at, still_dead], basis[at, still_dead] = DEAD, _INFERRED
    for at, earlier, _, gradients in reversed(pairs):
        was_dead = (states[at] == DEAD) & gradients.none & ~earlier.fires & (states[at - 1] != DEAD)
        was_dead &= (exacts[at] == UNDATED) | (exacts[at] <= steps[at - 1])
        states[at - 1, was_dead], basis[at - 1, was_dead] = DEAD, _INFERRED
    events = _Events()
    lower = np.full(neurons, -1, dtype=np.int64)  # the earliest step at which a death may have come
    last_dead = np.full(neurons, UNDATED, dtype=np.int64)  # step of the last checkpoint at which it was dead
    died_at = np.full(neurons, UNDATED, dtype=np.int64)  # the exact step of its current death, if it is known
    known = np.full(neurons, UNKNOWN, dtype=np.uint8)  # the last state that was known
    woke = np.zeros(neurons, dtype=np.bool_)  # whether it got a gradient since the last checkpoint at which it was dead
    spell = np.full(neurons, -1, dtype=np.int64)  # index of its current death among the events
    for at, one in enumerate(parts):
        if one is None:
            continue
        state, step, exact = states[at], steps[at], exacts[at]
        dead, alive, dated = state == DEAD, state == ALIVE, exact != UNDATED
        if one.gradients is not None and at:
            lower = np.where(one.gradients.some, np.maximum(lower, steps[at - 1] + 1), lower)
            woke |= one.gradients.some
        both = dated & (died_at != UNDATED)
        again = dead & (known == DEAD) & np.where(both, exact > died_at, woke)
        revived = (known == DEAD) & (alive | again)
        first, last = last_dead + 1, np.full(neurons, step)
        first, last = np.where(again & both, (died_at + 1, exact), (first, last))
        first, last = np.where(alive & dated & (exact >= 0), (exact, exact), (first, last))
        events.add(revived, REVIVED, at, first, last, basis[at])
        died = dead & ((known != DEAD) | again)
        start = np.where(dated, exact, np.maximum(lower, one.bound))
        spell[died] = events.add(died, DIED, at, start, np.where(dated, exact, step), basis[at])
        events.narrow(spell, dead & ~died, np.where(dated, exact, one.bound), dated, basis[at])
        died_at = np.where(dead & (dated | died), exact, np.where(alive, UNDATED, died_at))
        lower = np.where(one.fires & alive, np.maximum(lower, step), lower)
        last_dead[dead], woke[dead] = step, False
        known = np.where(state == UNKNOWN, known, state)
    neuron, kind, checkpoint, earliest, latest, bases = events.table
    present = np.array([one is not None for one in parts])
    return LayerTimeline(
        name=layer.name,
        neurons=neurons,
        in_headlines=layer.in_headlines,
        dead=np.where(present, (states == DEAD).sum(axis=1), -1),
        unknown=(states == UNKNOWN).sum(axis=1),
        neuron=neuron,
        kind=kind.astype(np.uint8),
        checkpoint=checkpoint,
        earliest=earliest,
        latest=latest,
        basis=bases.astype(np.uint8),
    )


class _Events:
    """Events of a layer, int64 ``(6, E)``: neuron, kind, checkpoint, earliest and latest step, and basis of each."""

    def __init__(self) -> None:
        self.table: IntArray = np.zeros((6, 0), dtype=np.int64)

    def add(
        self, mask: BoolArray, kind: int, checkpoint: int, earliest: IntArray, latest: IntArray, basis: ByteArray
    ) -> IntArray:
        """Add an event for each neuron of a mask ``(N,)``, by steps and bases ``(N,)``; return the events' indices."""
        neurons, start = np.flatnonzero(mask), self.table.shape[1]
        same, late = np.ones_like(neurons), np.maximum(latest, earliest)
        added = neurons, same * kind, same * checkpoint, earliest[mask], late[mask], basis[mask]
        self.table = np.concatenate([self.table, np.array(added, dtype=np.int64)], axis=1)
        return np.arange(start, start + neurons.size)

    def narrow(self, events: IntArray, mask: BoolArray, steps: IntArray, exact: BoolArray, basis: ByteArray) -> None:
        """Narrow the dates of deaths by what a later checkpoint shows; all arrays are ``(N,)``.

        ``steps`` are exact where ``exact``, with their ``basis``, and else the earliest; ``UNDATED`` = not known.
        """
        *_, earliest, latest, bases = self.table
        mask = mask & (steps != UNDATED)
        at = events[mask & ~exact]
        earliest[at] = np.maximum(earliest[at], np.minimum(steps[mask & ~exact], latest[at]))
        at, sure = events[mask & exact], steps[mask & exact]
        inside = sure <= latest[at]  # else the record tells of another death, or means that it fell silent later
        earliest[at[inside]] = latest[at[inside]] = sure[inside]
        bases[at[inside]] = basis[mask & exact][inside]
