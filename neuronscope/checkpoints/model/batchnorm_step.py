"""Read the parameters and the running statistics of a batch norm in a traced forward."""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.checkpoints.model.traced_graph import Graph, Step

__all__ = ["CONVOLUTIONS", "HALF_NORMAL", "BatchNormStep", "read_batch_norm"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
#: mean² / variance of the positive half of a normal distribution, such as a ReLU gives.
HALF_NORMAL = 0.47

_SIGNATURE = inspect.signature(F.batch_norm)
_STATISTICS = ("running_mean", "running_var")


class BatchNormStep(NamedTuple):
    """A batch norm over ``C`` channels.

    Attributes:
        scale: γ, ``(C,)``; ``None`` if it has none, or if it depends on the input.
        shift: β, ``(C,)``, likewise.
        mean: Running mean of its input, float64 ``(C,)``; ``None`` if it keeps none.
        variance: Running variance of its input, float64 ``(C,)``, likewise.
        momentum: Share of each new batch in the running statistics; ``None`` if it is not a plain number.
        eps: What is added to the variance.
    """

    scale: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    momentum: float | None
    eps: float

    @property
    def is_trained(self) -> bool:
        """Whether the running statistics have left their start, which is a mean of 0 everywhere."""
        return self.mean is not None and self.variance is not None and bool((self.mean != 0).any())

    @property
    def has_clock(self) -> bool:
        """Whether the running statistics forget old batches at a known rate; not if they are averages of all."""
        return self.momentum is not None and 0.0 < self.momentum < 0.5

    def steps_of_decay(self, factor: Tensor) -> Tensor:
        """Return in how many training steps without anything new the running statistics fall by a factor.

        Args:
            factor: How many times smaller they are, ``(C,)``.

        Returns:
            Steps, ``(C,)``, of torch's default momentum of 0.1 if there is no clock.
        """
        return torch.log(factor) / -math.log1p(-(self.momentum if self.has_clock and self.momentum else 0.1))


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
