"""Read the optimizer's clock for the rows of each layer, or report why it cannot be read."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.initial_weights import Shrinkage, as_initialised
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer
from neuronscope.checkpoints.file.optimizer_clocks import (
    SILENT_FOLDS,
    SILENT_STEPS,
    AdamClock,
    BufferPeaks,
    ClockReading,
    SGDClock,
    by_chunks,
)
from neuronscope.checkpoints.file.optimizer_rules import (
    OptimizerRule,
    finite_settings,
    recognize_optimizer,
    steps_taken,
)
from neuronscope.checkpoints.file.parameter_matching import ParameterState
from neuronscope.checkpoints.verdict.evidence import Abstention

__all__ = ["ClockReader", "LayerClock", "NoClock"]

#: Layers are read together until they have so many weights: reading one takes far longer than its numbers do.
_TOGETHER = 1 << 16


#: Largest learning rate · decay, as a share of (1 − momentum)², at which a buffer with decay is read.
_MOST_PULL = 0.15
_AVERAGED = (
    "weight decay is part of its momentum buffer, which must be compared with the weights; but the file's weights are "
    "averages of those that the optimizer trained"
)


@dataclass(frozen=True)
class NoClock:
    """Stands for the clock of an optimizer of whose state only exact zeros can be read."""

    unknown_reason: ClassVar[str] = "only a row that never got a gradient can be told from its state"
    silent_steps: ClassVar[float] = math.inf
    alive_steps: ClassVar[float] = -math.inf
    sure_steps: ClassVar[float] = math.inf

    def read(self, *kept: Tensor) -> ClockReading:
        """Return which of ``N`` rows never got a gradient, by sums or means ``(N, F)`` that are zero only then."""
        never = torch.stack([(one == 0).all(dim=1) for one in kept]).all(dim=0)
        not_finite = torch.stack([~torch.isfinite(one).all(dim=1) for one in kept]).any(dim=0)
        none = torch.full(never.shape, torch.nan, dtype=torch.float64)
        return ClockReading(torch.full_like(none, torch.inf), none, never, not_finite, ~never & ~not_finite)


@dataclass(frozen=True, eq=False)
class LayerClock:
    """The optimizer's clock, read for one layer."""

    layer: Layer
    rule: OptimizerRule  # the optimizer that updates its weight
    clock: AdamClock | SGDClock | NoClock  # the clock of that optimizer
    reading: ClockReading  # what the clock shows for each row
    #: What it shows for each row without the bias, that is, for the parameters that multiply the input.
    weights: ClockReading
    parameters: tuple[str, ...]  # names of the layer's tensors that were read
    #: True for rows without any gradient in this state that no other optimizer seems to have trained before, bool
    #: ``(N,)``: their weights look as they were initialised.
    untrained: Tensor
    #: The training step of the checkpoint, if the optimizer's steps are steps of the training; ``None`` = not known.
    step: int | None
    #: Number of steps in which the layer was updated; ``None`` if its optimizer does not count them.
    taken: int | None = None
    #: Number of its optimizer's steps in which it was not updated: it was frozen, or no gradient reached it.
    lag: int = 0
    began: int | None = None  # the training step at which its optimizer began; ``None`` = not known

    @property
    def is_decayed(self) -> bool:
        """Whether weight decay is part of its momentum buffer."""
        return self.rule.is_momentum and self.rule.decay != 0 and not self.rule.is_decoupled

    @property
    def sure_end(self) -> float:
        """The end of the clock beyond which its rows are inferred, and not only suspected, to be without gradient.

        Where decay is part of the buffer, the end is sharper than a bound: rounding hides little.
        """
        if self.is_decayed and isinstance(self.clock, SGDClock):
            return max(SILENT_FOLDS, SILENT_STEPS * self.clock.fastest_rate) / self.clock.rate
        return self.clock.sure_steps

    @property
    def unknown_reason(self) -> str:
        """Why nothing is known of a row."""
        if self.rule.is_momentum and not self.is_decayed:
            return "their momentum buffers have become too small for the numbers of their dtype"
        return self.clock.unknown_reason

    @property
    def is_bound(self) -> bool:
        """Whether the clock's steps are an upper bound (Adam and its variants), and not an estimate (SGD)."""
        return isinstance(self.clock, AdamClock)


