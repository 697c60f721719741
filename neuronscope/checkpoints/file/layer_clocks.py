"""Read the optimizer's clock for the rows of each layer, or report why it cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.adam_clock import AdamClock, ClockReading
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer
from neuronscope.checkpoints.file.optimizer_rules import OptimizerRule, recognize_optimizer, steps_taken
from neuronscope.checkpoints.file.parameter_matching import ParameterState
from neuronscope.checkpoints.file.sgd_clock import BufferPeaks, SGDClock
from neuronscope.checkpoints.verdict.evidence import Abstention

__all__ = ["LayerClock", "read_clocks"]


@dataclass(frozen=True, eq=False)
class LayerClock:
    """The optimizer's clock, read for one layer.

    Attributes:
        layer: The layer.
        rule: The optimizer that updates its weight.
        clock: The clock of that optimizer.
        reading: What the clock shows for each row.
        weights: What it shows for each row without the bias, that is, for the parameters that multiply the input.
        parameters: Names of the layer's tensors that were read.
        taken: Number of steps in which the layer was updated; ``None`` if its optimizer does not count them.
        lag: Number of its optimizer's steps in which it was not updated: it was frozen, or no gradient reached it.
        step: The training step of the checkpoint; ``None`` = not known.
    """

    layer: Layer
    rule: OptimizerRule
    clock: AdamClock | SGDClock
    reading: ClockReading
    weights: ClockReading
    parameters: tuple[str, ...]
    taken: int | None
    lag: int
    step: int | None

    @property
    def is_bound(self) -> bool:
        """Whether the clock's steps are an upper bound (Adam and its variants), and not an estimate (SGD)."""
        return isinstance(self.clock, AdamClock)


def read_clocks(
    checkpoint: Checkpoint, layers: Sequence[Layer], states: Mapping[str, ParameterState]
) -> Iterator[LayerClock | Abstention]:
    """Yield the clock of every layer whose rows are neurons and of every norm, or why a layer has none.

    Args:
        checkpoint: The opened checkpoint.
        layers: Its layers.
        states: The optimizer state of each parameter; see
            :func:`neuronscope.checkpoints.file.parameter_matching.match_parameters`.
    """
    newest = _newest_steps(states)
    decay_check = _DecayCheck(checkpoint, states)
    sgd_layers: dict[tuple[int, float], list[tuple[Layer, OptimizerRule, tuple[str, ...]]]] = {}
    for layer in layers:
        if layer.kind == "experts":
            yield Abstention(
                "optimizer state",
                layer.path,
                "Several experts are stacked in one tensor; along which dimension their neurons lie is not known.",
            )
        if layer.kind not in (*NEURON_KINDS, "norm"):
            continue
        known = _find_rules(checkpoint, layer, states, decay_check)
        if isinstance(known, str):
            if layer.kind != "norm":
                yield Abstention("optimizer state", layer.path, f"No clock for this layer: {known}.")
            continue
        rule, names = known[layer.weight], tuple(known)
        if rule.name == "SGD":
            key = (states[names[0]].optimizer, rule.betas[0])
            sgd_layers.setdefault(key, []).append((layer, rule, names))
            continue
        yield _read_adam(checkpoint, layer, states, known, newest)
    for (_, momentum), found in sgd_layers.items():
        yield from _read_sgd(checkpoint, states, SGDClock(momentum), found)


def _read_sgd(
    checkpoint: Checkpoint,
    states: Mapping[str, ParameterState],
    clock: SGDClock,
    found: Sequence[tuple[Layer, OptimizerRule, tuple[str, ...]]],
) -> Iterator[LayerClock]:
    """Read all layers of one optimizer, compared with the largest buffer of linear and convolutional layers.

    Norms are left out of the comparison because their buffers are larger.
    """
    whole = [_peaks(layer, states, names) for layer, _, names in found]
    largest = clock.largest(
        peaks for peaks, (layer, _, _) in zip(whole, found, strict=True) if layer.kind in NEURON_KINDS
    )
    for peaks, (layer, rule, names) in zip(whole, found, strict=True):
        weights = _peaks(layer, states, _without_bias(layer, names))
        readings = clock.read_layer(peaks, largest), clock.read_layer(weights, largest)
        yield LayerClock(layer, rule, clock, *readings, names, None, 0, checkpoint.step)


def _without_bias(layer: Layer, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name != layer.bias)


def _find_rules(
    checkpoint: Checkpoint, layer: Layer, states: Mapping[str, ParameterState], decay_check: _DecayCheck
) -> dict[str, OptimizerRule] | str:
    """Return the optimizer of each of a layer's tensors that can be read, or why the weight cannot be read."""
    weight = states.get(layer.weight)
    if weight is None:
        return "no entry of an optimizer's state could be matched to its weight; it may be shared with another layer"
    found: dict[str, OptimizerRule] = {}
    for name in layer.incoming:
        state = states.get(name)
        if state is None:
            continue
        rule = recognize_optimizer(state.group, state.slots)
        if isinstance(rule, OptimizerRule) and not _fits(state, rule, checkpoint.tensors[name].shape):
            rule = "its optimizer's state has another shape"
        reason = rule if isinstance(rule, str) else decay_check.reason(state, rule)
        if reason is not None and name == layer.weight:
            return reason
        if reason is None and isinstance(rule, OptimizerRule):
            found[name] = rule
    by_momentum = found[layer.weight].name == "SGD"
    return {name: rule for name, rule in found.items() if (rule.name == "SGD") == by_momentum}


