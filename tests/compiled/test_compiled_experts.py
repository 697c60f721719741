"""Experts in compiled graphs: each expert's counts are those of its tokens, as integers, and nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.build_report import MASK_IGNORED
from tests.attach.test_experts import (
    BATCH,
    EXPERTS,
    HIDDEN,
    KEPT,
    TIME,
    TOP,
    WAYS,
    Mixture,
    Stack,
    add_up,
    assert_counts,
    batches,
    loss_of,
    pairs,
    truth,
    watched,
    whole_numbers,
)
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter

pytestmark = COMPILES

#: torch cannot compile a grouped product of float32: see below for what transformers calls instead.
UNCOMPILED = {"torch._grouped_mm", "F.grouped_mm"}
#: The data-dependent sizes of these break the graph.
BROKEN = {"loop over integers", "loop over tensors", "joined", "joined by tensors"}
#: The same as others to a graph.
ALIKE = {"index_select", "bmm, weights left"}
WHOLE = [way for way in WAYS if way not in BROKEN | UNCOMPILED | ALIKE]


def compiled(
    model: nn.Module, *, fullgraph: bool = True, backend: str = "aot_eager", dynamic: bool | None = None
) -> tuple[Callable[[Tensor], Tensor], Counter]:
    torch._dynamo.reset()
    counter = Counter(backend)
    return torch.compile(model, backend=counter, fullgraph=fullgraph, dynamic=dynamic), counter


def run_both(way: Callable[..., Tensor], **options: Any) -> tuple[Mixture, ns.Scope]:
    """Run a compiled mixture unwatched and watched; compare the graphs, and the gradients bit for bit."""
    alone, model = Mixture(way), Mixture(way)
    run, unwatched = compiled(alone, **options)
    for x in batches():
        loss_of(run(x)).backward()
    run, counter = compiled(model, **options)
    scope = watched(model, run)
    assert (counter.graphs, counter.outputs) == (unwatched.graphs, unwatched.outputs)
    for one, other in zip(alone.experts.parameters(), model.experts.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    return model, scope


@pytest.mark.parametrize("way", WHOLE)
def test_one_graph_has_the_counts_of_each_experts_tokens(way: str) -> None:
    model, scope = run_both(WAYS[way])
    assert_counts(scope.census("train"), truth(model))
    assert not scope.report().not_measured


def test_what_data_breaks_up_has_them_too() -> None:
    model, scope = run_both(WAYS["loop over integers"], fullgraph=False)
    assert_counts(scope.census("train"), truth(model))
    assert not scope.report().not_measured


@pytest.mark.parametrize("way", ["loop over tensors", "joined"])
def test_sizes_that_data_decides_may_be_in_the_graph(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", True)
    model, scope = run_both(WAYS[way], fullgraph=False, backend="eager")  # the others take long for such sizes
    assert_counts(scope.census("train"), truth(model))
    assert not scope.report().not_measured


def test_one_graph_counts_batches_of_any_size() -> None:
    """Rows and examples are those of the run, and not those with which the graph was traced."""
    model = Mixture(WAYS["bmm"])
    run, counter = compiled(model, backend="eager", dynamic=True)
    sizes, chosen = (3, 5, 2), []
    with ns.watch(model) as scope:
        for step, batch in enumerate(sizes):
            x = whole_numbers(batch, TIME, HIDDEN, seed=20 + step)
            chosen.append(model.choose(x.flatten(0, 1)).flatten())
            loss_of(run(x)).backward()
            scope.step()
    assert counter.graphs == 1
    for number in range(EXPERTS):
        tally = scope.census()[f"experts.w1.{number}/relu"]
        of_each = [int((each == number).sum()) for each in chosen]
        assert tally.positions == tally.gradient_positions == sum(of_each)
        assert tally.examples == sum(min(each, batch) for each, batch in zip(of_each, sizes, strict=True))


def grouped_as_transformers_does(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    ids, order = chosen.flatten().sort(stable=True)
    ends = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0, dtype=torch.int32)
    product = torch.ops.transformers.grouped_mm_fallback
    hidden = product(x[order // TOP], self.w1, offs=ends).relu()
    out = product(hidden, self.w2, offs=ends)
    return add_up(torch.zeros_like(out).index_copy(0, order, out))


def test_grouped_products_of_transformers() -> None:
    pytest.importorskip("transformers.integrations.moe")
    model, scope = run_both(grouped_as_transformers_does, fullgraph=False)
    assert_counts(scope.census("train"), truth(model))
    assert not scope.report().not_measured


def gate(self: Stack, hidden: Tensor) -> Tensor:  # a frame of the module, so that torch compiles it alone
    return (hidden + 0).relu()


def gated_by_a_graph(self: Stack, x: Tensor, chosen: Tensor, times: int = 1) -> Tensor:
    """As transformers runs GPT-OSS with grouped products, whose backward pass torch cannot trace."""
    tokens, ids = pairs(x, chosen)
    hidden = []
    for _ in range(times):
        hidden.append(torch.bmm(tokens.unsqueeze(1), self.w1[ids]).squeeze(1))  # noqa: PERF401, torch compiles those
    active = gate(self, hidden.pop())
    for each in hidden:
        active = active + gate(self, each)
    return add_up(torch.bmm(active.unsqueeze(1), self.w2[ids]).squeeze(1))


def test_rows_that_eager_code_made_are_counted_where_a_graph_applies_the_activation() -> None:
    model, scope = run_both(torch._dynamo.disable(gated_by_a_graph, recursive=False), fullgraph=False)
    assert_counts(scope.census("train"), truth(model))
    assert not scope.report().not_measured


def test_they_are_not_taken_for_those_of_another_call_of_the_same_layer() -> None:
    way = torch._dynamo.disable(functools.partial(gated_by_a_graph, times=2), recursive=False)
    model = Mixture(way)
    run, _ = compiled(model, fullgraph=False)
    scope = watched(model, run)
    assert not scope.census()
    (item,) = scope.report().not_measured
    assert item.name == "experts.w1/relu"
    assert "compiled graph" in item.reason


def one_expert_after_another(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    """As transformers runs GPT-OSS in a loop over experts."""
    result = torch.zeros_like(x)
    for expert in chosen.unique():
        token, _ = torch.where(chosen == expert)
        result = result.index_add(0, token, gate(self, x[token] @ self.w1[expert]) @ self.w2[expert])
    return result


def test_rows_of_one_expert_after_another_are_counted_where_a_graph_applies_the_activation() -> None:
    model = Mixture(torch._dynamo.disable(one_expert_after_another, recursive=False))
    run, _ = compiled(model, fullgraph=False)
    scope = watched(model, run)
    assert_counts(scope.census("train"), truth(model))
    assert not scope.report().not_measured


def test_two_forwards_before_a_backward_pass_count_the_gradients_of_both() -> None:
    model = Mixture(WAYS["bmm"])
    run, _ = compiled(model)
    with ns.watch(model) as scope:
        for x in batches():
            (loss_of(run(x)) + loss_of(run(x))).backward()
            scope.step()
    for number, tally in truth(model).items():
        found = scope.census()[f"experts.w1.{number}/relu"]
        assert found.positions == found.gradient_positions == 2 * tally["positions"]
        assert found.zero_gradients.tolist() == (2 * tally["zero_gradients"]).tolist()


@pytest.mark.parametrize("way", ["bmm", "bmm of all"])
def test_a_mask_reaches_the_rows_in_a_graph_or_the_report_says_that_it_does_not(way: str) -> None:
    model = Mixture(WAYS[way])
    run, _ = compiled(model)
    scope = watched(model, run, mask=lambda args, kwargs: torch.logical_not(args[0].isnan().any(-1)) & KEPT)
    ignored = way.endswith("of all")
    assert (MASK_IGNORED in scope.report().notes) == ignored
    assert_counts(scope.census("train"), truth(model, None if ignored else KEPT))


def selected(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    tokens, ids = pairs(x, chosen)
    hidden = torch.bmm(tokens.unsqueeze(1), self.w1[ids]).squeeze(1)
    values, index = hidden.topk(2, dim=-1)
    hidden = torch.zeros_like(hidden).scatter(-1, index, values)
    return add_up(torch.bmm(hidden.unsqueeze(1), self.w2[ids]).squeeze(1))


def written_out(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    tokens, ids = pairs(x, chosen)
    hidden = torch.bmm(tokens.unsqueeze(1), self.w1[ids]).squeeze(1)
    hidden = hidden * torch.sigmoid(hidden) * (hidden + 1)
    return add_up(torch.bmm(hidden.unsqueeze(1), self.w2[ids]).squeeze(1))


@pytest.mark.parametrize("way", [selected, written_out])
def test_selections_and_products_in_rows_of_experts_count_as_in_eager_mode(way: Callable[..., Tensor]) -> None:
    _, scope = run_both(way)
    eager = watched(Mixture(way))
    assert [*scope.census()] == [*eager.census()]
    for name, tally in eager.census().items():
        found = scope.census()[name]
        assert found.zero_outputs.tolist() == tally.zero_outputs.tolist()
        assert found.zero_gradients.tolist() == tally.zero_gradients.tolist()
        assert (found.positions, found.gradient_positions) == (tally.positions, tally.gradient_positions)
        assert (found.examples, found.kind) == (tally.examples, tally.kind)


def test_phases_and_eager_runs_add_to_the_same_experts() -> None:
    model = Mixture(WAYS["bmm"])
    run, _ = compiled(model)
    with ns.watch(model) as scope:
        for forward in (run, model, run):
            for x in batches():
                loss_of(forward(x)).backward()
                scope.step()
        with scope.phase("val"), torch.no_grad():
            for x in batches():
                run(x)
    expected = truth(model)
    for number, tally in expected.items():
        found, val = (scope.census(phase)[f"experts.w1.{number}/relu"] for phase in ("train", "val"))
        assert found.zero_outputs.tolist() == (3 * tally["zero_outputs"]).tolist()
        assert found.zero_gradients.tolist() == (3 * tally["zero_gradients"]).tolist()
        assert (found.positions, found.examples) == (3 * tally["positions"], 3 * tally["examples"])
        assert val.zero_outputs.tolist() == tally["zero_outputs"].tolist()
        assert (val.positions, val.examples) == (tally["positions"], tally["examples"])


def test_a_number_that_the_graph_is_given_is_not_taken_for_that_of_one_expert() -> None:
    """After its first recompilation a graph serves every number: whose rows they are is not known in it."""
    model = Mixture(WAYS["bmm"])
    model.forward = lambda x, expert: (x @ model.experts.w1[expert]).relu().sum()  # type: ignore[method-assign]
    run, _ = compiled(model)
    with ns.watch(model) as scope:
        for expert in range(EXPERTS):
            run(whole_numbers(BATCH, HIDDEN, seed=1), expert).backward()
            scope.step()
    known = {name: tally.positions for name, tally in scope.census().items() if tally.positions}
    assert set(known.values()) <= {BATCH}
    assert len(known) == EXPERTS or scope.report().not_measured


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def test_one_graph_of_ordinary_layers_counts_the_examples_of_any_batch() -> None:
    model, sizes = Layer(), (3, 5, 2)
    run, counter = compiled(model, backend="eager", dynamic=True)
    with ns.watch(model) as scope:
        for size in sizes:
            run(torch.randn(size, TIME, HIDDEN)).sum().backward()
            scope.step()
    tally = scope.census()["linear/relu"]
    assert counter.graphs == 1
    assert (tally.examples, tally.positions) == (sum(sizes), TIME * sum(sizes))


class Router(nn.Module):
    """As DeepSeek-V3's: computes in float32, whatever its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.type(torch.float32), self.weight.type(torch.float32)).sigmoid()


def test_a_cast_that_changes_nothing_leaves_a_weight_a_weight() -> None:
    model = Router()
    with ns.watch(model) as scope:
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(BATCH, HIDDEN)).sum().backward()
        scope.step()
    assert [*scope.census()] == ["(root)/sigmoid"]
