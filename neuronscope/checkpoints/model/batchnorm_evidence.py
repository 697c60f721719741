r"""Conclude from batch norms how often the neurons before and behind them fire, and which are silent or constant.

**γ and β.** A channel's values in a training batch are normalised by their own mean and variance, so ``Σz = 0`` and
``Σz² ≤ n`` over its ``n`` values (ε only makes it smaller). With ``c = −β/|γ| > 0`` the neuron fires where ``z > c``
(or ``z < −c``). By Cantelli's inequality, at most ``1/(1 + c²)`` of the values do. None of ``n`` values is larger than
``√(n − 1)``, so none fires if ``β + |γ|√(n − 1) ≤ 0`` (Samuelson 1968). For normally distributed values the share is
``Φ(−c)``. A max pool before the activation gives a maximum above zero where one of its values is: each value is in a
few windows, and a pooled position stands for several values. The shares are multiplied by both numbers.

**Running statistics.** A batch norm in training keeps running means of the mean and of the variance of its input. What
does not vary over a whole batch multiplies the running variance by ``1 − momentum``, and what is zero multiplies both.

**Behind an activation** whose output is never negative, let ``R = mean² / variance``. A silent neuron lets R fall by
``1 − momentum`` in each step. For the positive half of a normal distribution R is .47. A neuron that fires at a share
``p`` of all positions has an R near ``p``, so that an R that is a little smaller shows a rare neuron as well as one
that fell silent lately. Only a very small one tells them apart: a neuron that fired at one of the ``n`` positions of
the last batch has at least ``momentum / n``. And a neuron fires at a share of ``R / (1 + R)`` of all positions at
least, by Cauchy and Schwarz: ``E[y]² ≤ P(y > 0) · E[y²]``. The running mean itself is the mean output, from which
dormancy follows without data; if it is exactly zero, the neuron never fired in training.

**A depthwise convolution** without bias may lie between the two. Its output ``Σ w y`` is zero too when the neuron is
silent, so that both statistics fall as before, and a neuron whose channel varies fires. Where the weights cancel each
other, R is smaller for any neuron: with independent pixels, R is that of the neuron times ``(Σ w)² / Σ w²``. The
smaller one of the two is taken for the R of a neuron that fires. The running mean is no mean output then.

**Before an activation**, the mean of a neuron's pre-activations over each batch is the norm's shift β. With β > 0 some
of each batch are above zero. With β ≤ 0 none is, if the norm's input is constant. The variance of a living channel
depends on its incoming weights, so ``q = variance / ‖w‖²`` is compared with that of the layer's other channels:
``k = ln(q_layer / q) / −ln(1 − momentum)`` training steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.arrays import BoolArray, FloatArray
from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.bounds.propagate import SiteBounds, is_positive_from, is_zero_below_zero
from neuronscope.checkpoints.model.function_rules import step_kind
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step, TensorRef
from neuronscope.checkpoints.verdict.evidence import Evidence, evidence_on_site
from neuronscope.judge.verdicts import Policy

__all__ = [
    "HALF_NORMAL",
    "batch_norm_parameters",
    "batch_norm_statistics",
    "negligible_neurons",
]

#: mean² / variance of the positive half of a normal distribution, such as a ReLU gives.
HALF_NORMAL = 0.47

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_MAX_POOLS = {function: n for n in (1, 2, 3) for function in spellings(f"max_pool{n}d")}
_SIGNATURE = inspect.signature(F.batch_norm)
_STATISTICS = ("running_mean", "running_var")
_CLOCK = "batch norm statistics"
#: Silence is suspected above this many steps, and inferred above this many (docs/postmortem.md has the measured rates).
_SILENT, _SURELY_SILENT = 50.0, 200.0
_ACTIVITY = "batch norm activity"
#: Up to this many steps since it varied a channel is taken to vary; above these, it is suspected and inferred to be
#: constant. They lie far apart, since a living channel's variance is known to a factor of some thousands only.
_VARIES, _SUSPECTED, _SURE = 50.0, 150.0, 300.0
#: The layer's usual ``q`` is this quantile of it; below the second number nothing is left of a whole layer's.
_USUAL, _FADED = 0.9, 1e-20
_TINY = 1e-300
_SOURCE = "batch norm"
#: A neuron after a batch norm that fires only above this many standard deviations is quiet; above the second, it is
#: suspected to be dead.
_QUIET, _MAYBE_DEAD = 3.0, 4.0
#: The share of values that may fire at that number of deviations: 1 in 10.
_QUIET_SHARE = 1.0 / (1.0 + _QUIET**2)
#: A channel whose output is at most this fraction of its layer's usual scale is negligible, for batches of at most so
#: many values per channel.
_NEGLIGIBLE, _MANY_VALUES = 1e-3, 1_000_000


class _BatchNormStep(NamedTuple):
    """A batch norm over ``C`` channels."""

    scale: Tensor | None  # γ, ``(C,)``; ``None`` if it has none, or if it depends on the input
    shift: Tensor | None  # β, ``(C,)``, likewise
    mean: Tensor | None  # running mean of its input, float64 ``(C,)``; ``None`` if it keeps none
    variance: Tensor | None  # running variance of its input, float64 ``(C,)``, likewise
    momentum: float | None  # share of each new batch in the running statistics; ``None`` if it is not a plain number

    @property
    def is_trained(self) -> bool:
        """Whether the running statistics have left their start, which is a mean of 0 everywhere."""
        return self.mean is not None and self.variance is not None and bool((self.mean != 0).any())

    @property
    def has_clock(self) -> bool:
        """Whether the running statistics forget old batches at a known rate; not if they are averages of all."""
        return self.momentum is not None and 0.0 < self.momentum < 0.5

    def steps_of_decay(self, factor: Tensor) -> Tensor:
        """Return in how many steps without anything new running statistics fall by a factor, both ``(C,)``.

        Without a clock these are steps of torch's default momentum of 0.1.
        """
        return torch.log(factor) / -math.log1p(-(self.momentum if self.has_clock and self.momentum else 0.1))


def _step_before_copies(graph: Graph, number: int) -> Step | None:
    """Return the step that computed a tensor, before copies, casts and dropout."""
    step = graph.producers.get(number)
    while step is not None and step_kind(step) == "same" and step.reads:
        step = graph.producers.get(step.reads[0])
    return step


class _Pooling(NamedTuple):
    """What lies between a batch norm and an activation: a max pool, or nothing."""

    #: The share of pooled positions that fire is at most so many times the share of values that do.
    spread: float = 1.0
    covers: bool = True  # whether each value is in some window


def _batch_norm_before(graph: Graph, number: int) -> tuple[Step | None, _Pooling]:
    """Return the step before a tensor, and before one max pool if there is one: a maximum is above zero if a value is.

    Args:
        graph: The traced forward.
        number: The tensor's number.
    """
    step = _step_before_copies(graph, number)
    if step is None or step.function not in _MAX_POOLS or not step.reads:
        return step, _Pooling()
    source, pooled = (graph.values[at].shape for at in (step.reads[0], step.outputs[0]))
    names = ("kernel_size", "stride", "padding", "dilation")
    kernel, stride, padding, dilation = (step.argument(place, name) for place, name in enumerate(names, start=1))
    axes = _MAX_POOLS[step.function]
    sizes = [_each(kernel, axes), _each(stride or kernel, axes), _each(padding or 0, axes), _each(dilation or 1, axes)]
    overlap, covers = 1, True
    for before, after, size, hop, pad, gap in zip(source[-axes:], pooled[-axes:], *sizes, strict=True):
        overlap *= -(-size // hop) if gap == 1 else size
        covers &= gap == 1 and hop <= size and (after - 1) * hop + size - pad >= before
    return _step_before_copies(graph, step.reads[0]), _Pooling(overlap * math.prod(source) / math.prod(pooled), covers)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """Return a setting of each axis: one number stands for all."""
    found = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return found * axes if len(found) == 1 else found


def _read_batch_norm(graph: Graph, step: Step | None) -> _BatchNormStep | None:
    """Return what a batch norm holds; ``None`` for any other step."""
    if step is None or step.function is not F.batch_norm or not step.reads:
        return None
    given = _SIGNATURE.bind(*step.args, **step.kwargs)
    given.apply_defaults()

    def tensor(name: str) -> Tensor | None:
        found = graph.constant(given.arguments[name])
        return None if found is None else found.detach()

    momentum = given.arguments["momentum"]
    mean, variance = (None if (found := tensor(name)) is None else found.to(torch.float64) for name in _STATISTICS)
    return _BatchNormStep(
        scale=tensor("weight"),
        shift=tensor("bias"),
        mean=mean,
        variance=variance,
        momentum=float(momentum) if isinstance(momentum, (int, float)) else None,
    )


class _WeightedStep(NamedTuple):
    """A linear or convolutional layer of ``C`` channels."""

    weight: Tensor  # the incoming weights of each channel, float64 ``(C, F)``
    has_bias: bool  # whether a bias that is not zero is added
    reads: int  # number of the tensor that it reads
    is_depthwise: bool  # whether it is a convolution of which each channel reads one neuron, the one with its number


def _weighted_step(graph: Graph, number: int) -> _WeightedStep | None:
    """Return the layer that computed a tensor; ``None`` if none did."""
    step = _step_before_copies(graph, number)
    if step is None or step.function not in (*_CONVOLUTIONS, F.linear):
        return None
    read = step.argument(0, "input")
    weight, bias = (graph.constant(step.argument(place, name)) for place, name in ((1, "weight"), (2, "bias")))
    if weight is None or weight.dim() < 2 or not isinstance(read, TensorRef):
        return None
    one_each = weight.shape[1] == 1 and graph.values[read.value].shape[1] == weight.shape[0]
    has_bias = bias is not None and bool((bias != 0).any())
    rows = weight.detach().double().flatten(1)
    return _WeightedStep(rows, has_bias, read.value, one_each and step.function in _CONVOLUTIONS)


class _NormBehindSite(NamedTuple):
    """A batch norm with running statistics of the ``N`` neurons of a site."""

    path: str  # path of the batch norm; ``""`` if its running mean is no buffer of a module
    norm: _BatchNormStep  # the batch norm
    mean: Tensor  # its running mean, float64 ``(N,)``
    variance: Tensor  # its running variance, float64 ``(N,)``
    site: Site  # the site
    #: The depthwise convolution between the two; ``None`` if the norm reads the site's output itself.
    depthwise: _WeightedStep | None


def _norms_behind_sites(graph: Graph) -> Iterator[_NormBehindSite]:
    """Yield the batch norms that read the output of a site, or of a depthwise convolution that reads it."""
    site_of = {site.after: site for site in graph.sites}
    for step in graph.steps:
        norm = _read_batch_norm(graph, step)
        if norm is None or norm.mean is None or norm.variance is None:
            continue
        layer = _weighted_step(graph, step.reads[0])
        depthwise = layer if layer is not None and layer.is_depthwise else None
        before = _step_before_copies(graph, step.reads[0] if depthwise is None else depthwise.reads)
        site = next((site_of[number] for number in (before.outputs if before else ()) if number in site_of), None)
        if site is None or site.layout.axis != 1 or not norm.mean.shape == norm.variance.shape == (site.neurons,):
            continue
        buffer = step.argument(1, "running_mean")
        path = graph.values[buffer.value].name.rpartition(".")[0] if isinstance(buffer, TensorRef) else ""
        yield _NormBehindSite(path, norm, norm.mean, norm.variance, site, depthwise)


def batch_norm_statistics(
    graph: Graph, intervals: Sequence[Interval | None], batches: Mapping[str, int], training_step: int | None
) -> Iterator[Evidence]:
    """Yield what the running statistics of batch norms say about the neurons before and behind them.

    Args:
        graph: A traced forward in evaluation mode.
        intervals: What :func:`~neuronscope.checkpoints.model.bounds.propagate.propagate_bounds` gave for it.
        batches: Number of training batches that each batch norm has counted, by its path.
        training_step: The checkpoint's number of optimizer steps; ``None`` = not known, so that a batch counts as one.
    """
    seen = set()
    for found in _norms_behind_sites(graph):
        interval = intervals[found.site.after]
        if found.site.name in seen or interval is None or not interval.is_never_negative:
            continue
        seen.add(found.site.name)
        if found.norm.is_trained and not (found.depthwise and found.depthwise.has_bias):
            count = batches.get(found.path)
            yield from _silent(found, count if training_step in (None, count) else None)
    yield from _activity(graph, intervals)


def _silent(found: _NormBehindSite, batches: int | None) -> Iterator[Evidence]:
    """Yield evidence on one site; ``batches`` are those that the norm has counted, if each was an optimizer step."""
    norm, mean = found.norm, found.mean
    evidence = partial(evidence_on_site, found.site.name, source=_CLOCK)
    never = (mean == 0).numpy()
    text = (
        "The batch norm behind it has a running mean of exactly zero: it never fired in training since these "
        "statistics began."
    )
    yield from evidence(never, claim="dead", basis="inferred", text=text)
    if norm.has_clock:
        ratio = mean.square() / found.variance.clamp(min=_TINY)
        gain = torch.ones((), dtype=torch.float64) if found.depthwise is None else _gain(found.depthwise.weight)
        silent = norm.steps_of_decay(HALF_NORMAL * gain.clamp(min=_TINY) / ratio.clamp(min=_TINY)).numpy()
        since = None if batches is None else np.clip(batches - np.floor(silent), 0, batches).astype(np.int64)
        is_sure = silent > _SURELY_SILENT
        for basis, mask in (("inferred", is_sure), ("suspected", (silent > _SILENT) & ~is_sure)):
            yield from evidence(
                mask & ~never,
                np.floor(silent),
                claim="dead",
                basis=basis,
                measure="training steps since it fired, about",
                text=(
                    "The running mean of the batch norm behind it is far smaller, compared with the running deviation, "
                    "than that of a neuron that fires: both have been falling for about this many steps. A neuron "
                    "that fires very rarely looks alike."
                ),
                since=since,
            )
    if found.depthwise is not None:
        return
    score = (mean / (mean.clamp(min=0).mean() + 1e-9)).numpy()
    threshold = Policy().dormant_tau
    yield from evidence(
        (score <= threshold) & ~never,
        score,
        claim="quiet",
        basis="inferred",
        measure="mean output ÷ the layer's mean output",
        text=(
            f"Dormant: by the running mean of the batch norm behind it, its mean output in training was at most "
            f"{threshold:g} times that of its layer."
        ),
    )


def _gain(weight: Tensor) -> Tensor:
    """Return R behind depthwise weights ``(C, F)`` over R before them, at least; float64 ``(C,)``, 0 to 1."""
    return (weight.sum(1).square() / weight.square().sum(1).clamp(min=_TINY)).clamp(max=1.0)


def _activity(graph: Graph, intervals: Sequence[Interval | None]) -> Iterator[Evidence]:
    """Yield which neurons fire, and which are constant."""
    for site, *others in graph.calls.values():
        step, pooling = _batch_norm_before(graph, site.before)
        norm = _read_batch_norm(graph, step)
        if step is None or norm is None or norm.shift is None or others or site.layout.axis != 1:
            continue
        if norm.shift.shape == (site.neurons,):
            constant = _constant_steps(norm, _weighted_step(graph, step.reads[0]))
            yield from _behind(graph, site, norm.shift, constant, fires_above=pooling.covers)
    for found in _norms_behind_sites(graph):
        site, norm = found.site, found.norm
        if len(graph.calls[site.name]) > 1 or not norm.is_trained:
            continue
        if found.depthwise is not None:
            if (constant := _constant_steps(norm, found.depthwise)) is not None:
                yield from _varies(site, constant)
        elif (interval := intervals[site.after]) is not None and interval.is_never_negative:
            yield from _fires(found)


def _constant_steps(norm: _BatchNormStep, layer: _WeightedStep | None) -> FloatArray | None:
    """Return for about how many training steps each channel has been constant, ``(C,)``; ``None`` if it is unknown."""
    if layer is None or norm.variance is None or not norm.has_clock or not norm.is_trained:
        return None
    size = layer.weight.square().sum(1)
    if norm.variance.shape != size.shape:
        return None
    per_weight = norm.variance / size.clamp(min=_TINY)
    usual = torch.quantile(per_weight, _USUAL)
    if not usual > _FADED:
        return None
    return norm.steps_of_decay(usual / per_weight.clamp(min=_TINY)).floor().numpy()


def _behind(
    graph: Graph, site: Site, shift: Tensor, constant: FloatArray | None, *, fires_above: bool
) -> Iterator[Evidence]:
    """Yield evidence on a site whose pre-activation is the output of a batch norm, or the maxima of it.

    Args:
        graph: The traced forward.
        site: The site.
        shift: The norm's shift, ``(N,)``.
        constant: For about how many steps each channel has been constant, ``(N,)``; ``None`` = not known.
        fires_above: Whether a value above zero reaches the activation: not if a max pool leaves values out.
    """
    above = shift > 0
    evidence = partial(evidence_on_site, site.name, source=_ACTIVITY)
    if fires_above and bool(above.any()) and is_positive_from(graph, site, float(shift[above].min())):
        yield from evidence(
            above,
            shift.double(),
            claim="alive",
            basis="inferred",
            measure="mean of its pre-activations over each training batch",
            text=(
                "In training, the mean of its pre-activations over each batch is the shift of the batch norm before "
                "it, β > 0, so it fires in each batch; in evaluation, this holds as far as the running statistics "
                "match the data."
            ),
        )
    if constant is None or not is_zero_below_zero(graph, site):
        return
    for basis, mask in (("inferred", constant > _SURE), ("suspected", (constant > _SUSPECTED) & (constant <= _SURE))):
        yield from evidence(
            mask & ~above.numpy(),
            constant,
            claim="dead",
            basis=basis,
            measure="training steps since its pre-activation varied, about",
            text=(
                "The running variance of the batch norm before it is far smaller than that of the layer's other "
                "channels: what the norm is given has been constant for about this many training steps, or longer. So "
                "its pre-activation in training is the norm's shift β, which is not above zero."
            ),
        )


def _varies(site: Site, constant: FloatArray) -> Iterator[Evidence]:
    """Yield evidence on a site whose neurons a depthwise convolution reads, one each, before a batch norm."""
    return evidence_on_site(
        site.name,
        constant <= _VARIES,
        constant.clip(min=0),
        source=_ACTIVITY,
        claim="alive",
        basis="inferred",
        measure="training steps since its output varied, about",
        text=(
            "By the running variance of the batch norm behind it, what the depthwise convolution made of its output "
            "varied lately in training: it fires."
        ),
    )


def _fires(found: _NormBehindSite) -> Iterator[Evidence]:
    """Yield evidence on a site whose output a batch norm normalises, if it is never negative."""
    norm, mean = found.norm, found.mean
    ratio = mean.square() / found.variance.clamp(min=_TINY)
    lately = norm.has_clock
    alive = norm.steps_of_decay(HALF_NORMAL / ratio.clamp(min=_TINY)) <= _VARIES
    when = "lately" if lately else "at some time; whether lately is not known, since these statistics do not forget"
    yield from evidence_on_site(
        found.site.name,
        alive & (mean > 0),
        ratio / (1 + ratio),
        source=_ACTIVITY,
        claim="alive",
        basis="inferred" if lately else "suspected",
        measure="share of positions in training at which it fired, at least",
        text=f"By the running mean and variance of the batch norm behind it, it fired in training {when}.",
    )


def batch_norm_parameters(graph: Graph) -> Iterator[Evidence]:
    """Yield what γ and β of batch norms say about the sites behind them that are zero for inputs up to zero."""
    for site in graph.first_calls():
        parameters = _parameters_before(graph, site)
        if parameters is not None and is_zero_below_zero(graph, site):
            spread = max(_batch_norm_before(graph, call.before)[1].spread for call in graph.calls[site.name])
            yield from _on_site(site, *parameters, spread)


def _on_site(site: Site, scale: Tensor, shift: Tensor, spread: float) -> Iterator[Evidence]:
    """Yield evidence from γ and β; ``spread``: by how much a max pool in between may raise the share that fires."""
    c = _threshold(scale, shift)
    evidence = partial(evidence_on_site, site.name, source=_SOURCE)
    share = (spread * _firing_share_bound(c)).clamp(max=1.0)
    yield from evidence(
        (c >= _QUIET) & (share <= _QUIET_SHARE),
        share,
        claim="quiet",
        basis="inferred",
        measure="share of a training batch in which it fires, at most",
        text=(
            "In training, it fires for at most this share of any batch's values, whatever their distribution "
            "(Cantelli); in evaluation, this holds as far as the running statistics match the data."
        ),
    )
    most = _training_maximum(scale, shift.abs(), _MANY_VALUES)
    usual = _usual_scale(scale, shift)
    yield from evidence(
        (most <= _NEGLIGIBLE * usual) & (most > 0),
        most,
        claim="quiet",
        basis="inferred",
        measure="output in training, at most",
        text=(
            f"Negligible: whatever its input is, no value of a training batch of up to {_MANY_VALUES:,} "
            f"values is larger than this, which is less than {_NEGLIGIBLE:g} of the layer's median |γ| + |β| "
            f"({usual:.3g}). In evaluation, this holds as far as the running statistics match the data."
        ),
    )
    yield from evidence(
        c >= _MAYBE_DEAD,
        (spread * torch.special.ndtr(-c)).clamp(max=1.0),
        claim="dead",
        basis="suspected",
        measure="share of values that fire, if they are normal",
        text=(
            "If its values were normally distributed, it would fire for this share of them, Φ(β/|γ|); this is "
            "inaccurate in the tails."
        ),
    )


def negligible_neurons(
    graph: Graph, bounds: Mapping[str, SiteBounds], scope: str, judged: Mapping[str, BoolArray]
) -> Iterator[Evidence]:
    """Yield the neurons after a batch norm whose output is next to nothing for every input.

    Args:
        graph: A traced forward in evaluation mode.
        bounds: The bounds of its sites.
        scope: The inputs that they hold for, to end a clause with.
        judged: The neurons of each site that are judged there, bool ``(N,)``.
    """
    for site in graph.first_calls():
        parameters, found = _parameters_before(graph, site), bounds.get(site.name)
        if parameters is None or found is None:
            continue
        usual = _usual_scale(*parameters)
        yield from evidence_on_site(
            site.name,
            (found.output <= _NEGLIGIBLE * usual) & ~found.dead & judged[site.name],
            found.output,
            source=_SOURCE,
            claim="quiet",
            basis="proved",
            measure="output, at most",
            text=(
                f"Negligible: in evaluation mode its output is never larger than this, {scope}. It is less than "
                f"{_NEGLIGIBLE:g} of the layer's median |γ| + |β| ({usual:.3g})."
            ),
        )


def _parameters_before(graph: Graph, site: Site) -> tuple[Tensor, Tensor] | None:
    """Return γ and β of the one batch norm that is right before every call of a site, both ``(N,)``, or ``None``."""
    found = []
    for call in graph.calls[site.name]:
        norm = _read_batch_norm(graph, _batch_norm_before(graph, call.before)[0])
        if norm is None or norm.scale is None or norm.shift is None or norm.scale.shape != (site.neurons,):
            return None
        found.append((norm.scale, norm.shift))
    same = all(torch.equal(one, first) for pair in found for one, first in zip(pair, found[0], strict=True))
    return found[0] if same else None


def _usual_scale(scale: Tensor, shift: Tensor) -> float:
    """Return the median size of a layer's outputs, by the γ and β of the batch norm before the activation."""
    return float((scale.double().abs() + shift.double().abs()).median())


def _threshold(scale: Tensor, shift: Tensor) -> Tensor:
    """Return how many standard deviations above its mean a channel's value must be for its neuron to fire.

    It is ``c = −β/|γ|``, float64 ``(C,)``: ∞ where γ = 0 and β ≤ 0, −∞ where γ = 0 and β > 0.
    """
    scale, shift = scale.double().abs(), shift.double()
    constant = torch.where(shift > 0, -torch.inf, torch.inf)
    return torch.where(scale > 0, -shift / scale.clamp_min(torch.finfo(torch.float64).tiny), constant)


def _firing_share_bound(c: Tensor) -> Tensor:
    """Return the largest share of a batch's values above a threshold, both float64 ``(C,)`` (Cantelli)."""
    bound: Tensor = torch.where(c > 0, 1 / (1 + c * c), 1.0)
    return bound


def _training_maximum(scale: Tensor, shift: Tensor, values: int) -> Tensor:
    """Return the largest value that each channel can have in a training batch of ``n`` values, float64 ``(C,)``."""
    return shift.double() + scale.double().abs() * math.sqrt(values - 1)
