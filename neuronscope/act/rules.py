"""Rules that choose which neurons to revive, as data: each is a frozen dataclass of the numbers in its paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from neuronscope.act.structure import SiteStructure
from neuronscope.attach.dtensor import is_distributed
from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import Policy, judge
from neuronscope.tally.census import Tally

__all__ = ["ContinualBackprop", "Dead", "ReDo", "Rule", "SelfNormalizedResets", "SiteActivity", "as_rule"]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SiteActivity:
    """What a rule is told of one site with ``N`` neurons.

    Attributes:
        name: The site's name.
        window: The counts of the newest closed window.
        zero_outputs: Zero outputs of each neuron before that window, since it was revived last, int64 ``(N,)``.
        positions: Positions of each neuron before that window, since it was revived last, int64 ``(N,)``.
        silent: Examples since each neuron fired or was revived last, at a step's mean in the window, float64 ``(N,)``.
        age: Optimizer steps since each neuron was revived last, or since watching began, int64 ``(N,)``.
        steps: Optimizer steps taken since watching began.
        revived: How many neurons of the site were revived so far, each as often as it was.
        structure: The weights of the neurons.
        policy: The thresholds of the watch.
    """

    name: str
    window: Tally
    zero_outputs: IntArray
    positions: IntArray
    silent: FloatArray
    age: IntArray
    steps: int
    revived: int
    structure: SiteStructure
    policy: Policy

    def outgoing(self) -> FloatArray:
        """Return ``Σ |w|`` over the weights that read each neuron, float64 ``(N,)``; 0 where they are not known.

        Raises:
            UsageError: The weights are distributed, and this rank holds a part of them.
        """
        layers = [self.structure.layers[path] for path in {each.layer for each in self.structure.readers}]
        for layer in layers:
            if any(is_distributed(part.tensor) for part in layer.columns):
                raise UsageError(
                    "Expected a rule that does not ask for the size of outgoing weights, as `ns.Dead()` and "
                    f"`ns.ReDo()`, since those of `{layer.path}` are distributed among ranks."
                )
        sums = {
            layer.path: [
                part.tensor.detach().double().movedim(part.dim, 0).flatten(1).abs().sum(1).cpu().numpy()
                for part in layer.columns
            ]
            for layer in layers
        }
        return np.array(
            [
                sum(
                    each[columns].sum()
                    for layer, columns in self.structure.columns(neuron)
                    for each in sums[layer.path]
                )
                for neuron in range(self.window.neurons)
            ],
            dtype=np.float64,
        )


@dataclass(frozen=True)
class Rule:
    """Choose neurons to revive. A rule of your own is a subclass with :meth:`choose`.

    Args:
        init: Initialises a layer in place, as ``model._init_weights`` of a Hugging Face model does; the fresh incoming
            weights are from it. By default the layer's own ``reset_parameters()``.
    """

    init: Callable[[nn.Module], Any] | None = field(default=None, repr=False, compare=False, kw_only=True)

    def choose(self, site: SiteActivity) -> BoolArray:
        """Return which neurons to revive, bool ``(N,)``.

        Args:
            site: The site.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `choose(site)`")


@dataclass(frozen=True)
class Dead(Rule):
    """Choose the dead neurons: zero output, and zero gradient, at every position of the window.

    The network's function on that window does not change by a bit.
    """

    def choose(self, site: SiteActivity) -> BoolArray:
        """Return which neurons are dead, bool ``(N,)``."""
        return judge(site.window, site.policy).dead


@dataclass(frozen=True)
class ReDo(Rule):
    """Choose the neurons that are dormant by their paper's definition, dead and silent ones included.

    A neuron is τ-dormant if ``E|y_i| / mean_k E|y_k| ≤ τ``. The paper takes the mean over a batch, every 1,000 steps;
    here it is taken over the window. Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning".
    A dormant neuron that still fires changes the network's function when it is revived.

    Args:
        tau: τ; the paper's are 0.025 and 0.1.
    """

    tau: float = 0.025

    def __post_init__(self) -> None:
        _check(self, tau=(0.0, float("inf")))

    def choose(self, site: SiteActivity) -> BoolArray:
        """Return which neurons are τ-dormant, bool ``(N,)``."""
        return judge(site.window, replace(site.policy, dormant_tau=self.tau)).tau_dormant


