"""A watched run meets torch's limits of recompilation where the unwatched run meets them, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.attach import compiling
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter, train
from tests.compiled.three_runs import in_three_runs

pytestmark = COMPILES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    """Blocks of one class, and one of another."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.other = Other()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(torch.relu(self.other(x)))


def in_place(model: Stack, backend: Counter, fullgraph: bool) -> None:
    for block in (*model.blocks, model.other):
        block.compile(backend=backend, fullgraph=fullgraph)


def wrapped(model: Stack, backend: Counter, fullgraph: bool) -> None:
    model.blocks = nn.ModuleList(torch.compile(each, backend=backend, fullgraph=fullgraph) for each in model.blocks)


@pytest.mark.parametrize(("way", "fullgraph"), [(in_place, True), (wrapped, True), (in_place, False)])
def test_more_blocks_than_the_limit_are_compiled_and_counted_as_in_eager(way, fullgraph):
    """Unwatched, all blocks of a class share two graphs: one with gradients and one without."""
    graphs: list[int] = []

    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model, backend = Stack(4), Counter("aot_eager")
        with torch._dynamo.config.patch(recompile_limit=2):
            if compiles:
                way(model, backend, fullgraph)
            with watcher.attach(model):
                train(model, model, watcher, (4, 5), 3)
                with watcher.phase("val"), torch.no_grad():
                    model(torch.ones(4, 5))
        graphs.append(backend.graphs)
        return model

    scope = in_three_runs(run)
    assert scope.phases == ("train", "val")
    assert graphs[1] >= 2 * 4


class Variants(nn.Module):
    """Needs a graph for each value of an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.last = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)
        self.variant = "0"

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.layer(x)) * len(self.variant))


def run_variants(watches: bool, backend: Counter, phases: tuple[str, ...], variants: int, every: int) -> None:
    torch.manual_seed(0)
    model = Variants()
    run = torch.compile(model, backend=backend)
    watcher = Watched(every_n_steps=every) if watches else Nobody()
    with watcher.attach(model):
        for variant in range(variants):
            model.variant = "v" * (variant + 1)
            for phase in phases:
                with watcher.phase(phase):
                    for _ in range(2):
                        run(torch.ones(4, 5)).sum().backward()
                        watcher.step()


def test_phases_and_unobserved_steps_do_not_bring_the_limit_nearer():
    backends: list[Counter] = []
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for watches in (False, True):
            torch._dynamo.reset()
            backends.append(Counter("aot_eager"))
            run_variants(watches, backends[-1], ("train", "a", "b"), 3, every=2)
    assert backends[0].graphs == 3
    assert backends[1].graphs > 3


def test_a_function_that_meets_the_limit_meets_it_watched_too():
    """Otherwise a watched run would compile again and again where the unwatched one goes on uncompiled."""
    graphs: list[int] = []
    with torch._dynamo.config.patch(recompile_limit=3):
        for watches in (False, True):
            torch._dynamo.reset()
            backend = Counter("aot_eager")
            run_variants(watches, backend, ("train",), 6, every=1)
            graphs.append(backend.graphs)
    assert graphs == [3, 4]


def test_more_models_of_one_class_than_the_limit_are_compiled_and_counted():
    watchers = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            model, watcher = nn.Sequential(Other()), Watched()
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
            with watcher.attach(model):
                run(torch.ones(4, 8)).sum().backward()
            watchers.append(watcher)
    assert [watcher.scope.census()["0.up/gelu"].positions for watcher in watchers] == [4] * 4


def test_before_the_limit_of_all_graphs_is_met_the_watch_ends_and_training_goes_on():
    states = []
    for watcher in (Nobody(), Watched()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, backend = Stack(6), Counter("aot_eager")
        with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=6), watcher.attach(model):
            in_place(model, backend, True)
            if isinstance(watcher, Watched):
                with pytest.warns(ns.NeuronscopeWarning, match="accumulated_recompile_limit"):
                    train(model, model, watcher, (4, 5), 2)
            else:
                train(model, model, watcher, (4, 5), 2)
        states.append(state_of(model))
    assert_bits(*states)
    assert "accumulated_recompile_limit" in str(watcher.scope.report())


def test_windows_and_phases_that_ran_before_compile_nothing_again():
    """And a phase that did not is compiled then, so that torch raises: see `docs/limits.md`."""
    model, backend = Variants(), Counter("aot_eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    policy = ns.Policy(max_rate=0.5, confidence=0.5)
    with ns.watch(model, every_n_steps=2, window_steps=4, policy=policy) as scope:

        def train_and_evaluate(steps: int, phase: str) -> None:
            for _ in range(steps):
                run(torch.ones(4, 5)).sum().backward()
                scope.step()
            with scope.phase(phase), torch.no_grad():
                run(torch.ones(4, 5))

        train_and_evaluate(2, "val")  # a step that is observed, and one that is not
        graphs = backend.graphs
        with torch.compiler.set_stance("fail_on_recompile"), torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                train_and_evaluate(6, "val")
            with pytest.raises(RuntimeError, match="recompile"):
                train_and_evaluate(2, "test")
        assert backend.graphs == graphs
        assert scope._hooks.failure is None
    assert scope.census()["layer/relu"].gradient_positions == 4 * 11  # every second one of 2 + 3 · 6 + 2 steps
    assert scope.census("val")["layer/relu"].positions == 4 * 4
    assert scope.report()["layer/relu"].history.steps.tolist() == [2, 6, 10, 14, 18, 20]


def test_nothing_of_a_graph_is_kept_when_it_has_been_traced():
    """A node of a graph holds its tensors, so a map from these to nodes would keep each graph for good."""
    model = Stack(2)
    with ns.watch(model) as scope:
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 5)).sum().backward()
        scope.step()
    assert scope.census()
    assert not compiling._nodes.entries
    assert not compiling._variables.entries
