"""Watched and compiled: one graph, the same counts as eager, and the weights of the unwatched compiled run.

``aot_eager`` computes what eager computes, bit for bit, so its counts are held to the slow twin; Inductor, slow to
compile, runs on a few small networks and is held to the counts of eager, and to the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

import neuronscope as ns
from neuronscope.attach import activations
from neuronscope.count import compiled_graphs
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of
from tests.compiled.compiler_marks import COMPILES

pytestmark = COMPILES


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
NAMES = ["conv1/relu", "conv2/relu", "gate/silu", "gate/swiglu", "gate/gelu"]


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
    """A back end that counts its graphs, and the tensors that they return."""

    def __init__(self, backend: str) -> None:
        self.inner = torch._dynamo.lookup_backend(backend)
        self.graphs = 0
        self.outputs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        self.graphs += 1
        self.outputs += len(graph.graph.output_node().args[0])
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
def test_a_compiled_run_has_the_counts_of_the_twin_and_the_weights_of_an_unwatched_run(way, every):
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
    assert watched.scope._hooks.failure is None
    torch.manual_seed(0)
    model, twin = Net(dropout=0.2), Twin(AXES, every)
    with twin.attach(model):
        train(model, model, twin, (4, 3, 6), STEPS)
    assert_same(watched.scope.census(), twin.tallies())
    assert list(watched.scope.census()) == NAMES


def test_evaluation_passes_of_a_compiled_model_are_counted_apart():
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
    assert scope.census()["0/relu"].positions == 18
    assert scope.census()["0/relu"].gradient_positions == 18


@pytest.mark.parametrize(
    ("backend", "order"),
    [
        *(("aot_eager", order) for order in ("one sum", "in order", "last first", "validation between")),
        ("inductor", "last first"),
    ],
)
def test_a_compiled_model_that_runs_twice_before_its_backward_pass_is_counted_exactly(backend, order):
    """As networks with two towers do. Numbers are small integers, so that every order of sums is exact."""
    runs = []
    for watcher, compiles in ((Nobody(), True), (Watched(window_steps=2), True), (Watched(window_steps=2), False)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape))
        with watcher.attach(model):
            run = torch.compile(model, backend=backend, fullgraph=True) if compiles else model
            for _ in range(3):
                losses = [run(torch.randint(-3, 4, (6, 5)).float()).sum() for _ in range(2)]
                if order == "validation between":
                    with watcher.phase("val"), torch.no_grad():
                        run(torch.ones(3, 5))
                for loss in [sum(losses)] if order == "one sum" else losses[:: -1 if order == "last first" else 1]:
                    loss.backward()
                watcher.step()
        runs.append((watcher, [parameter.grad for parameter in model.parameters()]))
    (_, plain), (watched, gradients), (eager, _) = runs
    assert all(torch.equal(*pair) for pair in zip(plain, gradients))
    assert_same_census(watched.scope.census(), eager.scope.census())
    assert watched.scope.census()["0/relu"].gradient_positions == 36


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
        assert scope.census(window="last")["0/relu"].positions == 12
    assert scope.census()["0/relu"].positions == 36
    assert scope.report()["0/relu"].history.steps.tolist() == [1, 3, 5]


class Plain(nn.Module):
    """A module of a class of its own: its hooks run in eager code around the graph of its forward."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(F.relu(x))
        return x if next(self.children(), None) is not None else F.relu(x)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> dict[str, object]:
        gate, up = self.a(x).chunk(2, -1)
        return {"gate": gate, "others": (up, 3)}


class Breaking(nn.Module):
    """Its forward is compiled in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kept = {"h": (self.a(x), 1)}
        torch._dynamo.graph_break()
        h = self.b(F.relu(kept["h"][0] * 2))  # in the graph: see test_compile_inputs
        torch._dynamo.graph_break()
        return h + x


class Partly(nn.Module):
    """An eager model with a compiled part."""

    def __init__(self, part: nn.Module, run: Callable[[Partly, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.relu = nn.ReLU()
        self.part, self.run = part, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def gated_halves(net: Partly, x: Tensor) -> Tensor:
    halves = net.part(x)
    return net.last(F.silu(halves["gate"]) * halves["others"][0])


class Sharing(nn.Module):
    """Calls one block twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.first(x)))


def shared_with_eager(net: Partly, x: Tensor) -> Tensor:
    return net.last(net.part.block(net.part(x)))


