"""Compare two checkpoints of one run row by row: which neurons got no gradient in between, and which died there.

Three laws hold for a row that gets no gradient over Δ steps: ``v₂ = v₁ β2^Δ``; ``m₂ = m₁ β1^Δ``; and its weights move
by no more than ``m₁`` can still cause, apart from decoupled weight decay, which shrinks all weights of the row by the
same factor for any learning rates. A row that satisfies all three got no gradient, as far as this dtype can show. A
row whose ``v`` or ``|m|`` is larger certainly got one, since nothing else increases them.

SGD with weight decay in its momentum buffer needs another law. Without a gradient of the loss, each step maps the pair
(weight, buffer) of every element by the same two numbers by two, whatever the learning rates are. So the weights and
the buffers of the later checkpoint are combinations of those of the earlier one, with the same factors for the whole
row. A row of which this is true up to rounding got no gradient; one that is far from it certainly got one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint, StoredTensor
from neuronscope.checkpoints.file.layer_clocks import ClockReader, LayerClock
from neuronscope.checkpoints.file.layers import Layer
from neuronscope.checkpoints.file.parameter_matching import ParameterState, match_parameters
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence, evidence_where

__all__ = ["GradientsBetween", "compare_with_earlier"]

_SOURCE = "two checkpoints"

#: Relative error allowed for a decayed number, and what each step adds to it (rounding of the number, and of β).
_RELATIVE, _RELATIVE_A_STEP = 5e-6, 2.0**-23
#: The learning rate in between may have been this many times that of either checkpoint.
_RATE_FACTOR = 30.0
#: A row is far from what it would be without a gradient if it differs by this many times the error that is allowed.
_FAR = 10.0
#: With weight decay in the buffer, the relative error allowed for a whole row of weights, apart from a step's rounding.
_ROW_RELATIVE = 5e-7
#: A row of fewer elements is always near a combination of two others.
_FEWEST_ELEMENTS = 5
_AVERAGED = (
    "The weights of a checkpoint are averages of those that the optimizer trained, which move without a gradient too: "
    "the two checkpoints do not show which neurons got no gradient in between."
)


@dataclass(frozen=True, eq=False)
class GradientsBetween:
    """Which neurons of a layer got a gradient between two checkpoints.

    A neuron that is in neither of the two masks may have got one or not.
    """

    layer: str  # path of the layer
    steps: int  # number of optimizer steps between the two
    none: Tensor  # true for rows that got no gradient, as far as the dtype can show it, bool ``(N,)``
    some: Tensor  # true for rows that certainly got one, bool ``(N,)``
    whole_layer: bool  # whether the whole layer got none: it was frozen, or cut off by a later layer
    short: bool  # whether the time between the two is no longer than a pause: a row that got a gradient is alive


def compare_with_earlier(
    earlier: Checkpoint,
    later: Checkpoint,
    layers: Sequence[Layer],
    states: Mapping[str, ParameterState],
    readings: Sequence[LayerClock],
    parameter_names: Sequence[str] | None = None,
) -> Iterator[Evidence | Abstention | GradientsBetween]:
    """Yield what two checkpoints of one run show together, and for each layer that can be compared, how it is known.

    Args:
        earlier: The earlier checkpoint.
        later: The later checkpoint.
        layers: The layers of the later one.
        states: The optimizer state of each parameter in the later one.
        readings: The clocks of the later one.
        parameter_names: See :func:`neuronscope.checkpoints.file.examine_file.examine_file`.
    """
    if not earlier.optimizers or not later.optimizers:
        reason = "Two checkpoints are compared by the states of their optimizers, but one of them has none."
        yield Abstention(_SOURCE, "", reason)
        return
    first, second = ({name: tuple(value.shape) for name, value in one.tensors.items()} for one in (earlier, later))
    if strange := sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)):
        reason = f"The earlier checkpoint is of another network: {len(strange)} tensors differ, {strange[0]!r} first."
        yield Abstention(_SOURCE, "", reason)
        return
    if earlier.is_averaged or later.is_averaged:
        yield Abstention(_SOURCE, "", _AVERAGED)
    before = match_parameters(earlier, parameter_names)[0]
    readings_before = ClockReader(earlier, before).read(layers)
    clocks = {read.layer.path: read for read in readings_before if isinstance(read, LayerClock)}
    for end in readings:
        start = clocks.get(end.layer.path)
        if start is None:
            yield Abstention(_SOURCE, end.layer.path, "The earlier checkpoint has no clock for this layer.")
        elif isinstance(steps := _steps_between(start, end), str):
            yield Abstention(_SOURCE, end.layer.path, steps)
        else:
            between = _Pair((earlier, later), (before, states), (start, end), steps).gradients()
            yield between
            yield from _judge(start, end, between)


def _steps_between(start: LayerClock, end: LayerClock) -> int | str:
    """Return the number of updates of a layer between the two checkpoints, or why they cannot be compared."""
    if not end.rule.betas:
        return f"There is {end.rule.no_clock}."
    if start.is_decayed != end.is_decayed:
        return "Weight decay was switched on or off in between."
    if start.rule.betas != end.rule.betas:
        return f"The optimizer's betas were changed in between, from {start.rule.betas} to {end.rule.betas}."
    first, last = (start.taken, end.taken) if start.taken is not None else (start.step, end.step)
    if first is None or last is None:
        return "The two checkpoints do not say how many steps lie between them."
    if last <= first:
        return f"The layer was not updated in between: its step is {first} and then {last}."
    return last - first


class _Pair:
    """One layer in both checkpoints, each attribute with the earlier one first."""

    def __init__(
        self,
        checkpoints: tuple[Checkpoint, Checkpoint],
        states: tuple[Mapping[str, ParameterState], Mapping[str, ParameterState]],
        clocks: tuple[LayerClock, LayerClock],
        steps: int,
    ) -> None:
        self.checkpoints, self.states, self.clocks, self.steps = checkpoints, states, clocks, steps
        self._layer = clocks[1].layer
        self._names = [name for name in clocks[1].parameters if name in clocks[0].parameters]
        self._tolerance = _RELATIVE + _RELATIVE_A_STEP * steps

    def gradients(self) -> GradientsBetween:
        """Return which rows got a gradient, without those of which a clock shows nothing."""
        end = self.clocks[1]
        no_gradient, touched = self._decayed_tests() if end.is_decayed else self._tests()
        readable = self.clocks[0].reading.readable & end.reading.readable
        none, some = no_gradient & readable, touched & readable & ~no_gradient
        whole = bool((none | end.reading.never).all())
        return GradientsBetween(end.layer.path, self.steps, none, some, whole, self.steps <= end.clock.silent_steps)

    def _tests(self) -> tuple[Tensor, Tensor]:
        """Return which rows got no gradient as far as can be seen, and which certainly got one, both bool ``(N,)``."""
        averaged = any(one.is_averaged for one in self.checkpoints)
        kept = torch.full((self._layer.width,), not averaged)
        touched = torch.zeros(self._layer.width, dtype=torch.bool)
        for name in self._names:
            room = self._means(name, touched)
            if not averaged:
                self._weights(name, room, kept)
        return kept & ~touched, touched

    def _decayed_tests(self) -> tuple[Tensor, Tensor]:
        """Return the same as :meth:`_tests`, for a momentum buffer that weight decay is part of."""
        columns: list[list[Tensor]] = [[], [], [], []]  # weights and buffers of the earlier and of the later one
        for name in self._names:
            for at, (checkpoint, states) in enumerate(zip(self.checkpoints, self.states, strict=True)):
                columns[2 * at].append(self._rows(checkpoint.tensors[name]))
                columns[2 * at + 1].append(self._rows(states[name].slots["momentum_buffer"]))
        w1, b1, w2, b2 = (torch.cat(parts, dim=1) for parts in columns)
        first, last = (clock.rule for clock in self.clocks)
        momentum, epsilon = first.betas[0], torch.finfo(torch.float32).eps
        # Rounding moves each weight by half of its epsilon a step at most, and a decayed buffer follows the weights.
        size, old = w1.norm(dim=1), b1.norm(dim=1) * momentum**self.steps
        allowed_weights = (_ROW_RELATIVE + epsilon / 2.0 * self.steps) * size
        decayed = last.decay / (1.0 - momentum) * size
        allowed_buffers = epsilon * ((decayed + old) / (1.0 - momentum) + old * self.steps / 2.0)
        ratios = [_distance(w2, w1, b1) / allowed_weights, _distance(b2, w2, b1) / allowed_buffers]
        largest = torch.stack(ratios).amax(dim=0)  # NaN if any number is
        informative = (w1 != 0).sum(dim=1) >= _FEWEST_ELEMENTS
        return (largest <= 1.0) & informative, (largest > _FAR) & informative

    def _rows(self, value: StoredTensor | float) -> Tensor:
        tensor = torch.tensor(value) if isinstance(value, (int, float)) else value.read()
        return self._layer.rows(tensor).double()

    def _means(self, name: str, touched: Tensor) -> Tensor:
        """Mark rows of ``touched`` ``(N,)`` whose means grew.

        Return how far each weight can move without a gradient, ``(N, F)``.
        """
        rule = self.clocks[0].rule
        first, last = (states[name].slots for states in self.states)
        beta = rule.betas[0]
        tiny = torch.finfo(torch.float32).tiny
        m1, m2 = (self._rows(slots[rule.slots[0]]) for slots in (first, last))
        left = m1.abs() * beta**self.steps * (1 + self._tolerance) + 4 * tiny
        touched |= (m2.abs() > left).any(dim=1)
        rates = [clock.rule.rate for clock in self.clocks if math.isfinite(clock.rule.rate)]
        rate = _RATE_FACTOR * max(rates, default=math.inf)
        if not rule.is_adam:
            return rate * m1.abs() * beta / (1.0 - beta)
        beta2 = rule.betas[1]
        v1, v2 = (self._rows(slots[rule.slots[1]]) for slots in (first, last))
        left = v1 * beta2**self.steps * (1 + self._tolerance) + 65536 * tiny
        touched |= (v2 > left).any(dim=1)
        # Step j moves a weight by at most lr · r₁ (β1/√β2)^j. The sum over all j is geometric, and the bias correction
        # of m in early steps is at most 1 / (1 − β1).
        shrink = beta / math.sqrt(beta2)
        ratio = torch.where(v1 > 0, m1.abs() / v1.clamp(min=tiny).sqrt(), 0.0)
        return rate * ratio * shrink / (1.0 - shrink) / (1.0 - beta)

    def _weights(self, name: str, room: Tensor, kept: Tensor) -> None:
        """Unmark rows of ``kept`` ``(N,)`` whose weights moved farther than the ``room`` ``(N, F)`` that they have."""
        w1, w2 = (self._rows(one.tensors[name]) for one in self.checkpoints)
        if self.states[1][name].group.get("weight_decay"):
            # Decay shrinks the whole row by one factor: that of its largest weight.
            place = w1.abs().argmax(dim=1, keepdim=True)
            top = w1.gather(1, place)
            factor = torch.where(top == 0, 1.0, w2.gather(1, place) / torch.where(top == 0, 1.0, top))
            slack = torch.where(top == 0, 0.0, room.gather(1, place) / torch.where(top == 0, 1.0, top).abs())
            kept &= ((factor > -slack) & (factor <= 1 + self._tolerance + slack)).flatten()
            moved = w2 - w1 * factor
            room = room + room.gather(1, place)
        else:
            moved = w2 - w1
        kept &= (moved.abs() <= room + 2 * self._tolerance * w1.abs()).all(dim=1)


def _distance(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return how far each row is from all combinations of two others, ``(N,)``; all rows are float64 ``(N, F)``."""
    basis = torch.linalg.qr(torch.stack([first, second], dim=2)).Q  # (N, F, 2)
    along = basis @ (basis.transpose(1, 2) @ rows[:, :, None])
    distance: Tensor = torch.linalg.vector_norm(rows - along[:, :, 0], dim=1)
    return distance


