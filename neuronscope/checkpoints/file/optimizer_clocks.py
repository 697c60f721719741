r"""Tell how many steps ago a parameter got its last gradient, by the state of Adam (a bound) and of SGD (an estimate).

**Adam** keeps ``m = Σ (1 − β1) β1^(t−i) g_i`` and ``v = Σ (1 − β2) β2^(t−i) g_i²`` over steps ``i = 1 … t``. By the
inequality of Cauchy and Schwarz, with ``q = β1² / β2 < 1``::

    |m| = (1 − β1) Σ (β1^(t−i) / β2^((t−i)/2)) · (β2^((t−i)/2) |g_i|)
        ≤ (1 − β1) √(Σ q^(t−i)) √(Σ β2^(t−i) g_i²)
        = (1 − β1) / √(1 − β2) · √((1 − q^t) / (1 − q)) · √v

Therefore ``r = |m| / √v`` never exceeds ``r_sup``, the factor of ``√v``, for any gradients. (``m`` and ``v`` do not
contain the bias corrections.) A step without gradient multiplies ``m`` by β1 and ``√v`` by √β2, and thus ``r`` by
``β1 / √β2``. If the last ``k`` steps had no gradient, ``r ≤ r_sup (β1/√β2)^k``, or::

    k ≤ ln(r_sup / r) / ln(√β2 / β1)

This holds for each element. The last gradient of a row is the last of any of its elements, so the row's largest ``r``
gives its bound. At the default betas ``r_sup`` is 7.27 and a step lowers ``ln r`` by .1049.

A schedule may cycle β1 between a least and a largest value. Each term of ``|m|`` is then at most ``(1 − least)`` times
a power of the largest, and a step without gradient multiplies ``m`` by at most the largest. So the bound holds with
``(1 − least)`` in place of ``(1 − β1)``, and with the largest β1 everywhere else.

The bound does *not* imply that ``k`` is close to it: gradients of opposite signs make ``r`` small too, and so do
gradients that became much smaller. :data:`SILENT_FOLDS` assumes that neither happens to all elements of a row at once;
``docs/optimizer-clock.md`` has the measured rates.

Rounding: ``v`` is a sum of positive terms, each rounded a few times per step, so its error is relative. The error of
``m`` is at most a few roundings of its largest terms, which ``r_sup √v`` bounds as well. Both errors decay as the sums
do. :meth:`AdamClock.bound` adds the most that they can amount to. Numbers near the smallest of the dtype are left out:
there rounding is absolute, and ``m`` stops at a denormal instead of decaying to zero (``n`` of the smallest denormals
times .9 rounds to ``n`` for n ≤ 4).

**SGD.** Without gradients and weight decay, a momentum buffer shrinks by the factor μ (the momentum) per step. Unlike
Adam, SGD keeps no second mean to compare it with. A row's buffer is therefore compared with the largest of its layer:
this gives an estimate, not a bound. Living rows of one layer usually differ by a factor of ten; a row without gradient
shrinks by ten in 22 steps at μ = .9.

Weight decay λ adds λw to the gradient. Without a gradient of the loss, all pairs (weight, buffer) of a row then follow
the same linear map, whatever the learning rates are. What remains of the last gradients shrinks by about μ per step, so
that the buffer becomes ``c w``, with one number ``c ≈ λ (1 − dampening) / (1 − μ)`` for the whole row. So the clock is
read from the part of the buffer that is not a multiple of the weights. It ends where this part is as small as rounding
makes it: relative to the buffer, each of the last 1 / (1 − μ) steps adds a few roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FASTEST_FADING",
    "SILENT_FOLDS",
    "SILENT_FOLDS_BELOW_LARGEST",
    "SILENT_STEPS",
    "SURE_FOLDS",
    "SURE_STEPS",
    "AdamClock",
    "BufferPeaks",
    "Clock",
    "ClockReading",
    "SGDClock",
    "by_chunks",
]

#: A row counts as without gradient if ``r`` is this many e-foldings below its supremum: 80 steps at default betas …
SILENT_FOLDS = 8.4
#: … and if this is at least as many steps. With a small β1, e-foldings pass in a few steps; rare inputs take more.
SILENT_STEPS = 80
#: With fewer e-foldings than this the claim is *suspected*, else *inferred*: 300 steps at default betas …
SURE_FOLDS = 31.5
#: … and with fewer steps than this.
SURE_STEPS = 300
#: A mean that decays by this factor or a smaller one reaches an exact zero; with a larger one it stops at a denormal.
FASTEST_FADING = 0.5

#: Number of elements of a chunk of rows, which is converted to float64 at a time.
_CHUNK = 1 << 20
#: A row counts as without gradient if it is this many e-foldings below its layer's largest, and for 80 steps. Adam's
#: rows must be farther below the supremum, since living rows are far below it themselves.
SILENT_FOLDS_BELOW_LARGEST = 5.0
#: Steps up to which SGD's estimate is no more than a pause; and the factor by which living rows of a layer may differ.
_PAUSE, _LIVING_RANGE = 100.0, 10.0
#: Roundings of a decayed buffer per step that it averages. Of 629 rows that were silent for 200 steps and more, all had
#: less than 1, and .6 % of 6,741 living ones less than 1.5.
_ROUNDINGS = 1.5
#: ``c`` is looked for within this factor of ``λ (1 − dampening) / (1 − μ)``: learning rates move it a little.
_RANGE = 2.0
#: A buffer this many times smaller than weight decay makes it was not made by this rule.
_FAR_BELOW = 100.0


class ClockReading(NamedTuple):
    """What a clock shows for ``N`` rows."""

    steps: Tensor  # upper bound on the steps since the last gradient, float64 ``(N,)``; infinite = no bound
    #: If there is no bound because every ``m`` of the row decayed to nothing: the last gradient came about this many
    #: steps ago, or earlier, float64 ``(N,)``; NaN otherwise.
    least_steps: Tensor
    never: Tensor  # true if no element of the row ever got a gradient whose square the dtype can hold, bool ``(N,)``
    not_finite: Tensor  # true if an element of the state is NaN or infinite, bool ``(N,)``
    unknown: Tensor  # true if nothing is known of the row, bool ``(N,)``; the clock's ``unknown_reason`` says why

    @property
    def readable(self) -> Tensor:
        """True if something is known of the row, bool ``(N,)``."""
        return ~self.not_finite & ~self.unknown

    def split(self, rows: Sequence[int]) -> list[ClockReading]:
        """Return the readings of so many rows each, in order."""
        return [ClockReading(*parts) for parts in zip(*(one.split(list(rows)) for one in self), strict=True)]

    def join(self, other: ClockReading) -> ClockReading:
        """Return the reading of the same rows with further elements (a weight's rows and the bias)."""
        finite = torch.isfinite(torch.minimum(self.steps, other.steps))
        both = torch.stack([self.least_steps, other.least_steps])
        least_steps = torch.where(torch.isnan(both), -torch.inf, both).amax(dim=0)
        return ClockReading(
            steps=torch.minimum(self.steps, other.steps),
            least_steps=torch.where(finite | torch.isinf(least_steps), torch.nan, least_steps),
            never=self.never & other.never,
            not_finite=self.not_finite | other.not_finite,
            unknown=(self.unknown | self.never) & (other.unknown | other.never) & ~(self.never & other.never),
        )


def by_chunks(read: Callable[[Tensor, Tensor], tuple[Tensor, ...]], first: Tensor, second: Tensor) -> list[Tensor]:
    """Read rows some at a time, since they are converted to float64, and return what is read of all of them.

    Args:
        read: Returns tensors ``(n,)`` for ``n`` rows of two tensors.
        first: ``(N, F)``.
        second: Likewise.
    """
    rows = max(1, _CHUNK // max(first.shape[1], 1))
    parts = [read(one, other) for one, other in zip(first.split(rows), second.split(rows), strict=True)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


class Clock:
    """The thresholds that all clocks share: from how many steps a row is silent, and from how many this is sure."""

    #: The e-foldings by which the clock must have fallen.
    silent_folds: ClassVar[float] = SILENT_FOLDS
    #: Why nothing is known of a row.
    unknown_reason: ClassVar[str]

    @property
    def rate(self) -> float:
        """The least number of e-foldings by which the clock falls in a step without gradient."""
        raise NotImplementedError

    @property
    def fastest_rate(self) -> float:
        """The largest such number, if a schedule changes it."""
        raise NotImplementedError

    @property
    def silent_steps(self) -> float:
        """The steps since the last gradient above which a row counts as without gradient."""
        return max(self.silent_folds, SILENT_STEPS * self.rate) / self.rate

    @property
    def alive_steps(self) -> float:
        """The steps since the last gradient up to which a row counts as alive."""
        return self.silent_steps

    @property
    def sure_steps(self) -> float:
        """The steps above which this is inferred and not only suspected."""
        return max(SURE_FOLDS, SURE_STEPS * self.fastest_rate) / self.rate


@dataclass(frozen=True)
class AdamClock(Clock):
    """Bounds the steps since the last gradient of a parameter that Adam or a variant of it updates.

    Args:
        beta1: Decay of the first running mean, in (0, √β2); the largest one if a schedule cycles it.
        beta2: Decay of the second running mean, in (0, 1).
        taken: Number of steps in which the parameter was updated; ``None`` = not known.
        least_beta1: The least decay of the first running mean, if a schedule cycles it; ``None`` = ``beta1``.

    >>> clock = AdamClock(0.9, 0.999)
    >>> round(clock.supremum, 2), round(clock.rate, 4), round(clock.silent_steps)
    (7.27, 0.1049, 80)
    """

    beta1: float
    beta2: float
    taken: int | None = None
    least_beta1: float | None = None

    unknown_reason = "their gradients were so small, or the means fade so fast, that the numbers underflowed"

    @property
    def rate(self) -> float:
        """The number of e-foldings by which ``r`` falls in a step without gradient, at the largest β1."""
        return 0.5 * math.log(self.beta2) - math.log(self.beta1)

    @property
    def fastest_rate(self) -> float:
        """The same at the least β1."""
        return 0.5 * math.log(self.beta2) - math.log(self.least_beta1 or self.beta1)

    @property
    def supremum(self) -> float:
        """The least upper bound of ``r`` over all possible gradients."""
        q = self.beta1**2 / self.beta2
        run = 1.0 if self.taken is None else -math.expm1(self.taken * math.log(q))
        return (1.0 - (self.least_beta1 or self.beta1)) * math.sqrt(run / ((1.0 - self.beta2) * (1.0 - q)))

    def bound(self, ratio: Tensor, epsilon: float) -> Tensor:
        """Return the upper bound on the steps since the last gradient, in the shape of ``ratio``.

        Args:
            ratio: ``|m| / √v``, float64, any shape; 0 = no bound.
            epsilon: Machine epsilon of the dtype in which both are stored.
        """
        steps = (math.log(self.supremum) - torch.log(ratio)) / self.rate
        # At most four roundings per step, over the steps without gradient and over those that m and v average.
        averaged = 1.0 / (1.0 - self.beta1) + 1.0 / (1.0 - self.beta2)
        slack = 4.0 * epsilon * (steps.clamp(min=0.0) + averaged) / self.rate
        bounded = torch.floor(steps + slack).clamp(min=0.0)
        if self.taken is None:
            return bounded
        return torch.where(torch.isfinite(bounded), bounded.clamp(max=max(self.taken - 1.0, 0.0)), bounded)

    def read(self, mean: Tensor, square: Tensor) -> ClockReading:
        """Read the clock of ``N`` rows of ``F`` elements.

        Args:
            mean: ``m``, float32 or float64, ``(N, F)``.
            square: ``v``, of the same dtype and shape.
        """
        return ClockReading(*by_chunks(self._read, mean, square))

    def _read(self, mean: Tensor, square: Tensor) -> ClockReading:
        info = torch.finfo(mean.dtype)
        m, v = mean.double().abs(), square.double()
        least_m = 2.0 * info.tiny
        # Squares that underflowed cost v less than 1 / (1 − β2) of the smallest denormals: 2^-139 for β2 = .999 in
        # float32. A v above tiny · 2^16 (2^-110) lost less by this than by ordinary rounding.
        least_v = 65536.0 * info.tiny
        exact = v >= least_v
        ratio = torch.where(exact & (m >= least_m), m / v.clamp(min=least_v).sqrt(), 0.0).amax(dim=1)
        steps = self.bound(ratio, info.eps)
        largest_v = torch.where(exact, v, 0.0).amax(dim=1)
        end = (torch.log(largest_v.sqrt() / least_m) / self.rate).floor()
        faded = (ratio == 0) & (largest_v > 0)
        known = faded & (end > self.silent_steps)
        never = ((m == 0) & (v == 0)).all(dim=1) & (self.beta2 > FASTEST_FADING)
        not_finite = ~(torch.isfinite(m) & torch.isfinite(v)).all(dim=1)
        unknown = ((largest_v == 0) | (faded & ~known)) & ~never & ~not_finite
        return ClockReading(steps, torch.where(known, end, torch.nan), never, not_finite, unknown)


class BufferPeaks(NamedTuple):
    """The largest absolute value in each row of a momentum buffer, without what weight decay alone puts there."""

    rows: Tensor  # ``max |buffer|`` of each row, float64 ``(N,)``; NaN or infinite if the row contains such an element
    least: Tensor  # the smallest such number that can be told from rounding, float64 ``(N,)``
    zero: Tensor  # true if the whole row of the buffer is exactly zero, bool ``(N,)``
    unknown: Tensor  # true if the row shows nothing, bool ``(N,)``

    @classmethod
    def of(cls, buffer: Tensor) -> BufferPeaks:
        """Return the peaks of a buffer ``(N, F)`` without weight decay."""
        rows = buffer.abs().amax(dim=1).double()
        least = torch.full_like(rows, 2.0 * torch.finfo(buffer.dtype).tiny)
        return cls(rows, least, rows == 0, torch.zeros_like(rows, dtype=torch.bool))

    @classmethod
    def of_decayed(cls, decay: float, clock: SGDClock, buffer: Tensor, weight: Tensor) -> BufferPeaks:
        """Return the peaks of a buffer with weight decay.

        Args:
            decay: λ (1 − dampening), above 0.
            clock: The optimizer's clock.
            buffer: The momentum buffer, ``(N, F)``.
            weight: The weights that it belongs to, ``(N, F)``.
        """
        plain = cls.of(buffer)
        b, w = buffer.double(), weight.double()
        low, high = (decay / (1.0 - momentum) for momentum in (clock.least, clock.momentum))
        square = w.square().sum(dim=1)
        factor = torch.where(square > 0, (b * w).sum(dim=1) / square, 0.0).clamp(low / _RANGE, high * _RANGE)
        rows = (b - factor[:, None] * w).abs().amax(dim=1)
        epsilon = max(torch.finfo(buffer.dtype).eps, torch.finfo(weight.dtype).eps)
        least = plain.least + plain.rows * epsilon * _ROUNDINGS / (1.0 - clock.momentum)
        # A single number is always a multiple of another one.
        informative = ((b != 0) | (w != 0)).sum(dim=1) > 1
        not_by_this_rule = plain.rows * _FAR_BELOW < low * w.abs().amax(dim=1)
        return cls(rows, least, plain.zero, ~informative | not_by_this_rule)

    def join(self, other: BufferPeaks) -> BufferPeaks:
        """Return the peaks of the same rows with further elements (a weight's rows and the bias)."""
        first, second = (torch.where(part.unknown, 0.0, part.rows) for part in (self, other))
        return BufferPeaks(
            torch.maximum(first, second),
            torch.maximum(self.least, other.least),
            self.zero & other.zero,
            self.unknown & other.unknown,
        )

    def repeat(self, rows: int) -> BufferPeaks:
        """Return the peaks of so many rows, each with this one's."""
        return BufferPeaks(*(one.repeat(rows) for one in self))

    @property
    def largest(self) -> float:
        """The largest peak that can be told from rounding; 0 if all peaks are smaller."""
        shown = torch.isfinite(self.rows) & (self.rows >= self.least) & ~self.unknown
        return float(self.rows[shown].max()) if shown.any() else 0.0


@dataclass(frozen=True)
class SGDClock(Clock):
    """Estimates the steps since the last gradient of parameters that SGD with momentum updates.

    Args:
        momentum: μ, in (0, 1); the largest one if a schedule cycles it.
        least_momentum: The least momentum, if a schedule cycles it; ``None`` = ``momentum``.

    >>> round(SGDClock(0.9).silent_steps), round(SGDClock(0.95).silent_steps)
    (80, 97)
    """

    momentum: float
    least_momentum: float | None = None

    silent_folds = SILENT_FOLDS_BELOW_LARGEST
    unknown_reason = (
        "weight decay is part of their momentum buffers, and the rest is too small or too short to be told from it"
    )

    @property
    def least(self) -> float:
        """The least momentum."""
        return self.momentum if self.least_momentum is None else self.least_momentum

    @property
    def rate(self) -> float:
        """The number of e-foldings by which a buffer shrinks in a step without gradient, at least."""
        return -math.log(self.momentum)

    @property
    def fastest_rate(self) -> float:
        """The same, at most."""
        return -math.log(self.least)

    @property
    def alive_steps(self) -> float:
        """The steps up to which a row counts as alive: fewer than make it silent, if the buffer forgets slowly."""
        return min(self.silent_steps, _PAUSE)

    @property
    def is_slow(self) -> bool:
        """Whether a row's estimate may be wrong by more than a pause, since living rows differ by a factor of ten."""
        return math.log(_LIVING_RANGE) / self.rate > _PAUSE

    def read_layer(self, layer: BufferPeaks, largest: float) -> ClockReading:
        """Read the clock of one layer.

        Args:
            layer: The peaks of its rows.
            largest: The largest peak of all layers; a layer far below it gets no gradient as a whole.
        """
        reference = largest if layer.largest < largest * math.exp(-SILENT_FOLDS) else layer.largest
        finite = torch.isfinite(layer.rows)
        decaying = finite & (layer.rows >= layer.least)
        steps = torch.where(decaying, torch.log(reference / layer.rows) / self.rate, torch.inf).round().clamp(min=0.0)
        never = layer.zero & (self.momentum > FASTEST_FADING)
        end = (torch.log(layer.least.clamp(min=reference) / layer.least) / self.rate).floor()
        faded = ~decaying & ~never & finite
        unknown = ~never & finite & (layer.unknown | (faded & (end * self.rate <= SILENT_FOLDS)))
        return ClockReading(
            steps=torch.where(unknown, torch.inf, steps),
            least_steps=torch.where(faded & ~unknown, end, torch.nan),
            never=never,
            not_finite=~finite,
            unknown=unknown,
        )
