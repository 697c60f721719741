"""Rules that choose which neurons to revive, as data: each is a frozen dataclass of the numbers in its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuronscope.act.structure import LayerWeights, SiteStructure
from neuronscope.arrays import BoolArray, FloatArray, IntArray
from neuronscope.attach.dtensor import is_distributed
from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import Policy, judge
from neuronscope.sampled_features import Representation, has_low_gradient
from neuronscope.tally.census import Tally

__all__ = [
    "ContinualBackprop",
    "Dead",
    "GraMa",
    "ReDo",
    "Resampling",
    "Rule",
    "SelfNormalizedResets",
    "SiteActivity",
    "as_rule",
]


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
        found = np.zeros(self.window.neurons)
        for neuron in range(len(found)):
            for layer, columns in self.structure.columns(neuron):
                found[neuron] += sum(each[columns].sum() for each in sums[layer.path])
        return found


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

    def refine(self, layer: LayerWeights, fresh: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        """Change fresh rows in place before they are used. By default they stay as the initialiser left them.

        Meanwhile torch's default generator holds a state of ours, not the user's.

        Args:
            layer: A layer that leads into the neurons, with its weights of now.
            fresh: Its freshly initialised tensors on the CPU, by name, whole.
            rows: The rows that will be used.
        """


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


@dataclass(frozen=True)
class GraMa(Rule):
    """Choose the neurons whose gradient is small beside their layer's, measured on data of your own.

    A neuron is chosen if ``E|∂L/∂y_i| / mean_k E|∂L/∂y_k| ≤ τ``, with its output ``y_i`` and the mean over its layer.
    Liu et al. 2025, "Measure gradients, not activations! Enhancing neuronal activity in deep reinforcement learning".
    A chosen neuron may well fire, and reviving it then changes the network's function. A dead ReLU may have a large
    gradient at its output, which does not reach its weights; :class:`Dead` is the rule that chooses it.

    Args:
        measured: What :func:`neuronscope.representation` returned for the model as it is now, with a loss; the same on
            all ranks. It is out of date after an act, so measure anew before each: callbacks refuse this rule.
        tau: τ.

    >>> import neuronscope
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> measured = neuronscope.representation(model, torch.randn(300, 4), lambda output, batch: output.mean())
    >>> GraMa(measured, tau=0.1)
    GraMa(tau=0.1)
    """

    measured: Representation = field(repr=False, compare=False)
    tau: float = 0.025

    def __post_init__(self) -> None:
        _check(self, tau=(0.0, float("inf")))
        known = isinstance(self.measured, Representation)
        if not known or all(layer.mean_abs_gradient is None for layer in self.measured.layers):
            raise UsageError(
                "Expected argument `measured` of GraMa to be what `ns.representation(model, data, loss)` returns with "
                f"a loss, but got {'one without' if known else type(self.measured).__name__}."
            )

    def choose(self, site: SiteActivity) -> BoolArray:
        """Return which neurons have a small gradient, bool ``(N,)``; none of a site that was not measured."""
        gradients = next((each.mean_abs_gradient for each in self.measured.layers if each.name == site.name), None)
        if gradients is None or len(gradients) != site.window.neurons:
            return np.zeros(site.window.neurons, dtype=np.bool_)
        return has_low_gradient(gradients, self.tau)


@dataclass(frozen=True)
class Resampling(Rule):
    """Choose the silent neurons of a sparse autoencoder, and turn each towards an example that is reconstructed badly.

    An example is drawn with a chance proportional to its loss squared; the incoming row becomes its direction times
    ``scale`` times the mean norm of the other rows, and the bias 0. Bricken et al. 2023, "Towards Monosemanticity:
    Decomposing Language Models With Dictionary Learning". The paper also sets the outgoing column to the direction;
    here it is 0, as for all rules, so that the network's function on the window does not change by a bit.

    Args:
        inputs: Inputs of the encoder's linear layer, ``(E, D)``; the same on all ranks. Linear layers of other inputs,
            and those whose weights are distributed, are left alone.
        losses: The loss of each of these examples, ``(E,)``.
        scale: Norm of the fresh rows, relative to the mean norm of the others.

    >>> Resampling(torch.randn(100, 4), torch.rand(100))
    Resampling(scale=0.2)
    """

    inputs: Tensor = field(repr=False, compare=False)
    losses: Tensor = field(repr=False, compare=False)
    scale: float = 0.2

    def __post_init__(self) -> None:
        _check(self, scale=(0.0, float("inf")))
        inputs, losses = self.inputs, self.losses
        fits = inputs.dim() == 2 and losses.shape == inputs.shape[:1] and bool(losses.isfinite().all())
        if not fits or not bool((losses >= 0).all() & losses.any()):
            raise UsageError(
                "Expected `inputs` (E, D) of Resampling, and as many finite `losses` (E,), none negative, not all 0, "
                f"but got shapes {tuple(inputs.shape)} and {tuple(losses.shape)}."
            )

    def choose(self, site: SiteActivity) -> BoolArray:
        """Return which neurons are zero at every position of the window; none of layers that do not take the inputs."""
        window, layers = site.window, [site.structure.layers[each.layer] for each in site.structure.incoming]
        chosen: BoolArray = (window.zero_outputs == window.positions) & (window.not_finite_outputs == 0)
        return chosen & all(map(self._fits, layers))

    def refine(self, layer: LayerWeights, fresh: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        """Turn fresh rows towards examples with a high loss.

        Args:
            layer: The encoder's linear layer.
            fresh: Its freshly initialised tensors.
            rows: The rows that will be used.

        """
        norms = layer.rows[0].tensor.detach().double().norm(dim=1).cpu()
        others = norms[[row for row in range(len(norms)) if row not in set(rows)]]
        drawn = torch.multinomial(self.losses.detach().double().cpu() ** 2, len(rows), replacement=True)
        directions = nn.functional.normalize(self.inputs.detach().double().cpu()[drawn], dim=1)
        size = self.scale * float((others if len(others) else norms).mean())
        fresh["weight"][list(rows)] = (size * directions).to(fresh["weight"].dtype)
        if "bias" in fresh:
            fresh["bias"][list(rows)] = 0.0

    def _fits(self, layer: LayerWeights) -> bool:
        """Whether a layer is linear, takes inputs of this size, and is whole on this rank."""
        weight = layer.rows[0] if layer.rows else None
        if weight is None or weight.dim or is_distributed(weight.tensor):
            return False
        return weight.tensor.shape[1:] == self.inputs.shape[1:]


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
    """
    named: dict[str, Rule] = {"dead": Dead(), "dormant": ReDo(policy.dormant_tau)}
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str) and rule in named:
        return named[rule]
    raise UsageError(f"Expected a rule to be 'dead', 'dormant' or a neuronscope.act.rules.Rule, but got {rule!r}.")
