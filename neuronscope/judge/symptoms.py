"""Signs: the tests behind the diagnosis, each on what is known of a run; the thresholds are stated and are few.

A test gives the layers, neurons and steps that show its sign, or ``None``: where there is no evidence, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "UNDATED",
    "LayerFacts",
    "RunFacts",
    "Support",
    "born_deep",
    "born_plain",
    "collapsed",
    "drifted",
    "early",
    "grouped",
    "groups",
    "last_deaths",
    "may_have_collapsed",
    "not_finite",
    "off_centre",
    "shrunk",
    "spread",
    "unread",
]

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

#: Where a step would stand, and none is known.
UNDATED = -2

#: A group of deaths: at least this many of them …
GROUP_LEAST = 5
#: … and at least this share of all that are dated, within a span of steps …
GROUP_SHARE = 0.2
#: … of this many, or of this share of the run, whichever is more. The optimizer's clock is off by about 20 steps.
SPAN_STEPS, SPAN_SHARE = 25, 0.01
#: (Where so many distinct steps have a common spacing, deaths were looked for no oftener: no span is shorter than it.)
GRID_LEAST = 4
#: … and this many times what an even spread over the run would put there.
GROUP_EXCESS = 4.0
#: A group that ends within this share of the run came before training was under way.
EARLY_SHARE = 0.05
#: Deaths spread over the run: this many are dated, and between their quartiles lies this share of it.
SPREAD_LEAST, SPREAD_SHARE = 20, 1 / 3
#: Deep and narrow: as many layers, of which the middle one is at most so many times as wide as there are layers.
DEEP_LAYERS, NARROW_RATIO = 5, 8.0
#: A layer has collapsed when this share of it is dead.
COLLAPSED_SHARE = 0.9
#: The input's mean outweighs its spread by this much.
OFF_CENTRE = 2.0
#: Dead rows have shrunk when their middle norm is at most this share of the others', and decay alone accounts for
#: as much, over the steps since the middle one of them died.
SHRUNK_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What the signs are tested on, of one layer of ``N`` neurons.

    Attributes:
        name: Its name.
        dead: Neurons that are dead or get no gradient, on firm ground, bool ``(N,)``.
        since: Step from which on, int64 ``(N,)``: −1 = since the beginning, :data:`UNDATED` = not known.
        drifted: Neurons whose pre-activation lies below zero by a bound, whatever the input.
        not_finite: Neurons with NaN or infinite weights or outputs.
        unread: Neurons whose output reaches nothing.
        dead_norm: Middle norm of the dead neurons' incoming weights over that of the others; ``None`` = not known.
        may_have_collapsed: Whether it gets no gradient as a whole, and has collapsed or was frozen.
        idle: Neurons that get no gradient only because the whole layer gets none.
        kind: Kind of its activation (``relu-like``, ``smooth`` …); ``""`` = not known.
        normalised: Whether a normalisation stands before its activation or its weights; ``False`` = none is known of.
    """

    name: str
    dead: BoolArray
    since: IntArray
    drifted: int = 0
    not_finite: int = 0
    unread: int = 0
    dead_norm: float | None = None
    may_have_collapsed: bool = False
    idle: int = 0
    kind: str = ""
    normalised: bool = False

    @property
    def width(self) -> int:
        """``N``."""
        return len(self.dead)


