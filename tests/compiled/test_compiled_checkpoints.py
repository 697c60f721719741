"""Compiled parts that activation checkpointing runs again in the backward pass: their outputs are counted once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_same
from tests.attach.test_experts import WAYS, Mixture, assert_counts, truth, watched
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import assert_same_census
from tests.compiled.three_runs import in_three_runs

pytestmark = COMPILES


@pytest.fixture(autouse=True)
def _backward_may_run_again() -> Iterator[None]:
    """Inductor's graphs leave their inputs whole, also one that it keeps on the disk: the training goes back twice."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


class Block(nn.Module):
    """Begins with an activation of what it is given, and has a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = (*(nn.Linear(8, 8) for _ in range(3)), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.down(F.gelu(self.act(self.gate(x)) * self.up(x) + x))


class Broken(Block):
    """Applies an activation to what eager code between two graphs returned."""

    @torch._dynamo.disable
    def between(self, x: Tensor) -> Tensor:
        return F.silu(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.between(self.act(self.gate(x)))))


class Net(nn.Module):
    """Two blocks, each under a checkpoint; or all of it under one, and each block under another one inside."""

    def __init__(self, block: type[Block], reentrant: bool | None, *, nested: bool = False) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.ModuleList([block(), block()]), nn.Linear(8, 2)
        self.reentrant, self.nested = reentrant, nested

    def again(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None or not self.training:
            return part(x)
        return checkpoint(part, x, use_reentrant=self.reentrant)

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.again(block, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.again(self.middle, x) if self.nested else self.middle(x))


def train(model: nn.Module, run: Callable[[Tensor], Tensor], watcher: Nobody) -> None:
    """Two batches a step, the second of which goes back first, and twice."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        losses = [run(torch.randn(4, 8, generator=generator)).square().mean() for _ in range(2)]
        watcher.backward(losses[1], again=True)
        watcher.backward(losses[1], again=True)
        watcher.backward(losses[0])
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()
    model.eval()
    with watcher.phase("val"), torch.no_grad():
        run(torch.ones(3, 8))


Training = Callable[[Any, Callable[[Tensor], Tensor], Nobody], None]
Build = Callable[[], tuple[nn.Module, list[nn.Module]]]


def compared(
    build: Build, run_of: Callable[[Any], Callable[[Tensor], Tensor]], training: Training, backend: str = "aot_eager"
) -> ns.Scope:
    """Compare a watched compiled run with others; see :func:`tests.compiled.three_runs.in_three_runs`.

    Args:
        build: Returns a network, and the parts of it to compile.
        run_of: Returns what is called in place of the network.
        training: The training loop.
        backend: Compiles the parts.
    """

    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model, parts = build()
        for part in parts if compiles else ():
            part.compile(backend=backend)
        with watcher.attach(model):
            training(model, run_of(model), watcher)
        return model

    return in_three_runs(run)


def as_it_is(model: Net) -> Callable[[Tensor], Tensor]:
    return model


def compiled_blocks(block: type[Block], reentrant: bool, **options: bool) -> Build:
    def build() -> tuple[nn.Module, list[nn.Module]]:
        model = Net(block, reentrant, **options)
        return model, [*model.blocks]

    return build


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # in the outer checkpoint
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("block", "nested", "backend"),
    [(Block, False, "aot_eager"), (Block, True, "aot_eager"), (Broken, False, "aot_eager"), (Block, False, "inductor")],
)
def test_blocks_that_are_compiled_one_by_one_count_what_eager_ones_and_the_twin_do(block, nested, backend, reentrant):
    scope = compared(compiled_blocks(block, reentrant, nested=nested), as_it_is, train, backend)
    torch.manual_seed(0)
    twin, model = Twin({None: -1}), Net(block, None)
    with twin.attach(model):
        train(model, model, twin)
    assert_same(scope.census(), twin.tallies())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_model_that_the_loop_calls_under_a_checkpoint(reentrant):
    """No forward of the model runs around it. Its first run without gradients is training, and another is inference."""

    def build() -> tuple[nn.Module, list[nn.Module]]:
        model = Net(Block, None)
        return model, [model]

    def run_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                model(x)
            return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

        return run

    scope = compared(build, run_of, train)
    positions = [{site.positions for site in scope.census(phase).values()} for phase in ("train", "inference")]
    assert positions == [{24}, {24}]


