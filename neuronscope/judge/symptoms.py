"""Test the facts about a run for symptoms; the tests behind the diagnosis, with all their thresholds.

Each test returns the layers, neurons and steps that show its symptom, or ``None`` if there is no evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from neuronscope.arrays import BoolArray, IntArray

__all__ = [
    "COLLAPSED",
    "COLLAPSED_SHARE",
    "GROUPED",
    "GROUP_LEAST",
    "NOT_FINITE",
    "UNDATED",
    "LayerFacts",
    "RunFacts",
    "Support",
    "born_deep",
    "born_plain",
    "collapsed",
    "died_after",
    "drifted",
    "early",
    "grouped",
    "groups",
    "last_deaths",
    "may_have_collapsed",
    "not_finite",
    "off_centre",
    "shrunk",
    "silent",
    "spread",
    "unread",
]


#: Names of symptoms that others ask for.
NOT_FINITE, COLLAPSED, GROUPED = "NaN or infinite numbers", "a layer nearly all dead", "deaths close together in time"

#: Stands for a step that is not known.
UNDATED = -2

#: Deaths form a group if they are at least this many …
GROUP_LEAST = 5
#: … and at least this fraction of all deaths with a known step, within a span of steps …
GROUP_SHARE = 0.2
#: … of this many, or of this fraction of the run, whichever is more. The optimizer's clock is off by about 20 steps.
SPAN_STEPS, SPAN_SHARE = 25, 0.01
#: If this many distinct steps have a common spacing, deaths were looked for at that spacing; no span is shorter.
SPACING_LEAST = 4
#: A group also has at least this many times the deaths that an even spread over the run would put in the span.
GROUP_EXCESS = 4.0
#: A group that ends within this fraction of the run belongs to the start of training.
EARLY_SHARE = 0.05
#: Deaths are spread over the run if this many have a known step and their quartiles are this fraction of it apart.
SPREAD_LEAST, SPREAD_SHARE = 20, 1 / 3
#: A network is deep and narrow if it has this many layers and its median width is at most this many times their number.
DEEP_LAYERS, NARROW_RATIO = 5, 8.0
#: A layer has collapsed if this fraction of it is dead.
COLLAPSED_SHARE = 0.9
#: An input is off centre if the norm of its mean is this many times that of its standard deviation.
OFF_CENTRE = 2.0
#: Dead rows have shrunk if their median norm is at most this fraction of the others', and weight decay alone explains
#: that, over the steps since the median death.
SHRUNK_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """Hold the facts about one layer of ``N`` neurons that symptoms are tested on."""

    name: str
    dead: BoolArray  # neurons that are certainly dead or get no gradient, bool ``(N,)``
    #: Step of each neuron's death, int64 ``(N,)``: −1 = dead from the start, :data:`UNDATED` = not known.
    since: IntArray
    drifted: int = 0  # number of neurons whose pre-activation is proved to be below zero for every input
    not_finite: int = 0  # number of neurons with NaN or infinite weights or outputs
    unread: int = 0  # number of neurons whose output nothing reads
    silent: int = 0  # number of silent neurons: zero output at every position, but gradient arrives
    #: Median norm of the dead neurons' incoming weights ÷ that of the others; ``None`` = not known.
    dead_norm: float | None = None
    may_have_collapsed: bool = False  # whether the whole layer gets no gradient, because it collapsed or was frozen
    idle: int = 0  # number of neurons that get no gradient only because the whole layer gets none
    kind: str = ""  # kind of the activation (``relu-like``, ``smooth`` …); ``""`` = not known
    normalised: bool = False  # whether a normalisation is known to come before the activation or the weights

    @property
    def width(self) -> int:
        """``N``."""
        return len(self.dead)


@dataclass(frozen=True, eq=False)
class RunFacts:
    """Hold the facts about a whole run that symptoms are tested on."""

    layers: tuple[LayerFacts, ...]  # the layers, starting at the input
    step: int | None = None  # number of optimizer steps taken; ``None`` = not known
    learning_rates: tuple[float, ...] = ()  # last known learning rates of the optimizer's parameter groups
    #: Fraction by which weight decay shrinks weights per step: the largest last known ``lr · weight_decay`` of a group;
    #: 0 = none or not known.
    decay: float = 0.0
    #: Whether steps were derived from the optimizer's state. They are then the earliest possible steps, usually about
    #: 20 steps too early.
    clocked: bool = False
    estimated: bool = False  # whether some steps are estimates by a clock, too early or too late
    input_offset: float | None = None  # ‖mean‖ ÷ ‖standard deviation‖ of the network's input; ``None`` = not known
    #: Maximum number of steps between two observations of a monitor. A death may have happened up to this many steps
    #: before its date.
    observed_every: int = 1
    checkpoints: tuple[int, ...] = ()  # steps at which checkpoints were saved, as far as known, ascending
    #: Whether the network was seen in training. In a scan or an evaluation, a neuron that never fired may have died
    #: long before.
    in_training: bool = True

    def dated(self) -> IntArray:
        """Return the known steps of deaths, ascending, int64 ``(D,)``."""
        steps = [layer.since[layer.dead & (layer.since >= 0)] for layer in self.layers]
        return np.sort(np.concatenate(steps)) if steps else np.zeros(0, dtype=np.int64)

    def born(self) -> int:
        """Return the number of neurons that were dead from the start."""
        return sum(int((layer.dead & (layer.since == -1)).sum()) for layer in self.layers)

    def length(self) -> int:
        """Return the length of the run in steps: those taken, or up to the last death if that is not known."""
        dated = self.dated()
        return max(self.step or 0, int(dated[-1]) if dated.size else 0, 1)

    def healthy_before(self, step: int | None) -> int | None:
        """Return the step before which a checkpoint is older than deaths dated to ``step``, or ``None``.

        An estimated date may be too late, so that no step follows from it. Before the first step there is none.
        """
        if step is None or self.estimated or step <= self.observed_every:
            return None
        return step - self.observed_every + 1

    def last_checkpoint(self, before: int | None) -> int | None:
        """Return the step of the last known checkpoint before a step; ``None`` if no known one comes before it."""
        return max((step for step in self.checkpoints if before is not None and step < before), default=None)


@dataclass(frozen=True)
class Support:
    """Hold the evidence for a symptom."""

    evidence: str  # one or two sentences: how many neurons, in which layers, at which steps
    neurons: int  # number of neurons that show the symptom
    layers: tuple[str, ...]  # names of the layers that show it, the most affected first
    steps: tuple[int, int] | None = None  # first and last step that it concerns; ``None`` if no step is known
    before: int | None = None  # the step before which checkpoints do not show it yet; ``None`` if no such step is known


def last_deaths(dead: BoolArray, since: IntArray) -> int | None:
    """Return the step at which the last group of a layer's deaths began.

    The group is the deaths within ``SPAN_STEPS`` of the last one.

    Args:
        dead: Which neurons are dead, bool ``(N,)``.
        since: Steps of their deaths, int64 ``(N,)``, as in :class:`LayerFacts`.

    Returns:
        A step; −1 if all were dead from the start, ``None`` if no step is known.

    >>> last_deaths(np.array([True, True, True, False]), np.array([20, 300, 310, 400]))
    300
    """
    steps = since[dead & (since >= 0)]
    if steps.size:
        return int(steps[steps >= steps.max() - SPAN_STEPS].min())
    return -1 if dead.any() and bool((since[dead] == -1).all()) else None


def groups(steps: IntArray, length: int) -> list[tuple[int, int]]:
    """Return the first and last step of each group of deaths close together in time, the largest group first.

    Args:
        steps: Steps of deaths, ascending, int64 ``(D,)``.
        length: Number of steps of the whole run.

    >>> groups(np.array([10, 400, 401, 402, 402, 405, 900]), 1000)
    [(400, 405)]
    """
    span = max(SPAN_STEPS, int(SPAN_SHARE * length), _spacing(steps))
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


def _spacing(steps: IntArray) -> int:
    """Return the common spacing of the steps at which deaths were found: a monitor may look at every 100th only."""
    distinct = np.unique(steps)
    return int(np.gcd.reduce(np.diff(distinct))) if distinct.size >= SPACING_LEAST else 1


def _affected(counts: Sequence[tuple[str, int, int]]) -> tuple[str, tuple[str, ...]]:
    """Return the affected layers, the worst first, as text and as names, given each one's name, number and width."""
    affected = sorted((count for count in counts if count[1]), key=lambda count: -count[1] / count[2])
    shown = ", ".join(f"{name} ({count:,} of {width:,})" for name, count, width in affected[:4])
    more = f" and {len(affected) - 4:,} more" if len(affected) > 4 else ""
    return f"layer{'s' if len(affected) > 1 else ''} {shown}{more}", tuple(name for name, _, _ in affected)