def _judge(start: LayerClock, end: LayerClock, between: GradientsBetween) -> Iterator[Evidence]:
    """Yield evidence on the rows that got no gradient, that stopped getting one, and that got one."""
    before, after, passed, whole = start.reading, end.reading, between.steps, between.whole_layer
    no_gradient, touched = between.none & ~after.never, between.some
    evidence = partial(evidence_where, end.layer.path, source=_SOURCE)
    if between.short:  # a neuron that fires rarely gets no gradient either
        no_gradient = torch.zeros_like(no_gradient)
    since = None
    if start.step is not None and not start.lag:
        dated = torch.where(torch.isfinite(before.steps), before.steps, 0.0)
        since = (start.step - dated).clamp(min=0.0).long()
    of_layer = (
        " The whole layer got none: it was frozen, or cut off by a later layer. This says nothing about these neurons "
        "themselves."
    )
    yield from evidence(
        no_gradient,
        torch.full(no_gradient.shape, float(passed), dtype=torch.float64),
        claim="no gradient",
        basis="inferred" if passed > end.clock.sure_steps else "suspected",
        measure="steps without a gradient, at least",
        text=(
            f"Over the {passed} steps between the two checkpoints, the optimizer's means and the weights changed "
            f"exactly as they do without a gradient.{of_layer if whole else ''}"
        ),
        since=since,
        whole_layer=whole,
    )
    within = after.steps.clamp(max=float(passed))
    died = touched & (within > end.clock.silent_steps)
    sure = within > end.clock.sure_steps
    is_dated = end.step is not None and not end.lag
    for basis, mask in (("inferred", died & sure), ("suspected", died & ~sure)):
        yield from evidence(
            mask,
            within,
            claim="no gradient",
            basis=basis,
            measure=f"steps since the last gradient, {'at most' if end.is_bound else 'about'}",
            text=(
                "It got a gradient after the earlier checkpoint, and none recently by the later one's clock: its "
                "gradient stopped in between."
            ),
            since=((end.step or 0) - within).clamp(min=0.0).long() if is_dated else None,
        )
    yield from evidence(
        touched & ~died,
        within,
        claim="alive",
        basis="inferred",
        measure="steps since the last gradient, at most",
        text="The optimizer's state is not what decay alone makes of the earlier one: it got a gradient in between.",
    )
