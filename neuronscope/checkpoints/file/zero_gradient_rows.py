"""Report which neurons got no gradient recently, or never, by the optimizer's clock, and which did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from neuronscope.checkpoints.file.adam_clock import SILENT_STEPS
from neuronscope.checkpoints.file.collapse import NoGradientCause
from neuronscope.checkpoints.file.layer_clocks import LayerClock
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence

__all__ = ["clock_evidence", "zero_gradient_evidence"]

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
        yield _alive(read, is_alive)
        return
    if reading.not_finite.any():
        count = int(reading.not_finite.sum())
        yield Abstention(source, path, f"The optimizer's state of {count} neurons is NaN or infinite.")
    unknown = reading.unknown & ~reading.not_finite
    if read.rule.no_clock:
        yield Abstention(source, path, f"There is {read.rule.no_clock}; {read.clock.unknown_reason}.")
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
    sure = reading.steps > read.clock.sure_steps
    for as_whole, mask in ((False, dated & ~together), (True, dated & together)):
        yield from _stopped(read, mask & sure, "inferred", as_whole, cause)
        yield from _stopped(read, mask & ~sure, "suspected", as_whole, cause)
    sure = reading.least_steps > read.sure_end
    for as_whole, mask in ((False, undated & ~together), (True, undated & together)):
        yield from _undated(read, mask & sure, "inferred", as_whole, cause)
        yield from _undated(read, mask & ~sure, "suspected", as_whole, cause)
    if alive.any():
        yield _alive(read, alive)


def _alive(read: LayerClock, mask: Tensor) -> Evidence:
    return clock_evidence(
        read,
        "alive",
        mask,
        read.reading.steps,
        _measure(read),
        "The optimizer's running means show a gradient within this many steps"
        + (", for any gradients." if read.is_bound else ", by comparison with the layer's largest.")
        + _caveats(read),
    )


def _measure(read: LayerClock) -> str:
    return "steps since the last gradient, at most" if read.is_bound else "steps since the last gradient, about"


def _never(read: LayerClock, mask: Tensor, whole: bool, cause: NoGradientCause | None) -> Iterator[Evidence]:
    """Yield evidence on rows whose state is exactly zero.

    If another optimizer may have trained them before, all that is known is that none came since this one began.
    """
    if not mask.any():
        return
    kept = " and ".join(read.rule.slots)
    text = f"The optimizer's {kept} of all incoming weights are exactly zero: "
    none = "none ever got a gradient" + ("" if read.rule.is_momentum else ", or none whose square this dtype can hold")
    why = _why(cause, "it was cut off from the loss, or multiplied by zero, from the start") if whole else ""
    no_numbers = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    born = mask & read.untrained
    if born.any():
        since = torch.full(mask.shape, -1, dtype=torch.int64)
        told = f"{text}{none}.{why}{_caveats(read)}"
        found = clock_evidence(read, "never trained", born, no_numbers, "", told, since)
        yield _for_whole_layer(found, whole, cause)
    later = mask & ~born
    if not later.any():
        return
    taken = read.taken
    if taken is not None and taken - 1 <= SILENT_STEPS:
        return
    has_collapsed = cause is not None and cause.kind == "collapsed"  # as the next layer's clock shows too
    is_sure = has_collapsed or (taken is not None and taken - 1 > _LONG)
    basis = "inferred" if is_sure else "suspected"
    numbers = no_numbers if taken is None else torch.full_like(no_numbers, float(taken))
    text += f"no gradient came since this optimizer began{_beginning(read)}. Others may have trained them before."
    found = clock_evidence(
        read,
        "no gradient",
        later,
        numbers,
        "" if taken is None else "steps without a gradient, at least",
        text + why + _caveats(read),
        basis=basis,
    )
    yield _for_whole_layer(found, whole, cause)


def _beginning(read: LayerClock) -> str:
    """Return when a layer's optimizer began, as a clause."""
    if read.began:
        return f" (its step 0 is step {read.began:,})"
    return "" if read.taken is None else f" ({read.taken:,} of its steps ago)"


def _stopped(
    read: LayerClock, mask: Tensor, basis: str, as_whole: bool, cause: NoGradientCause | None
) -> Iterator[Evidence]:
    """Yield evidence on rows that the clock dates; ``as_whole``: the last rows of the layer, which stopped together."""
    if not mask.any():
        return
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
    text += _caveats(read)
    found = clock_evidence(read, "no gradient", mask, read.reading.steps, _measure(read), text, since, basis=basis)
    yield _for_whole_layer(found, as_whole, cause)


def _undated(
    read: LayerClock, mask: Tensor, basis: str, whole: bool, cause: NoGradientCause | None
) -> Iterator[Evidence]:
    if not mask.any():
        return
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
    found = clock_evidence(
        read,
        "no gradient",
        mask,
        read.reading.least_steps,
        "steps since the last gradient, about or more",
        text + _caveats(read),
        basis=basis,
    )
    yield _for_whole_layer(found, whole, cause)


def _why(cause: NoGradientCause | None, unknown: str) -> str:
    """Return why a whole layer gets no gradient, as a sentence; with the clause ``unknown`` if that is not known."""
    if cause is None or cause.kind == "cut off":
        why = unknown if cause is None else cause.text
        return f" The whole layer gets none: {why}. This says nothing about these neurons themselves."
    return f" The whole layer gets none, and {cause.text}."


def _for_whole_layer(evidence: Evidence, whole: bool, cause: NoGradientCause | None) -> Evidence:
    """Mark evidence on a whole layer: about its neurons too if the layer has collapsed, else about the layer only.

    The next layer's clock supports the layer's own. Thus a collapse is inferred even if each alone is only suspected.
    """
    if not whole:
        return evidence
    if cause is None or cause.kind == "cut off":
        return replace(evidence, whole_layer=True)
    return replace(evidence, collapsed=True, basis="inferred" if cause.kind == "collapsed" else "suspected")


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


def clock_evidence(
    read: LayerClock,
    claim: str,
    mask: Tensor,
    numbers: Tensor,
    measure: str,
    text: str,
    since: Tensor | None = None,
    whole: bool = False,
    basis: str = "inferred",
    source: str = "",
) -> Evidence:
    """Return evidence from a layer's clock about some of its ``N`` neurons; see :class:`Evidence` for the fields.

    Args:
        read: The layer's clock.
        claim: The claim.
        mask: The neurons that it is about, bool ``(N,)``.
        numbers: The number for each neuron of the layer, float64 ``(N,)``.
        measure: The meaning of the numbers.
        text: An explanation for the reader.
        since: The step from which the claim holds for each neuron of the layer, int64 ``(N,)``.
        whole: Whether the claim is about the layer only, and not about its single neurons.
        basis: The basis.
        source: The source; by default the optimizer's state.
    """
    neurons = torch.nonzero(mask).flatten()
    return Evidence(
        layer=read.layer.path,
        width=read.layer.width,
        source=source or read.rule.source,
        claim=claim,
        basis=basis,
        neurons=neurons.numpy(),
        numbers=numbers[neurons].numpy(),
        measure=measure,
        text=text,
        since=None if since is None else since[neurons].numpy(),
        whole_layer=whole,
    )