def _count(facts: RunFacts, mask: Callable[[LayerFacts], Any]) -> tuple[int, str, tuple[str, ...]]:
    """Return the number of affected neurons, which ``mask`` gives, and the affected layers, as text and as names."""
    counts = [(layer.name, int(np.sum(mask(layer))), layer.width) for layer in facts.layers]
    layers, names = _affected(counts)
    return sum(count for _, count, _ in counts), layers, names


def _neurons_are(number: int) -> str:
    """Return ``1 neuron is`` or, for other numbers, ``2 neurons are``."""
    return "1 neuron is" if number == 1 else f"{number:,} neurons are"


def _steps(first: int, last: int) -> str:
    return f"steps {first:,} to {last:,}" if first < last else f"step {first:,}"


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

    number, layers, names = _count(facts, mask)
    when = " and ".join(_steps(*span) for span in spans)
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(facts.learning_rates), reverse=True))
    text = f"{number:,} of {dated.size:,} dated deaths are at {when} of {length:,}: {layers}."
    if facts.estimated:
        text += " Steps are estimated by a clock, some too early and some too late."
    elif facts.clocked:
        text += " Steps come from the optimizer's state: the earliest possible, usually about 20 steps too early."
    if rates:
        text += f" Learning rate when the checkpoint was saved: {rates}."
    return Support(text, number, names, (spans[0][0], spans[-1][1]), facts.healthy_before(spans[0][0]))


