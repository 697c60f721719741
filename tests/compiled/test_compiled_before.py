"""Networks that were compiled, and ran, before the watch began."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter, assert_same_census
from tests.compiled.three_runs import in_three_runs

pytestmark = [
    *COMPILES,
    pytest.mark.skipif(
        not hasattr(torch._C._dynamo.guards.GuardManager, "get_type_of_guarded_value"),
        reason="this torch does not tell what its graphs were traced for",
    ),
]

Call = Callable[[Tensor], Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.down(self.act(self.up(x))))


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Block(), nn.ReLU(), nn.Linear(6, 2))


def whole(model: nn.Module) -> Call:
    return model


def in_a_function(model: nn.Module) -> Call:
    return lambda x: model(x).square()


def in_a_list(model: nn.Module) -> Call:
    def run(x: Tensor, parts: tuple[nn.Module, ...] = (model,)) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    return run


def in_another_module(model: nn.Module) -> Call:
    return nn.Sequential(nn.Identity(), model)


def train(run: Call, model: nn.Module, watcher: Nobody, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        run(torch.linspace(-2, 2, size * 6).view(size, 6)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        watcher.step()


@pytest.mark.parametrize("way", [whole, in_a_function, in_a_list, in_another_module])
def test_a_graph_from_before_the_watch_counts_nothing_in_its_place(way):
    """Among the sizes is one that the compiler makes another graph for."""

    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model = build()
        called = torch.compile(way(model), backend="aot_eager", fullgraph=True) if compiles else way(model)
        train(called, model, Nobody(), (4, 4))
        with watcher.attach(model):
            train(called, model, watcher, (4, 5, 4, 4))
        return model

    assert {site.positions for site in in_three_runs(run).census().values()} == {17}


def test_graphs_from_before_run_again_in_unobserved_steps_and_after_the_watch():
    model, backend = build(), Counter("aot_eager")
    called = torch.compile(in_a_function(model), backend=backend, fullgraph=True)
    train(called, model, Nobody(), (4,))
    assert backend.graphs == 1
    for graphs in (2, 3):
        watcher = Watched(every_n_steps=2)
        with watcher.attach(model):
            train(called, model, watcher, (4,) * 5)
        train(called, model, Nobody(), (4, 4))
        assert backend.graphs == graphs
        assert {site.positions for site in watcher.scope.census().values()} == {12}


def test_a_watch_that_begins_beside_another_counts_and_lets_the_other_count():
    scopes = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = build()
        run = in_a_function(model)
        called = torch.compile(run, backend="aot_eager", fullgraph=True) if compiles else run
        first, second = Watched(), Watched()
        with first.attach(model):
            train(called, model, first, (4, 4))
            with second.attach(model[1]):
                for _ in range(3):
                    train(called, model, second, (4,))
                    first.step()
            train(called, model, first, (4,))
        scopes.append((first.scope, second.scope))
    for which, positions in ((0, 24), (1, 12)):
        eager, compiled = (each[which] for each in scopes)
        assert {site.positions for site in compiled.census().values()} == {positions}
        assert_same_census(compiled.census(), eager.census())
        assert compiled.report().not_measured == eager.report().not_measured


def test_a_watch_has_no_graph_of_another_network_compiled_anew():
    other, backend = build(), Counter("aot_eager")
    called = torch.compile(in_a_function(other), backend=backend, fullgraph=True)
    train(called, other, Nobody(), (4, 4))
    model = build()
    with ns.watch(model) as scope:
        train(called, other, Nobody(), (4, 4))
        model(torch.ones(4, 6)).sum().backward()
        scope.step()
    assert backend.graphs == 1
    assert scope.census()


@pytest.mark.usefixtures("fresh_compiler")
def test_another_network_that_ran_before_does_not_search_the_watched_one_at_each_call() -> None:
    class Searched(nn.Sequential):
        searches = 0

        def modules(self) -> Iterator[nn.Module]:
            Searched.searches += 1
            return super().modules()

    other, x = torch.compile(nn.Linear(6, 6), backend="eager"), torch.ones(2, 6)
    other(x)
    model = Searched(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with ns.watch(model):
        model(x)
        other(x)
        before = Searched.searches
        for _ in range(9):
            other(x)
        assert Searched.searches == before
