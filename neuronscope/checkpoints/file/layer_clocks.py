"""Readings: the optimizer's clock of each layer's rows, or the reason why it cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.adam_clock import AdamClock, ClockReading
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer
from neuronscope.checkpoints.file.optimizer_rules import Rule, recognise, steps_taken
from neuronscope.checkpoints.file.parameter_matching import Entry
from neuronscope.checkpoints.file.sgd_clock import Loudness, SGDClock
from neuronscope.checkpoints.verdict.evidence import Abstention

__all__ = ["LayerReading", "read_clocks"]


@dataclass(frozen=True, eq=False)
class LayerReading:
    """The clock of one layer.

    Attributes:
        layer: The layer.
        rule: The optimizer.
        clock: Its clock.
        reading: What it says of each row.
        weights: What it says of each row without its bias: of what multiplies the layer's input.
        parameters: Which of the layer's tensors it is of.
        taken: Steps in which the layer was updated, where its optimizer counts them.
        lag: Steps of its optimizer in which it was not: it was frozen then, or no gradient reached it.
        step: The checkpoint's step at which this is so; ``None`` where it is not known.
    """

    layer: Layer
    rule: Rule
    clock: AdamClock | SGDClock
    reading: ClockReading
    weights: ClockReading
    parameters: tuple[str, ...]
    taken: int | None
    lag: int
    step: int | None


def read_clocks(
    checkpoint: Checkpoint, layers: Sequence[Layer], entries: Mapping[str, Entry]
) -> Iterator[LayerReading | Abstention]:
    """Read the clock of every layer whose rows are neurons, and of every norm that has one.

    Args:
        checkpoint: What the file holds.
        layers: Its layers.
        entries: Whose state is whose; see :func:`neuronscope.checkpoints.file.parameter_matching.find_owners`.
    """
    newest = _newest_steps(entries)
    decays = _DecayJudge(checkpoint, entries)
    quiet: dict[tuple[int, float], list[tuple[Layer, Rule, tuple[str, ...]]]] = {}
    for layer in layers:
        if layer.kind == "experts":
            yield Abstention(
                "optimizer state",
                layer.path,
                "Several experts are stacked in one tensor; it is not known along which dimension their neurons lie.",
            )
        if layer.kind not in (*NEURON_KINDS, "norm"):
            continue
        known = _known(checkpoint, layer, entries, decays)
        if isinstance(known, str):
            if layer.kind != "norm":
                yield Abstention("optimizer state", layer.path, f"No clock for this layer: {known}.")
            continue
        rule, names = known[layer.weight], tuple(known)
        if rule.name == "SGD":
            place = (entries[names[0]].optimizer, rule.betas[0])
            quiet.setdefault(place, []).append((layer, rule, names))
            continue
        yield _adam(checkpoint, layer, entries, known, newest)
    for (_, momentum), found in quiet.items():
        yield from _sgd(checkpoint, entries, SGDClock(momentum), found)


def _sgd(
    checkpoint: Checkpoint,
    entries: Mapping[str, Entry],
    clock: SGDClock,
    found: Sequence[tuple[Layer, Rule, tuple[str, ...]]],
) -> Iterator[LayerReading]:
    """Read the layers of one optimizer, by the loudest of those whose rows are neurons: a norm's numbers are larger."""
    whole = [_loudness(layer, entries, names) for layer, _, names in found]
    loudest = clock.loudest(
        loudness for loudness, (layer, _, _) in zip(whole, found, strict=True) if layer.kind in NEURON_KINDS
    )
    for loudness, (layer, rule, names) in zip(whole, found, strict=True):
        weights = _loudness(layer, entries, _without_bias(layer, names))
        readings = clock.read_layer(loudness, loudest), clock.read_layer(weights, loudest)
        yield LayerReading(layer, rule, clock, *readings, names, None, 0, checkpoint.step)


def _without_bias(layer: Layer, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name != layer.bias)


def _known(
    checkpoint: Checkpoint, layer: Layer, entries: Mapping[str, Entry], decays: _DecayJudge
) -> dict[str, Rule] | str:
    """The optimizer of each tensor of a layer whose state is known; the weight's must be."""
    weight = entries.get(layer.weight)
    if weight is None:
        return "no entry of an optimizer's state could be tied to its weight; it may be shared with another layer"
    found: dict[str, Rule] = {}
    for name in layer.incoming:
        entry = entries.get(name)
        if entry is None:
            continue
        rule = recognise(entry.group, entry.slots)
        if isinstance(rule, Rule) and not _fits(entry, rule, checkpoint.tensors[name].shape):
            rule = "its optimizer's state has another shape than it has"
        reason = rule if isinstance(rule, str) else decays.reason(entry, rule)
        if reason is not None and name == layer.weight:
            return reason
        if reason is None and isinstance(rule, Rule):
            found[name] = rule
    by_momentum = found[layer.weight].name == "SGD"
    return {name: rule for name, rule in found.items() if (rule.name == "SGD") == by_momentum}


