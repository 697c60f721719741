"""A graph that breaks, in a submodule or around it: names and counts behind the break are those of eager code."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement.slow_twin import Nobody
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter, train
from tests.compiled.three_runs import in_three_runs

pytestmark = COMPILES


class Breaking(nn.Module):
    """Breaks between two layers, or before the first."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.a, self.b, self.late = nn.Linear(8, 8), nn.Linear(8, 8), late

    def forward(self, x: Tensor) -> Tensor:
        if self.late:
            x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(F.relu(x * 2))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(8, 8), Breaking(late=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.inner(F.silu(self.a(x)))) * 2


class Outer(nn.Module):
    """The compiled model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.early, self.part, self.nested = Breaking(late=False), Breaking(late=True), Nested()
        self.relu = nn.ReLU()


class Input(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.early(self.first(x)))


class ModuleBehind(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.part(self.first(x)) * 1.5))


class FunctionBehind(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.early(self.first(x)) * 1.5))


class Residual(Outer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * 2
        return self.last(F.relu(h + self.part(h)) + F.gelu(h * 3))


class Twice(Outer):
    """A part that is called twice, with units of other layers."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.early(self.first(x))
        return self.last(F.relu(self.early(self.second(h)) * 2))


class InNested(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.elu(h := self.nested(F.relu(self.first(x)))) * 2 + h)


class ByName(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.early(x=self.second(F.silu(self.first(x)))))


class Plain(nn.Module):
    """Has no parameters, and so no name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x * 2)


class InLoop(Outer):
    """Breaks in a loop: torch runs its forward in eager code, and compiles each module that it calls by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.members = Plain(), nn.Sequential(nn.Dropout(0.2), nn.LayerNorm(8))
        self.silu = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in (self.second, self.last):
            torch._dynamo.graph_break()
            x = layer(self.plain(self.members(self.silu(x + 0.1))))  # torch compiles no module of its own here
        return x


CASES = {
    case.__name__: case for case in (Input, ModuleBehind, FunctionBehind, Residual, Twice, InNested, ByName, InLoop)
}


@pytest.mark.parametrize("name", CASES)
def test_behind_a_break_in_a_submodule_sites_and_counts_are_those_of_eager(name):
    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model = CASES[name]()
        called = torch.compile(model, backend=Counter("aot_eager")) if compiles else model
        with watcher.attach(model):
            train(model, called, watcher, (4, 5), 3)
            with watcher.phase("val"), torch.no_grad():
                called(torch.ones(3, 5))
        return model

    assert in_three_runs(run).phases == ("train", "val")


class Point(nn.Module):
    """Looks at its own hooks, as a library's hook points do, so that it gets none."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).round() if self._forward_hooks or self._forward_pre_hooks else F.relu(x)


class PointInLoop(InLoop):
    def __init__(self) -> None:
        super().__init__()
        self.plain = Point()


def rectify(relu: nn.Module, x: Tensor) -> Tensor:
    return relu(x * 2)


class Helped(nn.Module):
    """Calls layers between breaks, so that torch compiles the methods and functions that it calls each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.relu, self.scale = nn.ReLU(), nn.Parameter(torch.ones(8))

    def act(self, x: Tensor) -> Tensor:
        return (x + 0).relu()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = self.step(layer, x)
        return x


class AMethod(Helped):
    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.act(layer(x))


class AFunction(Helped):
    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return rectify(self.relu, layer(x))


class TwoMethods(Helped):
    """The second one applies another activation to what the layer gave when it was called again."""

    def soft(self, x: Tensor) -> Tensor:
        return F.gelu(x * 2) * self.scale

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.soft(layer(self.act(layer(x))))


class TwoLayers(Helped):
    """A method that is given what two layers gave, in both orders; the first tensor is not of the last layer."""

    def both(self, x: Tensor, y: Tensor) -> Tensor:
        return x.relu() * 2 + F.gelu(y + 1)

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        first, other = layer(x), self.layers[0](x)
        torch._dynamo.graph_break()
        return self.both(first, other) + self.both(other, first)


class Halves(Helped):
    """A method that is called twice with the units of one call: two activations, as in CReLU."""

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        x = layer(x)
        return self.act(x) + self.act(-x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def act(self, x: Tensor) -> Tensor:
        return x.relu_()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class MethodOfAPart(Helped):
    """A method of another module, which works in place; and one that calls a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.between = Inner(), nn.Linear(8, 8)

    def call(self, x: Tensor) -> Tensor:
        return self.between(F.silu(x)) * 2

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.elu(self.call(self.part.act(layer(self.part(x)))))


class SameLayerAgain(Helped):
    def __init__(self) -> None:
        super().__init__()
        first, second, _ = self.layers
        self.layers = nn.ModuleList([first, second, first, first])

    step = AMethod.step


class Weights(Helped):
    """A function that is given weights: the layer is known from them."""

    def step(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return linear(x, layer.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).relu()


class OtherPath(Helped):
    """A part of the model's own forward that comes behind another layer each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.choose(x)
        torch._dynamo.graph_break()
        return F.relu(x * 2)

    @torch._dynamo.disable
    def choose(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers[self.calls % 2](x)


class Tail(Helped):
    """What it returns is of its last layer, which no graph calls, and has the shape of what the last graph returned."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = AMethod(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.body(x))) + F.gelu(self.last(x))


HELPED = (
    *(AMethod, AFunction, TwoMethods, TwoLayers, Halves, MethodOfAPart, SameLayerAgain, Weights, OtherPath, Tail),
    PointInLoop,
)


@pytest.mark.parametrize("in_place", [True, False], ids=["compile()", "torch.compile"])
@pytest.mark.parametrize("build", HELPED)
def test_a_function_that_is_compiled_by_itself_counts_at_the_layer_that_it_is_given(build, in_place):
    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model = called = build()
        if compiles and in_place:
            model.compile(backend="eager")
        elif compiles:
            called = torch.compile(model, backend="eager")
        with watcher.attach(model):
            train(model, called, watcher, (4, 5 if isinstance(model, Outer) else 8), 3)
            with watcher.phase("val"), torch.no_grad():
                called(torch.ones(3, 5 if isinstance(model, Outer) else 8))
        return model

    compiled = in_three_runs(run)
    assert compiled.census("train")
    assert compiled.census("val")


class Tied(nn.Module):
    """A container of torch's own, of which a weight is used outside of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.inner = nn.Sequential(self.layer, nn.SiLU(inplace=True), nn.Dropout(0.2), self.layer, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(F.relu(self.layer(x))))


def test_a_container_of_torchs_own_is_not_compiled_because_it_has_hooks():
    graphs: list[int] = []

    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model, backend = Tied(), Counter("aot_eager")
        if compiles:
            model.inner.compile(backend=backend)
        with watcher.attach(model):
            train(model, model, watcher, (4, 8), 3)
        graphs.append(backend.graphs)
        return model

    in_three_runs(run)
    assert graphs[1] == graphs[2]