def gradients_of(loss: Tensor, model: nn.Module) -> None:
    parameters = [*model.parameters()]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.grad = gradient


#: Ways to run a backward pass. Torch tells a function mode of the first three.
BACKWARD: dict[str, Callable[[Tensor, nn.Module], None]] = {
    "Tensor.backward": lambda loss, _: loss.backward(),
    "autograd.backward": lambda loss, _: torch.autograd.backward(loss),
    "autograd.grad": gradients_of,
    "edge": lambda loss, _: torch.autograd.backward(get_gradient_edge(loss), torch.ones(())),
}


@pytest.mark.parametrize(
    ("reentrant", "backward"),
    [
        pair for pair in itertools.product((False, True), BACKWARD) if pair != (True, "autograd.grad")
    ],  # torch refuses it
)
def test_compiled_blocks_that_an_explicit_step_calls_under_a_checkpoint(reentrant, backward):
    def in_steps(model: Net, run: Callable[[Tensor], Tensor], watcher: Nobody) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scope = getattr(watcher, "scope", None)
        for number in range(3):
            x = torch.full((4, 8), number / 3)
            if scope is not None:
                scope.open_step()
            for _ in range(2):
                BACKWARD[backward](model.last(model.middle(model.first(x))).square().mean(), model)
            optimizer.step()
            if scope is not None:
                scope.close_step()
            watcher.step()

    scope = compared(compiled_blocks(Block, reentrant), as_it_is, in_steps)
    assert {site.gradient_positions for site in scope.census().values()} == {24}


class Moved(Net):
    """Moves its inputs along a gradient that the forward takes itself."""

    def __init__(self, reentrant: bool | None, *, by_backward: bool) -> None:
        super().__init__(Block, reentrant)
        self.by_backward = by_backward

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = self.last(self.middle(self.first(x))).square().mean()
        if self.by_backward:
            y.backward()
        gradient = x.grad if self.by_backward else torch.autograd.grad(y, x)[0]
        return self.last(self.middle(F.silu(self.first(x.detach() + gradient))))


