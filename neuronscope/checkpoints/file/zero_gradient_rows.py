"""Report which neurons got no gradient recently, or never, by the optimizer's clock, and which did.

If a whole layer gets none, it has collapsed, or it was only cut off by a later layer, or frozen. It has collapsed if
all its neurons output zero. The optimizer's state shows this at the next layer, which reads the output. If the next
layer's weights get no gradient while its bias does, the loss still reaches the next layer, and its input must be zero:
the layer before it has collapsed. A frozen layer still outputs numbers, so the weights of the next layer get gradients.

Layers are taken in the order of the file, which is the order in which the network's modules were created.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.file.layer_clocks import LayerClock
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer
from neuronscope.checkpoints.file.optimizer_clocks import SILENT_STEPS, ClockReading, SGDClock
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence, evidence_where

__all__ = ["LayerGradients", "find_no_gradient_causes"]

#: Steps by which the clocks of rows that stopped together may differ (measured: docs/optimizer-clock.md).
_TOGETHER = 30
#: With no gradient at all in more steps than this of an optimizer, silence is inferred.
_LONG = 200
#: When a bound holds: whoever changes the betas by hand leaves no trace of the earlier ones in the file.
_ANY_GRADIENTS = "for any gradients under the betas that the file holds"


class LayerGradients:
    """The neurons of one layer by its clock; masks are bool ``(N,)``.

    Args:
        read: The layer's clock.
        cause: Why the whole layer gets no gradient; ``None`` if it gets one, or the cause is not known.
    """

    def __init__(self, read: LayerClock, cause: NoGradientCause | None) -> None:
        self._read, self._cause = read, cause
        self._path, self._source = read.layer.path, read.rule.source
        self._has_collapsed = cause is not None and cause.kind == "collapsed"  # as the next layer's clock shows
        measure = "steps since the last gradient, " + ("at most" if read.is_bound else "about")
        self._measured: dict[str, Any] = {"numbers": read.reading.steps, "measure": measure}

    @property
    def _is_slow(self) -> bool:
        """Whether the clock is an estimate that may be wrong by hundreds of steps."""
        return isinstance(self._read.clock, SGDClock) and self._read.clock.is_slow

    def evidence(self) -> Iterator[Evidence | Abstention]:
        """Yield what the clock shows, and what it does not."""
        read, reading = self._read, self._read.reading
        limit, no_clock = read.clock.silent_steps, read.rule.no_clock
        is_short = read.taken is not None and read.taken - 1 <= limit
        never = reading.never & reading.readable
        stopped = reading.readable & ~never & (reading.steps > limit)
        alive = reading.readable & ~never & (reading.steps <= read.clock.alive_steps)
        unsure = reading.readable & ~never & ~stopped & ~alive
        if not no_clock and not is_short and bool(alive.all()):
            yield from self._alive(alive)
            return
        if reading.not_finite.any():
            count = int(reading.not_finite.sum())
            yield self._abstain(f"The optimizer's state of {count} neurons is NaN or infinite.")
        unknown = reading.unknown & ~reading.not_finite
        if unknown.any() and self._has_collapsed:
            text = "The layer's own clock does not tell when the last gradient came." + self._why("")
            yield from self._evidence(unknown, True, claim="no gradient", basis="inferred", text=text)
        elif no_clock:
            yield self._abstain(f"There is {no_clock}; {read.unknown_reason}.")
        elif unknown.any():
            yield self._abstain(f"Nothing is known of {int(unknown.sum())} neurons: {read.unknown_reason}.")
        if unsure.any():
            yield self._abstain(
                f"Nothing is known of {int(unsure.sum())} neurons: a momentum of {read.rule.betas[0]:g} forgets so "
                "slowly that a small gradient and one that ended hundreds of steps ago leave the same buffer."
            )
        if is_short and not no_clock:
            yield self._abstain(
                f"The layer was updated {read.taken} times; the clock needs more than {limit:.0f} steps to tell a "
                "pause from the end of gradients."
            )
        yield from self._never(never)
        if no_clock or is_short:
            return
        undated = stopped & torch.isinf(reading.steps)
        dated = stopped & ~undated
        together = self._stopped_together(dated, undated, whole=bool((never | stopped).all()))
        for found, sure, describe in (
            (dated, reading.steps > read.clock.sure_steps, self._stopped),
            (undated, reading.least_steps > read.sure_end, self._undated),
        ):
            for as_whole, part in ((False, found & ~together), (True, found & together)):
                yield from describe(part & sure, "inferred", as_whole)
                yield from describe(part & ~sure, "suspected", as_whole)
        yield from self._alive(alive)

    def _abstain(self, reason: str) -> Abstention:
        return Abstention(self._source, self._path, reason)

    def _stopped_together(self, dated: Tensor, undated: Tensor, *, whole: bool) -> Tensor:
        """Return the rows that stopped because the whole layer gets no gradient, if it gets none.

        Rows that stopped well before its last ones did so one by one, unless the layer has collapsed.
        """
        if self._cause is not None and self._cause.kind != "cut off":
            return dated | undated
        if not whole:
            return torch.zeros_like(dated)
        steps = self._read.reading.steps
        return dated & (steps <= steps[dated].min() + _TOGETHER) if dated.any() else undated

    def _alive(self, mask: Tensor) -> Iterator[Evidence]:
        """Yield evidence on rows that got a gradient lately."""
        how = f"{_ANY_GRADIENTS}." if self._read.is_bound else "by comparison with the layer's largest."
        text = f"The optimizer's running means show a gradient within this many steps, {how}"
        basis = "suspected" if self._is_slow else "inferred"
        return self._evidence(mask, False, claim="alive", basis=basis, text=text, **self._measured)

    def _never(self, mask: Tensor) -> Iterator[Evidence]:
        """Yield evidence on rows of exact zeros; another optimizer may have trained them before this one began."""
        read, taken, whole = self._read, self._read.taken, bool(mask.all())
        text = f"The optimizer's {' and '.join(read.rule.slots)} of all incoming weights are exactly zero: "
        none = "none ever got a gradient" + (
            "" if read.rule.is_momentum else ", or none whose square this dtype can hold"
        )
        why = self._why("it was cut off from the loss, or multiplied by zero, from the start") if whole else ""
        yield from self._evidence(
            mask & read.untrained,
            whole,
            claim="never trained",
            basis="inferred",
            text=f"{text}{none}.{why}",
            since=torch.full(mask.shape, -1),
        )
        if taken is not None and taken - 1 <= SILENT_STEPS:
            return
        is_sure = self._has_collapsed or (taken is not None and taken - 1 > _LONG)
        began = "" if taken is None else f" ({taken:,} of its steps ago)"
        if read.began:
            began = f" (its step 0 is step {read.began:,})"
        text += f"no gradient came since this optimizer began{began}. Others may have trained them before.{why}"
        yield from self._evidence(
            mask & ~read.untrained,
            whole,
            claim="no gradient",
            basis="inferred" if is_sure else "suspected",
            text=text,
            numbers=None if taken is None else torch.full(mask.shape, float(taken), dtype=torch.float64),
            measure="" if taken is None else "steps without a gradient, at least",
        )

    def _stopped(self, mask: Tensor, basis: str, as_whole: bool) -> Iterator[Evidence]:
        """Yield evidence on rows that the clock dates; ``as_whole``: the last rows of the layer."""
        read = self._read
        cycled = read.rule.betas[0] != read.rule.least_beta
        if read.is_bound:
            limit, living = {
                "inferred": (read.clock.sure_steps, "at most 1 %"),
                "suspected": (read.clock.silent_steps, "up to 40 %" if cycled else "1 to 22 %"),
            }[basis]
            text = (
                f"The last gradient came at most this many steps ago, {_ANY_GRADIENTS}. Since that is more than "
                f"{limit:.0f} steps, it is {basis} that none came since: in our measurements, {living} of living "
                "neurons had such a bound too."
            )
        else:
            text = (
                "The momentum buffer is smaller than the layer's largest by as much as this many steps without "
                f"gradient make it: an estimate, accurate to some {'hundreds' if self._is_slow else 'tens'} of steps."
            )
        if as_whole:
            text += self._why("it was frozen, or cut off by a later layer, or its gradients became far smaller")
        since = None
        # Only a bound dates a whole layer: SGD's estimate compares with the largest layer, which may have stopped
        # since. Nor does an estimate date rows whose momentum a schedule cycles, since it would have to know it; nor
        # rows whose buffer forgets slowly, since it is wrong by hundreds of steps.
        if read.step is not None and not read.lag and (read.is_bound or not (as_whole or cycled or self._is_slow)):
            since = (read.step - read.reading.steps.nan_to_num(posinf=0.0)).clamp(min=0.0).long()
        return self._evidence(
            mask, as_whole, claim="no gradient", basis=basis, text=text, since=since, **self._measured
        )

    def _undated(self, mask: Tensor, basis: str, as_whole: bool) -> Iterator[Evidence]:
        """Yield evidence on rows whose state has faded beyond the end of the clock."""
        if self._read.is_decayed:
            text = (
                "The momentum buffer is a multiple of the weights, up to rounding, as weight decay alone makes it: the "
                "last gradient came about this many steps ago, or earlier. In our measurements, 0.6 % of living "
                "neurons had such a buffer too, since their gradients were far smaller than weight decay."
            )
        else:
            text = (
                "The running mean of gradients has decayed below the smallest numbers of its dtype, where the clock "
                "ends: the last gradient came about this many steps ago, or earlier."
            )
        if as_whole:
            text += self._why("it was frozen, or cut off by a later layer")
        return self._evidence(
            mask,
            as_whole,
            claim="no gradient",
            basis=basis,
            text=text,
            numbers=self._read.reading.least_steps,
            measure="steps since the last gradient, about or more",
        )

    def _why(self, unknown: str) -> str:
        """Return why the whole layer gets no gradient, as a sentence; with the clause ``unknown`` if no cause is."""
        if self._cause is None or self._cause.kind == "cut off":
            why = unknown if self._cause is None else self._cause.text
            return f" The whole layer gets none: {why}. This says nothing about these neurons themselves."
        return f" The whole layer gets none, and {self._cause.text}."

    def _evidence(self, mask: Tensor, whole: bool, *, text: str, **fields: Any) -> Iterator[Evidence]:
        """Yield evidence on rows of the layer, or on the whole layer, with what limits it.

        Evidence on a whole layer is about its neurons too if the layer has collapsed, else about the layer only. The
        next layer's clock supports the layer's own. Thus a collapse is inferred even if each alone is only suspected.
        """
        if whole and (self._cause is None or self._cause.kind == "cut off"):
            fields["whole_layer"] = True
        elif whole and self._cause is not None:
            fields |= {"collapsed": True, "basis": "inferred" if self._has_collapsed else "suspected"}
        read = self._read
        if read.lag:
            text += (
                f" The layer was left out of {read.lag} of its optimizer's steps (frozen, or unused); only the other "
                "steps are counted."
            )
        if read.layer.bias is not None and read.layer.bias not in read.parameters:
            text += " The bias is not included."
        if not read.layer.axis_known:
            text += " The neuron axis of the weight is the usual one; the file does not confirm it."
        return evidence_where(self._path, mask, source=self._source, text=text, **fields)


@dataclass(frozen=True)
class NoGradientCause:
    """Why a whole layer gets no gradient."""

    kind: str  # ``collapsed``; ``unsure`` = collapsed or frozen; ``cut off`` = by a layer that has collapsed
    text: str  # how this is known, as a clause for the reader


@dataclass(frozen=True, eq=False)
class _LayerState:
    """What the clocks show about a layer, together with the norm after it if the norm replaces its bias."""

    layer: Layer
    has_bias: bool  # whether it adds a term that does not depend on its input
    no_gradient: bool  # whether none of its parameters gets a gradient
    is_open: bool  # whether its clock shows neither that nor a gradient
    input_is_zero: bool  # whether its bias still got gradients when the parameters that multiply its input got none
    is_hidden: bool  # whether its rows are neurons, as far as is known
    still_updated: bool  # whether its optimizer continued to update it, as far as the file shows

    @property
    def may_have_collapsed(self) -> bool:
        """Whether it shows no gradient, and its rows are neurons."""
        return (self.no_gradient or self.is_open) and self.is_hidden


def find_no_gradient_causes(
    layers: Sequence[Layer],
    clocks: Mapping[str, LayerClock],
    linear: Collection[str] = (),
    behind_activation: Mapping[str, bool] | None = None,
) -> dict[str, NoGradientCause]:
    """Return by path why whole layers get no gradient, as far as the clocks of the layers around them show it.

    A layer that is missing was frozen or cut off, as far as is known.

    Args:
        layers: The checkpoint's layers, in the order of the file.
        clocks: The clocks of the layers that have one, by path.
        linear: Paths of layers that no activation follows, if the model is known: they have no neurons that could have
            collapsed. Of a gated product's two factors, the one without an activation is such a layer.
        behind_activation: Whether an activation lies between a norm and the layer before it, by the norm's path, where
            this is known.
    """
    states = list(_layer_states(layers, clocks, linear, behind_activation or {}))
    causes: dict[str, NoGradientCause] = {}
    for index, state in enumerate(states):
        at = _input_at(states, index) if state.input_is_zero else None
        if at is None:
            continue
        source = states[at].layer
        read = _input_at(states, at) if state.layer.kind == "norm" else None
        if read is not None and (earlier := states[read].layer.path) in causes:
            # A norm makes zeros of constants, and a layer that reads a collapsed one gives constants.
            text = f"since the collapse of {earlier} it gives constants, which the norm behind it makes zeros of"
            causes.setdefault(source.path, NoGradientCause("cut off", text))
            continue
        text = f"its input is zero since the collapse of {source.path}, and only its bias got gradients"
        causes.setdefault(state.layer.path, NoGradientCause("cut off", text))
        text = (
            f"the weights of {state.layer.path}, which reads it, got none either while its bias still did: the input "
            "there is zero. The layer has collapsed"
        )
        causes[source.path] = NoGradientCause("collapsed", text)
    for layer, text in _unsure(states):
        causes.setdefault(layer.path, NoGradientCause("unsure", text))
    for index, state in enumerate(states):
        if state.layer.path in causes and causes[state.layer.path].kind == "collapsed":
            for before in reversed(states[:index]):
                if not before.no_gradient:
                    break
                if before.may_have_collapsed:
                    text = f"it is cut off by the collapse of {state.layer.path}"
                    causes.setdefault(before.layer.path, NoGradientCause("cut off", text))
    return causes


def _layer_states(
    layers: Sequence[Layer],
    clocks: Mapping[str, LayerClock],
    linear: Collection[str],
    behind_activation: Mapping[str, bool],
) -> Iterator[_LayerState]:
    left = iter(zip_longest(layers, layers[1:]))
    for layer, norm in left:
        if layer.path not in clocks:
            continue
        parts, has_bias = [clocks[layer.path]], layer.bias is not None
        followed = norm and norm.kind == "norm" and norm.width == layer.width and norm.path in clocks
        # A layer without bias is mostly followed by its norm, which has one.
        if followed and not behind_activation.get(norm.path, has_bias):
            parts.append(clocks[norm.path])
            has_bias = has_bias or norm.bias is not None
            next(left)  # the norm is a part of this layer
        input_is_zero = _input_is_zero(parts)
        silent = [_without_gradient(part, part.reading) for part in parts]
        no_gradient = not input_is_zero and all(bool(rows.all()) for rows in silent)
        shown = [part.reading.readable & ~rows for part, rows in zip(parts, silent, strict=True)]
        is_open = not no_gradient and not input_is_zero and not any(bool(rows.any()) for rows in shown)
        still_updated = all(part.lag == 0 and (part.taken is not None or part.rule.is_momentum) for part in parts)
        is_hidden = layer.kind in NEURON_KINDS and layer.path not in linear
        yield _LayerState(layer, has_bias, no_gradient, is_open, input_is_zero, is_hidden, still_updated)


def _input_is_zero(parts: Sequence[LayerClock]) -> bool:
    """Whether the weights had no gradient for long when the bias got its last one; the bias may have stopped since."""
    last = min(float(torch.where(part.reading.readable, part.reading.steps, torch.inf).min()) for part in parts)
    return math.isfinite(last) and all(bool(_without_gradient(part, part.weights, last).all()) for part in parts)


def _without_gradient(read: LayerClock, reading: ClockReading, steps_ago: float = 0.0) -> Tensor:
    """Whether each row, some steps ago, had got no gradient for longer than a pause, or never any; bool ``(N,)``."""
    limit = read.clock.silent_steps
    stopped = reading.never
    if read.taken is None or read.taken - 1 > limit:
        stopped = stopped | (reading.steps - steps_ago > limit)
    return stopped & reading.readable


def _input_at(states: Sequence[_LayerState], index: int) -> int | None:
    """Return which layer another one reads: the nearest before it that shows no gradient and has a fitting width."""
    reader = states[index].layer
    for at in reversed(range(index)):
        state = states[at]
        width = state.layer.width
        fits = width == reader.width if reader.kind == "norm" else not (reader.inputs % width and width % reader.inputs)
        if fits and state.may_have_collapsed:
            return at
    return None


def _unsure(states: Sequence[_LayerState]) -> Iterator[tuple[Layer, str]]:
    """Yield layers that have collapsed or were frozen: nothing gets a gradient, or no bias tells which of the two."""
    begin = 0
    while begin < len(states):
        end = begin
        while end < len(states) and states[end].no_gradient and states[end].still_updated:
            end += 1
        candidates = [state for state in states[begin:end] if state.may_have_collapsed]
        whole_network = (begin, end) == (0, len(states))
        no_bias_at_end = len(candidates) > 1 and not candidates[-1].has_bias and not states[end - 1].input_is_zero
        if candidates and whole_network:
            text = (
                "nothing in the network gets a gradient although the optimizer continues: this layer or one near it "
                "has collapsed, or the loss gives no gradient any more"
            )
            yield candidates[-2 if no_bias_at_end else -1].layer, text
        elif no_bias_at_end and begin > 0 and not (end < len(states) and states[end].input_is_zero):
            text = (
                f"neither does {candidates[-1].layer.path}, which reads it, although the optimizer continues: the "
                "layer has collapsed, or both were frozen in a way that leaves gradients of zero"
            )
            yield candidates[-2].layer, text
        begin = end + 1
