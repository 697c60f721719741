"""Count again, in this process, what the stored counts were made of, and how much of it another processor may see
differently.

Processors round the last bits of a matrix product differently, and so may the next version of torch: a pre-activation
of 1e-8 here is one of -1e-8 there, and a zero more is counted. :class:`Recount` is the slow twin, which must agree with
Neuronscope exactly, and which also counts the positions that lie within rounding of zero, neuron by neuron. A stored
count may differ from one of today by that many and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tests.agreement.slow_twin import Call, Twin

__all__ = ["Recount", "may_differ"]

UNIT = 2.0**-24  # half the distance between neighbouring float32 numbers at 1
#: How far two processors' pre-activations lie apart, as a share of the layer's largest: 6e-6 was seen at most.
APART = 2.0**-16
#: How far a sum of gradients may be off, as a share of the largest one of the same example.
SUM = 2.0**-20
#: Where float32 underflows: below the smallest normal number some processors give zero, below the smallest all do.
UNDERFLOW = (2.0**-152, 2.0**-122)


class Recount(Twin):
    """Count a network slowly; :meth:`settle` after each batch keeps only the numbers.

    Args:
        axis: The neurons' dimension, by place of the activation.
    """

    def __init__(self, axis: dict[str | None, int]) -> None:
        super().__init__(axis)
        self.counts: dict[str, dict[str, np.ndarray]] = {}
        self._asked: list[tuple[Call, Callable[..., Tensor], Tensor, Any]] = []

    def seen(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before = args[0].detach().clone()
        x, y, call = super().seen(func, args, kwargs)
        assert call is not None
        self._asked.append((call, func, before, get_gradient_edge(y)))
        return x, y, call

    def backward(self, loss: Tensor) -> None:
        """Ask for the gradients at each site's output and input, and count everything."""
        edges = [edge for call, *_, output in self._asked for edge in (output, call.edge)]
        gradients = iter(torch.autograd.grad(loss, edges))
        for (call, function, x, _), outer, inner in zip(self._asked, gradients, gradients, strict=True):
            call.gradients.append(inner)
            uncertain = may_differ(function, x, outer)
            counts = self.counts.setdefault(call.name, {})
            for name, part in zip(("zero_outputs", "zero_gradients"), uncertain, strict=True):
                _add(counts, f"{name}_may_differ", _per_neuron(part, *call.axes))
        for name, tally in self.tallies().items():
            for part in ("zero_outputs", "zero_gradients"):
                _add(self.counts[name], part, tally[part])
        self.calls, self.pending, self._asked = [], [], []


def may_differ(function: Callable[..., Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return which positions' outputs and gradients may be zero on one processor and not on another.

    Args:
        function: The activation.
        x: Pre-activations of any shape; examples, or tokens, lie along the first dimension.
        gradient: Of the loss with respect to the activation's output, of the same shape.

    Returns:
        Two tensors of bools of that shape: for the output, and for the gradient with respect to ``x``.
    """
    exact = x.double().requires_grad_()
    y = function(exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    exact, y = exact.detach().abs(), y.detach().abs()
    near = exact <= APART * exact.max()
    vanishing = (y > UNIT / 16 * exact) & (y < UNIT * exact)  # a small difference: GELU's 1 + erf(x / √2) at x = −5.5
    gradient = gradient.double().abs()
    largest = gradient.flatten(1).amax(1).view(-1, *(1,) * (x.dim() - 1))  # of each example
    cancelled = (gradient > 0) & (gradient <= SUM * largest)
    flat = (slope != 0) & (slope.abs() < 4 * UNIT)  # a small difference too: GELU's slope at its minimum
    product = gradient * slope.abs()
    underflown = (product > UNDERFLOW[0]) & (product < UNDERFLOW[1])
    return near | vanishing, near | (cancelled & (slope != 0)) | flat | underflown


def _per_neuron(positions: Tensor, axis: int) -> np.ndarray:
    return positions.movedim(axis, 0).flatten(1).sum(1).numpy()


def _add(counts: dict[str, np.ndarray], name: str, part: np.ndarray) -> None:
    counts[name] = counts[name] + part if name in counts else part
