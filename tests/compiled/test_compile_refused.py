"""Back ends of users: one that refuses a part of a model, so that it runs in eager mode, and one that calls graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import SkipFrame
from torch._subclasses.fake_tensor import DataDependentOutputException

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


def calls(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
    """A back end that runs code of its own around each graph."""

    def around(*given: Tensor) -> Tensor:
        return run(*given)

    def run(*given: Tensor) -> Tensor:
        return graph(*given)

    return around


@pytest.mark.parametrize("build", [TwoMethods, Twice, Halves])
def test_a_back_end_that_calls_the_graph_from_its_own_code_counts_once(build):
    def run(watcher: Nobody, compiles: bool) -> nn.Module:
        model = build()
        called = torch.compile(model, backend=calls) if compiles else model
        with watcher.attach(model):
            train(model, called, watcher, (4, 5 if isinstance(model, Outer) else 8), 3)
        return model

    in_three_runs(run)