def _fits(entry: Entry, rule: Rule, shape: tuple[int, ...]) -> bool:
    return all(tuple(getattr(entry.slots[slot], "shape", ())) == tuple(shape) for slot in _slots(rule))


def _slots(rule: Rule) -> tuple[str, ...]:
    return ("momentum_buffer",) if rule.name == "SGD" else ("exp_avg", "exp_avg_sq")


class _DecayJudge:
    """Whether weight decay hides what is sought, optimizer by optimizer."""

    def __init__(self, checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> None:
        self._checkpoint = checkpoint
        self._entries = entries
        self._decoupled: dict[int, bool] = {}

    def reason(self, entry: Entry, rule: Rule) -> str | None:
        """Why a parameter's state says nothing of missing gradients; ``None`` where it does."""
        hides = rule.decay.hides
        if hides is False or (hides is None and self._is_decoupled(entry.optimizer)):
            return None
        amount = f"weight decay of {rule.decay.amount:g}"
        if hides is None:
            return (
                f"the file does not say whether its {amount} is AdamW's or Adam's, which is part of the gradient and "
                "hides missing ones"
            )
        return (
            f"the {amount} of its optimizer ({rule.name}) is part of the gradient, so that missing ones cannot be seen"
        )

    def _is_decoupled(self, optimizer: int) -> bool:
        """Whether an optimizer's decay cannot be part of the gradient: a weight that is not zero never got any.

        Coupled decay gives a weight ``w`` the gradient ``λw`` at least once. Its square in ``v`` is not lost where
        ``λ |w|`` is at least 1e-15: ``(1 − β2) 1e-30`` is far from the smallest float32.
        """
        if optimizer not in self._decoupled:
            self._decoupled[optimizer] = any(
                self._proves(name, entry) for name, entry in self._entries.items() if entry.optimizer == optimizer
            )
        return self._decoupled[optimizer]

    def _proves(self, name: str, entry: Entry) -> bool:
        rule = recognise(entry.group, entry.slots)
        tensor = self._checkpoint.tensors[name]
        if isinstance(rule, str) or rule.name == "SGD" or not _fits(entry, rule, tensor.shape):
            return False
        untouched = (_read(entry, "exp_avg") == 0) & (_read(entry, "exp_avg_sq") == 0)
        if not untouched.any():
            return False
        return bool((tensor.read()[untouched].double().abs() * rule.decay.amount > 1e-15).any())


def _read(entry: Entry, slot: str) -> torch.Tensor:
    stored = entry.slots[slot]
    return torch.tensor(stored) if isinstance(stored, (int, float)) else stored.read()


def _newest_steps(entries: Mapping[str, Entry]) -> dict[int, int]:
    """The most steps that any parameter of an optimizer was updated in."""
    newest: dict[int, int] = {}
    for entry in entries.values():
        taken = steps_taken(entry.slots, entry.group)
        if taken is not None:
            newest[entry.optimizer] = max(taken, newest.get(entry.optimizer, 0))
    return newest


def _loudness(layer: Layer, entries: Mapping[str, Entry], names: Sequence[str]) -> Loudness:
    first, *rest = (Loudness.of(layer.rows(_read(entries[name], "momentum_buffer"))) for name in names)
    for other in rest:
        first = first.join(other)
    return first


def _reading(layer: Layer, entry: Entry, rule: Rule) -> ClockReading:
    clock = AdamClock(rule.betas[0], rule.betas[1], steps_taken(entry.slots, entry.group))
    return clock.read(*(layer.rows(_read(entry, slot)) for slot in _slots(rule)))


def _adam(
    checkpoint: Checkpoint,
    layer: Layer,
    entries: Mapping[str, Entry],
    rules: Mapping[str, Rule],
    newest: Mapping[int, int],
) -> LayerReading:
    rule = rules[layer.weight]
    weight = entries[layer.weight]
    taken = steps_taken(weight.slots, weight.group)
    clock = AdamClock(rule.betas[0], rule.betas[1], taken)
    each = {name: _reading(layer, entries[name], rules[name]) for name in rules}
    weights = reduce(ClockReading.join, (each[name] for name in _without_bias(layer, tuple(rules))))
    reading = reduce(ClockReading.join, each.values())
    last = newest.get(weight.optimizer)
    lag = 0 if taken is None or last is None else last - taken
    alone = len(checkpoint.optimizers) == 1
    step = checkpoint.step if alone and checkpoint.step is not None else last
    return LayerReading(layer, rule, clock, reading, weights, tuple(rules), taken, lag, step)
