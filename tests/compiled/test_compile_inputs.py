"""A pre-activation that a compiled graph is given: its gradient is that of all its uses, or is said not to be counted.

A graph sees the gradient of the uses in the graph alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Partly, assert_same_census, train
from tests.compiled.three_runs import in_three_runs

pytestmark = COMPILES


class Applied(nn.Module):
    """Applies a function to its inputs, and has a layer behind it or not."""

    def __init__(self, function: Callable[..., Tensor], layer: bool) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(8, 8) if layer else nn.Identity()

    def forward(self, *inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.layer(self.function(*inputs, *(() if bias is None else (bias,))))


def used_beside(net: Partly, x: Tensor) -> Tensor:
    """The input of the compiled part is used after it, in eager code."""
    h = net.first(x)
    return net.last(net.part(h) - h)


def used_before(net: Partly, x: Tensor) -> Tensor:
    """The input of the compiled part is used before it, in eager code."""
    h = net.first(x)
    g = h * 2
    return net.last(net.part(h) - g)


def given_by_name(net: Partly, x: Tensor) -> Tensor:
    """A second input of the compiled part is given by name, and used after it."""
    h = net.first(x)
    return net.last(net.part(net.second(x), bias=h) - h)


def two_inputs(net: Partly, x: Tensor) -> Tensor:
    """Both inputs of the compiled part are used after it."""
    h, g = net.first(x), net.second(x)
    return net.last(net.part(h, g) - h - g)


#: What the part does, whether a layer is in it, and how the eager model around it uses it.
USES: dict[str, tuple[Callable[..., Tensor], bool, Callable[[Partly, Tensor], Tensor]]] = {
    "function": (F.relu, False, used_beside),
    "function and a layer": (F.relu, True, used_beside),
    "in place": (torch.relu_, True, used_before),
    "by name": (lambda x, bias: F.relu(bias) + x, True, given_by_name),
    "two": (lambda x, y: F.relu(x) * 2 + F.gelu(y), True, two_inputs),
    "changed first": (lambda x: F.relu(x * 2), True, used_beside),
}


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("name", USES)
def test_the_gradient_of_an_input_of_a_graph_is_that_of_all_its_uses(name, wraps):
    function, layer, use = USES[name]

    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model = Partly(Applied(function, layer), use)
        if compiles and wraps:
            model.part = torch.compile(model.part, backend="aot_eager", fullgraph=True)
        elif compiles:
            model.part.compile(backend="aot_eager", fullgraph=True)
        with watcher.attach(model):
            for size in (6, 6, 5, 4):
                train(model, model, watcher, (size, 8), 1)
            with watcher.phase("val"), torch.no_grad():
                model(torch.ones(5, 8))
        return model

    compiled = in_three_runs(run)
    assert compiled.phases == ("train", "val")
    assert compiled.census()["first/relu"].gradient_positions == 21


class Broken(nn.Module):
    """Its pre-activation is used before and after a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        g = h * 2
        torch._dynamo.graph_break()
        return self.last(F.relu(h) - g)


def test_gradients_are_not_counted_where_a_graph_sees_a_part_of_them():
    model, watcher = Broken(), Watched()
    with watcher.attach(model):
        train(model, torch.compile(model, backend="aot_eager"), watcher, (6, 5), 2)
    tally = watcher.scope.census()["first/relu"]
    assert (tally.positions, tally.gradient_positions) == (12, 0)
    (place,) = watcher.scope.report().not_measured
    assert place.name == "first/relu"
    assert "its gradients are not counted" in place.reason


class Flagged(nn.Module):
    """Applies its activation if an argument says so, which no hook knows."""

    def forward(self, x: Tensor, applies: bool) -> Tensor:
        return F.relu(x) if applies else x * 2


def test_a_graph_that_depends_on_other_arguments_has_the_gradients_of_eager():
    scopes = []
    for compiles in (False, True):
        watcher, flags = Watched(), iter([True, False, True, False])
        torch.manual_seed(0)
        model = Partly(Flagged(), lambda net, x, flags=flags: net.last(net.part(h := net.first(x), next(flags)) - h))
        if compiles:
            model.part.compile(backend="aot_eager", fullgraph=True)
        with watcher.attach(model):
            train(model, model, watcher, (6, 8), 4)
        scopes.append(watcher.scope)
    eager, compiled = scopes
    assert_same_census(compiled.census(), eager.census())
    assert compiled.census()["first/relu"].gradient_positions == 12
    assert compiled.report().not_measured == eager.report().not_measured


def test_a_function_that_is_compiled_by_itself_counts_at_each_layer_of_a_step_whatever_its_width():
    """Torch makes the width a dynamic size when it meets the second one."""
    scopes = []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        watcher, model = Watched(), Broken()
        model.other = nn.Linear(5, 8)
        act = torch.compile(F.relu, backend="aot_eager") if compiles else F.relu
        with watcher.attach(model):
            for _ in range(3):
                watcher.scope.open_step()
                y = model.last(act(model.first(torch.ones(4, 5))))
                watcher.backward((act(y) + act(model.other(torch.ones(4, 5))).sum() + model(torch.ones(4, 5))).sum())
                watcher.scope.close_step()
                watcher.step()
        scopes.append(watcher.scope)
    eager, compiled = scopes
    assert_same_census(compiled.census(), eager.census())
    assert compiled._hooks.failure is None


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        x = torch.relu(torch.quantize_per_tensor(h, 0.1, 0, torch.quint8)).dequantize()
        return torch.sigmoid(self.last(x))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_activation_of_a_quantised_tensor_in_a_graph_is_listed(backend):
    torch._dynamo.reset()
    model, x = Quantised(), torch.randn(4, 5)
    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), ns.watch(model) as scope:
        output = run(x)
    with torch.no_grad():
        assert output.equal(model(x))
    assert scope._hooks.failure is None
    assert {each.name for each in scope.report().not_measured if "quantised" in each.reason} == {"relu()"}
