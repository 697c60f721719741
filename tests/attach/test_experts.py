"""Experts: each has its own counts and its own positions, in each way in which a mixture is run.

All numbers are small integers, so that every product is exact. The slow twin multiplies each token by the matrix of
each of its experts, one at a time, and asks autograd for the gradient of each product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import neuronscope as ns
from neuronscope.build_report import MASK_IGNORED
from neuronscope.count import expert_counters
from neuronscope.count.counters import SiteCounters
from neuronscope.count.expert_counters import ExpertCounters, add_expert_outputs

EXPERTS, HIDDEN, WIDTH, TOP, BATCH, TIME = 5, 4, 8, 2, 3, 4
IDLE, DEAD = 3, (1, 2)  # an expert that gets no token; a neuron of another one that never fires


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


class Stack(nn.Module):
    """The experts: a stack of matrices, and how it is run."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w1 = nn.Parameter(whole_numbers(EXPERTS, HIDDEN, WIDTH, seed=1))
        self.w2 = nn.Parameter(whole_numbers(EXPERTS, WIDTH, HIDDEN, seed=2))
        self.way = way
        with torch.no_grad():
            self.w1[DEAD[0], :, DEAD[1]] = 0

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self.way(self, x, chosen)


class Mixture(nn.Module):
    """A router and its experts: ``(B, T, H)`` → ``(B, T, H)``."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.experts = Stack(way)
        self.router = nn.Parameter(whole_numbers(HIDDEN, EXPERTS, seed=3) + torch.arange(EXPERTS) / 16)

    def choose(self, x: Tensor) -> Tensor:
        scores = x @ self.router.detach()
        scores[:, IDLE] = -torch.inf
        return scores.topk(TOP, dim=-1).indices

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return self.experts(tokens, self.choose(tokens)).view(x.shape)


def pairs(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Each token once for each of its experts, and their numbers."""
    return x.repeat_interleave(TOP, dim=0), chosen.flatten()


def add_up(out: Tensor) -> Tensor:
    return out.view(-1, TOP, HIDDEN).sum(1)


