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

from neuronscope.checkpoints.model.batchnorm_step import HALF_NORMAL, NormBehindSite, norms_behind_sites
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.traced_graph import Graph
from neuronscope.checkpoints.verdict.evidence import Evidence, evidence_on_site
from neuronscope.judge.verdicts import Policy

__all__ = ["running_statistics_evidence"]

_SOURCE = "batch norm statistics"
#: Silence is suspected above this many steps, and inferred above this many (docs/postmortem.md has the measured rates).
_SILENT, _SURE = 50.0, 200.0
_TINY = 1e-300


def running_statistics_evidence(
    graph: Graph,
    intervals: Sequence[Interval | None],
    batches: Mapping[str, int] | None = None,
    training_step: int | None = None,
) -> Iterator[Evidence]:
    """Yield what the running statistics of batch norms say about the neurons of the sites right before them.

    Args:
        graph: A traced forward in evaluation mode.
        intervals: What :func:`~neuronscope.checkpoints.model.bounds.propagate.propagate_bounds` gave for it.
        batches: Number of training batches that each batch norm has counted, by its path.
        training_step: The checkpoint's number of optimizer steps; ``None`` = not known, so that a batch counts as one.
    """
    seen = set()
    for found in norms_behind_sites(graph):
        interval = intervals[found.site.after]
        if found.site.name in seen or interval is None or not interval.is_never_negative:
            continue
        seen.add(found.site.name)
        if found.norm.is_trained and not (found.depthwise and found.depthwise.has_bias):
            count = (batches or {}).get(found.path)
            yield from _evidence(found, count if training_step in (None, count) else None)


def _evidence(found: NormBehindSite, batches: int | None) -> Iterator[Evidence]:
    """Yield evidence on one site; ``batches`` are those that the norm has counted, if each was an optimizer step."""
    norm, mean = found.norm, found.mean
    evidence = partial(evidence_on_site, found.site.name, source=_SOURCE)
    never = (mean == 0).numpy()
    yield from evidence(
        never,
        claim="dead",
        basis="inferred",
        text=(
            "The batch norm behind it has a running mean of exactly zero: it never fired in training since these "
            "statistics began."
        ),
    )
    if norm.has_clock:
        ratio = mean.square() / found.variance.clamp(min=_TINY)
        gain = torch.ones((), dtype=torch.float64) if found.depthwise is None else _gain(found.depthwise.weight)
        silent = norm.steps_of_decay(HALF_NORMAL * gain.clamp(min=_TINY) / ratio.clamp(min=_TINY)).numpy()
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
