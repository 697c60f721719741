"""Silence: which neurons got no gradient lately, or ever, by the optimizer's clock; and which did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from neuronscope.checkpoints.file.collapse import NoGradientCause
from neuronscope.checkpoints.file.layer_clocks import LayerClock
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence

__all__ = ["clock_evidence", "zero_gradient_evidence"]

#: Steps by which the clocks of rows that went silent at once may differ (measured: docs/optimizer-clock.md).
_AT_ONCE = 30


def zero_gradient_evidence(read: LayerClock, cause: NoGradientCause | None = None) -> Iterator[Evidence | Abstention]:
    """What the clock of one layer says of its neurons.

    Args:
        read: The layer's clock.
        cause: Why the layer gets no gradient as a whole, where it gets none and that is known.
    """
    reading, source, path = read.reading, read.rule.source, read.layer.path
    exact = read.rule.name != "SGD"
    if reading.not_finite.any():
        count = int(reading.not_finite.sum())
        yield Abstention(source, path, f"The optimizer's state of {count} neurons is NaN or infinite.")
    if reading.underflowed.any():
        count = int((reading.underflowed & ~reading.not_finite).sum())
        yield Abstention(
            source, path, f"The gradients of {count} neurons were so small that their squares are lost in this type."
        )
    sound = ~reading.not_finite & ~reading.underflowed
    never = reading.never & sound
    limit = read.clock.silent_steps
    if read.taken is not None and read.taken - 1 <= limit:
        yield Abstention(
            source,
            path,
            f"The layer was updated {read.taken} times; to tell a pause from silence the clock needs more than "
            f"{limit:.0f} steps.",
        )
        yield from _never(read, never, bool(never.all()), cause)
        return
    silent = sound & ~never & (reading.steps > limit)
    alive = sound & ~never & ~silent
    # Nobody in the layer gets a gradient: then it was frozen, or cut off by what follows it, at the latest when its
    # last rows went silent. Those that were silent well before that fell silent one by one.
    whole = not bool(alive.any()) and bool((never | silent).all())
    ran_out = silent & torch.isinf(reading.steps)
    timed = silent & ~ran_out
    together = torch.zeros_like(silent)
    if whole and timed.any():
        together = timed & (reading.steps <= reading.steps[timed].min() + _AT_ONCE)
    elif whole:
        together = ran_out
    if whole and cause is not None and cause.kind != "cut off":
        together = silent  # whoever went first, the layer has collapsed
    yield from _never(read, never, bool(never.all()), cause)
    singly = timed & ~together
    sure = reading.steps > read.clock.sure_steps
    for at_once, mask in ((False, singly), (True, together & timed)):
        yield from _silent(read, mask & sure, exact, "inferred", at_once, cause)
        yield from _silent(read, mask & ~sure, exact, "suspected", at_once, cause)
    yield from _ran_out(read, ran_out & ~together)
    yield from _ran_out(read, ran_out & together, True, cause)
    if alive.any():
        yield clock_evidence(
            read,
            "alive",
            alive,
            reading.steps,
            _measure(exact),
            "The optimizer's running means show a gradient within as many steps"
            + (", whatever the gradients were." if exact else ", by comparison with the layer's largest.")
            + _caveats(read),
        )


def _measure(exact: bool) -> str:
    return "steps since the last gradient, at most" if exact else "steps since the last gradient, about"


def _never(read: LayerClock, mask: Tensor, whole: bool, cause: NoGradientCause | None) -> Iterator[Evidence]:
    if not mask.any():
        return
    kept = "exp_avg and exp_avg_sq" if read.rule.name != "SGD" else "momentum_buffer"
    least = "" if read.rule.name == "SGD" else ", or none whose square this type can hold"
    text = f"The optimizer's {kept} of all incoming weights are exactly zero: none ever got a gradient{least}."
    if whole:
        text += _why(cause, "it was cut off from the loss, or multiplied by zero, all along")
    since = torch.full(mask.shape, -1, dtype=torch.int64)
    nothing = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    yield _as_halted(
        clock_evidence(read, "never trained", mask, nothing, "", text + _caveats(read), since), whole, cause
    )


def _silent(
    read: LayerClock, mask: Tensor, exact: bool, basis: str, at_once: bool, cause: NoGradientCause | None
) -> Iterator[Evidence]:
    """Rows that the clock dates, on one basis; ``at_once``: the layer's last ones, that went together."""
    if not mask.any():
        return
    if exact:
        limit, living = {
            "inferred": (read.clock.sure_steps, "at most 3 %"),
            "suspected": (read.clock.silent_steps, "1 to 22 %"),
        }[basis]
        ground = (
            "The last gradient came at most as many steps ago, whatever the gradients were. As that is more than "
            f"{limit:.0f} steps, it is {basis} that none came since: where this was counted, {living} of living "
            "neurons had such a bound too."
        )
    else:
        ground = (
            "The momentum buffer is as much smaller than the layer's largest as so many steps without gradient make "
            "it: an estimate, good to some tens of steps."
        )
    if at_once:
        ground += _why(
            cause, "it was frozen, or cut off by what follows it, or its gradients became far smaller than they were"
        )
    since = None
    # A collapse is dated by a bound alone: SGD's estimate goes by the loudest layer, which may have come to rest since.
    if read.step is not None and not read.lag and (exact or not at_once):
        since = (read.step - read.reading.steps.nan_to_num(posinf=0.0)).clamp(min=0.0).long()
    text = ground + _caveats(read)
    said = clock_evidence(read, "no gradient", mask, read.reading.steps, _measure(exact), text, since, basis=basis)
    yield _as_halted(said, at_once, cause)