def int_loop(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, _ = torch.where(chosen == expert)
        if len(token):
            hidden = F.relu(x[token] @ self.w1[expert])
            result.index_add_(0, token, hidden @ self.w2[expert])
    return result


def tensor_loop(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    for expert in chosen.unique():
        token, _ = torch.where(chosen == expert)
        hidden = F.relu(F.linear(x[token], self.w1[expert].t()))
        result = result.index_add(0, token, hidden @ self.w2[expert])
    return result


def bmm(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    tokens, ids = pairs(x, chosen)
    hidden = torch.bmm(tokens.unsqueeze(1), self.w1[ids]).squeeze(1).relu()
    return add_up(torch.bmm(hidden.unsqueeze(1), self.w2[ids]).squeeze(1))


def bmm_from_left(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    tokens, ids = pairs(x, chosen)
    hidden = torch.bmm(self.w1.transpose(1, 2)[ids], tokens.unsqueeze(-1)).squeeze(-1).relu()
    return add_up((self.w2[ids].transpose(1, 2) @ hidden[..., None])[..., 0])


def einsum(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    hidden = torch.einsum("th,tkhf->tkf", x, self.w1[chosen]).relu()
    return torch.einsum("tkf,tkfh->th", hidden, self.w2[chosen])


def index_select(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    tokens, ids = pairs(x, chosen)
    hidden = F.relu((tokens[:, None] @ self.w1.index_select(0, ids)).view(len(x), TOP, WIDTH))
    return add_up((hidden.view(-1, 1, WIDTH) @ self.w2.index_select(0, ids)).squeeze(1))


def sorted_rows(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens in the order of their experts, where each expert's end, and the order."""
    ids, order = chosen.flatten().sort(stable=True)
    return x[order // TOP], torch.bincount(ids, minlength=EXPERTS).cumsum(0).int(), order


def grouped(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def way(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
        tokens, ends, order = sorted_rows(x, chosen)
        out = product(F.relu(product(tokens, self.w1, offs=ends)), self.w2, offs=ends)
        return add_up(torch.zeros_like(out).index_copy(0, order, out))

    return way


def joined(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    tokens, ends, order = sorted_rows(x, chosen)
    parts = tokens.tensor_split(ends[:-1].long())
    hidden = F.relu(torch.cat([part @ self.w1[expert] for expert, part in enumerate(parts)]))
    out = torch.cat([part @ self.w2[expert] for expert, part in enumerate(hidden.tensor_split(ends[:-1].long()))])
    return add_up(torch.zeros_like(out).index_copy(0, order, out))


def joined_by_tensor(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
    tokens, ends, order = sorted_rows(x, chosen)
    parts = tokens.tensor_split(ends[:-1].long())
    hidden = F.relu(torch.cat([part @ self.w1[torch.tensor(expert)] for expert, part in enumerate(parts)]))
    out = torch.cat([part @ self.w2[expert] for expert, part in enumerate(hidden.tensor_split(ends[:-1].long()))])
    return add_up(torch.zeros_like(out).index_copy(0, order, out))


def dispatched(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A fixed number of rows for each expert, filled up with zeros."""

    def way(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
        mask = F.one_hot(chosen, EXPERTS).to(x.dtype)  # (token, k, expert)
        place = (mask.flatten(0, 1).cumsum(0) - 1).view(mask.shape) * mask
        slot = F.one_hot(place.long(), len(x) * TOP) * mask[..., None]  # (token, k, expert, slot)
        rows = torch.einsum("tkes,th->esh", slot.to(x.dtype), x)
        out = product(F.relu(product(rows, self.w1)), self.w2)
        return torch.einsum("tkes,esh->th", slot.to(x.dtype), out)

    return way


WAYS: dict[str, Callable[..., Tensor]] = {
    "loop over integers": int_loop,
    "loop over tensors": tensor_loop,
    "bmm": bmm,
    "bmm, weights left": bmm_from_left,
    "einsum by a matrix of indices": einsum,
    "index_select": index_select,
    "torch._grouped_mm": grouped(torch._grouped_mm),
    "joined": joined,
    "joined by tensors": joined_by_tensor,
    "bmm of all": dispatched(torch.bmm),
    "einsum of all": dispatched(lambda x, w: torch.einsum("ech,ehf->ecf", x, w)),
}
if hasattr(F, "grouped_mm"):
    WAYS["F.grouped_mm"] = grouped(F.grouped_mm)


def batches() -> Iterable[Tensor]:
    for step in range(3):
        x = whole_numbers(BATCH, TIME, HIDDEN, seed=10 + step)
        x[..., 0] = x[..., 0].abs() + 1  # no token is zero
        yield x


def loss_of(out: Tensor) -> Tensor:
    return (out * (torch.arange(out.numel()).view(out.shape) % 3 - 1)).sum()


def watched(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None, **options: Any) -> ns.Scope:
    with ns.watch(model, **options) as scope:
        for x in batches():
            loss_of(model(x) if run is None else run(x)).backward()
            scope.step()
    return scope


def truth(model: Mixture, kept: Tensor | None = None) -> dict[int, dict[str, Any]]:
    """Each token by the matrix of each of its experts, one at a time; those that a mask leaves out are not counted."""
    found: dict[int, dict[str, Any]] = {}
    for step, x in enumerate(batches()):
        tokens, outs, products = x.flatten(0, 1).double(), [], []
        w1, w2 = (weight.detach().double().requires_grad_() for weight in (model.experts.w1, model.experts.w2))
        real = [True] * len(tokens) if kept is None else kept.flatten().tolist()
        for token, chosen, counts in zip(tokens, model.choose(x.flatten(0, 1)).tolist(), real, strict=True):
            out = torch.zeros(HIDDEN, dtype=torch.float64)
            for expert in chosen:
                product = token @ w1[expert]
                if counts:
                    products.append((expert, product))
                out = out + product.relu() @ w2[expert]
            outs.append(out)
        gradients = torch.autograd.grad(loss_of(torch.stack(outs).view(x.shape)), [each for _, each in products])
        for (expert, product), gradient in zip(products, gradients, strict=True):
            tally = found.setdefault(expert, {"zero_outputs": 0, "zero_gradients": 0, "abs_sum": 0, "last": -1})
            fired = product.detach().numpy() > 0
            tally["zero_outputs"] += ~fired
            tally["zero_gradients"] += gradient.numpy() == 0
            tally["abs_sum"] += product.detach().relu().numpy()
            tally["last"] = np.where(fired, step, tally["last"])
        for expert, positions in Counter(expert for expert, _ in products).items():
            tally = found[expert]
            tally["positions"] = tally.get("positions", 0) + positions
            tally["examples"] = tally.get("examples", 0) + min(positions, BATCH)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_counts_of_each_expert_are_those_of_its_tokens(way: str) -> None:
    model = Mixture(WAYS[way])
    assert_counts(watched(model).census("train"), truth(model))


def assert_counts(census: ns.Census, expected: dict[int, dict[str, Any]]) -> None:
    assert sorted(expected) == [number for number in range(EXPERTS) if number != IDLE]
    for number, tally in expected.items():
        found = census[f"experts.w1.{number}/relu"]
        np.testing.assert_array_equal(found.zero_outputs, tally["zero_outputs"])
        np.testing.assert_array_equal(found.zero_gradients, tally["zero_gradients"])
        np.testing.assert_array_equal(found.abs_sum, tally["abs_sum"])
        np.testing.assert_array_equal(found.last_active_step, tally["last"])
        assert (found.positions, found.gradient_positions) == (tally["positions"], tally["positions"])
        assert found.examples == tally["examples"]
        assert (found.layer, found.neurons) == (f"experts.w1.{number}", WIDTH)
    assert {*census} == {f"experts.w1.{number}/relu" for number in range(EXPERTS)}
    assert census[f"experts.w1.{IDLE}/relu"].positions == 0


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_without_a_token_is_unseen_and_never_dead(way: str) -> None:
    report = watched(Mixture(WAYS[way])).report("train")
    layers = {layer.name: layer for layer in report.layers}
    idle = layers[f"experts.w1.{IDLE}/relu"]
    assert (idle.positions, idle.judgement.unseen.all(), idle.judgement.dead.any()) == (0, True, False)
    assert layers[f"experts.w1.{DEAD[0]}/relu"].judgement.dead[DEAD[1]]
    assert not report.not_measured


@pytest.mark.parametrize("way", WAYS)
def test_a_watched_mixture_gives_the_same_bits(way: str) -> None:
    gradients = []
    for watch in (False, True):
        model = Mixture(WAYS[way])
        if watch:
            watched(model)
        else:
            for x in batches():
                loss_of(model(x)).backward()
        gradients.append((model.experts.w1.grad, model.experts.w2.grad))
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


def test_validation_in_another_way_adds_to_the_same_sites() -> None:
    """A model may be trained by grouped products, and generate by picking the matrices of each token."""
    model = Mixture(WAYS["torch._grouped_mm"])
    with ns.watch(model) as scope:
        for x in batches():
            loss_of(model(x)).backward()
            scope.step()
        model.experts.way = bmm
        for x in batches():
            loss_of(model(x)).backward()
            scope.step()
    census, expected = scope.census("train"), truth(model)
    for number, tally in expected.items():
        found = census[f"experts.w1.{number}/relu"]
        np.testing.assert_array_equal(found.zero_outputs, 2 * tally["zero_outputs"])
        assert found.positions == 2 * tally["positions"]


def test_an_index_that_was_changed_before_the_activation_ran_is_not_believed() -> None:
    def way(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
        tokens, ids = pairs(x, chosen)
        hidden = torch.bmm(tokens.unsqueeze(1), self.w1[ids]).squeeze(1)
        ids.zero_()
        return add_up(hidden.relu() @ self.w2[0])

    model = Mixture(way)
    with ns.watch(model) as scope, scope.phase("val"), torch.no_grad():
        model(next(iter(batches())))
    assert not scope.census("val")
    (item,) = scope.report("val").not_measured
    assert "changed in place" in item.reason


KEPT = torch.arange(TIME).lt(TIME - 1).expand(BATCH, TIME).clone()
KEPT[1, 1] = False


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_reaches_the_rows_of_experts_or_the_report_says_that_it_does_not(way: str) -> None:
    model = Mixture(WAYS[way])
    scope = watched(model, mask=lambda args, kwargs: KEPT)
    ignored = way.endswith("of all")  # a product sends the tokens to their rows
    assert (MASK_IGNORED in scope.report().notes) == ignored
    assert_counts(scope.census("train"), truth(model, None if ignored else KEPT))


@pytest.mark.parametrize("activation", [F.relu, nn.Identity()], ids=["relu", "alone"])
def test_a_top_k_selection_in_rows_of_several_experts_is_that_of_each_expert(
    activation: Callable[[Tensor], Tensor],
) -> None:
    picked = []

    def way(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
        tokens, ids = pairs(x, chosen)
        hidden = activation(torch.bmm(tokens.unsqueeze(1), self.w1[ids]).squeeze(1))
        values, index = hidden.topk(2, dim=-1)
        hidden = torch.zeros_like(hidden).scatter(-1, index, values)
        picked.append((ids, hidden.detach()))
        return add_up(torch.bmm(hidden.unsqueeze(1), self.w2[ids]).squeeze(1))

    scope = watched(Mixture(way))
    ids, hidden = (torch.cat(each) for each in zip(*picked, strict=True))
    name = "topk relu" if activation is F.relu else "topk"
    for number in range(EXPERTS):
        tally, own = scope.census()[f"experts.w1.{number}/{name}"], hidden[ids == number]
        assert tally.zero_outputs.tolist() == (own == 0).sum(0).tolist()
        assert (tally.positions, tally.gradient_positions, tally.kind) == (len(own), len(own), "sparse")
    assert not scope.report().not_measured


def test_a_silu_that_is_written_out_on_a_matrix_of_a_stack_is_counted() -> None:
    def way(self: Stack, x: Tensor, chosen: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, _ = torch.where(chosen == expert)
            hidden = x[token] @ self.w1[expert]
            hidden = hidden * torch.sigmoid(hidden) * (x[token] @ self.w2[expert].t())
            result.index_add_(0, token, hidden @ self.w2[expert])
        return result

    scope = watched(Mixture(way))
    assert {f"experts.w1.{number}/swiglu" for number in range(EXPERTS)} <= {*scope.census()}
    assert all(tally.gradient_positions == tally.positions for tally in scope.census().values())
    assert not scope.report().not_measured


def test_the_memory_of_the_counters_is_in_neurons_and_not_in_rows() -> None:
    """However many rows there are, what is made to count them has the size of a piece, or of the counters."""
    counters = ExpertCounters([SiteCounters(8, torch.device("cpu")) for _ in range(4)], 8, torch.device("cpu"))
    with mock.patch.object(expert_counters, "_PIECE", 64):
        for rows in (4, 400):
            y, owners = torch.zeros(rows, 8), torch.arange(rows) % 4
            with Largest(y) as largest:
                add_expert_outputs(counters, y[:, None], owners, 1, rows, 0, 0.0)
            assert largest.elements <= max(64, 5 * 8, rows)
    assert [int(member.tensors.zero_outputs.sum()) for member in counters.members] == [8 * 101] * 4


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made beside one that is given."""

    def __init__(self, beside: Tensor) -> None:
        super().__init__()
        self.elements, self.beside = 0, beside.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.beside:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_report_of_experts_allows_no_act_on_them() -> None:
    """Their weights lie in one tensor, and data picks them."""
    for layer in watched(Mixture(WAYS["bmm"])).report("train").layers:
        assert "picks its weights" in layer.weights_unknown
