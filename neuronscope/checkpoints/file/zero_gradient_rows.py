"""Report which neurons got no gradient recently, or never, by the optimizer's clock, and which did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.file.adam_clock import SILENT_STEPS
from neuronscope.checkpoints.file.collapse import NoGradientCause
from neuronscope.checkpoints.file.layer_clocks import LayerClock
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence, evidence_where

__all__ = ["zero_gradient_evidence"]

#: Steps by which the clocks of rows that stopped together may differ (measured: docs/optimizer-clock.md).
_TOGETHER = 30
#: With no gradient at all in more steps than this of an optimizer, silence is inferred.
_LONG = 200
#: When a bound holds: whoever changes the betas by hand leaves no trace of the earlier ones in the file.
_ANY_GRADIENTS = "for any gradients under the betas that the file holds"


def zero_gradient_evidence(read: LayerClock, cause: NoGradientCause | None = None) -> Iterator[Evidence | Abstention]:
    """Yield what the clock of one layer shows about its neurons.

    Args:
        read: The layer's clock.
        cause: Why the whole layer gets no gradient; ``None`` if it gets one, or the cause is not known.
    """
    return _LayerGradients(read, cause).evidence()


class _LayerGradients:
    """The neurons of one layer by its clock; masks are bool ``(N,)``."""

    def __init__(self, read: LayerClock, cause: NoGradientCause | None) -> None:
        self._read, self._cause = read, cause
        self._path, self._source = read.layer.path, read.rule.source
        self._has_collapsed = cause is not None and cause.kind == "collapsed"  # as the next layer's clock shows
        measure = "steps since the last gradient, " + ("at most" if read.is_bound else "about")
        self._measured: dict[str, Any] = {"numbers": read.reading.steps, "measure": measure}

    def evidence(self) -> Iterator[Evidence | Abstention]:
        read, reading = self._read, self._read.reading
        limit, no_clock = read.clock.silent_steps, read.rule.no_clock
        is_short = read.taken is not None and read.taken - 1 <= limit
        never = reading.never & reading.readable
        stopped = reading.readable & ~never & (reading.steps > limit)
        alive = reading.readable & ~never & ~stopped
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
        return self._evidence(mask, False, claim="alive", basis="inferred", text=text, **self._measured)

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
                "gradient make it: an estimate, accurate to some tens of steps."
            )
        if as_whole:
            text += self._why("it was frozen, or cut off by a later layer, or its gradients became far smaller")
        since = None
        # Only a bound dates a whole layer: SGD's estimate compares with the largest layer, which may have stopped
        # since. Nor does an estimate date rows whose momentum a schedule cycles, since it would have to know it.
        if read.step is not None and not read.lag and (read.is_bound or not (as_whole or cycled)):
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
        text += _caveats(self._read)
        return evidence_where(self._path, mask, source=self._source, text=text, **fields)


def _caveats(read: LayerClock) -> str:
    """Return the sentences that limit what a layer's clock shows."""
    text = ""
    if read.lag:
        text += (
            f" The layer was left out of {read.lag} of its optimizer's steps (frozen, or unused); only the other steps "
            "are counted."
        )
    if read.layer.bias is not None and read.layer.bias not in read.parameters:
        text += " The bias is not included."
    if not read.layer.axis_known:
        text += " The neuron axis of the weight is the usual one; the file does not confirm it."
    return text
