"""Measure whether activations act linear on data: whether each neuron has one slope and one offset for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neuronscope.attach.origins import Origin
from neuronscope.count.neuron_layout import neurons_first
from neuronscope.linear.affine_functions import Function

__all__ = ["Slopes"]


class Slopes:
    """The smallest and the largest slope and offset of each neuron of one activation.

    ``y = slope * x + offset`` around each element ``x``; an activation acts linear if both never change for any neuron.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[Tensor, Tensor]] | None = None
        self._positions = 0  # of each neuron

    def add(
        self, function: Function, given: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], origin: Origin
    ) -> None:
        """Measure one call.

        Args:
            function: The activation function.
            given: Its input, of any shape, before it runs.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            origin: What the input is.
        """
        with torch.enable_grad():
            x = given.detach().clone().requires_grad_()
            inner = x.clone()  # the function may work in place
            rest = tuple(inner if each is given else each for each in args)
            y = function(*rest, **{name: inner if each is given else each for name, each in kwargs.items()})
            (slope,) = torch.autograd.grad(y.sum(), x)
        x, y = x.detach(), y.detach()
        offset = y - slope * x
        offset = torch.where(offset.abs() <= 1e-6 * (y.abs() + (slope * x).abs()), torch.zeros_like(offset), offset)
        ranges = [self._by_neuron(values, origin) for values in (slope, offset)]
        self._positions += y.numel() // max(1, len(ranges[0][0]))
        if self._ranges is not None and self._ranges[0][0].shape == ranges[0][0].shape:
            ranges = [
                (torch.minimum(low, new_low), torch.maximum(high, new_high))
                for (low, high), (new_low, new_high) in zip(self._ranges, ranges, strict=True)
            ]
        elif self._ranges is not None:
            ranges = [(low * float("nan"), high) for low, high in ranges]  # other neurons than before: not comparable
        self._ranges = ranges

    @staticmethod
    def _by_neuron(values: Tensor, origin: Origin) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest of an activation's values for each neuron, each ``(N,)``.

        If the units of its input are not known, each element of an example is a neuron.
        """
        if origin.units is None:
            flat = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
        else:
            layout = origin.units.layout
            moved, axis = neurons_first(values, layout.axis, layout.dims)
            flat = moved.movedim(axis, 0).reshape(moved.shape[axis], -1).T
        return flat.amin(0), flat.amax(0)

    @property
    def act_linear(self) -> bool:
        """Whether every neuron had one slope and one offset at several positions; at one, any function has."""
        return (
            self._ranges is not None
            and self._positions > 1
            and all(bool((low == high).all()) for low, high in self._ranges)
        )

    def constant(self) -> int:
        """Return how many neurons gave a constant: a slope of zero, if the activation acts linear."""
        return 0 if self._ranges is None else int((self._ranges[0][1] == 0).sum())

    def __len__(self) -> int:
        return 0 if self._ranges is None else len(self._ranges[0][0])
