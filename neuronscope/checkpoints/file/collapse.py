"""Collapse: which layers went silent as a whole because nothing passes them any more, and which were only cut off.

A layer that gets no gradient at all was frozen, or cut off by what follows it, or has collapsed: all of its neurons
give zero. The optimizer's state tells these apart by the layer that reads it. Where the reader's weights get no
gradient while its bias does, the loss still reaches the reader, and what it reads is zero: its input has collapsed.
A frozen layer goes on giving numbers, so that its reader's weights learn.

Layers are taken in the order of the file, which is the order in which a network's modules were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuronscope.checkpoints.file.adam_clock import ClockReading
from neuronscope.checkpoints.file.layer_clocks import LayerClock
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer

__all__ = ["NoGradientCause", "find_no_gradient_causes"]


@dataclass(frozen=True)
class NoGradientCause:
    """Why a layer gets no gradient as a whole.

    Attributes:
        kind: ``collapsed``; ``unsure`` where it may have been frozen too; ``cut off`` by a layer that has collapsed.
        text: A sentence for a reader: how that is known.
    """

    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class _Unit:
    """A layer, with the norm behind it where that takes the place of its bias.

    Attributes:
        layer: The layer.
        biased: Whether it adds something that does not depend on its input.
        silent: Whether none of its parameters gets a gradient.
        starved: Whether its bias got gradients after those parameters that multiply its input got none any more.
        stepped: Whether its optimizer went on updating it, as far as the file says.
    """

    layer: Layer
    biased: bool
    silent: bool
    starved: bool
    stepped: bool

    @property
    def halted(self) -> bool:
        """Whether it is silent, and its rows are neurons."""
        return self.silent and self.layer.kind in NEURON_KINDS


def find_no_gradient_causes(layers: Sequence[Layer], readings: Sequence[LayerClock]) -> dict[str, NoGradientCause]:
    """Find out why layers get no gradient as a whole, where the clocks of their neighbours tell.

    Args:
        layers: The checkpoint's layers, in the order of the file.
        readings: The clocks of those that have one.

    Returns:
        By the layer's path; a layer that is missing here was frozen, or cut off, for all that is known.
    """
    units = list(_units(layers, {read.layer.path: read for read in readings}))
    found: dict[str, NoGradientCause] = {}
    for place, unit in enumerate(units):
        if unit.starved:
            at = _read_by(units, place)
            if at is not None:
                idle = f"what it reads is zero since the collapse of {units[at].layer.path}: its bias alone learnt on"
                found.setdefault(unit.layer.path, NoGradientCause("cut off", idle))
                text = (
                    f"the weights of {unit.layer.path}, which reads it, got none either while its bias still did: what "
                    "it reads is zero. The layer has collapsed"
                )
                found[units[at].layer.path] = NoGradientCause("collapsed", text)
    for at, text in _unsure(units):
        found.setdefault(units[at].layer.path, NoGradientCause("unsure", text))
    for last, unit in enumerate(units):
        if unit.layer.path in found and found[unit.layer.path].kind == "collapsed":
            for before in reversed(units[:last]):
                if not before.silent:
                    break
                if before.halted:
                    text = f"it is cut off by the collapse of {unit.layer.path}"
                    found.setdefault(before.layer.path, NoGradientCause("cut off", text))
    return found


def _units(layers: Sequence[Layer], clocks: Mapping[str, LayerClock]) -> Iterator[_Unit]:
    after: list[Layer | None] = [*layers, None][1:]
    norm_of_last = False
    for layer, behind in zip(layers, after, strict=True):
        if norm_of_last:
            norm_of_last = False
            continue
        own = clocks.get(layer.path)
        if own is None:
            continue
        parts = [own]
        biased = layer.bias is not None
        if not biased and behind is not None and behind.kind == "norm" and behind.width == layer.width:
            shift = clocks.get(behind.path)
            if shift is not None:
                parts.append(shift)
                biased, norm_of_last = behind.bias is not None, True
        starved = _starved(parts)
        silent = not starved and all(bool(_silent(part, part.reading).all()) for part in parts)
        stepped = all(part.lag == 0 and (part.taken is not None or part.rule.name == "SGD") for part in parts)
        yield _Unit(layer, biased, silent, starved, stepped)


def _starved(parts: Sequence[LayerClock]) -> bool:
    """Whether what multiplies the input had been silent for long when the bias last got a gradient for certain.

    The bias may have come to rest since: then all is silent now, and yet the two fell silent one after the other.
    """
    lately = min(float(torch.where(_sound(part.reading), part.reading.steps, torch.inf).min()) for part in parts)
    return math.isfinite(lately) and all(bool(_silent(part, part.weights, lately).all()) for part in parts)


def _silent(read: LayerClock, reading: ClockReading, ago: float = 0.0) -> Tensor:
    """Rows that had no gradient for longer than a pause, or never any, so many steps ago; bool ``(N,)``."""
    limit = read.clock.silent_steps
    silent = reading.never
    if read.taken is None or read.taken - 1 > limit:
        silent = silent | (reading.steps - ago > limit)
    return silent & _sound(reading)


def _sound(reading: ClockReading) -> Tensor:
    return ~reading.not_finite & ~reading.underflowed


def _read_by(units: Sequence[_Unit], place: int) -> int | None:
    """Which layer the starved unit at a place reads: the nearest silent one before it that has a fitting width."""
    reader = units[place].layer
    for at in range(place - 1, -1, -1):
        width = units[at].layer.width
        fits = width == reader.width if reader.kind == "norm" else not (reader.inputs % width and width % reader.inputs)
        if units[at].halted and fits:
            return at
    return None


def _unsure(units: Sequence[_Unit]) -> Iterator[tuple[int, str]]:
    """Where a run of silent layers ends in one without a bias to tell by, or nothing in the network learns."""
    begin = 0
    while begin < len(units):
        end = begin
        while end < len(units) and units[end].silent and units[end].stepped:
            end += 1
        halted = [at for at in range(begin, end) if units[at].halted]
        everything, last = (begin, end) == (0, len(units)), units[end - 1]
        blind = len(halted) > 1 and not units[halted[-1]].biased and not last.starved
        if halted and everything:
            text = (
                "nothing in the network gets a gradient although the optimizer goes on: this layer or one near it has "
                "collapsed, or the loss gives no gradient any more"
            )
            yield halted[-2 if blind else -1], text
        elif blind and begin > 0 and not (end < len(units) and units[end].starved):
            text = (
                f"so is {units[halted[-1]].layer.path}, which reads it, although the optimizer goes on: the layer has "
                "collapsed, or both were frozen in a way that leaves gradients of zero"
            )
            yield halted[-2], text
        begin = end + 1