def died_after(facts: RunFacts, step: int) -> Support | None:
    """Return the evidence that neurons died after a step, or ``None`` if none did.

    Args:
        facts: The facts about the run.
        step: The step.
    """
    number, layers, names = _count(facts, lambda layer: layer.dead & (layer.since > max(step, -1)))
    if not number:
        return None
    dated = facts.dated()
    first, last = int(dated[dated > step][0]), int(dated[-1])
    text = f"{number:,} neuron{'' if number == 1 else 's'} died at {_steps(first, last)}: {layers}."
    return Support(text, number, names, (first, last), facts.healthy_before(first))


def spread(facts: RunFacts) -> Support | None:
    """Test for deaths over the whole run without groups."""
    dated, length = facts.dated(), facts.length()
    if dated.size < SPREAD_LEAST or groups(dated, length):
        return None
    low, high = np.quantile(dated, (0.25, 0.75))
    if high - low < SPREAD_SHARE * length:
        return None
    number, layers, names = _count(facts, lambda layer: layer.dead & (layer.since >= 0))
    text = (
        f"{number:,} dated deaths, half of them between steps {low:,.0f} and {high:,.0f} of {length:,}, and nowhere "
        f"close together: {layers}."
    )
    return Support(text, number, names, (int(dated[0]), int(dated[-1])))


def _is_deep_and_narrow(facts: RunFacts) -> bool:
    widths = [layer.width for layer in facts.layers]
    return len(widths) >= DEEP_LAYERS and float(np.median(widths)) <= NARROW_RATIO * len(widths)


def _born(facts: RunFacts, deep: bool) -> Support | None:
    number, layers, names = _count(facts, lambda layer: layer.dead & (layer.since == -1))
    if not number or not facts.in_training or _is_deep_and_narrow(facts) != deep:
        return None
    widths = [layer.width for layer in facts.layers]
    text = f"{_neurons_are(number)} dead since the beginning: {layers}."
    if deep:
        text += f" The network has {len(widths)} layers of neurons; their median width is {np.median(widths):,.0f}."
    return Support(text, number, names, (-1, -1))


def off_centre(facts: RunFacts) -> Support | None:
    """Test for an input that is off centre, if the first layer has the largest fraction of dead neurons."""
    if facts.input_offset is None or facts.input_offset < OFF_CENTRE or not facts.layers:
        return None
    first, dead = facts.layers[0], int(facts.layers[0].dead.sum())
    if not dead or dead / first.width < max(layer.dead.mean() for layer in facts.layers):
        return None
    text = (
        f"The input's mean is {facts.input_offset:.3g} times its standard deviation, and the worst layer is the first: "
        f"{first.name} ({dead:,} of {first.width:,})."
    )
    return Support(text, dead, (first.name,))


