r"""The optimizer's clock: how long ago a parameter got its last gradient, read off its two running means.

Adam keeps ``m = Σ (1 − β1) β1^(t−i) g_i`` and ``v = Σ (1 − β2) β2^(t−i) g_i²`` over steps ``i = 1 … t``. By the
inequality of Cauchy and Schwarz, with ``q = β1² / β2 < 1``::

    |m| = (1 − β1) Σ (β1^(t−i) / β2^((t−i)/2)) · (β2^((t−i)/2) |g_i|)
        ≤ (1 − β1) √(Σ q^(t−i)) √(Σ β2^(t−i) g_i²)
        = (1 − β1) / √(1 − β2) · √((1 − q^t) / (1 − q)) · √v

so that ``r = |m| / √v`` is never above ``r_sup``, the factor of ``√v``, whatever the gradients were. (The bias
corrections are no part of ``m`` and ``v``.) A step without gradient multiplies ``m`` by β1 and ``√v`` by √β2, hence
``r`` by ``β1 / √β2``. If the last ``k`` steps brought none, ``r ≤ r_sup (β1/√β2)^k``, or::

    k ≤ ln(r_sup / r) / ln(√β2 / β1)

This holds for each number. A row's last gradient is the last of any of its numbers, so a row's largest ``r`` gives
its bound. At the defaults ``r_sup`` is 7.27 and a step takes .1049 off ``ln r``. What the bound does *not* say is
that ``k`` is near it: gradients of opposite signs make ``r`` small too, and so do gradients that have become far
smaller than they were. That neither happens to all numbers of a row at once is what :data:`SILENT_FOLDS` rests on;
``docs/optimizer-clock.md`` has the rates.

Rounding: ``v`` is a sum of positive terms, each rounded a few times a step, so its error is relative; ``m``'s is at
most a few roundings of its largest terms, which ``r_sup √v`` bounds as well. Both fade as the sums do.
:meth:`AdamClock.bound` adds what that can come to. Numbers near the type's smallest are left out: there rounding is
absolute, and ``m`` stops at a denormal instead of decaying to zero (``n`` of the smallest denormals times .9 rounds
to ``n`` for n ≤ 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SILENT_FOLDS", "SURE_FOLDS", "AdamClock", "ClockReading"]

#: A row is said to get no gradient when ``r`` lies this many e-foldings below its supremum: 80 steps by default.
SILENT_FOLDS = 8.4
#: Below this many that is *suspected*, from here on *inferred*: 200 steps by default.
SURE_FOLDS = 21.0

#: Numbers of a chunk of rows that are worked on at a time, in float64.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ClockReading:
    """What the clock says of ``N`` rows.

    Attributes:
        steps: Steps since the last gradient, at most, float64 ``(N,)``; infinite where there is no bound.
        floor: Where there is none since every ``m`` of the row has faded to nothing: about as many steps ago, or more;
            NaN elsewhere.
        never: Whether no number of the row ever got a gradient whose square the type can hold, bool ``(N,)``.
        broken: Whether one is NaN or infinite.
        faint: Whether there is no telling, since every gradient was so small that its square is nothing in this type.
    """

    steps: Tensor
    floor: Tensor
    never: Tensor
    not_finite: Tensor
    underflowed: Tensor

    def join(self, other: ClockReading) -> ClockReading:
        """The reading of rows together with other numbers of theirs (a weight's rows and the bias)."""
        finite = torch.isfinite(torch.minimum(self.steps, other.steps))
        floors = torch.stack([self.floor, other.floor])
        floor = torch.where(torch.isnan(floors), -torch.inf, floors).amax(dim=0)
        return ClockReading(
            steps=torch.minimum(self.steps, other.steps),
            floor=torch.where(finite | torch.isinf(floor), torch.nan, floor),
            never=self.never & other.never,
            not_finite=self.not_finite | other.not_finite,
            underflowed=(self.underflowed | self.never)
            & (other.underflowed | other.never)
            & ~(self.never & other.never),
        )


@dataclass(frozen=True)
class AdamClock:
    """Adam's clock.

    Args:
        beta1: Decay of the first running mean, in (0, √β2).
        beta2: Decay of the second, in (0, 1).
        taken: Steps that the parameter has been updated in, or ``None`` where nobody knows.

    >>> clock = AdamClock(0.9, 0.999)
    >>> round(clock.supremum, 2), round(clock.rate, 4), round(clock.silent_steps)
    (7.27, 0.1049, 80)
    """

    beta1: float
    beta2: float
    taken: int | None = None

    @property
    def rate(self) -> float:
        """By how many e-foldings ``r`` falls a step without gradient."""
        return 0.5 * math.log(self.beta2) - math.log(self.beta1)

    @property
    def supremum(self) -> float:
        """The least upper bound of ``r``, whatever the gradients were."""
        q = self.beta1**2 / self.beta2
        run = 1.0 if self.taken is None else -math.expm1(self.taken * math.log(q))
        return (1.0 - self.beta1) * math.sqrt(run / ((1.0 - self.beta2) * (1.0 - q)))

    @property
    def silent_steps(self) -> float:
        """Steps at most from which on a row is said to get no gradient."""
        return SILENT_FOLDS / self.rate

    @property
    def sure_steps(self) -> float:
        """Steps at most from which on that is inferred and not only suspected."""
        return SURE_FOLDS / self.rate

    def bound(self, ratio: Tensor, epsilon: float) -> Tensor:
        """Steps since the last gradient, at most.

        Args:
            ratio: ``|m| / √v``, float64, any shape; 0 = no bound.
            epsilon: Of the type that both are kept in.
        """
        steps = (math.log(self.supremum) - torch.log(ratio)) / self.rate
        # Four roundings a step at most, over the steps of the silence and over those that m and v look back on.
        looked_back = 1.0 / (1.0 - self.beta1) + 1.0 / (1.0 - self.beta2)
        slack = 4.0 * epsilon * (steps.clamp(min=0.0) + looked_back) / self.rate
        bounded = torch.floor(steps + slack).clamp(min=0.0)
        return (
            bounded
            if self.taken is None
            else torch.where(torch.isfinite(bounded), bounded.clamp(max=max(self.taken - 1.0, 0.0)), bounded)
        )

    def read(self, mean: Tensor, square: Tensor) -> ClockReading:
        """Read the clock of some rows.

        Args:
            mean: ``m``, ``(N, F)``, float32 or float64.
            square: ``v``, likewise.
        """
        chunk = max(1, _CHUNK // max(mean.shape[1], 1))
        parts = [self._read(m, v) for m, v in zip(mean.split(chunk), square.split(chunk), strict=True)]
        return ClockReading(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ClockReading.__dataclass_fields__)
        )

    def _read(self, mean: Tensor, square: Tensor) -> ClockReading:
        info = torch.finfo(mean.dtype)
        m, v = mean.double().abs(), square.double()
        least_m = 2.0 * info.tiny
        # What a v has lost by squares that came to nothing is below 1 / (1 − β2) of the smallest denormals: 2^-139 for
        # β2 = .999 in float32. A v above tiny · 2^16 (2^-110) has lost less than it has by ordinary rounding.
        least_v = 65536.0 * info.tiny
        told = v >= least_v
        spoken = told & (m >= least_m)
        ratio = torch.where(spoken, m / v.clamp(min=least_v).sqrt(), 0.0).amax(dim=1)
        steps = self.bound(ratio, info.eps)
        loudest = torch.where(told, v, 0.0).amax(dim=1)
        faded = (ratio == 0) & (loudest > 0)
        floor = torch.where(faded, (torch.log(loudest.sqrt() / least_m) / self.rate).floor(), torch.nan)
        never = ((m == 0) & (v == 0)).all(dim=1)
        not_finite = ~(torch.isfinite(m) & torch.isfinite(v)).all(dim=1)
        return ClockReading(steps, floor, never, not_finite, (loudest == 0) & ~never & ~not_finite)
