"""Back ends of users: one that refuses a part of a model, so that it runs in eager mode, and one that calls graphs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import SkipFrame
from torch._subclasses.fake_tensor import DataDependentOutputException

import neuronscope as ns
from neuronscope.attach.compiling import in_compiled_graph
from tests.agreement.slow_twin import Nobody
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import train
from tests.compiled.test_compile_breaks import Halves, Outer, Twice, TwoMethods
from tests.compiled.three_runs import in_three_runs

pytestmark = COMPILES


class Refusing:
    """A back end that refuses each graph, or every second one.

    Args:
        error: Makes the error that it refuses by.
        each: Refuses the graphs whose number is a multiple of this.
    """

    def __init__(self, error: Callable[[], Exception], each: int) -> None:
        self.error, self.each, self.given, self.refused = error, each, 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        self.given += 1
        if self.given % self.each:
            return graph.forward
        self.refused += 1
        raise self.error()


ERRORS = {
    "depends on data": lambda: DataDependentOutputException(torch.ops.aten._local_scalar_dense.default),
    "skips": lambda: SkipFrame("refused"),
    "fails": lambda: ValueError("refused"),  # with `suppress_errors`, which a user may set
}


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("build", [TwoMethods, Twice, Halves])
def test_a_part_that_the_back_end_refuses_counts_as_in_eager(build, error, each):
    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model, backend = build(), Refusing(ERRORS[error], each)
        called = torch.compile(model, backend=backend) if compiles else model
        with torch._dynamo.config.patch(suppress_errors=True), watcher.attach(model):
            train(model, called, watcher, (4, 5 if isinstance(model, Outer) else 8), 3)
        assert bool(backend.refused) == compiles
        return model

    in_three_runs(run)


def function(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    def run(*given: Tensor) -> Any:
        return graph(*given)

    return run


class Runner(nn.Module):
    """Calls a graph."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *given: Tensor) -> Any:
        return self.graph(*given)


#: Ways in which a back end may run a graph.
CALLS: dict[str, Callable[[torch.fx.GraphModule], Callable[..., Any]]] = {
    "function": function,
    "function in a function": lambda graph: functools.wraps(graph.forward)(function(graph)),
    "function that torch decorates": lambda graph: torch.enable_grad()(function(graph)),
    "function that is not compiled": lambda graph: torch._dynamo.disable(function(graph)),
    "module": Runner,
    "interpreter": lambda graph: torch.fx.Interpreter(graph).run,
    "compiled again": lambda graph: torch.compile(function(graph), backend="eager"),
}


@pytest.mark.parametrize(
    ("build", "called"),
    [*((TwoMethods, called) for called in CALLS), *((build, "module") for build in (Twice, Halves))],
)
def test_a_back_end_that_calls_the_graph_from_its_own_code_counts_once(build, called):
    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model = build()
        run = torch.compile(model, backend=lambda graph, _: CALLS[called](graph)) if compiles else model
        with watcher.attach(model):
            train(model, run, watcher, (4, 5 if isinstance(model, Outer) else 8), 3)
        return model

    in_three_runs(run)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


def test_a_thread_is_in_a_graph_only_while_it_runs_one_even_if_that_raises():
    seen: list[bool] = []

    def look() -> None:
        seen.append(in_compiled_graph())

    def raises(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*given: Tensor) -> Any:
            look()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            if any(each.isnan().any() for each in given):
                raise ZeroDivisionError
            return graph(*given)

        return run

    model = nn.Sequential(Part(), nn.Linear(8, 3), nn.GELU())
    model[0].compile(backend=raises)
    with ns.watch(model) as scope:
        model(torch.ones(4, 5)).sum().backward()
        look()
        scope.step()
        with pytest.raises(ZeroDivisionError):
            model(torch.full((4, 5), torch.nan))
        look()
        scope.step()
        model(torch.ones(4, 5)).sum().backward()
    assert seen == [True, False, False, True, False, False, True, False]
    assert scope._hooks.failure is None
    assert {site: tally.positions for site, tally in scope.census().items()} == {"0.layer/relu": 8, "1/gelu": 8}
