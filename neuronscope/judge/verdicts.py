"""Decide which neurons are dead, silent, cut off, dormant or linear, from counts alone.

:func:`judge` takes the counts of a site and a policy and returns one mask per verdict. :func:`rate_bound` returns how
often a neuron that never fired may still fire. Nothing here imports torch or knows hooks or reports.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, FloatArray
from neuronscope.errors import UsageError

if TYPE_CHECKING:
    from neuronscope.tally.census import Tally

__all__ = ["LABELS", "Judgement", "Policy", "Verdict", "is_tau_dormant", "judge", "rate_bound"]


#: Every label of a neuron, most serious first. A neuron that meets the criteria of several gets the first of them.
LABELS = ("unseen", "not finite", "dead", "silent", "cut off", "dormant", "linear", "alive")


@dataclass(frozen=True)
class Policy:
    """Hold the thresholds for verdicts.

    Attributes:
        tolerance: An output counts as zero if ``|y| <= tolerance``; 0 is exact. Applied while counting.
        dormant_tau: A neuron is dormant if its score ``E|y_i| / (mean_k E|y_k| + 1e-9)`` is at most this
            (Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning").
        confidence: Confidence level of the bound that comes with every dead verdict.
        max_rate: A window is long enough if a neuron that never fired in it fires in less than this fraction of
            examples, at the level ``confidence``.

    Raises:
        UsageError: A threshold is out of range.

    >>> Policy().min_examples
    299
    """

    tolerance: float = 0.0
    dormant_tau: float = 0.025
    confidence: float = 0.95
    max_rate: float = 0.01

    def __post_init__(self) -> None:
        for name, low, high in (("tolerance", 0.0, math.inf), ("dormant_tau", 0.0, math.inf)):
            value = getattr(self, name)
            if not _is_number(value) or not low <= value < high:
                raise UsageError(f"Expected policy `{name}` to be a number of at least {low}, but got {value!r}.")
        for name in ("confidence", "max_rate"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 < value < 1.0:
                raise UsageError(f"Expected policy `{name}` to lie between 0 and 1, but got {value!r}.")

    @property
    def min_examples(self) -> int:
        """Number of independent examples that a window needs for verdicts as certain as the policy asks for."""
        return math.ceil(math.log(1.0 - self.confidence) / math.log1p(-self.max_rate))

    def to_dict(self) -> dict[str, float]:
        """Return the thresholds as plain data."""
        return asdict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def rate_bound(examples: int, confidence: float = 0.95) -> float:
    """Return an upper bound on how often a neuron fires that never fired in ``examples`` independent examples.

    ``1 - (1 - confidence) ** (1 / examples)``: the exact (Clopper-Pearson) one-sided bound for 0 of n.

    Args:
        examples: Number of independent examples, ≥ 0.
        confidence: Confidence level of the bound.

    Returns:
        A fraction of examples in [0, 1]; 1.0 if nothing was observed.

    >>> round(rate_bound(1000), 6)
    0.002991
    """
    if examples <= 0:
        return 1.0
    return -math.expm1(math.log(1.0 - confidence) / examples)


@dataclass(frozen=True)
class Judgement:
    """Hold one mask per label over the ``N`` neurons of one site, each bool ``(N,)``.

    A neuron bears one label, so no two of the labels' masks overlap; a neuron in none of them is alive.
    ``tau_dormant`` is not a label.

    Attributes:
        dead: Zero output at every position and, where gradients were seen, zero gradient at every one.
        silent: Zero output at every position, but gradient at some of them.
        dormant: Almost no output.
        cut_off: Zero gradient at every position, and not dead.
        linear: Piecewise linear and never off.
        not_finite: NaN or infinite output at some position.
        unseen: Not observed.
        tau_dormant: Every neuron whose score is at most the policy's ``dormant_tau``, whatever its label: dormant as
            Sokar et al. 2023 define it, dead and silent ones included.
    """

    dead: BoolArray
    silent: BoolArray
    dormant: BoolArray
    cut_off: BoolArray
    linear: BoolArray
    not_finite: BoolArray
    unseen: BoolArray
    tau_dormant: BoolArray

    def labels(self) -> ByteArray:
        """Return the index into :data:`LABELS` of each neuron's most serious label, uint8 ``(N,)``."""
        codes = np.full(self.dead.shape, LABELS.index("alive"), dtype=np.uint8)
        for name in reversed(LABELS[:-1]):
            codes[getattr(self, name.replace(" ", "_"))] = LABELS.index(name)
        return codes


def judge(counts: Tally, policy: Policy) -> Judgement:
    """Judge every neuron of one site by its counts over one window.

    Args:
        counts: The site's counts.
        policy: The thresholds.

    Returns:
        One mask per label, each bool ``(N,)``.
    """
    none = np.zeros(counts.zero_outputs.shape, dtype=np.bool_)
    if counts.positions == 0:
        return Judgement(**dict.fromkeys(Judgement.__dataclass_fields__, none) | {"unseen": ~none})
    not_finite = counts.not_finite_outputs > 0
    never_fired = (counts.zero_outputs == counts.positions) & ~not_finite
    no_gradient = dead = silent = none
    if counts.gradient_positions:
        no_gradient = counts.zero_gradients == counts.gradient_positions
        silent = never_fired & ~no_gradient
    if counts.kind != "leaky":  # never dead by output: its slope lets gradient through everywhere
        dead = never_fired & ~silent
    # Cut off: fires but gets no gradient. A leaky unit is never dead, so it is cut off even if it does not fire.
    cut_off = no_gradient & ~dead & ~not_finite
    tau_dormant = linear = none
    if counts.kind != "sparse":  # a latent that seldom fires is as it should be
        tau_dormant = is_tau_dormant(counts.mean_abs_output, not_finite, policy.dormant_tau)
    dormant = tau_dormant & ~dead & ~silent & ~cut_off
    if counts.linear_when_on:
        linear = (counts.zero_outputs == 0) & ~not_finite & ~cut_off & ~dormant
    return Judgement(
        dead=dead,
        silent=silent,
        dormant=dormant,
        cut_off=cut_off,
        linear=linear,
        not_finite=not_finite,
        unseen=none,
        tau_dormant=tau_dormant,
    )


def is_tau_dormant(mean_abs_output: FloatArray, not_finite: BoolArray, tau: float) -> BoolArray:
    """Return which neurons have a score ``E|y_i| / (mean_k E|y_k| + 1e-9)`` of at most ``tau``, bool ``(N,)``.

    Args:
        mean_abs_output: Mean of ``|y|`` over positions, float64 ``(N,)``.
        not_finite: Neurons with NaN or infinite output, which are left out, bool ``(N,)``.
        tau: The threshold.
    """
    finite = mean_abs_output[~not_finite]
    with np.errstate(invalid="ignore"):  # a mean may be too large for float64; ∞ ÷ ∞ is not dormant
        score = mean_abs_output / ((finite.mean() if finite.size else 0.0) + 1e-9)
    dormant: BoolArray = (score <= tau) & ~not_finite
    return dormant


@dataclass(frozen=True)
class Verdict:
    """Hold the verdict on one neuron, with its basis and its sample size.

    Attributes:
        site: Name of the site.
        neuron: Index along the site's neuron axis.
        label: One of :data:`LABELS`.
        basis: ``measured``, ``proved`` or ``inferred``.
        examples: Number of independent examples that the verdict is based on; 0 if that is not known.
        bound: For a dead or silent neuron, the fraction of examples in which it may still fire, at the policy's
            confidence; ``None`` for other labels, and where the number of examples is not known.
        since: For a dead neuron, the optimizer step at which it was first observed not to fire; −1 if it never fired
            since watching began ("born dead"). ``None`` for other labels.
        in_headlines: Whether totals include the neuron. They do not if the site's axis is assumed, or if the neuron is
            an output.
    """

    site: str
    neuron: int
    label: str
    basis: str
    examples: int
    bound: float | None
    since: int | None
    in_headlines: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return asdict(self)
