r"""Read from batch norms which neurons fire in training, and which pre-activations have become constant.

**Before a norm.** A neuron that is never negative fires at a share of ``R / (1 + R)`` of all positions at least, with
``R = mean² / variance``, by Cauchy and Schwarz: ``E[y]² ≤ P(y > 0) · E[y²]``. Where a depthwise convolution lies
between, each channel reads one neuron, and a neuron whose channel varies fires.

**Behind a norm.** In training, the mean of a neuron's pre-activations over each batch is the norm's shift β. With β > 0
some of each batch are above zero. With β ≤ 0 none is, if the norm's input is constant.

A channel that does not vary over a whole batch multiplies the running variance by ``1 − momentum``. The variance of
a living channel depends on its incoming weights, so ``q = variance / ‖w‖²`` is compared with that of the layer's other
channels: ``k = ln(q_layer / q) / −ln(1 − momentum)`` training steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neuronscope.arrays import FloatArray
from neuronscope.checkpoints.model.batchnorm_step import (
    HALF_NORMAL,
    BatchNormStep,
    NormBehindSite,
    WeightedStep,
    norms_behind_sites,
    read_batch_norm,
    weighted_step,
)
from neuronscope.checkpoints.model.before_site import step_before_copies
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.bounds.propagate import is_positive_from, is_zero_below_zero
from neuronscope.checkpoints.model.traced_graph import Graph, Site
from neuronscope.checkpoints.verdict.evidence import Evidence, evidence_on_site

__all__ = ["batch_norm_activity"]

_SOURCE = "batch norm activity"
#: Up to this many steps since it varied a channel is taken to vary; above these, it is suspected and inferred to be
#: constant. They lie far apart, since a living channel's variance is known to a factor of some thousands only.
_VARIES, _SUSPECTED, _SURE = 50.0, 150.0, 300.0
#: The layer's usual ``q`` is this quantile of it; below the second number nothing is left of a whole layer's.
_USUAL, _FADED = 0.9, 1e-20
_TINY = 1e-300


def batch_norm_activity(graph: Graph, intervals: Sequence[Interval | None]) -> Iterator[Evidence]:
    """Yield what batch norms say about the neurons before and behind them; see the module's docstring.

    Args:
        graph: A traced forward in evaluation mode.
        intervals: What :func:`~neuronscope.checkpoints.model.bounds.propagate.propagate_bounds` gave for it.
    """
    for site, *others in graph.calls.values():
        step = step_before_copies(graph, site.before)
        norm = read_batch_norm(graph, step)
        if step is None or norm is None or norm.shift is None or others or site.layout.axis != 1:
            continue
        if norm.shift.shape == (site.neurons,):
            yield from _behind(graph, site, norm.shift, _constant_steps(norm, weighted_step(graph, step.reads[0])))
    for found in norms_behind_sites(graph):
        site, norm = found.site, found.norm
        if len(graph.calls[site.name]) > 1 or not norm.is_trained:
            continue
        if found.depthwise is not None:
            yield from _varies(site, _constant_steps(norm, found.depthwise))
        elif (interval := intervals[site.after]) is not None and interval.is_never_negative:
            yield from _fires(found)


def _constant_steps(norm: BatchNormStep, layer: WeightedStep | None) -> FloatArray | None:
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


def _behind(graph: Graph, site: Site, shift: Tensor, constant: FloatArray | None) -> Iterator[Evidence]:
    """Yield evidence on a site whose pre-activation is the output of a batch norm."""
    above = shift > 0
    if bool(above.any()) and is_positive_from(graph, site, float(shift[above].min())):
        yield from evidence_on_site(
            site.name,
            above,
            shift.double(),
            source=_SOURCE,
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
        yield from evidence_on_site(
            site.name,
            mask & ~above.numpy(),
            constant,
            source=_SOURCE,
            claim="dead",
            basis=basis,
            measure="training steps since its pre-activation varied, about",
            text=(
                "The running variance of the batch norm before it is far smaller than that of the layer's other "
                "channels: what the norm is given has been constant for about this many training steps, or longer. So "
                "its pre-activation in training is the norm's shift β, which is not above zero."
            ),
        )


def _varies(site: Site, constant: FloatArray | None) -> Iterator[Evidence]:
    """Yield evidence on a site whose neurons a depthwise convolution reads, one each, before a batch norm."""
    if constant is not None:
        yield from evidence_on_site(
            site.name,
            constant <= _VARIES,
            constant.clip(min=0),
            source=_SOURCE,
            claim="alive",
            basis="inferred",
            measure="training steps since its output varied, about",
            text=(
                "By the running variance of the batch norm behind it, what the depthwise convolution made of its "
                "output varied lately in training: it fires."
            ),
        )


def _fires(found: NormBehindSite) -> Iterator[Evidence]:
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
        source=_SOURCE,
        claim="alive",
        basis="inferred" if lately else "suspected",
        measure="share of positions in training at which it fired, at least",
        text=f"By the running mean and variance of the batch norm behind it, it fired in training {when}.",
    )