def _ran_out(
    read: LayerClock, mask: Tensor, whole: bool = False, cause: NoGradientCause | None = None
) -> Iterator[Evidence]:
    if not mask.any():
        return
    text = (
        "The running mean of gradients has faded below the smallest numbers of its type, where the clock stops: the "
        "last gradient came about as many steps ago, or more."
    )
    if whole:
        text += _why(cause, "it was frozen, or cut off by what follows it")
    said = clock_evidence(
        read,
        "no gradient",
        mask,
        read.reading.least_steps,
        "steps since the last gradient, about or more",
        text + _caveats(read),
    )
    yield _as_halted(said, whole, cause)


def _why(cause: NoGradientCause | None, unknown: str) -> str:
    """Why a whole layer gets no gradient, as a sentence; ``unknown`` where that is not known."""
    if cause is None or cause.kind == "cut off":
        why = unknown if cause is None else cause.text
        return f" This is so for the whole layer: {why}. It says nothing of these neurons themselves."
    return f" This is so for the whole layer, and {cause.text}."


def _as_halted(said: Evidence, whole: bool, cause: NoGradientCause | None) -> Evidence:
    """What is said of a layer as a whole: of its neurons too where it has collapsed, and suspected where it may have.

    The reader's clock supports the layer's own, so that a collapse is inferred where each alone would be suspected.
    """
    if not whole:
        return said
    if cause is None or cause.kind == "cut off":
        return replace(said, whole_layer=True)
    return replace(said, collapsed=True, basis="inferred" if cause.kind == "collapsed" else "suspected")


def _caveats(read: LayerClock) -> str:
    said = ""
    if read.lag:
        said += (
            f" The layer was left out of {read.lag} of its optimizer's steps (frozen, or unused): steps are those in "
            "which it was not."
        )
    if read.layer.bias is not None and read.layer.bias not in read.parameters:
        said += " The bias is not in it."
    if not read.layer.axis_known:
        said += " Which dimension of the weight is which is the usual guess."
    return said


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
    """What a layer's clock says of some of its neurons.

    Args:
        read: The layer's clock.
        claim: See :class:`Evidence`, as for the rest.
        mask: Of which neurons, bool ``(N,)``.
        numbers: Of all neurons, float64 ``(N,)``.
        measure: What such a number is.
        text: One sentence for a reader.
        since: Of all neurons, int64 ``(N,)``.
        whole: Whether it is said of the layer, and not of its neurons.
        basis: On what ground.
        source: Who says so; the optimizer's state where it is not named.
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
