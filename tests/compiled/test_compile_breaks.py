"""A graph that breaks, in a submodule or around it: names and counts behind the break are those of eager code."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter, assert_same_census, train

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
    runs = []
    for watcher, compiles in ((Watched(), False), (Watched(), True), (Nobody(), True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = CASES[name]()
        run = torch.compile(model, backend=Counter("aot_eager")) if compiles else model
        with watcher.attach(model):
            train(model, run, watcher, (4, 5), 3)
            with watcher.phase("val"), torch.no_grad():
                run(torch.ones(3, 5))
        runs.append((getattr(watcher, "scope", None), state_of(model)))
    (eager, _), (compiled, weights), (_, plain) = runs
    assert_bits(weights, plain)
    assert compiled._hooks.failure is None
    for phase in ("train", "val"):
        assert_same_census(compiled.census(phase), eager.census(phase))
    assert compiled.report().not_measured == eager.report().not_measured


class Point(nn.Module):
    """Looks at its own hooks, as a library's hook points do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).round() if self._forward_hooks or self._forward_pre_hooks else F.relu(x)


class PointInLoop(InLoop):
    def __init__(self) -> None:
        super().__init__()
        self.plain = Point()


def rectify(relu: nn.Module, x: Tensor) -> Tensor:
    return relu(x * 2)


class FunctionInLoop(InLoop):
    """Calls a function that torch compiles by itself; its graph serves inputs of any layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in (self.second, self.last):
            torch._dynamo.graph_break()
            x = layer(rectify(self.relu, x))
        return x


@pytest.mark.parametrize(("build", "place"), [(PointInLoop, "relu()"), (FunctionInLoop, "relu")])
@pytest.mark.filterwarnings("ignore:No activation of .* was seen in the first observed step")
def test_behind_a_break_what_can_have_no_hook_is_listed_and_not_counted(build, place):
    states = []
    for watcher in (Nobody(), Watched()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build()
        with watcher.attach(model):
            train(model, torch.compile(model, backend="aot_eager"), watcher, (4, 5), 2)
        states.append(state_of(model))
    assert_bits(*states)
    assert watcher.scope._hooks.failure is None
    not_measured = {place.name: place.reason for place in watcher.scope.report().not_measured}
    assert "traced it by itself" in not_measured[place]
    assert all(tally.axis_source != "assumed (rank)" for tally in watcher.scope.census().values())


class Tied(nn.Module):
    """A container of torch's own, of which a weight is used outside of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.inner = nn.Sequential(self.layer, nn.SiLU(inplace=True), nn.Dropout(0.2), self.layer, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(F.relu(self.layer(x))))


def test_a_container_of_torchs_own_is_not_compiled_because_it_has_hooks():
    runs = []
    for watcher, compiles in ((Nobody(), True), (Watched(), True), (Watched(), False)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, backend = Tied(), Counter("aot_eager")
        if compiles:
            model.inner.compile(backend=backend)
        with watcher.attach(model):
            train(model, model, watcher, (4, 8), 3)
        runs.append((watcher, state_of(model), backend.graphs))
    (_, plain, graphs), (compiled, weights, watched_graphs), (eager, _, _) = runs
    assert_bits(weights, plain)
    assert watched_graphs == graphs
    assert_same_census(compiled.scope.census(), eager.scope.census())
