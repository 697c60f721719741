"""Weights that lie elsewhere than in a layer: on the left of a product, or in a stack, as a mixture's experts do."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.networks.zoo import EXPERTS


class Product(nn.Module):
    """``relu(product(weight, x))`` for x of shape (2, 3, 4), with a weight of (5, 3) or (2, 4, 5)."""

    def __init__(self, product: str, stack: int = 2) -> None:
        super().__init__()
        left = product in ("left", "left, transposed")
        self.weight = nn.Parameter(torch.randn(5, 3) if left else torch.randn(stack, 4, 5))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        weight, picked = self.weight, torch.ones((), dtype=torch.int64)
        if self.product == "left":
            y = weight @ x
        elif self.product == "left, transposed":
            y = (weight @ x).transpose(1, 2)
        elif self.product == "stack":
            y = torch.bmm(x, weight)
        elif self.product == "picked by data":
            y = F.linear(x, weight[picked].t())
        elif self.product == "picked rows":
            y = x @ weight.index_select(0, picked.expand(2))
        else:
            y = x @ weight[1]
        return F.relu(y)


ROWS = {
    "left": (1, "producer (matmul)"),
    "left, transposed": (2, "producer (matmul)"),
    "picked by hand": (2, "producer (matmul)"),
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("product", ROWS)
def test_the_neuron_axis_is_the_output_axis_of_the_weight(product: str, compiled: bool) -> None:
    model = Product(product)
    with ns.watch(model) as scope:
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        run(torch.randn(2, 3, 4)).sum().backward()
        scope.step()
    tally = scope.census("train")["relu()"]
    assert (tally.axis, tally.axis_source) == ROWS[product]
    assert tally.neurons == 5


@pytest.mark.parametrize(
    ("product", "compiled"),
    [
        *((product, False) for product in ("stack", "picked by data", "picked rows")),
        *(pytest.param(product, True, marks=pytest.mark.slow) for product in ("stack", "picked rows")),
    ],
)
def test_stacked_weights_are_measured_only_when_their_axis_is_declared(product: str, compiled: bool) -> None:
    for axes in (None, {"relu()": -1}):
        torch.compiler.reset()
        model = Product(product)
        with ns.watch(model, axes=axes, window_steps=1) as scope:
            run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
            with (
                pytest.warns(ns.NeuronscopeWarning, match="No activation") if axes is None else contextlib.nullcontext()
            ):
                run(torch.randn(2, 3, 4)).sum().backward()
                scope.step()
        if axes is None:
            assert len(scope.census("train")) == 0
            (item,) = scope.report("train").not_measured
            assert (item.name, item.reason.startswith(EXPERTS)) == ("relu()", True)
        else:
            assert scope.census("train")["relu()"].neurons == 5


def test_a_stack_of_one_weight_is_measured_like_a_single_weight() -> None:
    model = Product("stack", stack=1)
    with ns.watch(model) as scope:
        model(torch.randn(1, 3, 4)).sum().backward()
        scope.step()
    assert scope.census("train")["relu()"].neurons == 5