def _fits(state: ParameterState, rule: OptimizerRule, shape: tuple[int, ...]) -> bool:
    return all(tuple(getattr(state.slots[slot], "shape", ())) == tuple(shape) for slot in _slots(rule))


def _slots(rule: OptimizerRule) -> tuple[str, ...]:
    return ("momentum_buffer",) if rule.name == "SGD" else ("exp_avg", "exp_avg_sq")


class _DecayCheck:
    """Checks for each optimizer whether weight decay hides missing gradients."""

    def __init__(self, checkpoint: Checkpoint, states: Mapping[str, ParameterState]) -> None:
        self._checkpoint = checkpoint
        self._entries = states
        self._decoupled: dict[int, bool] = {}

    def reason(self, state: ParameterState, rule: OptimizerRule) -> str | None:
        """Return why a parameter's state cannot show missing gradients; ``None`` if it can."""
        hides_zero_gradients = rule.decay.hides_zero_gradients
        if hides_zero_gradients is False or (hides_zero_gradients is None and self._is_decoupled(state.optimizer)):
            return None
        amount = f"weight decay of {rule.decay.amount:g}"
        if hides_zero_gradients is None:
            return (
                f"the file does not say whether its {amount} is AdamW's or Adam's; Adam's is added to the gradient, so "
                "that missing gradients cannot be seen"
            )
        return (
            f"the {amount} of its optimizer ({rule.name}) is added to the gradient, so that missing gradients cannot "
            "be seen"
        )

    def _is_decoupled(self, optimizer: int) -> bool:
        """Whether an optimizer's decay is certainly not added to the gradient: a nonzero weight never got a gradient.

        Coupled decay gives a weight ``w`` the gradient ``λw`` at least once. Its square in ``v`` does not underflow if
        ``λ |w|`` is at least 1e-15: ``(1 − β2) 1e-30`` is far above the smallest float32.
        """
        if optimizer not in self._decoupled:
            self._decoupled[optimizer] = any(
                self._proves(name, state) for name, state in self._entries.items() if state.optimizer == optimizer
            )
        return self._decoupled[optimizer]

    def _proves(self, name: str, state: ParameterState) -> bool:
        rule = recognize_optimizer(state.group, state.slots)
        tensor = self._checkpoint.tensors[name]
        if isinstance(rule, str) or rule.name == "SGD" or not _fits(state, rule, tensor.shape):
            return False
        untouched = (_read(state, "exp_avg") == 0) & (_read(state, "exp_avg_sq") == 0)
        if not untouched.any():
            return False
        return bool((tensor.read()[untouched].double().abs() * rule.decay.amount > 1e-15).any())


def _read(state: ParameterState, slot: str) -> torch.Tensor:
    stored = state.slots[slot]
    return torch.tensor(stored) if isinstance(stored, (int, float)) else stored.read()


def _newest_steps(states: Mapping[str, ParameterState]) -> dict[int, int]:
    """Return the largest number of updates of any parameter, by optimizer."""
    newest: dict[int, int] = {}
    for state in states.values():
        taken = steps_taken(state.slots, state.group)
        if taken is not None:
            newest[state.optimizer] = max(taken, newest.get(state.optimizer, 0))
    return newest


def _peaks(layer: Layer, states: Mapping[str, ParameterState], names: Sequence[str]) -> BufferPeaks:
    first, *rest = (BufferPeaks.of(layer.rows(_read(states[name], "momentum_buffer"))) for name in names)
    for other in rest:
        first = first.join(other)
    return first


def _reading(layer: Layer, state: ParameterState, rule: OptimizerRule) -> ClockReading:
    clock = AdamClock(rule.betas[0], rule.betas[1], steps_taken(state.slots, state.group))
    return clock.read(*(layer.rows(_read(state, slot)) for slot in _slots(rule)))


def _read_adam(
    checkpoint: Checkpoint,
    layer: Layer,
    states: Mapping[str, ParameterState],
    rules: Mapping[str, OptimizerRule],
    newest: Mapping[int, int],
) -> LayerClock:
    rule = rules[layer.weight]
    weight = states[layer.weight]
    taken = steps_taken(weight.slots, weight.group)
    clock = AdamClock(rule.betas[0], rule.betas[1], taken)
    each = {name: _reading(layer, states[name], rules[name]) for name in rules}
    weights = reduce(ClockReading.join, (each[name] for name in _without_bias(layer, tuple(rules))))
    reading = reduce(ClockReading.join, each.values())
    last = newest.get(weight.optimizer)
    lag = 0 if taken is None or last is None else last - taken
    alone = len(checkpoint.optimizers) == 1
    step = checkpoint.step if alone and checkpoint.step is not None else last
    return LayerClock(layer, rule, clock, reading, weights, tuple(rules), taken, lag, step)
