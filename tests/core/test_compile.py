"""Watched and compiled: one graph, the same counts as eager, and the same weights as the unwatched compiled run.

``aot_eager`` computes what eager computes, so its counts are held to the slow twin; Inductor, which is slow to
compile, runs on two small networks and is held to eager's counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.core.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of

pytestmark = [
    # The compiler's own: it warns of its deprecations and of this machine's limits.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    # And it looks at the .grad of a hook's arguments, with a warning that it hides itself where warnings are no errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A reused in-place ReLU, a functional GELU, a gated product, two layouts."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv1d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.gate = nn.Linear(6, 8)
        self.up = nn.Linear(6, 8)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.conv1(x)))
        x = x + self.relu(self.conv2(x))
        x = x.transpose(1, 2)
        x = self.act(self.gate(x)) * self.up(x)
        return self.head(F.gelu(x)).mean(1)


STEPS = 20
AXES = {"relu": 1, "relu#1": 1, None: 2}
NAMES = ["relu", "relu#1", "act", "act.gated", "gelu()"]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 1))


def train(
    model: nn.Module, run: Callable[[Tensor], Tensor], watcher: Nobody, shape: tuple[int, ...], steps: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        watcher.backward(run(torch.randn(shape, generator=generator)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


class Counter:
    """A back end that counts its graphs."""

    def __init__(self, backend: str) -> None:
        self.inner = torch._dynamo.lookup_backend(backend)
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        self.graphs += 1
        return self.inner(graph, inputs)


def watch_then_compile(model: nn.Module, watcher: Nobody, backend: Counter) -> tuple[Callable, object]:
    context = watcher.attach(model)
    return torch.compile(model, backend=backend, fullgraph=True), context


def compile_then_watch(model: nn.Module, watcher: Nobody, backend: Counter) -> tuple[Callable, object]:
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return compiled, watcher.attach(compiled)


def compile_in_place(model: nn.Module, watcher: Nobody, backend: Counter) -> tuple[Callable, object]:
    context = watcher.attach(model)
    model.compile(backend=backend, fullgraph=True)
    return model, context


WAYS = [watch_then_compile, compile_then_watch, compile_in_place]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [1, 2])
def test_counts_and_weights_of_a_compiled_run(way, every):
    states, numbers, graphs = [], [], []
    watched = Watched(every_n_steps=every)
    for watcher in (Nobody(), watched):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net(dropout=0.2)
        before, drawn = hook_tables(model), torch.get_rng_state()
        backend = Counter("aot_eager")
        run, context = way(model, watcher, backend)
        with context:
            train(model, run, watcher, (4, 3, 6), STEPS)
        assert hook_tables(model) == before
        assert torch.overrides._len_torch_function_stack() == 0
        states.append(state_of(model))
        numbers.append(torch.get_rng_state())
        assert not numbers[-1].equal(drawn)
        graphs.append(backend.graphs)
    assert_bits(*states)
    assert numbers[0].equal(numbers[1])
    assert graphs[0] == 1
    assert graphs[1] <= (1 if every == 1 else 2)
    assert watched.scope._tap.failure is None
    torch.manual_seed(0)
    model, twin = Net(dropout=0.2), Twin(AXES, every)
    with twin.attach(model):
        train(model, model, twin, (4, 3, 6), STEPS)
    assert_same(watched.scope.census(), twin.tallies())
    assert list(watched.scope.census()) == NAMES


def test_evaluation_passes_of_a_compiled_model():
    """Training, evaluation without gradients and back: each phase has its own counts."""
    watched, twin = Watched(), Twin(AXES)
    for watcher in (watched, twin):
        torch.manual_seed(0)
        model = Net()
        run = model if watcher is twin else torch.compile(model, backend="aot_eager", fullgraph=True)
        with watcher.attach(model):
            for _ in range(2):
                train(model, run, watcher, (4, 3, 6), 2)
                with watcher.phase("val"), torch.no_grad():
                    run(torch.ones(3, 3, 6))
                    run(-torch.ones(3, 3, 6))
    for phase in ("train", "val"):
        assert_same(watched.scope.census(phase), twin.tallies(phase))


def test_other_batch_sizes_are_counted_exactly():
    """The compiler makes the batch size symbolic at the second one that it sees."""
    watched, twin = Watched(), Twin(AXES)
    for watcher in (watched, twin):
        torch.manual_seed(0)
        model = Net()
        run = model if watcher is twin else torch.compile(model, backend="aot_eager", fullgraph=True)
        with watcher.attach(model):
            for size in (4, 7, 2, 9, 4):
                train(model, run, watcher, (size, 3, 6), 1)
    assert_same(watched.scope.census(), twin.tallies())


def test_after_detach_a_compiled_model_is_not_counted():
    model = mlp()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with ns.watch(model) as scope:
        train(model, run, Scoped(scope), (6, 5), 3)
    train(model, run, Nobody(), (6, 5), 3)
    assert scope.census()["1"].positions == 18
    assert scope.census()["1"].gradient_positions == 18


class Scoped(Nobody):
    def __init__(self, scope: ns.Scope) -> None:
        self.scope = scope

    def step(self) -> None:
        self.scope.step()


def test_windows_close_on_a_compiled_model():
    """Counters are reset in place when a window closes, and the graph goes on counting into them."""
    model = mlp()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with ns.watch(model, window_steps=2, policy=ns.Policy(max_rate=0.5, confidence=0.5)) as scope:
        train(model, run, Scoped(scope), (6, 5), 6)
        assert scope.census(window="last")["1"].positions == 12
    assert scope.census()["1"].positions == 36
    assert scope.report()["1"].history.steps.tolist() == [1, 3, 5]


def test_a_part_that_is_compiled():
    """A compiled block within an eager model: its sites bear their plain names and are counted."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.compile(mlp(), backend="aot_eager")
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.block(x))

    model = Outer()
    with ns.watch(model) as scope:
        train(model, model, Scoped(scope), (6, 5), 3)
    census = scope.census()
    assert sorted(census) == ["block.1", "block.3", "relu"]
    assert {tally.positions for tally in census.values()} == {18}
    assert {tally.gradient_positions for tally in census.values()} == {18}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "shape"), [(mlp, (16, 5)), (Net, (4, 3, 6))], ids=["mlp", "net"])
def test_inductor(build, shape):
    states = []
    watched = Watched()
    for watcher in (Nobody(), watched):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build()
        before = hook_tables(model)
        run, context = watch_then_compile(model, watcher, Counter("inductor"))
        with context:
            train(model, run, watcher, shape, STEPS)
        assert hook_tables(model) == before
        states.append(state_of(model))
    assert_bits(*states)
    torch.manual_seed(0)
    model, eager = build(), Watched()
    with eager.attach(model):
        train(model, model, eager, shape, STEPS)
    compiled, expected = watched.scope.census(), eager.scope.census()
    assert list(compiled) == list(expected)
    for name, tally in expected.items():
        assert compiled[name].zero_outputs.tolist() == tally.zero_outputs.tolist(), name
        assert compiled[name].zero_gradients.tolist() == tally.zero_gradients.tolist(), name
        assert compiled[name].positions == tally.positions
        assert compiled[name].last_active_step.tolist() == tally.last_active_step.tolist()