@dataclass(frozen=True)
class SelfNormalizedResets(Rule):
    """Choose the neurons that are silent for longer than they ever were by chance, each by its own rate of firing.

    If a neuron fires with probability ``p`` in an example, it is silent in ``a`` examples with probability
    ``(1 - p)^a``; it is chosen where that is at most η, so where ``a ≥ ln η / ln(1 - p)``. Here ``a`` counts the
    examples since it fired last, and ``p`` is its rate over all positions before that, since it was revived last. One
    that has not fired since has no rate yet, and has the mean of its site's. Farias & Jozefiak 2024, "Self-Normalized
    Resets for Plasticity in Continual Learning". Only neurons that are silent in the whole window are chosen, so the
    network's function on it does not change by a bit.

    Args:
        eta: η, in (0, 1).
    """

    eta: float = 0.02

    def __post_init__(self) -> None:
        _check(self, eta=(0.0, 1.0))

    def choose(self, site: SiteActivity) -> BoolArray:
        """Return which neurons are silent for too long, bool ``(N,)``."""
        window = site.window
        quiet = (window.zero_outputs == window.positions) & (window.not_finite_outputs == 0)
        positions = site.positions + window.positions
        fired = positions - site.zero_outputs - window.zero_outputs
        silent_positions = site.silent * window.positions / (window.examples or window.positions)
        rate = np.clip(fired / np.maximum(positions - silent_positions, 1), 0.0, 1.0)
        if not fired.any():
            return fired > 0
        rate = np.where(fired > 0, rate, rate[fired > 0].mean())
        chosen: BoolArray = quiet & ((1.0 - rate) ** site.silent <= self.eta)
        return chosen


@dataclass(frozen=True)
class ContinualBackprop(Rule):
    """Choose the least useful neurons, a few at a time, among those that are old enough.

    The utility of a neuron is ``E|y_i| · Σ|w_out|``: its paper averages this with a decay of 0.99 over the steps; here
    the output is averaged over the window, and the weights are those at its end. Over the whole watch each site has
    ``rate`` times its mature neurons revived at each step. Dohare et al. 2024, "Loss of plasticity in deep continual
    learning", Nature 632. A neuron that still fires changes the network's function when it is revived.

    Args:
        rate: Share of the mature neurons to revive at each optimizer step; the paper's are 1e-6 to 1e-4.
        maturity: Optimizer steps for which a neuron is left alone after it was revived.
    """

    rate: float = 1e-4
    maturity: int = 100

    def __post_init__(self) -> None:
        _check(self, rate=(0.0, 1.0), maturity=(0, float("inf")))

    def choose(self, site: SiteActivity) -> BoolArray:
        """Return the least useful mature neurons, as many as are due, bool ``(N,)``."""
        mature = (site.age >= self.maturity) & (site.window.not_finite_outputs == 0)
        due = int(self.rate * int(mature.sum()) * site.steps) - site.revived
        utility = np.where(mature, site.window.mean_abs_output * site.outgoing(), np.inf)
        chosen = np.zeros(len(mature), dtype=np.bool_)
        chosen[np.argsort(utility, kind="stable")[: max(due, 0)]] = True
        chosen &= mature
        return chosen


def _check(rule: Rule, **ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            raise UsageError(
                f"Expected `{name}` of {type(rule).__name__} to be a number from {low} to below {high}, but got "
                f"{value!r}."
            )


def as_rule(rule: Any, policy: Policy) -> Rule:
    """Return the rule that a user named.

    Args:
        rule: A rule, or ``dead`` or ``dormant``.
        policy: The thresholds of the watch, for ``dormant``.

    Raises:
        UsageError: It is anything else.
    """
    named: dict[str, Rule] = {"dead": Dead(), "dormant": ReDo(policy.dormant_tau)}
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str) and rule in named:
        return named[rule]
    raise UsageError(f"Expected a rule to be 'dead', 'dormant' or a neuronscope.act.rules.Rule, but got {rule!r}.")
