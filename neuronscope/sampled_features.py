"""Measure what the features of a model's layers can express: dormant shares as published, ranks, norms of weights.

All of it is computed from a run over data of its own, in evaluation mode: a training that is watched pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from neuronscope.arrays import BoolArray, FloatArray
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import NeuronLayout, neurons_first
from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import is_tau_dormant
from neuronscope.options import ScanArguments, WatchOptions, positive_integer
from neuronscope.report.rendering import LayersByName
from neuronscope.scanning import run_over
from neuronscope.scope import Scope
from neuronscope.writers.formatting import UNKNOWN, count, visible

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LayerRepresentation", "Representation", "has_low_gradient", "representation"]


@dataclass(frozen=True, eq=False)
class LayerRepresentation:
    """Hold what was measured of one site with ``N`` neurons.

    Attributes:
        name: The site's name.
        neurons: ``N``.
        positions: Positions at which each neuron's output was observed.
        dead: Neurons with zero output at every position and, with a loss, zero gradient at the pre-activation too.
        mean_abs_output: Mean of ``|y|`` over all positions, float64 ``(N,)``.
        mean_abs_gradient: Mean of ``|∂L/∂y|`` over all positions, float64 ``(N,)``; ``None`` without a loss.
        dormant: Dormant neurons as Sokar et al. 2023 count them: dead ones included.
        gradient_dormant: Neurons whose GraMa score ``E|∂L/∂y_i| / mean_k E|∂L/∂y_k|`` is at most τ (Liu et al. 2025);
            all of them if the layer gets no gradient; ``None`` without a loss.
        rows: Number of sampled positions, of which the ranks are.
        effective_rank: ``exp(-Σ p ln p)`` of the singular values' shares ``p = σ / Σσ`` (Roy & Vetterli 2007).
        stable_rank: ``Σσ² / max σ²``.
        weight_norm: Square root of the sum of squares of the layer's weight; ``None`` if no single one is known.
        in_headlines: Whether totals include the site.
    """

    name: str
    neurons: int
    positions: int
    dead: int
    mean_abs_output: FloatArray
    mean_abs_gradient: FloatArray | None
    dormant: int
    gradient_dormant: int | None
    rows: int
    effective_rank: float
    stable_rank: float
    weight_norm: float | None
    in_headlines: bool


@dataclass(frozen=True)
class Representation(LayersByName[LayerRepresentation]):
    """Hold what was measured of a model's layers; print it for a table.

    Attributes:
        model: Class name of the model.
        tau: τ of both dormant shares.
        layers: One :class:`LayerRepresentation` for each site that ran, in the order in which they first ran.
    """

    model: str
    tau: float
    layers: tuple[LayerRepresentation, ...]

    @property
    def dormant_percent(self) -> float:
        """Dormant neurons (Sokar et al. 2023) in percent, of all layers but outputs; NaN if there is no neuron."""
        return self._percent([layer.dormant for layer in self.layers if layer.in_headlines])

    @property
    def gradient_dormant_percent(self) -> float:
        """Neurons with hardly any gradient (GraMa) in percent, likewise; NaN without a loss."""
        counts = [layer.gradient_dormant for layer in self.layers if layer.in_headlines]
        return self._percent([each for each in counts if each is not None])

    def _percent(self, counts: list[int]) -> float:
        neurons = sum(layer.neurons for layer in self.layers if layer.in_headlines)
        return 100.0 * sum(counts) / neurons if neurons and counts else float("nan")

    def __str__(self) -> str:
        from neuronscope.writers.console import Column, Page  # loads rich

        share = f"{self.dormant_percent:.1f} % of the neurons of {visible(self.model)} are dormant"
        rows = sorted({layer.rows for layer in self.layers})
        sampled = f"{count(rows[0])}{f' to {count(rows[-1])}' if len(rows) > 1 else ''}" if rows else "0"
        page = Page()
        page.line(f"{share} (Sokar et al. 2023, τ = {self.tau:g}; dead ones included).")
        if not np.isnan(self.gradient_dormant_percent):
            page.line(
                f"{self.gradient_dormant_percent:.1f} % have a low gradient (GraMa, Liu et al. 2025, the same τ)."
            )
        page.table([Column(heading, field) for heading, field, _ in _COLUMNS], [_cells(layer) for layer in self.layers])
        page.line(f"Ranks are of {sampled} sampled rows; a rank is at most the number of its rows.")
        return page.text()


#: Columns after the layer's name: heading, field of :class:`LayerRepresentation`, format.
_COLUMNS = (
    ("neurons", "neurons", ","),
    ("dead", "dead", ","),
    ("dormant", "dormant", ","),
    ("low\ngradient", "gradient_dormant", ","),
    ("effective\nrank", "effective_rank", ".1f"),
    ("stable\nrank", "stable_rank", ".1f"),
    ("weight\nnorm", "weight_norm", ".1f"),
)


def _cells(layer: LayerRepresentation) -> SimpleNamespace:
    values = {field: (getattr(layer, field), style) for _, field, style in _COLUMNS}
    cells = {field: UNKNOWN if value is None else format(value, style) for field, (value, style) in values.items()}
    return SimpleNamespace(name=visible(layer.name), tone="calm", **cells)


def representation(
    model: nn.Module,
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    tau: float = 0.025,
    rows: int = 2048,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    **options: Unpack[ScanArguments],
) -> Representation:
    """Measure what the features of a model's layers can express, on data such as a batch of a replay buffer.

    The model runs in evaluation mode. Its training flags, gradients and buffers are restored afterwards. What is
    measured are: neurons that are dormant as Sokar et al. 2023 define it ("The Dormant Neuron Phenomenon in Deep
    Reinforcement Learning"), dead ones included; with a loss, those whose gradient at the output is as
    small (GraMa: Liu et al. 2025, "Measure gradients, not activations!"); effective and stable rank of the features of
    sampled positions; the norm of each layer's weight.

    Args:
        model: The model.
        data: As for :func:`neuronscope.scan`.
        loss: A function ``loss(output, batch)`` that returns a scalar tensor. If given, gradients are measured too.
        tau: τ, the share of the layer's mean up to which a neuron is dormant.
        rows: Largest number of positions whose features are kept for the ranks, evenly spaced among all.
        forward: A function ``forward(model, batch)`` that returns the output, if the model must be called differently.
        **options: As for :func:`neuronscope.scan`, without ``mask``.

    Returns:
        The measures, by layer; print it for a table.

    Raises:
        UsageError: ``data`` has no batch, or an argument has a wrong type or value.
        NothingToWatchError: The model has no activation.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> _ = model[0].bias.data.copy_(torch.tensor([-100.0, 9.0, 9.0]))
    >>> found = representation(model, torch.randn(300, 4))
    >>> found["0/relu"].dormant, round(found.dormant_percent, 1), found["0/relu"].rows
    (1, 33.3, 300)
    """
    positive_integer("rows", rows)
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau < float("inf"):
        raise UsageError(f"Expected argument `tau` to be a number of at least 0, but got {tau!r}.")
    if options.get("mask") is not None:
        raise UsageError("Expected no argument `mask`: ranks are of all positions. Leave padding out of the data.")
    scope = _SamplingScope(model, WatchOptions(**options, join_ranks=False), rows)
    run_over(model, scope, data, loss, forward)
    report, layers = scope.report("scan"), []
    for name, tally in scope.census("scan").items():
        sample = scope.samples[name]
        means = tally.mean_abs_output
        gradients = None if loss is None else sample.mean_abs_gradient
        features = sample.features()
        effective, stable = _ranks(features)
        layers.append(
            LayerRepresentation(
                name=name,
                neurons=tally.neurons,
                positions=tally.positions,
                dead=report[name].dead,
                mean_abs_output=means,
                mean_abs_gradient=gradients,
                dormant=int(is_tau_dormant(means, report[name].judgement.not_finite, tau).sum()),
                gradient_dormant=None if gradients is None else int(has_low_gradient(gradients, tau).sum()),
                rows=len(features),
                effective_rank=effective,
                stable_rank=stable,
                weight_norm=_weight_norm(model, tally.layer),
                in_headlines=tally.in_headlines,
            )
        )
    return Representation(type(model).__name__, float(tau), tuple(layers))


class _Sample:
    """Keeps the features of some positions of a site, and adds up the magnitudes of its gradients."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._kept: list[Tensor] = []
        self._stride = 1
        self._seen = 0
        self._gradients: Tensor | None = None
        self._gradient_positions = 0

    def add(self, y: Tensor, layout: NeuronLayout) -> None:
        """Keep every n-th position of a call's output, and ask for its gradient."""
        features = _by_position(y.detach(), layout)
        self._kept.append(features[-self._seen % self._stride :: self._stride].double())
        self._seen += len(features)
        while sum(map(len, self._kept)) > self._rows:  # every second one is as evenly spaced
            self._kept = [torch.cat(self._kept)[::2]]
            self._stride *= 2
        if y.requires_grad:
            y.register_hook(lambda gradient: self._add_gradient(gradient.detach(), layout))

    def _add_gradient(self, gradient: Tensor, layout: NeuronLayout) -> None:
        magnitudes = _by_position(gradient, layout).double().abs()
        total = magnitudes.sum(0)
        self._gradients = total if self._gradients is None else self._gradients + total
        self._gradient_positions += len(magnitudes)

    @property
    def mean_abs_gradient(self) -> FloatArray | None:
        if self._gradients is None:
            return None
        means: FloatArray = (self._gradients / self._gradient_positions).cpu().numpy()
        return means

    def features(self) -> Tensor:
        """Return the kept features, float64 ``(R, N)``."""
        return torch.cat(self._kept)


class _SamplingScope(Scope):
    """Also keeps the features of some positions of each site."""

    def __init__(self, model: nn.Module, options: WatchOptions, rows: int) -> None:
        self.samples: dict[str, _Sample] = {}
        self._names: dict[SiteCounters, str] = {}
        self._rows = rows
        super().__init__(model, options)
        self._hooks.recorder.sampler = self._sample

    def _new_counters(self, *args: Any) -> SiteCounters | None:
        counters = super()._new_counters(*args)
        if counters is not None:
            _, key, *_ = args
            self._names[counters] = key.name
        return counters

    def _sample(self, counters: SiteCounters, y: Tensor, layout: NeuronLayout) -> None:
        self.samples.setdefault(self._names[counters], _Sample(self._rows)).add(y, layout)


def _by_position(values: Tensor, layout: NeuronLayout) -> Tensor:
    """Return values of a site as ``(P, N)``."""
    moved, axis = neurons_first(values, layout.axis, layout.dims)
    return moved.movedim(axis, -1).reshape(-1, moved.shape[axis])


def _ranks(features: Tensor) -> tuple[float, float]:
    """Return the effective and the stable rank of features ``(R, N)``; NaN if they are not all finite."""
    if not bool(features.isfinite().all()):
        return float("nan"), float("nan")
    values = torch.linalg.svdvals(features)
    largest = float(values.max()) if values.numel() else 0.0
    if largest == 0.0:
        return 0.0, 0.0
    shares = values / values.sum()
    entropy = float(-torch.special.xlogy(shares, shares).sum())
    return float(np.exp(entropy)), float(((values / largest) ** 2).sum())


def has_low_gradient(mean_abs_gradient: FloatArray, tau: float) -> BoolArray:
    """Return which neurons have a finite GraMa score of at most ``tau``, bool ``(N,)``.

    Nothing is added to the layer's mean, as it is for outputs: the gradients of a mean over a large batch are often
    smaller than that, and the score must not depend on the scale of the loss.

    Args:
        mean_abs_gradient: Mean of ``|∂L/∂y|`` over positions, float64 ``(N,)``.
        tau: The threshold.
    """
    finite = np.isfinite(mean_abs_gradient)
    mean = mean_abs_gradient[finite].mean() if finite.any() else 0.0
    low: BoolArray = finite & (mean_abs_gradient <= tau * mean)
    return low


def _weight_norm(model: nn.Module, layer: str) -> float | None:
    module = dict(model.named_modules()).get(layer) if layer else None
    weight = getattr(module, "weight", None)
    return float(weight.detach().double().norm()) if isinstance(weight, Tensor) else None
