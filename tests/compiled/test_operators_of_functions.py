"""Operators that run functions, such as ``torch.cond``: what runs in them is listed, and never counted in part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import train

pytestmark = COMPILES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer(x))


class Net(nn.Module):
    def __init__(self, run: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.act, self.block, self.run = nn.ReLU(), Block(), run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, x, F.silu(self.first(x))))


def branches(net: Net, x: Tensor, h: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda h: F.relu(h), lambda h: h * torch.sigmoid(net.inner(h)), (h,))


def branches_of_modules(net: Net, x: Tensor, h: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda h: net.act(net.inner(h)), lambda h: net.block(h), (h,))


def loop(net: Net, x: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        _, found = while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, F.relu(net.inner(h))), (torch.tensor(0), h))
    return h + found


def mapped(net: Net, x: Tensor, h: Tensor) -> Tensor:
    return map_rows(lambda row: F.relu(row), h)


def scanned(net: Net, x: Tensor, h: Tensor) -> Tensor:
    return scan(lambda state, row: (F.relu(state + row), F.relu(state + row) + 1), torch.zeros(6), h)[1]


def trained(
    run: Callable[[Net, Tensor, Tensor], Tensor], compiled: Callable[[nn.Module], Any], batches: int
) -> ns.Scope:
    """Train a network unwatched and watched, of the same weights at the end, and return the scope of the watch.

    Args:
        run: What the network does between its first layer and its last.
        compiled: Returns what is called in place of the network.
        batches: Number of batches.
    """
    states = []
    for watcher in (Nobody(), Watched()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net(run)
        with watcher.attach(model):
            train(model, compiled(model), watcher, (3, 4), batches)
        states.append(state_of(model))
    assert_bits(*states)
    assert watcher.scope._hooks.failure is None
    return watcher.scope


#: Each with the activations in its functions, and the word for the operator.
CASES = {
    branches: ({"relu()", "sigmoid()", "mul()"}, "cond"),
    branches_of_modules: ({"act", "gelu()"}, "cond"),
    loop: ({"relu()"}, "while_loop"),
    mapped: ({"relu()"}, "map"),
    scanned: ({"relu()"}, "scan"),
}


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
@pytest.mark.filterwarnings("ignore:No activation of .* was seen in the first observed step")
def test_what_runs_in_an_operator_is_listed_and_the_rest_is_counted(case, compiles):
    compiled: Callable[[nn.Module], Any] = partial(torch.compile, backend="eager") if compiles else lambda model: model
    scope = trained(case, compiled, batches=4)
    places, operator = CASES[case]
    listed = {each.name: each.reason for each in scope.report().not_measured}
    for place in places:
        assert f"(`{operator}" in listed[place]
    assert [*scope.census()] == ["first/silu"]
    assert scope.census()["first/silu"].positions == 12
