"""Activation checkpointing inside of a graph: what runs in it is counted as in eager mode, and the graph is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter
from tests.compiled.test_compiled_checkpoints import Block, Selecting, train
from tests.compiled.three_runs import in_three_runs

pytestmark = COMPILES

again = partial(checkpoint, use_reentrant=False)


class Within(nn.Module):
    """Runs its blocks in some way."""

    def __init__(self, way: Callable[[Within, Tensor], Tensor], block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(8, 8), nn.Linear(8, 2), way
        self.blocks, self.drop = nn.ModuleList([block(), block()]), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, self.first(x)))


class Wide(Within):
    """A block that has blocks under checkpoints."""

    def __init__(self) -> None:
        super().__init__(one_inside_of_another)
        self.last = nn.Linear(8, 8)


def both(net: Within, x: Tensor) -> Tensor:
    return net.blocks[1](net.blocks[0](x))


def each_block(net: Within, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = again(block, x)
    return x


def reentrant(net: Within, x: Tensor) -> Tensor:
    return checkpoint(net.blocks[1], checkpoint(net.blocks[0], x, use_reentrant=True), use_reentrant=True)


def one_block_twice(net: Within, x: Tensor) -> Tensor:
    return again(net.blocks[0], again(net.blocks[0], net.first(x)))


def one_inside_of_another(net: Within, x: Tensor) -> Tensor:
    return again(lambda x: F.silu(net.first(again(net.blocks[1], F.gelu(net.blocks[0](x))))), x)


def a_function_alone(net: Within, x: Tensor) -> Tensor:
    return again(lambda x: net.blocks[0].down(F.relu(net.blocks[0].up(F.gelu(x)))), x)


def what_it_is_given_is_used_outside(net: Within, x: Tensor) -> Tensor:
    return again(net.blocks[0], x) + F.relu(x) + x


def dropout(net: Within, x: Tensor) -> Tensor:
    return again(lambda x: net.drop(net.blocks[0](net.drop(x))), x)


def several(net: Within, x: Tensor) -> Tensor:
    given = {"x": x, "more": [x * 2]}
    found = again(lambda given: {"a": net.blocks[0](given["x"]), "b": [net.blocks[1](given["more"][0])]}, given)
    return F.relu(found["a"]) + F.gelu(net.first(found["b"][0]))


def without_gradients(net: Within, x: Tensor) -> Tensor:
    with torch.no_grad():
        side = again(net.blocks[0], x)
    return again(net.blocks[1], x + side)


WAYS = [
    each_block,
    reentrant,
    one_block_twice,
    one_inside_of_another,
    a_function_alone,
    what_it_is_given_is_used_outside,
    several,
    without_gradients,
]


def held(build: Callable[[], nn.Module], backend: str, *, part: bool = False, dynamic: bool = False) -> ns.Scope:
    """Compare the counts and the weights of a compiled network; watched and unwatched it is as many graphs.

    Args:
        build: Returns the network.
        backend: Compiles it.
        part: Whether its blocks are compiled, and not the whole.
        dynamic: Whether graphs serve inputs of any size.
    """
    graphs: list[int] = []

    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        counter = Counter(backend)
        model = run = build()
        if compiles and part:
            for block in model.blocks:
                block.compile(backend=counter, fullgraph=True, dynamic=dynamic)
        elif compiles:
            run = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        with watcher.attach(model):
            train(model, run, watcher)
        graphs.append(counter.graphs)
        return model

    scope = in_three_runs(run)
    assert part or graphs[1] == graphs[2]
    return scope


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of the eager run
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_checkpoint_in_a_graph_counts_as_in_eager_mode(way, backend):
    held(lambda: Within(way), backend)


@torch._functorch.config.patch(donated_buffer=False)  # the training goes back twice
def test_inductor_counts_a_checkpoint_in_a_graph():
    held(lambda: Within(one_inside_of_another), "inductor")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_selections_by_data_in_a_checkpoint_count_as_in_eager_mode(backend):
    held(lambda: Within(each_block, Selecting), backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_checkpoint_in_a_compiled_part_of_the_model_counts_as_in_eager_mode(backend):
    held(lambda: Within(both, Wide), backend, part=True)


@torch._functorch.config.patch(donated_buffer=False)  # the training goes back twice
def test_a_checkpoint_in_a_graph_for_any_size_counts_as_in_eager_mode():
    held(lambda: Within(each_block), "aot_eager", dynamic=True)


def selective(net: Within, x: Tensor) -> Tensor:
    policy = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
    return again(net.blocks[1], again(net.blocks[0], x, context_fn=policy))


def compiled_alone(way: Callable[[Within, Tensor], Tensor], backend: str) -> ns.Scope:
    """Hold the weights of a compiled network to those of the unwatched one, and return the scope.

    Args:
        way: What the network does between its first layer and its last.
        backend: Compiles it.
    """
    states, graphs = [], []
    for watcher in (Nobody(), Watched()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, counter = Within(way), Counter(backend)
        with watcher.attach(model):
            train(model, torch.compile(model, backend=counter, fullgraph=True), watcher)
        states.append(state_of(model))
        graphs.append(counter.graphs)
    assert_bits(*states)
    assert graphs[0] == graphs[1]
    assert watcher.scope._hooks.failure is None
    return watcher.scope


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dropout_in_a_checkpoint_draws_the_numbers_of_the_unwatched_run(backend):
    scope = compiled_alone(dropout, backend)
    assert {tally.positions for tally in scope.census().values()} == {24}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_a_selective_checkpoint_runs_is_listed(backend):
    """Torch asks the user's function about each operator in it: it must not be asked about ours."""
    scope = compiled_alone(selective, backend)
    listed = {each.name for each in scope.report().not_measured if "checkpoint`)" in each.reason}
    assert {"blocks.0.act", "relu()"} <= listed
    assert {tally.layer for tally in scope.census().values()} == {"blocks.0.down", "blocks.1.gate"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_a_compiled_function_calls_under_a_checkpoint_counts_as_in_eager_mode(backend):
    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model = Within(each_block)

        def call(x: Tensor) -> Tensor:
            return again(model, x)

        with watcher.attach(model):
            train(model, torch.compile(call, backend=backend, fullgraph=True) if compiles else call, watcher)
        return model

    in_three_runs(run)


class Part(nn.Sequential):
    """Not torch's own, so that it may call functions."""


def relu_behind(part: nn.Module, x: Tensor) -> Tensor:
    return F.relu(again(part, x))


def relu_inside(part: nn.Module, x: Tensor) -> Tensor:
    return again(lambda y: F.relu(part(y)), x)


@pytest.mark.filterwarnings("ignore:No activation of Part was seen")
@pytest.mark.parametrize(("way", "layers"), [(relu_behind, {"0.0"}), (relu_inside, set())])
def test_of_parts_that_a_compiled_function_calls_under_a_checkpoint_no_untrue_reason_is_given(way, layers):
    """The checkpoint is not taken for a function of the layer's weight, and a ReLU for one that is not known."""
    model = Part(Part(nn.Linear(8, 8)), Part(nn.Linear(8, 8)), nn.Linear(8, 2))

    def call(x: Tensor) -> Tensor:
        return model[2](way(model[0], x)).sum()

    called = torch.compile(call, backend="aot_eager")
    with ns.watch(model) as scope:
        for _ in range(2):
            called(torch.ones(4, 8)).backward()
            scope.step()
    listed = {each.name: each.reason for each in scope.report().not_measured}
    assert listed.keys() == layers | {"(root)"}
    assert "parts of the model were called, and never its forward" in listed["(root)"]
    assert all("where functions are not watched" in listed[layer] for layer in layers)


USER_CODE = """
def way(net, x):
    def block(y):
        y = net.blocks[0](y)
        ran.append(y.shape)
        return y
    return again(block, x)
"""


def test_code_of_the_user_in_a_folder_of_our_name_is_no_code_of_ours() -> None:
    """Torch lets nobody change what is outside of a checkpoint, and runs this one uncompiled."""
    ran: list[torch.Size] = []
    names: dict[str, Any] = {"again": again, "ran": ran}
    exec(compile(USER_CODE, "/a/user/neuronscope/train.py", "exec"), names)
    for watcher in (Nobody(), Watched()):
        torch._dynamo.reset()
        net = Within(names["way"])
        run = torch.compile(net, backend="eager", fullgraph=True)
        with watcher.attach(net), pytest.raises(torch._dynamo.exc.Unsupported, match="Unsafe side effect"):
            run(torch.randn(4, 8))
    assert not ran
