"""Read the batch norms of a traced forward: parameters, running statistics, and the layer or site before each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.checkpoints.model.function_rules import OPERATORS
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step, TensorRef

__all__ = [
    "HALF_NORMAL",
    "BatchNormStep",
    "NormBehindSite",
    "WeightedStep",
    "norms_behind_sites",
    "read_batch_norm",
    "step_before_copies",
    "step_kind",
    "weighted_step",
]

#: mean² / variance of the positive half of a normal distribution, such as a ReLU gives.
HALF_NORMAL = 0.47

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_SIGNATURE = inspect.signature(F.batch_norm)
_STATISTICS = ("running_mean", "running_var")


class BatchNormStep(NamedTuple):
    """A batch norm over ``C`` channels."""

    scale: Tensor | None  # γ, ``(C,)``; ``None`` if it has none, or if it depends on the input
    shift: Tensor | None  # β, ``(C,)``, likewise
    mean: Tensor | None  # running mean of its input, float64 ``(C,)``; ``None`` if it keeps none
    variance: Tensor | None  # running variance of its input, float64 ``(C,)``, likewise
    momentum: float | None  # share of each new batch in the running statistics; ``None`` if it is not a plain number
    eps: float  # what is added to the variance

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


def step_kind(step: Step | None) -> str:
    """Return what a step does to neurons: the ``kind`` of its operator's rule, or ``other``."""
    rule = OPERATORS.get(step.function) if step is not None else None
    return "other" if rule is None else rule.kind


def step_before_copies(graph: Graph, number: int) -> Step | None:
    """Return the step that computed a tensor, before copies, casts and dropout.

    Args:
        graph: A traced forward.
        number: The tensor's number.
    """
    step = graph.producers.get(number)
    while step is not None and step_kind(step) == "same" and step.reads:
        step = graph.producers.get(step.reads[0])
    return step


def read_batch_norm(graph: Graph, step: Step | None) -> BatchNormStep | None:
    """Return what a batch norm holds; ``None`` for any other step.

    Args:
        graph: A traced forward.
        step: A step of it.
    """
    if step is None or step.function is not F.batch_norm or not step.reads:
        return None
    given = _SIGNATURE.bind(*step.args, **step.kwargs)
    given.apply_defaults()

    def tensor(name: str) -> Tensor | None:
        found = graph.constant(given.arguments[name])
        return None if found is None else found.detach()

    momentum = given.arguments["momentum"]
    mean, variance = (None if (found := tensor(name)) is None else found.to(torch.float64) for name in _STATISTICS)
    return BatchNormStep(
        scale=tensor("weight"),
        shift=tensor("bias"),
        mean=mean,
        variance=variance,
        momentum=float(momentum) if isinstance(momentum, (int, float)) else None,
        eps=given.arguments["eps"],
    )


class WeightedStep(NamedTuple):
    """A linear or convolutional layer of ``C`` channels."""

    weight: Tensor  # the incoming weights of each channel, float64 ``(C, F)``
    has_bias: bool  # whether a bias that is not zero is added
    reads: int  # number of the tensor that it reads
    is_depthwise: bool  # whether it is a convolution of which each channel reads one neuron, the one with its number


def weighted_step(graph: Graph, number: int) -> WeightedStep | None:
    """Return the layer that computed a tensor; ``None`` if none did.

    Args:
        graph: A traced forward.
        number: The tensor's number.
    """
    step = step_before_copies(graph, number)
    if step is None or step.function not in (*_CONVOLUTIONS, F.linear):
        return None
    read = step.argument(0, "input")
    weight, bias = (graph.constant(step.argument(place, name)) for place, name in ((1, "weight"), (2, "bias")))
    if weight is None or weight.dim() < 2 or not isinstance(read, TensorRef):
        return None
    one_each = weight.shape[1] == 1 and graph.values[read.value].shape[1] == weight.shape[0]
    has_bias = bias is not None and bool((bias != 0).any())
    rows = weight.detach().double().flatten(1)
    return WeightedStep(rows, has_bias, read.value, one_each and step.function in _CONVOLUTIONS)


class NormBehindSite(NamedTuple):
    """A batch norm with running statistics of the ``N`` neurons of a site."""

    path: str  # path of the batch norm; ``""`` if its running mean is no buffer of a module
    norm: BatchNormStep  # the batch norm
    mean: Tensor  # its running mean, float64 ``(N,)``
    variance: Tensor  # its running variance, float64 ``(N,)``
    site: Site  # the site
    #: The depthwise convolution between the two; ``None`` if the norm reads the site's output itself.
    depthwise: WeightedStep | None


def norms_behind_sites(graph: Graph) -> Iterator[NormBehindSite]:
    """Yield the batch norms that read the output of a site, or of a depthwise convolution that reads it."""
    site_of = {site.after: site for site in graph.sites}
    for step in graph.steps:
        norm = read_batch_norm(graph, step)
        if norm is None or norm.mean is None or norm.variance is None:
            continue
        layer = weighted_step(graph, step.reads[0])
        depthwise = layer if layer is not None and layer.is_depthwise else None
        before = step_before_copies(graph, step.reads[0] if depthwise is None else depthwise.reads)
        site = next((site_of[number] for number in (before.outputs if before else ()) if number in site_of), None)
        if site is None or site.layout.axis != 1 or not norm.mean.shape == norm.variance.shape == (site.neurons,):
            continue
        buffer = step.argument(1, "running_mean")
        path = graph.values[buffer.value].name.rpartition(".")[0] if isinstance(buffer, TensorRef) else ""
        yield NormBehindSite(path, norm, norm.mean, norm.variance, site, depthwise)