@dataclass(frozen=True, eq=False)
class RunFacts:
    """What the signs are tested on, of the whole run.

    Attributes:
        layers: Its layers, from the input on.
        step: Optimizer steps taken; ``None`` = not known.
        learning_rates: Learning rates of the optimizer's groups, as they were last.
        decay: By what share weight decay shrinks weights a step: the largest ``lr · weight_decay`` of a group, as it
            was last; 0 = none or not known.
        clocked: Whether steps are by the optimizer's clock, which tells the earliest step, mostly by some 20 too early.
        input_offset: ‖mean‖ / ‖standard deviation‖ of the network's input; ``None`` = not known.
        observed_every: Steps at most between two at which a monitor looked for deaths: so much earlier than its date
            one may have come.
    """

    layers: tuple[LayerFacts, ...]
    step: int | None = None
    learning_rates: tuple[float, ...] = ()
    decay: float = 0.0
    clocked: bool = False
    input_offset: float | None = None
    observed_every: int = 1

    def dated(self) -> IntArray:
        """Steps of all deaths that have one, rising, int64 ``(D,)``."""
        steps = [layer.since[layer.dead & (layer.since >= 0)] for layer in self.layers]
        return np.sort(np.concatenate(steps)) if steps else np.zeros(0, dtype=np.int64)

    def born(self) -> int:
        """Neurons that are dead since the beginning."""
        return sum(int((layer.dead & (layer.since == -1)).sum()) for layer in self.layers)

    def length(self) -> int:
        """Steps of the run: those taken, or else up to the last death."""
        dated = self.dated()
        return max(self.step or 0, int(dated[-1]) if dated.size else 0, 1)

    def sound_before(self, step: int | None) -> int | None:
        """The step before which a checkpoint is older than deaths dated to ``step``; ``None`` where there is none."""
        if step is None or step < self.observed_every:
            return None
        return step - self.observed_every + 1


@dataclass(frozen=True)
class Support:
    """What a sign rests on where it was found.

    Attributes:
        evidence: One or two sentences: how many neurons, in which layers, at which steps.
        neurons: How many neurons show it.
        layers: Names of the layers that show it, the most affected first.
        steps: First and last step that it concerns, where it has any.
        before: Step before which a checkpoint does not have it yet; ``None`` where none is known, or can be.
    """

    evidence: str
    neurons: int
    layers: tuple[str, ...]
    steps: tuple[int, int] | None = None
    before: int | None = None


def last_deaths(dead: BoolArray, since: IntArray) -> int | None:
    """When the last neurons of a layer died: the first step of those within a span of the last.

    Args:
        dead: Which neurons are dead, bool ``(N,)``.
        since: Since when, int64 ``(N,)``, as in :class:`LayerFacts`.

    Returns:
        A step; −1 where all are dead since the beginning, ``None`` where nothing is dated.

    >>> last_deaths(np.array([True, True, True, False]), np.array([20, 300, 310, 400]))
    300
    """
    steps = since[dead & (since >= 0)]
    if steps.size:
        return int(steps[steps >= steps.max() - SPAN_STEPS].min())
    return -1 if dead.any() and bool((since[dead] == -1).all()) else None


def groups(steps: IntArray, length: int) -> list[tuple[int, int]]:
    """Spans of steps in which deaths crowd, by the rule at the head of this module; largest group first.

    Args:
        steps: Steps of deaths, rising, ``(D,)``.
        length: Steps of the whole run.

    Returns:
        First and last step of each group.

    >>> groups(np.array([10, 400, 401, 402, 402, 405, 900]), 1000)
    [(400, 405)]
    """
    span = max(SPAN_STEPS, int(SPAN_SHARE * length), _grid(steps))
    even = steps.size * min((span + 1) / (length + 1), 1.0)
    least = max(GROUP_LEAST, GROUP_SHARE * steps.size, GROUP_EXCESS * even)
    found = []
    while steps.size:
        ends = np.searchsorted(steps, steps + span, side="right")
        sizes = ends - np.arange(steps.size)
        begin = int(np.argmax(sizes))
        if sizes[begin] < least:
            break
        found.append((int(steps[begin]), int(steps[ends[begin] - 1])))
        steps = np.delete(steps, slice(begin, ends[begin]))
    return found


def _grid(steps: IntArray) -> int:
    """Steps between two at which deaths were looked for, as far as that shows: a monitor may look at every 100th."""
    distinct = np.unique(steps)
    return int(np.gcd.reduce(np.diff(distinct))) if distinct.size >= GRID_LEAST else 1


def _affected(counts: Sequence[tuple[str, int, int]]) -> tuple[str, tuple[str, ...]]:
    """In words and as names: the layers of ``(name, affected, width)`` that are affected at all, the worst first."""
    hit = sorted((one for one in counts if one[1]), key=lambda one: -one[1] / one[2])
    said = ", ".join(f"{name} ({count:,} of {width:,})" for name, count, width in hit[:4])
    more = f" and {len(hit) - 4:,} more" if len(hit) > 4 else ""
    return f"layer{'s' if len(hit) > 1 else ''} {said}{more}", tuple(name for name, _, _ in hit)