def two_layers(net: Partly, x: Tensor) -> Tensor:
    return net.last(net.part(net.second(net.part(net.first(x)))))


#: What the part is, and how the eager model around it uses it.
PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Partly, Tensor], Tensor]]] = {
    "function behind it": (lambda: Plain("a"), lambda net, x: net.last(F.relu(net.part(x)))),
    "module behind it": (lambda: Plain("a", "b"), lambda net, x: net.last(net.relu(net.part(x)))),
    "behind a container": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        lambda net, x: net.last(net.relu(net.part(x))),
    ),
    "behind one layer": (lambda: nn.Linear(8, 8), lambda net, x: net.last(F.relu(net.part(x)))),
    "several outputs": (Halves, gated_halves),
    "before it": (lambda: Plain("a"), lambda net, x: net.last(net.part(net.first(x)))),
    "twice": (lambda: Plain("a"), lambda net, x: net.last(F.relu(net.part(net.part(x))))),
    "activation of two layers": (Plain, two_layers),
    "activation module of two layers": (nn.ReLU, two_layers),
    "shared module": (lambda: Sharing(Plain("a")), shared_with_eager),
    "residual": (Plain, lambda net, x: net.last(F.relu((h := net.first(x)) + net.part(h)))),
    "activation behind an activation": (Plain, lambda net, x: net.last(F.relu(net.part(net.first(x))))),
    "breaking": (Breaking, lambda net, x: net.last(F.relu(net.part(x)))),
    "returned": (lambda: Plain("a"), lambda net, x: F.relu(net.part(x))),
}


def compiled_before(model: Partly, watcher: Nobody) -> object:
    model.part = torch.compile(model.part, backend="aot_eager")
    return watcher.attach(model)


def compiled_in_place(model: Partly, watcher: Nobody) -> object:
    model.part.compile(backend="aot_eager")
    return watcher.attach(model)


def compiled_after(model: Partly, watcher: Nobody) -> object:
    context = watcher.attach(model)
    model.part = torch.compile(model.part, backend="aot_eager")
    return context