@pytest.mark.parametrize(("reentrant", "by_backward"), [(False, False), (False, True), (True, True)])
def test_compiled_blocks_that_run_again_in_a_backward_pass_inside_of_a_forward(reentrant, by_backward):
    def in_training(model: Moved, run: Callable[[Tensor], Tensor], watcher: Nobody) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for number in range(3):
            watcher.backward(run(torch.full((4, 8), number / 3)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            watcher.step()

    def build_as(way: bool | None) -> Build:
        def build() -> tuple[nn.Module, list[nn.Module]]:
            model = Moved(way, by_backward=by_backward)
            return model, [*model.blocks]

        return build

    scope = compared(build_as(reentrant), as_it_is, in_training)
    assert_same_census(scope.census(), compared(build_as(None), as_it_is, in_training).census())


class Shared(Net):
    """One block, which is given the units of two layers."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__(Block, reentrant)
        self.blocks = nn.ModuleList([self.blocks[0], self.blocks[0]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_block_that_is_given_the_units_of_two_layers(reentrant):
    """Where its input is unknown in the backward pass, its first activation counts for neither layer."""
    torch.manual_seed(0)
    watched, model = Watched(), Shared(reentrant)
    model.blocks[0].compile(backend="aot_eager")
    with watched.attach(model):
        train(model, model, watched)
    torch.manual_seed(0)
    twin, model = Twin({None: -1}), Shared(None)
    with twin.attach(model):
        train(model, model, twin)
    expected, unseen = twin.tallies(), {"first/relu", "blocks.0.down/relu"} if reentrant else set()
    for name in unseen:
        expected[name]["gradient_positions"] = 0
        expected[name]["zero_gradients"][:] = 0
    assert_same(watched.scope.census(), expected)
    assert {each.name for each in watched.scope.report().not_measured} == unseen


class Scaled(nn.Module):
    """Applies activations to whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.relu(x) * self.scale)


class Widths(Net):
    """One block, which is given layers' units, as many as the first numbers say, and the model's input."""

    def __init__(self, reentrant: bool | None, widths: tuple[int, ...], given: int) -> None:
        super().__init__(Scaled, reentrant)
        self.blocks = nn.ModuleList([Scaled()])
        self.layers = nn.ModuleList(nn.Linear(8, width) for width in widths)
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        parts = [self.again(block, layer(x)) for layer in self.layers]
        if self.given:
            parts.append(self.again(block, x[:, : self.given].detach().requires_grad_()))
        return sum(part.mean(-1, keepdim=True) for part in parts)


def train_widths(model: Widths, run: Callable[[Tensor], Tensor], watcher: Nobody) -> None:
    """Two batches a step, the second of which goes back first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        losses = [run(torch.randn(4, 8, generator=generator)).square().mean() for _ in range(2)]
        watcher.backward(losses[1])
        watcher.backward(losses[0])
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_of_layers_of_several_widths_a_compiled_block_counts_each(reentrant):
    def build() -> tuple[nn.Module, list[nn.Module]]:
        model = Widths(reentrant, (8, 12), 0)
        return model, [*model.blocks]

    scope = compared(build, as_it_is, train_widths)
    assert {(site.positions, site.gradient_positions) for site in scope.census().values()} == {(16, 16)}


@pytest.mark.parametrize(("widths", "given"), [((6, 8, 6), 0), ((6,), 6)])
def test_what_a_compiled_block_is_given_that_is_not_known_again_is_counted_for_nobody(widths, given):
    """Two layers of one width, or one and the model's input: under reentrant checkpointing nothing says which it is."""
    scopes = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model, watched = Widths(True, widths, given), Watched()
        if compiles:
            model.blocks[0].compile(backend="aot_eager")
        with watched.attach(model):
            train_widths(model, model, watched)
        assert watched.scope._hooks.failure is None
        scopes.append(watched.scope)
    eager, compiled = (scope.census() for scope in scopes)
    unseen = {f"layers.{layer}/{act}" for layer, width in enumerate(widths) if width == 6 for act in ("relu", "gelu")}
    assert {each.name for each in scopes[1].report().not_measured} == unseen
    assert {site: tally.positions for site, tally in compiled.items()} == dict.fromkeys(eager, 16)
    assert {site: tally.gradient_positions for site, tally in compiled.items()} == {
        site: 0 if site in unseen else 16 for site in eager
    }
    seen = eager.keys() - unseen
    assert_same_census(*({site: census[site] for site in seen} for census in (compiled, eager)))


def test_a_forward_that_a_hook_runs_in_the_backward_pass_is_not_counted():
    def with_hook(model: Net, run: Callable[[Tensor], Tensor], watcher: Nobody) -> None:
        for number in range(3):
            y = run(torch.full((4, 8), number / 3))
            y.register_hook(lambda gradient: gradient + 0 * run(torch.ones(4, 8)).detach())
            watcher.backward(y.sum())
            watcher.step()

    def build() -> tuple[nn.Module, list[nn.Module]]:
        model = Net(Block, None)
        return model, [model]

    scope = compared(build, as_it_is, with_hook)
    assert {site.positions for site in scope.census().values()} == {12}


def test_experts_in_a_graph_that_runs_again_are_counted_once():
    model = Mixture(WAYS["index_select"])
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    scope = watched(model, lambda x: checkpoint(run, x, use_reentrant=False))
    assert_counts(scope.census("train"), truth(model))


class First(nn.Module):
    """Begins with an activation, and has others behind a graph break."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.fc, self.b, self.broken = nn.Linear(8, 8), nn.Linear(8, 8), broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(F.relu(x))
        if self.broken:
            torch._dynamo.graph_break()
        return self.b(F.relu(x))


class Selecting(nn.Module):
    """Selects by data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.fc(x * (x > 0.1))


class At(nn.Module):
    """Runs its block in one of several ways, each step in another."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), block
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("order", [(None, True), (True, None, True), (True, True), (False, True, False), (None, False)])
@pytest.mark.parametrize(
    "block", [lambda: First(False), lambda: First(True), Selecting], ids=["one graph", "two graphs", "selection"]
)
def test_checkpointing_that_begins_or_ends_in_training_changes_no_count(block, order):
    censuses = []
    for compiled, reentrant in itertools.product((False, True), (order, (None,) * len(order))):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = At(block())
        if compiled:
            model.block.compile(backend="aot_eager")
        with ns.watch(model) as scope:
            for model.reentrant in reentrant:
                model(torch.randn(4, 8)).square().mean().backward()
                scope.step()
        assert scope._hooks.failure is None
        censuses.append(scope.census())
    assert len({tally.positions for tally in censuses[0].values()}) == 1
    for census in censuses[1:]:
        assert_same_census(census, censuses[0])