def _count(facts: RunFacts, mask: Callable[[LayerFacts], Any]) -> tuple[int, str, tuple[str, ...]]:
    counts = [(layer.name, int(np.sum(mask(layer))), layer.width) for layer in facts.layers]
    said, names = _affected(counts)
    return sum(count for _, count, _ in counts), said, names


def _neurons(number: int, verb: tuple[str, str]) -> str:
    """``1 neuron dies``, ``2 neurons die``."""
    return f"{number:,} neuron{'' if number == 1 else 's'} {verb[0] if number == 1 else verb[1]}"


def _in_group(facts: RunFacts, early: bool) -> Support | None:
    dated, length = facts.dated(), facts.length()
    spans = [span for span in groups(dated, length) if (span[1] <= EARLY_SHARE * length) == early]
    if not spans:
        return None
    spans.sort()

    def mask(layer: LayerFacts) -> BoolArray:
        inside = np.zeros(layer.width, dtype=np.bool_)
        for first, last in spans:
            inside |= (layer.since >= first) & (layer.since <= last)
        return inside & layer.dead

    number, said, names = _count(facts, mask)
    when = " and ".join(f"steps {first:,} to {last:,}" if first < last else f"step {first:,}" for first, last in spans)
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(facts.learning_rates), reverse=True))
    text = f"{number:,} of {dated.size:,} dated deaths lie at {when}, of {length:,} in all: {said}."
    if facts.clocked:
        text += " Steps are by the optimizer's clock: the earliest possible, mostly by some 20 steps too early."
    if rates:
        text += f" Learning rate when the checkpoint was saved: {rates}."
    return Support(text, number, names, (spans[0][0], spans[-1][1]), facts.sound_before(spans[0][0]))


def grouped(facts: RunFacts) -> Support | None:
    """Deaths that crowd after training was under way."""
    return _in_group(facts, early=False)


def early(facts: RunFacts) -> Support | None:
    """Deaths that crowd in the first steps."""
    return _in_group(facts, early=True)


def spread(facts: RunFacts) -> Support | None:
    """Deaths all over the run, and none that crowd."""
    dated, length = facts.dated(), facts.length()
    if dated.size < SPREAD_LEAST or groups(dated, length):
        return None
    low, high = np.quantile(dated, (0.25, 0.75))
    if high - low < SPREAD_SHARE * length:
        return None
    number, said, names = _count(facts, lambda layer: layer.dead & (layer.since >= 0))
    text = (
        f"{number:,} dated deaths, half of them between steps {low:,.0f} and {high:,.0f} of {length:,}, and no step at "
        f"which they crowd: {said}."
    )
    return Support(text, number, names, (int(dated[0]), int(dated[-1])))


def _is_deep_and_narrow(facts: RunFacts) -> bool:
    widths = [layer.width for layer in facts.layers]
    return len(widths) >= DEEP_LAYERS and float(np.median(widths)) <= NARROW_RATIO * len(widths)


def _born(facts: RunFacts, deep: bool) -> Support | None:
    number, said, names = _count(facts, lambda layer: layer.dead & (layer.since == -1))
    if not number or _is_deep_and_narrow(facts) != deep:
        return None
    widths = [layer.width for layer in facts.layers]
    shape = (
        f" The network has {len(widths)} such layers; the middle one is {np.median(widths):,.0f} wide." if deep else ""
    )
    text = f"{_neurons(number, ('is', 'are'))} dead since the beginning: {said}.{shape}"
    return Support(text, number, names, (-1, -1))


def born_deep(facts: RunFacts) -> Support | None:
    """Neurons dead since the beginning, in a network that is deep and narrow."""
    return _born(facts, deep=True)


def born_plain(facts: RunFacts) -> Support | None:
    """Neurons dead since the beginning, in any other network."""
    return _born(facts, deep=False)


def drifted(facts: RunFacts) -> Support | None:
    """Neurons that a bound keeps below zero."""
    number, said, names = _count(facts, lambda layer: layer.drifted)
    if not number:
        return None
    return Support(f"{_neurons(number, ('stays', 'stay'))} below zero by a bound on the input: {said}.", number, names)


