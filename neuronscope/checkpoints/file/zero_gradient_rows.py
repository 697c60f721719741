"""Report which neurons got no gradient recently, or never, by the optimizer's clock, and which did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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


def zero_gradient_evidence(read: LayerClock, cause: NoGradientCause | None = None) -> Iterator[Evidence | Abstention]:
    """Yield what the clock of one layer shows about its neurons.

    Args:
        read: The layer's clock.
        cause: Why the whole layer gets no gradient; ``None`` if it gets one, or the cause is not known.
    """
    reading, source, path = read.reading, read.rule.source, read.layer.path
    limit = read.clock.silent_steps
    is_short = read.taken is not None and read.taken - 1 <= limit
    is_alive = ~(reading.not_finite | reading.unknown | reading.never | (reading.steps > limit))
    if not read.rule.no_clock and not is_short and bool(is_alive.all()):
        yield from _alive(read, is_alive)
        return
    if reading.not_finite.any():
        count = int(reading.not_finite.sum())
        yield Abstention(source, path, f"The optimizer's state of {count} neurons is NaN or infinite.")
    unknown = reading.unknown & ~reading.not_finite
    if read.rule.no_clock:
        yield Abstention(source, path, f"There is {read.rule.no_clock}; {read.clock.unknown_reason}.")
    elif unknown.any() and cause is not None and cause.kind == "unsure":
        text = "The layer's own clock does not tell when the last gradient came." + _why(cause, "") + _caveats(read)
        yield from _evidence(
            read, unknown, None, True, cause, claim="no gradient", basis="suspected", measure="", text=text
        )
    elif unknown.any():
        yield Abstention(
            source, path, f"Nothing is known of {int(unknown.sum())} neurons: {read.clock.unknown_reason}."
        )
    readable = ~reading.not_finite & ~reading.unknown
    never = reading.never & readable
    if read.rule.no_clock or is_short:
        if not read.rule.no_clock:
            yield Abstention(
                source,
                path,
                f"The layer was updated {read.taken} times; the clock needs more than {limit:.0f} steps to tell a "
                "pause from the end of gradients.",
            )
        yield from _never(read, never, bool(never.all()), cause)
        return
    stopped = readable & ~never & (reading.steps > limit)
    alive = readable & ~never & ~stopped
    # If no row of the layer gets a gradient, the layer was frozen or cut off by a later layer, at the latest when its
    # last rows stopped. Rows that stopped well before that did so one by one.
    whole = not bool(alive.any()) and bool((never | stopped).all())
    undated = stopped & torch.isinf(reading.steps)
    dated = stopped & ~undated
    together = torch.zeros_like(stopped)
    if whole and dated.any():
        together = dated & (reading.steps <= reading.steps[dated].min() + _TOGETHER)
    elif whole:
        together = undated
    if whole and cause is not None and cause.kind != "cut off":
        together = stopped  # the layer has collapsed, whichever rows stopped first
    yield from _never(read, never, bool(never.all()), cause)
    for found, is_sure, describe in (
        (dated, reading.steps > read.clock.sure_steps, _stopped),
        (undated, reading.least_steps > read.sure_end, _undated),
    ):
        for as_whole, part in ((False, found & ~together), (True, found & together)):
            yield from describe(read, part & is_sure, "inferred", as_whole, cause)
            yield from describe(read, part & ~is_sure, "suspected", as_whole, cause)
    yield from _alive(read, alive)


def _alive(read: LayerClock, mask: Tensor) -> Iterator[Evidence]:
    """Yield evidence on rows that got a gradient lately."""
    return evidence_where(
        read.layer.path,
        mask,
        read.reading.steps,
        source=read.rule.source,
        claim="alive",
        basis="inferred",
        measure=_measure(read),
        text=(
            "The optimizer's running means show a gradient within this many steps"
            + (", for any gradients." if read.is_bound else ", by comparison with the layer's largest.")
            + _caveats(read)
        ),
    )


def _measure(read: LayerClock) -> str:
    return "steps since the last gradient, at most" if read.is_bound else "steps since the last gradient, about"


def _never(read: LayerClock, mask: Tensor, whole: bool, cause: NoGradientCause | None) -> Iterator[Evidence]:
    """Yield evidence on rows whose state is exactly zero.

    If another optimizer may have trained them before, all that is known is that none came since this one began.
    """
    kept = " and ".join(read.rule.slots)
    text = f"The optimizer's {kept} of all incoming weights are exactly zero: "
    none = "none ever got a gradient" + ("" if read.rule.is_momentum else ", or none whose square this dtype can hold")
    why = _why(cause, "it was cut off from the loss, or multiplied by zero, from the start") if whole else ""
    born = mask & read.untrained
    yield from _evidence(
        read,
        born,
        None,
        whole,
        cause,
        claim="never trained",
        basis="inferred",
        text=f"{text}{none}.{why}{_caveats(read)}",
        since=torch.full(mask.shape, -1),
    )
    taken = read.taken
    if taken is not None and taken - 1 <= SILENT_STEPS:
        return
    has_collapsed = cause is not None and cause.kind == "collapsed"  # as the next layer's clock shows too
    is_sure = has_collapsed or (taken is not None and taken - 1 > _LONG)
    text += f"no gradient came since this optimizer began{_beginning(read)}. Others may have trained them before."
    yield from _evidence(
        read,
        mask & ~born,
        None if taken is None else torch.full(mask.shape, float(taken), dtype=torch.float64),
        whole,
        cause,
        claim="no gradient",
        basis="inferred" if is_sure else "suspected",
        measure="" if taken is None else "steps without a gradient, at least",
        text=text + why + _caveats(read),
    )


def _beginning(read: LayerClock) -> str:
    """Return when a layer's optimizer began, as a clause."""
    if read.began:
        return f" (its step 0 is step {read.began:,})"
    return "" if read.taken is None else f" ({read.taken:,} of its steps ago)"