#: A layer, and the optimizer of each of its tensors that is read.
_RuledLayer = tuple[Layer, Mapping[str, OptimizerRule]]


class ClockReader:
    """Reads the clocks of a checkpoint's layers.

    Args:
        checkpoint: The opened checkpoint.
        states: The optimizer state of each parameter.
    """

    def __init__(self, checkpoint: Checkpoint, states: Mapping[str, ParameterState]) -> None:
        self._checkpoint = checkpoint
        self._states = states
        self._newest: dict[int, int] = {}  # the largest number of updates of any parameter, by optimizer
        for state in states.values():
            taken = steps_taken(state.slots, state.group)
            if taken is not None:
                self._newest[state.optimizer] = max(taken, self._newest.get(state.optimizer, 0))
        self._known: dict[tuple[Hashable, ...], OptimizerRule | str] = {}
        self._decoupled: dict[int, bool] = {}

    def read(self, layers: Sequence[Layer]) -> Iterator[LayerClock | Abstention]:
        """Yield the clock of every layer whose rows are neurons and of every norm, or why a layer has none."""
        momentum_layers: dict[tuple[int, SGDClock], list[_RuledLayer]] = {}
        together: list[_RuledLayer] = []
        weights = 0
        for layer in layers:
            if layer.kind == "experts":
                reason = (
                    "Several experts are stacked in one tensor; along which dimension their neurons lie is not known."
                )
                yield Abstention("optimizer state", layer.path, reason)
            if layer.kind not in (*NEURON_KINDS, "norm"):
                continue
            rules = self._find_rules(layer)
            if isinstance(rules, str):
                if layer.kind != "norm":
                    yield Abstention("optimizer state", layer.path, f"No clock for this layer: {rules}.")
                continue
            rule = rules[layer.weight]
            if rule.is_momentum:
                key = self._states[layer.weight].optimizer, SGDClock(rule.betas[0], rule.least_beta)
                momentum_layers.setdefault(key, []).append((layer, rules))
                continue
            together.append((layer, rules))
            weights += math.prod(self._checkpoint.tensors[layer.weight].shape)
            if weights >= _TOGETHER:
                yield from self._read_means(together)
                together, weights = [], 0
        yield from self._read_means(together)
        for (_, clock), found in momentum_layers.items():
            yield from self._read_momentum(clock, found)

    def _find_rules(self, layer: Layer) -> dict[str, OptimizerRule] | str:
        """Return the optimizer of each of a layer's tensors that can be read, or why the weight cannot be read."""
        if layer.weight not in self._states:
            return (
                "no entry of an optimizer's state could be matched to its weight; it may be shared with another layer"
            )
        found: dict[str, OptimizerRule] = {}
        for name in layer.incoming:
            if name in self._states:
                rule = self._recognize(name)
                reason = rule if isinstance(rule, str) else self._why_hidden(self._states[name], rule)
                if reason is None and isinstance(rule, OptimizerRule):
                    found[name] = rule
                elif reason is not None and name == layer.weight:
                    return reason
        own = found[layer.weight]
        return {
            name: rule
            for name, rule in found.items()
            if (rule.source, rule.is_adam, rule.is_momentum) == (own.source, own.is_adam, own.is_momentum)
        }

    def _recognize(self, name: str) -> OptimizerRule | str:
        """Return the optimizer of a parameter: found once for all parameters of a group whose states are alike."""
        state, shape = self._states[name], tuple(self._checkpoint.tensors[name].shape)
        key = id(state.group), *state.slots, *(getattr(kept, "dtype", "") for kept in state.slots.values())
        if key not in self._known:
            self._known[key] = recognize_optimizer(state.group, state.slots)
        rule = self._known[key]
        fits = isinstance(rule, str) or all(
            tuple(getattr(state.slots[slot], "shape", ())) == shape for slot in rule.slots
        )
        return rule if fits else "its optimizer's state has another shape"

    def _why_hidden(self, state: ParameterState, rule: OptimizerRule) -> str | None:
        """Return why weight decay hides missing gradients in a parameter's state; ``None`` if it does not."""
        hides = rule.hides_zero_gradients
        if not rule.is_adam:  # a momentum buffer with decay is compared with the weights; exact zeros are zeros
            if not (rule.is_momentum and hides):
                return None
            return _AVERAGED if self._checkpoint.is_averaged else _why_decay_is_too_fast(state.group, rule)
        if hides is False or (hides is None and self._is_decoupled(state.optimizer)):
            return None
        amount = f"weight decay of {rule.decay:g}"
        if hides is None:
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
            own = [name for name, state in self._states.items() if state.optimizer == optimizer]
            self._decoupled[optimizer] = any(map(self._proves_decoupled, own))
        return self._decoupled[optimizer]

    def _proves_decoupled(self, name: str) -> bool:
        rule = self._recognize(name)
        if isinstance(rule, str) or not rule.is_adam:
            return False
        mean, square = (_read(self._states[name], slot) for slot in rule.slots)
        untouched = (mean == 0) & (square == 0)
        weight = self._checkpoint.tensors[name]
        return bool(untouched.any()) and bool((weight.read()[untouched].double().abs() * rule.decay > 1e-15).any())

    def _read_momentum(self, clock: SGDClock, found: Sequence[_RuledLayer]) -> Iterator[LayerClock]:
        """Read all layers of one optimizer, compared with the largest buffer of linear and convolutional layers.

        Norms are left out of the comparison because their buffers are larger.
        """
        whole = [(layer, rules, self._peaks(layer, rules, clock)) for layer, rules in found]
        largest = max((peaks.largest for layer, _, peaks in whole if layer.kind in NEURON_KINDS), default=0.0)
        for layer, rules, peaks in whole:
            weights = self._peaks(layer, _without_bias(layer, rules), clock, as_one=layer.kind == "norm")
            reading = clock.read_layer(peaks, largest)
            yield LayerClock(
                layer=layer,
                rule=rules[layer.weight],
                clock=clock,
                reading=reading,
                weights=clock.read_layer(weights, largest),
                parameters=tuple(rules),
                untrained=self._as_initialised(layer, rules, reading.never),
                step=self._checkpoint.step,
            )

    def _peaks(
        self, layer: Layer, rules: Mapping[str, OptimizerRule], clock: SGDClock, *, as_one: bool = False
    ) -> BufferPeaks:
        """Return the peaks of a layer's rows. Tensors with one weight decay are compared with their weights together.

        The gains of a norm show decay only ``as_one`` row: each row has a single one, which is a multiple of its
        buffer whatever came.
        """
        by_decay: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for name, rule in rules.items():
            decay = 0.0 if rule.is_decoupled else rule.decay * (1.0 - rule.dampening)
            tensors = (_read(self._states[name], "momentum_buffer"), self._checkpoint.tensors[name].read())
            buffer, weight = (tensor.reshape(1, -1) if as_one else layer.rows(tensor) for tensor in tensors)
            by_decay.setdefault(decay, []).append((buffer, weight))
        found = []
        for decay, parts in by_decay.items():
            if decay == 0.0:
                found += [BufferPeaks.of(buffer) for buffer, _ in parts]
            else:
                buffers, weights = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
                found.append(BufferPeaks(*by_chunks(partial(BufferPeaks.of_decayed, decay, clock), buffers, weights)))
        peaks = reduce(BufferPeaks.join, found)
        return peaks.repeat(layer.width) if as_one else peaks

    def _read_means(self, layers: Sequence[_RuledLayer]) -> Iterator[LayerClock]:
        """Read layers whose optimizer keeps Adam's means, or others of which only exact zeros are read."""
        readings = iter(self._read_together(layers))
        for layer, rules in layers:
            rule, weight = rules[layer.weight], self._states[layer.weight]
            taken, newest = steps_taken(weight.slots, weight.group), self._newest.get(weight.optimizer)
            each = {name: next(readings) for name in rules}
            reading = reduce(ClockReading.join, each.values())
            step, began, may_be_first = self._training_steps(newest)
            yield LayerClock(
                layer=layer,
                rule=rule,
                clock=_clock(rule, taken),
                reading=reading,
                weights=reduce(ClockReading.join, (each[name] for name in _without_bias(layer, rules))),
                parameters=tuple(rules),
                untrained=self._as_initialised(layer, rules, reading.never & may_be_first),
                step=step,
                taken=taken,
                lag=0 if taken is None or newest is None else newest - taken,
                began=began,
            )

    def _as_initialised(self, layer: Layer, rules: Mapping[str, OptimizerRule], rows: Tensor) -> Tensor:
        """Return which of some rows look as they were initialised, bool ``(N,)``."""
        rule, weight = rules[layer.weight], self._states[layer.weight]
        shrinkage = None
        if rule.is_decoupled and rule.decay:
            shrinkage = Shrinkage(
                rule.rate * rule.decay, steps_taken(weight.slots, weight.group) or self._checkpoint.step
            )
        return as_initialised(layer, self._checkpoint.tensors, rows, shrinkage)

    def _read_together(self, layers: Sequence[_RuledLayer]) -> list[ClockReading]:
        """Read the clocks of the tensors of several layers, layer by layer: those that are alike as one."""
        alike: dict[tuple[Hashable, ...], list[tuple[int, AdamClock | NoClock, tuple[Tensor, ...]]]] = {}
        tensors = [(layer, name, rule) for layer, rules in layers for name, rule in rules.items()]
        for number, (layer, name, rule) in enumerate(tensors):
            state = self._states[name]
            kept = tuple(layer.rows(_read(state, slot)) for slot in rule.slots)
            clock = _clock(rule, steps_taken(state.slots, state.group))
            key = clock, kept[0].shape[1], *(tensor.dtype for tensor in kept)
            alike.setdefault(key, []).append((number, clock, kept))
        found: dict[int, ClockReading] = {}
        for members in alike.values():
            numbers, (clock, *_), kept_by_each = zip(*members, strict=True)
            slots = kept_by_each[0] if len(members) == 1 else map(torch.cat, zip(*kept_by_each, strict=True))
            parts = clock.read(*slots).split([kept[0].shape[0] for kept in kept_by_each])
            found.update(zip(numbers, parts, strict=True))
        return [found[at] for at in range(len(tensors))]

    def _training_steps(self, newest: int | None) -> tuple[int | None, int | None, bool]:
        """Return the checkpoint's training step, that at which its optimizer began, and whether this may be the first.

        A file may count other steps than the optimizer's: batches of which several make a step, or the steps of several
        optimizers together. The steps are ``None`` then.
        """
        step = self._checkpoint.step
        if step is None or newest is None or len(self._checkpoint.optimizers) != 1:
            return newest, None, True
        batches = step // newest
        if step < newest or (batches > 1 and step % newest < batches):
            return None, None, step < newest
        return step, step - newest, step == newest