def collapsed(facts: RunFacts) -> Support | None:
    """Test for layers in which nearly all neurons are dead."""
    found = [layer for layer in facts.layers if layer.width > 1 and layer.dead.mean() >= COLLAPSED_SHARE]
    if not found:
        return None
    layers, names = _affected([(layer.name, int(layer.dead.sum()), layer.width) for layer in found])
    text = f"Nearly all neurons of a layer are dead: {layers}."
    steps = [step for layer in found if (step := last_deaths(layer.dead, layer.since)) is not None]
    steps = [step for step in steps if step >= 0 or facts.in_training]
    if steps:
        first, last = ("the beginning" if step < 0 else f"step {step:,}" for step in (min(steps), max(steps)))
        clock = "" if max(steps) < 0 else ", about" if facts.estimated else " at the earliest" if facts.clocked else ""
        if first == last:
            text += f" They have been dead since {first}{clock}."
        else:
            text += f" The first of these layers has been dead since {first}, the last since {last}{clock}."
    idle = [(layer.name, layer.idle, layer.width) for layer in facts.layers]
    if any(count for _, count, _ in idle):
        text += f" No gradient reaches {_affected(idle)[0]}."
    return Support(text, sum(int(layer.dead.sum()) for layer in found), names, *_since(facts, steps))


def may_have_collapsed(facts: RunFacts) -> Support | None:
    """Test for layers that get no gradient at all, because they collapsed or were frozen."""
    found = [layer for layer in facts.layers if layer.may_have_collapsed]
    if not found:
        return None
    layers, names = _affected([(layer.name, layer.width, layer.width) for layer in found])
    last_steps = [last_deaths(np.ones(layer.width, dtype=np.bool_), layer.since) for layer in found]
    steps = [step for step in last_steps if step is not None]
    text = f"No neuron gets a gradient, although the optimizer continues: {layers}."
    return Support(text, sum(layer.width for layer in found), names, *_since(facts, steps))


def _since(facts: RunFacts, steps: Sequence[int]) -> tuple[tuple[int, int] | None, int | None]:
    """Return the first and the last of some steps, and the step before which a checkpoint is older than all."""
    return ((min(steps), max(steps)), facts.healthy_before(min(steps))) if steps else (None, None)


def shrunk(facts: RunFacts) -> Support | None:
    """Test for weights of dead neurons that have shrunk by weight decay."""
    small = [
        layer
        for layer in facts.layers
        if layer.dead_norm is not None and layer.dead_norm <= SHRUNK_SHARE and _decayed(layer, facts) <= SHRUNK_SHARE
    ]
    if not small:
        return None
    layers, names = _affected([(layer.name, int(layer.dead.sum()), layer.width) for layer in small])
    least = min(layer.dead_norm for layer in small if layer.dead_norm is not None)
    text = (
        f"The dead neurons' weights have shrunk to as little as {100 * least:.2g} % of the others'; weight decay takes "
        f"{100 * facts.decay:.2g} % per step: {layers}."
    )
    return Support(text, sum(int(layer.dead.sum()) for layer in small), names)


def _decayed(layer: LayerFacts, facts: RunFacts) -> float:
    """Return what weight decay has left of a row that died at the median death; 1 if no step is known."""
    since = layer.since[layer.dead & (layer.since >= -1)]
    age = facts.length() - float(np.median(since)) if since.size else 0.0
    return math.exp(-facts.decay * age)


def _test_for(field: str, sentence: str) -> Callable[[RunFacts], Support | None]:
    """Return a test for neurons whose number in each layer is a field of :class:`LayerFacts`.

    The evidence is a sentence with ``{layers}`` and one of ``{neurons}`` or ``{neurons_are}``; ``{they_get}`` agrees.
    """

    def test(facts: RunFacts) -> Support | None:
        number, layers, names = _count(facts, attrgetter(field))
        words = {
            "neurons": f"{number:,} neuron{'' if number == 1 else 's'}",
            "neurons_are": _neurons_are(number),
            "they_get": "it gets" if number == 1 else "they get",
        }
        return Support(sentence.format(layers=layers, **words), number, names) if number else None

    return test


#: Groups of deaths after the start of training, and in the first steps.
grouped, early = partial(_in_group, early=False), partial(_in_group, early=True)
#: Neurons dead since the beginning, in a deep and narrow network and in any other.
born_deep, born_plain = partial(_born, deep=True), partial(_born, deep=False)
drifted = _test_for("drifted", "{neurons_are} proved to stay below zero: {layers}.")
not_finite = _test_for("not_finite", "{neurons_are} NaN or infinite: {layers}.")
silent = _test_for("silent", "{neurons_are} zero at every position, but {they_get} gradient: {layers}.")
unread = _test_for("unread", "Nothing reads the output of {neurons}: {layers}.")
