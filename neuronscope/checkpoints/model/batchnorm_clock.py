r"""Read from a batch norm behind an activation how long each neuron has been silent, and how large its output is.

A batch norm in training keeps running means of the mean and of the variance of its input. Behind an activation whose
output is never negative, both are sums of positive terms, and a neuron that outputs zero over a whole batch multiplies
both by ``1 − momentum``. So ``R = mean² / variance`` falls by this factor in each silent step. For the positive half of
a normal distribution R is .47. A neuron that fires at a share ``p`` of all positions has an R near ``p``, so that an R
that is a little smaller shows a rare neuron as well as one that fell silent lately. Only a very small one tells them
apart: a neuron that fired at one of the ``n`` positions of the last batch has at least ``momentum / n``.

The running mean itself is the mean output, from which dormancy follows without data. A mean of exactly zero shows that
the neuron never fired in training.

A depthwise convolution without bias may lie between the activation and the norm. Its output ``Σ w y`` is zero too when
the neuron is silent, so that both statistics fall as before. Where the weights cancel each other, R is smaller for any
neuron: with independent pixels, R is that of the neuron times ``(Σ w)² / Σ w²``. The smaller one of the two is taken
for the R of a neuron that fires. The running mean is no mean output then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from neuronscope.checkpoints.model.batchnorm_step import CONVOLUTIONS, HALF_NORMAL, BatchNormStep, read_batch_norm
from neuronscope.checkpoints.model.before_site import step_before_copies
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step, TensorRef
from neuronscope.checkpoints.verdict.evidence import Evidence, evidence_on_site
from neuronscope.judge.verdicts import Policy

__all__ = ["running_statistics_evidence"]

_SOURCE = "batch norm statistics"
#: Silence is suspected above this many steps, and inferred above this many (docs/postmortem.md has the measured rates).
_SILENT, _SURE = 50.0, 200.0


def running_statistics_evidence(
    graph: Graph,
    intervals: Sequence[Interval | None],
    batches: Mapping[str, int] | None = None,
    training_step: int | None = None,
) -> Iterator[Evidence]:
    """Yield what the running statistics of batch norms say about the neurons of the sites right before them.

    Args:
        graph: A traced forward in evaluation mode.
        intervals: The interval of each tensor; see
            :func:`~neuronscope.checkpoints.model.bounds.propagate.propagate_bounds`.
        batches: Number of training batches that each batch norm has counted, by its path.
        training_step: The checkpoint's number of optimizer steps; ``None`` = not known, so that a batch counts as one.
    """
    steps = graph.producers
    by_output = {site.after: site for site in graph.sites}
    seen = set()
    for step in graph.steps:
        norm = read_batch_norm(graph, step)
        if norm is None or norm.mean is None or norm.variance is None:
            continue
        before = step_before_copies(steps, step.reads[0])
        gain = _depthwise_gain(graph, before)
        if before is not None and gain is not None:
            before = step_before_copies(steps, before.reads[0])
        site = next((by_output[number] for number in (before.outputs if before else ()) if number in by_output), None)
        interval = None if site is None else intervals[site.after]
        if site is None or site.name in seen or site.layout.axis != 1 or not (interval and interval.is_never_negative):
            continue
        seen.add(site.name)
        if not norm.mean.shape == norm.variance.shape == (site.neurons,):
            continue
        if gain is None or gain.shape == norm.mean.shape:
            count = (batches or {}).get(_path(graph, step))
            is_dated = count is not None and training_step in (None, count)
            yield from _evidence(site, norm, norm.mean, norm.variance, gain, count if is_dated else None)


def _depthwise_gain(graph: Graph, step: Step | None) -> Tensor | None:
    """Return by how much R may be smaller behind a depthwise convolution of ``C`` channels than before it.

    Returns:
        A number from 0 to 1 for each channel, float64 ``(C,)``, or an empty tensor if nothing is known of it; ``None``
        if the step is no depthwise convolution.
    """
    if step is None or step.function not in CONVOLUTIONS:
        return None
    weight, bias = (graph.constant(step.argument(at, name)) for at, name in ((1, "weight"), (2, "bias")))
    if weight is None or weight.shape[1] != 1 or step.argument(6, "groups") != weight.shape[0]:
        return None
    if bias is not None and bool((bias != 0).any()):
        return torch.empty(0)
    weight = weight.detach().flatten(1).double()
    return (weight.sum(1).square() / weight.square().sum(1).clamp(min=1e-300)).clamp(max=1.0)


def _path(graph: Graph, step: Step) -> str:
    """Return the path of a batch norm; ``""`` if its running mean is no buffer of a module."""
    argument = step.argument(1, "running_mean")
    return graph.values[argument.value].name.rpartition(".")[0] if isinstance(argument, TensorRef) else ""


def _evidence(
    site: Site, norm: BatchNormStep, mean: Tensor, variance: Tensor, gain: Tensor | None, batches: int | None
) -> Iterator[Evidence]:
    """Yield the evidence on one site.

    Args:
        site: The site.
        norm: The batch norm.
        mean: The running mean of the site's outputs, float64 ``(N,)``.
        variance: Their running variance, float64 ``(N,)``.
        gain: See :func:`_depthwise_gain`; ``None`` if no convolution lies between.
        batches: Number of training batches that the norm has counted, if each was an optimizer step; else ``None``.
    """
    evidence = partial(evidence_on_site, site.name, source=_SOURCE)
    if not norm.is_trained:
        return
    never = (mean == 0).numpy()
    yield from evidence(
        never,
        np.full(site.neurons, np.nan),
        claim="dead",
        basis="inferred",
        measure="",
        text=(
            "The batch norm behind it has a running mean of exactly zero: it never fired in training since these "
            "statistics began."
        ),
    )
    if norm.has_clock:
        ratio = mean.square() / variance.clamp(min=1e-300)
        usual = HALF_NORMAL if gain is None else HALF_NORMAL * gain.clamp(min=1e-300)
        silent = norm.steps_of_decay(usual / ratio.clamp(min=1e-300)).numpy()
        since = None if batches is None else np.clip(batches - np.floor(silent), 0, batches).astype(np.int64)
        for basis, mask in (("inferred", silent > _SURE), ("suspected", (silent > _SILENT) & (silent <= _SURE))):
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
    if gain is not None:
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