def compiled_in_place_after(model: Partly, watcher: Nobody) -> object:
    context = watcher.attach(model)
    model.part.compile(backend="aot_eager")
    return context


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, compiled_before) for name in PARTS),
        *(
            (name, way)
            for name in ("module behind it", "behind a container", "twice")
            for way in (compiled_in_place, compiled_after)
        ),
        *(
            (name, way)
            for name in ("activation of two layers", "activation module of two layers")
            for way in (compiled_in_place, compiled_after, compiled_in_place_after)
        ),
    ],
)
def test_a_compiled_part_of_an_eager_model_has_the_sites_and_counts_of_eager(name, way):
    """Its sites bear their plain names, and so do those of the eager code around it, in every step and phase."""
    build, run = PARTS[name]
    scopes, states = [], []
    for watcher, compiles in ((Watched(), False), (Watched(), True), (Nobody(), True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Partly(build(), run)
        with way(model, watcher) if compiles else watcher.attach(model):
            train(model, model, watcher, (6, 8), 3)
            with watcher.phase("val"), torch.no_grad():
                model(torch.ones(5, 8))
        states.append(state_of(model))
        scopes.append(getattr(watcher, "scope", None))
    eager, compiled, _ = scopes
    assert compiled._hooks.failure is None
    for phase in ("train", "val"):
        assert_same_census(compiled.census(phase), eager.census(phase))
        assert [tally.info for tally in compiled.census(phase).values()] == [
            tally.info for tally in eager.census(phase).values()
        ]
    assert compiled.report().not_measured == eager.report().not_measured
    assert_bits(states[1], states[2])


@pytest.mark.parametrize("explicit", [False, True])
def test_a_part_without_parameters_that_is_compiled_later_counts_for_no_other_layer(explicit):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Partly(Plain(), two_layers)
    steps = 4
    with ns.watch(model) as scope:
        for step in range(steps):
            if step == 1:
                model.part.compile(backend="aot_eager")
            x = torch.randn(6, 8)
            if explicit:
                scope.open_step(inputs=(x,))
                two_layers(model, x).sum().backward()
                scope.close_step()
            else:
                model(x).sum().backward()
            scope.step()
    assert scope._hooks.failure is None
    assert {name: tally.positions for name, tally in scope.census().items()} == dict.fromkeys(
        ("first/relu", "second/relu"), 6 * steps
    )
    assert [place.name for place in scope.report().not_measured] == ["relu"]  # which this model does not call


def assert_same_census(compiled: ns.Census, eager: Mapping[str, ns.Tally]) -> None:
    """Every site is there, with the same neurons, and every integer is equal."""
    assert list(compiled) == list(eager)
    for name, tally in eager.items():
        other = compiled[name]
        assert (other.axis, other.axis_source, other.positions, other.gradient_positions, other.examples) == (
            tally.axis,
            tally.axis_source,
            tally.positions,
            tally.gradient_positions,
            tally.examples,
        ), name
        for part in ("zero_outputs", "zero_gradients", "not_finite_outputs", "last_active_step"):
            assert getattr(other, part).tolist() == getattr(tally, part).tolist(), f"{name}: {part}"


@pytest.mark.parametrize(("build", "shape"), [(mlp, (16, 5)), (Net, (4, 3, 6))], ids=["mlp", "net"])
def test_counts_under_inductor_equal_those_of_eager(build, shape):
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
    torch.testing.assert_close(*states)  # not bit for bit: with the counting in it, it is another compilation
    torch.manual_seed(0)
    model, eager = build(), Watched()
    with eager.attach(model):
        train(model, model, eager, shape, STEPS)
    assert_same_census(watched.scope.census(), eager.scope.census())


def gated(pair: Sequence[Tensor]) -> Tensor:
    return F.relu(pair[0]) * pair[1]


def fused_attention(net: Branches, h: Tensor, g: Tensor) -> Tensor:
    """Query, key and value from one projection, as GPT-2 and vision transformers have it."""
    batch, length, _ = g.shape
    query, key, value = torch.cat([g, h], -1).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    heads = F.scaled_dot_product_attention(query, key, value)
    return F.gelu(net.up(heads.transpose(1, 2).flatten(2)))


def recurrent(net: Branches, h: Tensor, g: Tensor) -> Tensor:
    """A cell of an LSTM, written out, over two steps."""
    state = torch.zeros_like(h[:, 0])
    for step in range(2):
        put, keep = net.gate(h[:, step]).chunk(2, 1)
        state = torch.sigmoid(keep) * state + torch.sigmoid(put) * torch.tanh(h[:, step])
    return F.relu(state)


def changed_in_place(net: Branches, h: Tensor, g: Tensor) -> Tensor:
    """Two views of one tensor, of which one is changed in place."""
    whole = g * 1
    whole[..., :8].relu_()
    return whole[..., 8:] * F.silu(whole[..., :8])


def members_changed_in_place(net: Branches, h: Tensor, g: Tensor) -> Tensor:
    left, right = (part.clone() for part in g.chunk(2, -1))
    left.mul_(2).relu_()
    return left * right


def nested(net: Branches, h: Tensor, g: Tensor) -> Tensor:
    """Members in tuples in a list in a dictionary."""
    kept = {"pairs": [(part, [other]) for part, other in zip(g.split(4, -1), h.split(2, -1))]}
    return torch.cat([F.relu(part).view(*part.shape[:-1], 2, 2).sum(-1) * other for part, (other,) in kept["pairs"]])


def returned(net: Branches, h: Tensor, g: Tensor) -> Tensor:
    """A member is what the graph returns."""
    return F.relu(g).chunk(2, -1)[1]


#: Calls that give several tensors: what becomes of the members passes an activation.
SEVERAL: dict[str, Callable[[Branches, Tensor, Tensor], Tensor]] = {
    "chunk": lambda net, h, g: gated(g.chunk(2, -1)),
    "torch.chunk": lambda net, h, g: gated(torch.chunk(g, 2, dim=-1)),
    "split": lambda net, h, g: gated(g.split(8, -1)),
    "split by sizes": lambda net, h, g: gated(torch.split(g, [4, 4, 8], -1)),
    "tensor_split": lambda net, h, g: gated(torch.tensor_split(g, 2, -1)),
    "hsplit": lambda net, h, g: gated(g.flatten(0, 1).hsplit(2)),
    "unbind": lambda net, h, g: gated(g.unbind(1)),
    "topk": lambda net, h, g: F.relu(net.down(g.topk(16, -1).values)),
    "sort": lambda net, h, g: F.relu(torch.sort(g, 1)[0]),
    "max": lambda net, h, g: F.relu(g.max(1)[0]),
    "min by name": lambda net, h, g: F.relu(torch.min(g, dim=1).values),
    "kthvalue": lambda net, h, g: F.relu(g.kthvalue(2, 1)[0]),
    "cummax": lambda net, h, g: F.relu(g.cummax(1)[0]),
    "aminmax": lambda net, h, g: gated(torch.aminmax(g, dim=1)),
    "var_mean": lambda net, h, g: gated(torch.var_mean(g, 1)),
    "broadcast_tensors": lambda net, h, g: gated(torch.broadcast_tensors(g, g[:, :1])),
    "meshgrid": lambda net, h, g: gated(torch.meshgrid(g[0, 0], h[0, 0], indexing="ij")),
    "max_pool with indices": lambda net, h, g: F.relu(F.max_pool1d(g, 2, return_indices=True)[0]),
    "svd": lambda net, h, g: F.relu(torch.linalg.svd(net.up(h[..., :3] @ h.new_ones(3, 8)) + g)[1]),
    "multi-head attention": lambda net, h, g: F.relu(net.attention(h, h, h)[0]),
    "fused attention": fused_attention,
    "lstm cell": lambda net, h, g: F.relu(net.cell(h[:, 0])[0]),
    "written-out lstm": recurrent,
    "unflatten": lambda net, h, g: gated(g.unflatten(-1, (2, 8)).unbind(-2)),
    "views changed in place": changed_in_place,
    "members changed in place": members_changed_in_place,
    "nested": nested,
    "returned": returned,
}


class Branches(nn.Module):
    """A network with one of the calls in its middle."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner, self.relu, self.gate = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cell = nn.LSTMCell(8, 8)
        self.call = SEVERAL[name]

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.inner(x))
        return self.call(self, h, self.gate(h))


@pytest.mark.parametrize("name", SEVERAL)
def test_calls_that_give_several_tensors_stay_in_one_graph(name):
    """Watched, the graph is one and returns no more tensors; weights are those of the unwatched run, counts eager's."""
    states, backends, watched = [], [], Watched()
    for watcher in (Nobody(), watched):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, backend = Branches(name), Counter("eager")
        run, context = watch_then_compile(model, watcher, backend)
        with context:
            train(model, run, watcher, (4, 5, 6), 2)
            assert vars(run(torch.ones(4, 5, 6))) == {}
        states.append(state_of(model))
        backends.append(backend)
    assert_bits(*states)
    assert [backend.graphs for backend in backends] == [1, 1]
    assert backends[0].outputs == backends[1].outputs
    assert watched.scope._hooks.failure is None
    torch.manual_seed(0)
    model, eager = Branches(name), Watched()
    with eager.attach(model):
        train(model, model, eager, (4, 5, 6), 2)
        model(torch.ones(4, 5, 6))
    assert_same_census(watched.scope.census(), eager.scope.census())


#: All but those that clamp at a tensor, which are no activations, and but a private one.
SPELLINGS = sorted(
    (
        function
        for function in activations.Registry().functions
        if not getattr(function, "__name__", "").endswith((".Tensor", "_threshold"))
    ),
    key=str,
)
ARGUMENTS = {"threshold": (0.1, 20.0), "clamp": (0.0,), "clip": (0.0,), "clamp_min": (0.0,), "prelu": (torch.ones(1),)}


@pytest.mark.parametrize("place", range(4))
def test_every_spelling_of_an_activation_function_is_seen_compiled_as_in_eager(place):
    """Also those that bypass function modes where a module is compiled: `torch.relu_`, `F.hardswish`, `F.sigmoid`."""

    functions = SPELLINGS[place::4]

    class Applied(nn.Module):
        def __init__(self, function: Callable[..., Tensor]) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
            name = function.__name__.removesuffix(".default").rstrip("_")
            self.function, self.arguments = function, ARGUMENTS.get(name, ())

        def forward(self, x: Tensor) -> Tensor:
            y = self.function(self.layer(x), *self.arguments)
            return self.last(torch.cat([y, y], -1)[..., :8])

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = nn.ModuleList(Applied(function) for function in functions)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([applied(x) for applied in self.of]).sum()

    censuses = []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = All()
        with ns.watch(model) as scope:
            run = torch.compile(model, backend="eager", fullgraph=True) if compiles else model
            run(torch.linspace(-2, 2, 24).view(4, 6)).backward()
        assert scope._hooks.failure is None
        censuses.append(scope.census())
    sites = [name.partition("/")[0] for name in censuses[0]]
    for number, function in enumerate(functions):
        assert sites.count(f"of.{number}.layer") == 1, function
    assert len(sites) == len(functions)
    assert_same_census(*censuses)


def test_without_fullgraph_there_is_no_graph_break_either():
    model, backend = Branches("chunk"), Counter("aot_eager")
    with ns.watch(model) as scope:
        train(model, torch.compile(model, backend=backend), Scoped(scope), (4, 5, 6), 2)
    assert backend.graphs == 1
    assert "gate(0:8)/reglu" in scope.census()


@pytest.mark.parametrize("name", ["chunk", "sort"])
def test_calls_that_give_several_tensors_under_inductor(name):
    """All numbers are small integers, of which every order of sums is exact: counts are equal here too."""
    outputs, censuses = [], []
    for watcher, backend in ((Nobody(), "inductor"), (Watched(), "inductor"), (Watched(), None)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Branches(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape))
        with watcher.attach(model):
            run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
            output = run(torch.randint(-3, 4, (4, 5, 6)).float())
            output.sum().backward()
            watcher.step()
        outputs.append(output.detach())
        if isinstance(watcher, Watched):
            censuses.append(watcher.scope.census())
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert_same_census(*censuses)


def test_a_graph_that_the_back_end_cannot_compile_runs_in_eager_mode_as_unwatched():
    """Because a value in it depends on data, as with the grouped experts of transformers: torch then runs the code."""

    def refuse(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)

    states, watched, eager = [], Watched(), Watched()
    for watcher, compiles in ((Nobody(), True), (watched, True), (eager, False)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net()
        with watcher.attach(model):
            train(model, torch.compile(model, backend=refuse) if compiles else model, watcher, (4, 3, 6), 2)
        states.append(state_of(model))
    assert_bits(*states[:2])
    assert watched.scope._hooks.failure is None
    assert_same_census(watched.scope.census(), eager.scope.census())


def test_counting_stays_one_call_in_a_graph_when_the_compiler_makes_its_tables_anew():
    """As it does when DDP is set up; later graphs would trace into the counting, and break there."""
    torch._dynamo.trace_rules.clear_lru_cache()
    table = torch._dynamo.trace_rules.get_torch_obj_rule_map()
    for name in ("_add_outputs_in_graph", "once_a_forward", "_leave_out_in_graph", "_register_gradient_hook_in_graph"):
        assert getattr(compiled_graphs, name) in table


class JoinedBehindOne(nn.Module):
    """An activation of one layer, whose rows are then joined with another layer's before the same activation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.left(x), F.silu(self.right(x))])
        return self.last(F.silu(joined))


def test_a_layer_that_a_graph_counts_alone_and_joined_with_another_one_is_listed_and_in_no_census():
    """The graph has counters of the layer already, and cannot count its joined rows in them."""
    model = JoinedBehindOne()
    with ns.watch(model) as scope:
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(3, 4)).sum().backward()
        assert not scope.census()
        assert "left+right/silu" in [place.name for place in scope.report().not_measured]


class Decoder(nn.Module):
    """A fused QKV, a feed-forward layer, and a SwiGLU of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gate, self.last = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        gate, up = self.gate(x).chunk(2, -1)
        return x + self.last(F.silu(gate) * up)


def test_under_inductor_attention_and_swiglu_keep_the_weights_of_the_unwatched_run():
    """In float32 on the CPU, after 20 steps. Where attention is broken out of the graph, they end 2e-4 apart."""
    states, backends = [], []
    for watcher in (Nobody(), Watched()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, backend = Decoder(), Counter("inductor")
        run, context = watch_then_compile(model, watcher, backend)
        with context:
            train(model, run, watcher, (4, 5, 16), 20)
        states.append(state_of(model))
        backends.append(backend)
    assert_bits(*states)
    assert [backend.graphs for backend in backends] == [1, 1]
    assert watcher.scope._hooks.failure is None
    positions = {site: tally.gradient_positions for site, tally in watcher.scope.census().items()}
    assert positions == {"up/gelu": 400, "gate(0:32)/silu": 400, "gate(0:32)/swiglu": 400}  # 20 steps of 4 × 5