def off_centre(facts: RunFacts) -> Support | None:
    """An input whose mean outweighs its spread, and a first layer that is hit hardest."""
    if facts.input_offset is None or facts.input_offset < OFF_CENTRE or not facts.layers:
        return None
    first, dead = facts.layers[0], int(facts.layers[0].dead.sum())
    if not dead or dead / first.width < max(layer.dead.mean() for layer in facts.layers):
        return None
    text = (
        f"The input's mean outweighs its spread {facts.input_offset:.3g} times, and the first layer is hit hardest: "
        f"{first.name} ({dead:,} of {first.width:,})."
    )
    return Support(text, dead, (first.name,))


def collapsed(facts: RunFacts) -> Support | None:
    """Layers of which nearly all is dead."""
    gone = [layer for layer in facts.layers if layer.width > 1 and layer.dead.mean() >= COLLAPSED_SHARE]
    if not gone:
        return None
    said, names = _affected([(layer.name, int(layer.dead.sum()), layer.width) for layer in gone])
    text = f"Nearly all neurons of a layer are dead: {said}."
    steps = [step for layer in gone if (step := last_deaths(layer.dead, layer.since)) is not None]
    if steps:
        when = "since the beginning" if max(steps) < 0 else f"since step {max(min(steps), 0):,}"
        text += f" That is so {when}{', at the earliest' if facts.clocked and max(steps) >= 0 else ''}."
    idle = [(layer.name, layer.idle, layer.width) for layer in facts.layers]
    if any(count for _, count, _ in idle):
        text += f" No gradient reaches {_affected(idle)[0]}."
    return Support(
        text,
        sum(int(one.dead.sum()) for one in gone),
        names,
        (min(steps), max(steps)) if steps else None,
        facts.sound_before(min(steps)) if steps else None,
    )


def may_have_collapsed(facts: RunFacts) -> Support | None:
    """Layers that get no gradient as a whole, where that is a collapse or a way of freezing."""
    gone = [layer for layer in facts.layers if layer.may_have_collapsed]
    if not gone:
        return None
    said, names = _affected([(layer.name, layer.width, layer.width) for layer in gone])
    everyone = [last_deaths(np.ones(layer.width, dtype=np.bool_), layer.since) for layer in gone]
    steps = [step for step in everyone if step is not None]
    return Support(
        f"No neuron gets a gradient, though the optimizer goes on: {said}.",
        sum(layer.width for layer in gone),
        names,
        (min(steps), max(steps)) if steps else None,
        facts.sound_before(min(steps)) if steps else None,
    )


def shrunk(facts: RunFacts) -> Support | None:
    """Weights of dead neurons that have shrunk under decay."""
    small = [
        one
        for one in facts.layers
        if one.dead_norm is not None and one.dead_norm <= SHRUNK_SHARE and _decayed(one, facts) <= SHRUNK_SHARE
    ]
    if not small:
        return None
    said, names = _affected([(layer.name, int(layer.dead.sum()), layer.width) for layer in small])
    least = min(layer.dead_norm for layer in small if layer.dead_norm is not None)
    text = (
        f"The dead neurons' weights have shrunk, down to {100 * least:.2g} % of the others'; weight decay takes "
        f"{100 * facts.decay:.2g} % a step: {said}."
    )
    return Support(text, sum(int(one.dead.sum()) for one in small), names)


def _decayed(layer: LayerFacts, facts: RunFacts) -> float:
    """What decay has left of a row that died with the middle one of the layer's dead; 1 where no death is dated."""
    since = layer.since[layer.dead & (layer.since >= -1)]
    age = facts.length() - float(np.median(since)) if since.size else 0.0
    return math.exp(-facts.decay * age)


def not_finite(facts: RunFacts) -> Support | None:
    """NaN and infinite numbers."""
    number, said, names = _count(facts, lambda layer: layer.not_finite)
    return Support(f"{_neurons(number, ('is', 'are'))} NaN or infinite: {said}.", number, names) if number else None


def unread(facts: RunFacts) -> Support | None:
    """Neurons that nothing reads."""
    number, said, names = _count(facts, lambda layer: layer.unread)
    return (
        Support(f"The output of {_neurons(number, ('reaches', 'reach'))} nothing: {said}.", number, names)
        if number
        else None
    )