def _why_decay_is_too_fast(group: Mapping[str, Any], rule: OptimizerRule) -> str | None:
    """Return why decay leaves no multiple of the weights in a momentum buffer; ``None`` if it does.

    Without a gradient, a weight and its buffer have two modes: one falls by about μ a step, the other by about
    ``1 − ηλ/(1 − μ)``. They are told apart only if the second is far slower: ``ηλ`` is far below ``(1 − μ)²``.
    """
    rate = max(finite_settings(group, "lr", "initial_lr", "max_lr"), default=math.nan)
    pull = rate * rule.decay * (1.0 - rule.dampening)
    if not pull > _MOST_PULL * (1.0 - rule.betas[0]) ** 2:
        return None
    return (
        f"at a momentum of {rule.betas[0]:g}, a learning rate of {rate:g} and a weight decay of {rule.decay:g}, decay "
        "moves weights as fast as the momentum buffer forgets, so that the two cannot be told apart"
    )


def _without_bias(layer: Layer, rules: Mapping[str, OptimizerRule]) -> dict[str, OptimizerRule]:
    return {name: rule for name, rule in rules.items() if name != layer.bias}


def _read(state: ParameterState, slot: str) -> Tensor:
    stored = state.slots[slot]
    return torch.tensor(stored) if isinstance(stored, (int, float)) else stored.read()


def _clock(rule: OptimizerRule, taken: int | None) -> AdamClock | NoClock:
    return AdamClock(rule.betas[0], rule.betas[1], taken, rule.least_beta) if rule.is_adam else NoClock()