def _stopped(
    read: LayerClock, mask: Tensor, basis: str, as_whole: bool, cause: NoGradientCause | None
) -> Iterator[Evidence]:
    """Yield evidence on rows that the clock dates; ``as_whole``: the last rows of the layer, which stopped together."""
    cycled = read.rule.betas[0] != read.rule.least_beta
    if read.is_bound:
        limit, living = {
            "inferred": (read.clock.sure_steps, "at most 1 %"),
            "suspected": (read.clock.silent_steps, "up to 40 %" if cycled else "1 to 22 %"),
        }[basis]
        text = (
            "The last gradient came at most this many steps ago, for any gradients. Since that is more than "
            f"{limit:.0f} steps, it is {basis} that none came since: in our measurements, {living} of living neurons "
            "had such a bound too."
        )
    else:
        text = (
            "The momentum buffer is smaller than the layer's largest by as much as this many steps without gradient "
            "make it: an estimate, accurate to some tens of steps."
        )
    if as_whole:
        text += _why(cause, "it was frozen, or cut off by a later layer, or its gradients became far smaller")
    since = None
    # Only a bound dates a whole layer: SGD's estimate compares with the largest layer, which may have stopped since.
    # Nor does an estimate date rows whose momentum a schedule cycles, since it would have to know the schedule.
    if read.step is not None and not read.lag and (read.is_bound or not (as_whole or cycled)):
        since = (read.step - read.reading.steps.nan_to_num(posinf=0.0)).clamp(min=0.0).long()
    return _evidence(
        read,
        mask,
        read.reading.steps,
        as_whole,
        cause,
        claim="no gradient",
        basis=basis,
        measure=_measure(read),
        text=text + _caveats(read),
        since=since,
    )


def _undated(
    read: LayerClock, mask: Tensor, basis: str, whole: bool, cause: NoGradientCause | None
) -> Iterator[Evidence]:
    """Yield evidence on rows whose state has faded beyond the end of the clock."""
    if read.is_decayed:
        text = (
            "The momentum buffer is a multiple of the weights, up to rounding, as weight decay alone makes it: the "
            "last gradient came about this many steps ago, or earlier. In our measurements, 0.6 % of living neurons "
            "had such a buffer too, since their gradients were far smaller than weight decay."
        )
    else:
        text = (
            "The running mean of gradients has decayed below the smallest numbers of its dtype, where the clock ends: "
            "the last gradient came about this many steps ago, or earlier."
        )
    if whole:
        text += _why(cause, "it was frozen, or cut off by a later layer")
    return _evidence(
        read,
        mask,
        read.reading.least_steps,
        whole,
        cause,
        claim="no gradient",
        basis=basis,
        measure="steps since the last gradient, about or more",
        text=text + _caveats(read),
    )


def _why(cause: NoGradientCause | None, unknown: str) -> str:
    """Return why a whole layer gets no gradient, as a sentence; with the clause ``unknown`` if that is not known."""
    if cause is None or cause.kind == "cut off":
        why = unknown if cause is None else cause.text
        return f" The whole layer gets none: {why}. This says nothing about these neurons themselves."
    return f" The whole layer gets none, and {cause.text}."


def _evidence(
    read: LayerClock, mask: Tensor, numbers: Tensor | None, whole: bool, cause: NoGradientCause | None, **fields: Any
) -> Iterator[Evidence]:
    """Yield evidence on rows of a layer, or on the whole layer.

    Evidence on a whole layer is about its neurons too if the layer has collapsed, else about the layer only. The next
    layer's clock supports the layer's own. Thus a collapse is inferred even if each alone is only suspected.

    Args:
        read: The layer's clock.
        mask: The rows, bool ``(N,)``.
        numbers: A number for each row of the layer, float64 ``(N,)``.
        whole: Whether it is on the whole layer.
        cause: Why the whole layer gets no gradient; ``None`` = not known.
        **fields: As for :func:`~neuronscope.checkpoints.verdict.evidence.evidence_where`.
    """
    for one in evidence_where(read.layer.path, mask, numbers, source=read.rule.source, **fields):
        if not whole:
            yield one
        elif cause is None or cause.kind == "cut off":
            yield replace(one, whole_layer=True)
        else:
            yield replace(one, collapsed=True, basis="inferred" if cause.kind == "collapsed" else "suspected")


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
