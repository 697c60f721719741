"""Back ends of users: one that refuses a part of a model, so that it runs in eager mode, and one that calls graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.exc import SkipFrame
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import assert_same_census, train
from tests.compiled.test_compile_breaks import Halves, Outer, Twice, TwoMethods

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
    runs = []
    for watcher, compiles in ((Watched(), False), (Watched(), True), (Nobody(), True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, backend = build(), Refusing(ERRORS[error], each)
        run = torch.compile(model, backend=backend) if compiles else model
        with torch._dynamo.config.patch(suppress_errors=True), watcher.attach(model):
            train(model, run, watcher, (4, 5 if isinstance(model, Outer) else 8), 3)
        assert bool(backend.refused) == compiles
        runs.append((getattr(watcher, "scope", None), state_of(model)))
    (eager, _), (compiled, weights), (_, plain) = runs
    assert_bits(weights, plain)
    assert compiled._hooks.failure is None
    assert_same_census(compiled.census(), eager.census())
    assert compiled.report().not_measured == eager.report().not_measured


def calls(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
    """A back end that runs code of its own around each graph."""

    def around(*given: Tensor) -> Tensor:
        return run(*given)

    def run(*given: Tensor) -> Tensor:
        return graph(*given)

    return around


@pytest.mark.parametrize("build", [TwoMethods, Twice, Halves])
def test_a_back_end_that_calls_the_graph_from_its_own_code_counts_once(build):
    runs = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model, watcher = build(), Watched()
        with watcher.attach(model):
            run = torch.compile(model, backend=calls) if compiles else model
            train(model, run, watcher, (4, 5 if isinstance(model, Outer) else 8), 3)
        runs.append(watcher.scope)
    assert runs[1]._hooks.failure is None
    assert_same_census(runs[1].census(), runs[0].census())
