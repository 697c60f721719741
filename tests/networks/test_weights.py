"""Weights that lie elsewhere than in a layer: on the left of a product, or in a stack, as a mixture's experts do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns


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


#: Product → axis, layer, number of neurons. A stack of two weights has the units of both.
ROWS = {
    "left": (1, "(root)", 5),
    "left, transposed": (2, "(root)", 5),
    "picked by hand": (2, "(root).1", 5),
    "stack": (2, "(root)", 2 * 5),
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("product", ROWS)
def test_the_neurons_are_the_outputs_of_the_weight(product: str, compiled: bool) -> None:
    model = Product(product)
    with ns.watch(model) as scope:
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        run(torch.randn(2, 3, 4)).sum().backward()
        scope.step()
    (tally,) = scope.census("train").values()
    assert (tally.axis, tally.layer, tally.neurons) == ROWS[product]
    assert tally.axis_source == f"layer ({tally.layer})"


def test_the_units_of_a_stack_are_counted_each_for_itself() -> None:
    model = Product("stack")
    with torch.no_grad():
        model.weight.abs_()
        model.weight[1, :, 3] *= -1  # of positive inputs, unit 3 of the second weight never fires: number 5 + 3
    with ns.watch(model) as scope:
        model(torch.rand(2, 3, 4) + 0.1).sum().backward()
        scope.step()
    (tally,) = scope.census("train").values()
    assert tally.zero_outputs.tolist() == [0] * 8 + [3] + [0]


@pytest.mark.parametrize("product", ["picked by data", "picked rows"])
def test_weights_that_data_picks_are_those_of_the_layer_that_it_picks(product: str) -> None:
    model = Product(product)
    with ns.watch(model) as scope:
        model(torch.randn(2, 3, 4)).sum().backward()
        scope.step()
    positions = {name: tally.positions for name, tally in scope.census("train").items()}
    assert positions == {"(root).0/relu": 0, "(root).1/relu": 6}
    with ns.watch(model, axes={"relu()": -1}) as scope:
        model(torch.randn(2, 3, 4)).sum().backward()
        scope.step()
    (tally,) = scope.census("train").values()
    assert (tally.neurons, tally.positions, tally.axis_source) == (5, 6, "declared")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "expected"),
    [(None, {"(root).0/relu": 0, "(root).1/relu": 6}), ({"relu()": -1}, {"relu()": 6})],
    ids=["by layer", "declared"],
)
def test_in_a_graph_weights_that_data_picks_are_those_of_the_layer_too(
    axes: dict[str, int] | None, expected: dict[str, int]
) -> None:
    torch.compiler.reset()
    model = Product("picked rows")
    with ns.watch(model, axes=axes) as scope:
        run = torch.compile(model, backend="eager", fullgraph=True)
        run(torch.randn(2, 3, 4)).sum().backward()
        scope.step()
    tallies = scope.census("train")
    assert {name: tally.positions for name, tally in tallies.items()} == expected
    assert all(tally.neurons == 5 for tally in tallies.values())


def test_a_stack_of_one_weight_is_measured_like_a_single_weight() -> None:
    model = Product("stack", stack=1)
    with ns.watch(model) as scope:
        model(torch.randn(1, 3, 4)).sum().backward()
        scope.step()
    (tally,) = scope.census("train").values()
    assert tally.neurons == 5
