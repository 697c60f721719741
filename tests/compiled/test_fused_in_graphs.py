"""Graphs of ``torch.compile`` have the fused kernels of an unwatched run: see also ``test_fused_calls.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import assert_bits, hook_tables
from tests.attach.test_fused_calls import KERNELS, built
from tests.compiled.compiler_marks import COMPILES

pytestmark = [
    *COMPILES,
    pytest.mark.filterwarnings(
        "ignore:The PyTorch API of nested tensors is in prototype stage", "ignore:enable_nested_tensor is True"
    ),
]


class Teaching(nn.Module):
    """A student of a frozen teacher."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.teacher = built(name)
        self.student = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            goal = self.teacher(x)
        return F.mse_loss(F.relu(self.student(goal + x)), goal)


def compiled(model: nn.Module, in_place: bool) -> tuple[Callable[[Tensor], Tensor], list[str]]:
    """Compile a model as one graph, and list the fused kernels in its graphs."""
    kernels: list[str] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        kernels.extend(node.target.__name__ for node in graph.graph.nodes if node.target in map(_kernel, KERNELS))
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    if in_place:
        model.compile(backend=backend, fullgraph=True)
        return model, kernels
    return torch.compile(model, backend=backend, fullgraph=True), kernels


def _kernel(name: str) -> Any:
    return getattr(torch, name)


#: How many steps there are for one that is observed.
EVERY = {"attention": 1, "encoder layer": 2, "encoder layer, norm first": 1, "encoder layer, subclass": 1}
EVERY |= {"encoder layer, SiLU module": 1, "encoder, padded": 1, "layers in a list": 2}


@pytest.mark.parametrize(("name", "every"), EVERY.items())
def test_a_graph_of_a_watched_network_has_the_fused_kernels_of_the_unwatched_one(name: str, every: int) -> None:
    results, found = [], []
    for watches in (False, True):
        model, x = built(name), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
        run, kernels = compiled(model, in_place=False)
        before = hook_tables(model)
        with torch.no_grad():
            if watches:
                with ns.watch(model, every_n_steps=every) as scope:
                    outputs = []
                    for _ in range(3):
                        outputs.append(run(x))
                        scope.step()
            else:
                outputs = [run(x) for _ in range(3)]
        results.append(outputs)
        found.append(kernels)
        assert hook_tables(model) == before
    assert all(map(torch.equal, *results))
    assert found[1] == found[0] * every  # observed steps and others have a graph each
    assert bool(found[0]) == (name not in ("attention", "encoder layer, SiLU module"))
    assert scope._hooks.failure is None
    model = built(name)
    with torch.no_grad(), ns.watch(model) as eager:
        for _ in range(0, 3, every):
            model(x)
            eager.step()
    counted, in_eager = scope.census("inference"), eager.census("inference")
    assert {site: tally.positions for site, tally in counted.items()} == {
        site: tally.positions for site, tally in in_eager.items()
    }
    assert scope.report().not_measured == eager.report().not_measured


@pytest.mark.parametrize(("name", "in_place"), [("encoder layer", True), ("encoder, padded", False)])
def test_a_compiled_student_of_a_fused_teacher_gets_the_weights_of_an_unwatched_run(name: str, in_place: bool) -> None:
    states, found = [], []
    for watches in (False, True):
        model = Teaching(name)
        run, kernels = compiled(model, in_place)
        optimizer = torch.optim.Adam(model.student.parameters(), 0.05)
        scope = ns.watch(model) if watches else None
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            run(torch.randn(3, 5, 16)).backward()
            optimizer.step()
            if scope is not None:
                scope.step()
        states.append(model.state_dict())
        found.append(kernels)
        if scope is not None:
            assert scope._hooks.failure is None
            census = scope.census("train")
            assert {site: tally.positions for site, tally in census.items() if site.startswith("student")} == {
                "student.0/relu": 60,  # 4 steps, 3 × 5 positions
                "student.2/relu": 60,
            }
            scope.detach()
    assert_bits(*states)
    assert found[0] == found[1] != []


def test_a_compiled_layer_that_trains_is_counted_and_fused_where_it_evaluates() -> None:
    results = []
    for watches in (False, True):
        model = built("encoder layer")
        run, kernels = compiled(model, in_place=False)
        scope = ns.watch(model) if watches else None
        x, outputs = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)), []
        for _ in range(2):
            model.train()
            run(x).sum().backward()
            if scope is not None:
                scope.step()
            model.eval()
            with torch.no_grad():
                outputs.append(run(x))
        results.append(outputs)
        assert kernels == [KERNELS[0]]
        if scope is not None:
            assert scope.census("train")["2.linear1/relu"].positions == 2 * 15
            assert "2.linear1/relu" not in scope.census("inference")
            assert [each.name for each in scope.report().not_measured] == ["2.linear1/relu"]
            scope.detach()
    assert all(map(torch.equal, *results))


def test_hooks_are_back_if_a_fused_layer_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ArithmeticError

    model, x = built("layers in a list"), torch.randn(3, 5, 16)
    run, _ = compiled(model, in_place=False)
    with torch.no_grad(), ns.watch(model) as scope:
        watched = hook_tables(model)
        with monkeypatch.context() as patch, pytest.raises(Exception, match=r"Arithmetic|Observed"):
            patch.setattr(type(model[2].layers[0].self_attn), "merge_masks", fail)
            run(x)
        assert hook_tables(model) == watched
        torch._dynamo.reset()
        run(x)
        assert hook_tables(model) == watched
        assert scope.census("inference")["2.fc/relu"].positions == 30


def test_a_users_hook_keeps_a_compiled_layer_on_its_ordinary_path_as_ever() -> None:
    outputs = []
    for watches in (False, True):
        model, x = built("encoder layer"), torch.ones(3, 5, 16)
        model[2].dropout.register_forward_hook(lambda *call: None)
        run, kernels = compiled(model, in_place=False)
        with torch.no_grad():
            if watches:
                with ns.watch(model) as scope:
                    outputs.append(run(x))
                assert scope.census("inference")["2.linear1/relu"].positions == 15
            else:
                outputs.append(run(x))
        assert not kernels
    assert torch.equal(*outputs)
