"""Functions with a backward of their own, and regions that are compiled once, inside a compiled forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.attach.test_layers_accounted import SavingSwish
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter, train
from tests.compiled.three_runs import in_three_runs

pytestmark = COMPILES


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, y * 2

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return one, other * 2


class Guided(torch.autograd.Function):
    """Guided backpropagation: a ReLU of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.relu(gradient)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)


class Between(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(Double.apply(self.a(x))))


class TwoResults(Layers):
    def forward(self, x: Tensor) -> Tensor:
        one, other = Pair.apply(self.a(x), self.b(x))
        return self.c(F.gelu(one) + F.relu(other))


class OwnActivation(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(SavingSwish.apply(self.a(x)))))


class OfGradients(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(Guided.apply(F.relu(self.a(x))))))


@pytest.mark.parametrize("build", [Between, TwoResults, OwnActivation, OfGradients])
def test_what_a_function_returns_is_known_and_its_backward_is_no_part_of_the_forward(build):
    graphs = []

    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model, backend = build(), Counter("aot_eager")
        called = torch.compile(model, backend=backend, fullgraph=True) if compiles else model
        with watcher.attach(model):
            train(model, called, watcher, (4, 8), 3)
        graphs.append(backend.graphs)
        return model

    assert len(in_three_runs(run).census()) >= 1
    _, watched, unwatched = graphs
    assert watched == unwatched


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.layer(x))


class Regions(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.regions = nn.ModuleList(Region() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for region in self.regions:
            x = region(x)
        return self.c(F.gelu(self.a(x)))


@pytest.mark.skipif(not hasattr(torch.compiler, "nested_compile_region"), reason="this torch has no such regions")
def test_a_region_that_is_compiled_once_is_listed_for_each_module_that_runs_it(monkeypatch):
    monkeypatch.setattr(Region, "forward", torch.compiler.nested_compile_region(Region.forward))
    states = []
    for watcher in (Nobody(), Watched()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Regions()
        with watcher.attach(model):
            train(model, torch.compile(model, backend="aot_eager", fullgraph=True), watcher, (4, 8), 3)
        states.append(state_of(model))
    assert_bits(*states)
    assert watcher.scope._hooks.failure is None
    assert list(watcher.scope.census()) == ["a/gelu"]
    listed = {each.name for each in watcher.scope.report().not_measured}
    assert {f"regions.{number}.silu()" for number in range(3)} <= listed
