"""What data selects of a layer is counted after the selection: the latents that the decoder reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns

INPUTS, LATENTS, ROWS, STEPS = 4, 9, 6, 4

Select = Callable[["Coder", Tensor], Tensor]


class Coder(nn.Module):
    """A sparse autoencoder.

    Args:
        select: Returns the latents of the pre-activation ``(B, N)``.
    """

    def __init__(self, select: Select) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(INPUTS, LATENTS), nn.Linear(LATENTS, INPUTS)
        self.theta = nn.Parameter(torch.full((LATENTS,), 0.3))
        self.select = select

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.select(self, self.enc(x)))


class Jump(torch.autograd.Function):
    """JumpReLU with a derivative of its own, as in training libraries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(x, theta)
        return x * (x > theta).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, theta = ctx.saved_tensors
        return gradient * (x > theta), torch.zeros_like(theta)


def top_k(_: Coder, x: Tensor) -> Tensor:
    values, index = x.topk(3, -1, sorted=False)
    return torch.zeros_like(x).scatter_(-1, index, values.relu())


def top_k_of_relu(_: Coder, x: Tensor) -> Tensor:
    largest = F.relu(x).topk(3, sorted=False)
    return x.new_zeros(x.shape).scatter(dim=-1, index=largest.indices, src=largest.values)


def batch_top_k(_: Coder, x: Tensor) -> Tensor:
    flat = F.relu(x).flatten()
    values, index = flat.topk(2 * len(x))
    return torch.zeros_like(flat).scatter(-1, index, values).reshape(x.shape)


def top_k_by_size(_: Coder, x: Tensor) -> Tensor:
    index = x.abs().topk(3, -1).indices
    return torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))


def jump(coder: Coder, x: Tensor) -> Tensor:
    return x * (x > coder.theta)


def jump_with_its_own_derivative(coder: Coder, x: Tensor) -> Tensor:
    return Jump.apply(x, coder.theta)


def jump_then_relu(coder: Coder, x: Tensor) -> Tensor:
    return nn.ReLU()((x > coder.theta - 1).to(x.dtype) * x)  # some thresholds are below zero


def relu_and_mask(coder: Coder, x: Tensor) -> Tensor:
    return F.relu(x) * (x > coder.theta).to(x.dtype)


def relu_above_threshold(coder: Coder, x: Tensor) -> Tensor:
    latents = F.relu(x)
    return latents * (latents > coder.theta)


def where(coder: Coder, x: Tensor) -> Tensor:
    return torch.where(x > coder.theta, x, 0.0)


def fill(coder: Coder, x: Tensor) -> Tensor:
    return x.masked_fill(x < coder.theta, 0)


def gated(coder: Coder, x: Tensor) -> Tensor:
    return (x + coder.theta - 0.5 > 0).to(x.dtype) * F.relu(coder.theta.exp() * x + 0.1)


#: Each selection, and the name of its site.
SELECTIONS = {
    top_k: "enc/topk",
    top_k_of_relu: "enc/topk relu",
    batch_top_k: "enc/topk relu",
    top_k_by_size: "enc/topk",
    jump: "enc/jumprelu",
    jump_with_its_own_derivative: "enc/jumprelu",
    jump_then_relu: "enc/relu",
    relu_and_mask: "enc/masked relu",
    relu_above_threshold: "enc/masked relu",
    where: "enc/jumprelu",
    fill: "enc/jumprelu",
    gated: "enc/masked relu",
}


def train(select: Select, *, watched: bool, compiled: bool = False) -> tuple[Coder, ns.Scope | None, list[Tensor]]:
    """Train a small autoencoder, and return it, the scope, and the latents of each step, computed beside it."""
    torch.manual_seed(0)
    coder = Coder(select)
    with torch.no_grad():
        coder.enc.bias[0] = -50
    torch._dynamo.reset()
    run = torch.compile(coder, backend="aot_eager", fullgraph=True) if compiled else coder
    optimizer = torch.optim.SGD(coder.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(1)
    scope, latents = ns.watch(coder) if watched else None, []
    for _ in range(STEPS):
        x = torch.randn(ROWS, INPUTS, generator=draw)
        with torch.no_grad():
            latents.append(select(coder, coder.enc(x)))
        (run(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scope is not None:
            scope.step()
    return coder, scope, latents


@pytest.mark.parametrize("select", SELECTIONS)
def test_counts_are_those_of_the_latents(select: Select) -> None:
    _, scope, latents = train(select, watched=True)
    assert scope is not None
    tally, report = scope.census()[SELECTIONS[select]], scope.report()
    zeros = torch.stack(latents).eq(0).sum((0, 1))
    assert tally.zero_outputs.tolist() == zeros.tolist()
    assert tally.zero_gradients.tolist() == zeros.tolist()  # the decoder's rows are dense
    assert (tally.positions, tally.gradient_positions, tally.examples) == (STEPS * ROWS,) * 3
    assert (tally.kind, tally.layer) == ("sparse", "enc")
    assert "dec" in tally.readers
    assert (report.neurons, report.dead) == (LATENTS, int((zeros == STEPS * ROWS).sum()))
    assert not report.dormant
    assert not report.not_measured
    scope.detach()


@pytest.mark.parametrize("select", SELECTIONS)
def test_training_is_the_same_bit_for_bit(select: Select) -> None:
    (alone, _, _), (watched, scope, _) = (train(select, watched=each) for each in (False, True))
    assert scope is not None
    scope.detach()
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("select", [top_k, batch_top_k, top_k_by_size, jump, relu_and_mask, where])
def test_compiled_graphs_count_alike(select: Select) -> None:
    (_, eager, _), (_, traced, _) = (train(select, watched=True, compiled=each) for each in (False, True))
    assert eager is not None
    assert traced is not None
    assert list(eager.census()) == list(traced.census())
    for name, tally in eager.census().items():
        other = traced.census()[name]
        assert tally.zero_outputs.tolist() == other.zero_outputs.tolist()
        assert (tally.positions, tally.examples) == (other.positions, other.examples)
        assert tally.gradient_positions == other.gradient_positions
        assert tally.zero_gradients.tolist() == other.zero_gradients.tolist()
    eager.detach()
    traced.detach()


def other_fill(_: Coder, x: Tensor) -> Tensor:
    values, index = x.topk(3)
    return torch.full_like(x, -1.0).scatter(-1, index, values).exp()


def picked_elsewhere(coder: Coder, x: Tensor) -> Tensor:
    """Write values at places that are no units of the layer."""
    values, _ = x.topk(3)
    index = coder.theta.detach()[None].expand(len(x), -1).topk(3).indices
    return torch.zeros_like(x).scatter(-1, index, values).relu()


def scores(_: Coder, x: Tensor) -> Tensor:
    """Weight by what is left of a softmax, as a router of experts does."""
    values, index = x.topk(3)
    return torch.zeros_like(x).scatter(-1, index, values.softmax(-1))


def guarded(_: Coder, x: Tensor) -> Tensor:
    """Set what is not finite to zero."""
    return torch.where(torch.isnan(x), 0.0, x).masked_fill(torch.isinf(x), 0.0) * torch.isfinite(x)


def dropped(_: Coder, x: Tensor) -> Tensor:
    """Leave out whole rows and single elements by chance, as stochastic depth, LayerDrop and dropout do."""
    kept = torch.where(torch.rand_like(x) > 0.2, x, 0.0) * torch.empty_like(x).bernoulli_(0.8)
    return kept * (torch.rand(len(x), 1) > 0.2)


def masked_by_another(coder: Coder, x: Tensor) -> Tensor:
    """Leave what a buffer or another tensor says, and not the units themselves."""
    return x.masked_fill(coder.theta.detach() > 10, 0.0) * (x.new_ones(x.shape) > 0)


@pytest.mark.filterwarnings("ignore:No activation of Coder")
@pytest.mark.parametrize("select", [other_fill, picked_elsewhere, scores, guarded, dropped, masked_by_another])
def test_what_is_no_selection_is_not_counted_as_one(select: Select) -> None:
    _, scope, _ = train(select, watched=True)
    assert scope is not None
    assert [tally.kind for tally in scope.census().values() if tally.kind == "sparse"] == []
    scope.detach()


def put_back(_: Coder, x: Tensor) -> Tensor:
    latents, on = torch.zeros_like(x), x > 0
    latents[on] = x[on]
    return latents


def put_back_by_index(_: Coder, x: Tensor) -> Tensor:
    on = (x > 0).nonzero(as_tuple=True)
    return torch.zeros_like(x).index_put(on, x[on])


def put_back_both_parts(_: Coder, x: Tensor) -> Tensor:
    latents, on = torch.empty_like(x), x > 0
    latents[on] = x[on]
    latents[~on] = x[~on].exp() - 1
    return latents * 1.0


def put_back_in_order(_: Coder, x: Tensor) -> Tensor:
    return torch.zeros_like(x).masked_scatter(x > 0, x.masked_select(x > 0))


@pytest.mark.filterwarnings("ignore:No activation of Coder")
@pytest.mark.parametrize("select", [put_back, put_back_by_index, put_back_both_parts, put_back_in_order])
def test_a_layer_of_which_data_picks_elements_that_are_put_back_is_listed(select: Select) -> None:
    """Which units an element is of is not known by then, so that nothing is counted; and that is said."""
    _, scope, _ = train(select, watched=True)
    assert scope is not None
    assert not scope.census()
    [listed] = scope.report().not_measured
    assert listed.name == "enc"
    assert "was applied to it, which is not known as an activation" in listed.reason
    scope.detach()


def fill_in(x: Tensor, h: Tensor, at: Tensor) -> Tensor:
    filled = x.clone()
    filled[at] = h[at]
    return filled


def fill_in_order(x: Tensor, h: Tensor, at: Tensor) -> Tensor:
    return x.masked_scatter(at, h.masked_select(at))


def keep_some(_: Tensor, h: Tensor, at: Tensor) -> Tensor:
    kept = torch.zeros_like(h)
    kept[at] = h[at]
    return kept


@pytest.mark.parametrize("write", [fill_in, fill_in_order, keep_some])
def test_elements_that_a_given_mask_picks_and_puts_back_went_through_no_activation(
    write: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """As where missing inputs are filled in, images are put among tokens, or a matrix is made triangular."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guess, self.up, self.out = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return self.out(F.relu(self.up(write(x, self.guess(x), at))))

    model = Net()
    with ns.watch(model) as scope:
        for _ in range(2):
            model(torch.randn(5, 6), torch.rand(5, 6) > 0.5).sum().backward()
            scope.step()
    assert list(scope.census()) == ["up/relu"]
    assert not scope.report().not_measured


class JoinedMasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x).relu()
        output: Tensor = self.decode(h * ((h > 0.1) * (h < 1)))
        return output


def test_a_product_of_truth_values_is_a_mask_and_no_fault() -> None:
    with ns.watch(model := JoinedMasks()) as scope:
        model(torch.randn(8, 4)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["encode/relu", "encode/masked relu"]


class Switched(nn.Module):
    """One layer is only compared with zero, and switches the units of another one on and off."""

    def __init__(self, *, activated: bool) -> None:
        super().__init__()
        self.encode, self.gate, self.decode = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        output: Tensor = self.decode((h.relu() if self.activated else h) * (self.gate(x) > 0))
        return output


@pytest.mark.filterwarnings("ignore:No activation of Switched")
@pytest.mark.parametrize(("activated", "listed"), [(True, {"gate"}), (False, {"gate", "encode"})])
def test_a_layer_that_only_switches_another_one_is_listed(activated: bool, listed: set[str]) -> None:
    with ns.watch(model := Switched(activated=activated)) as scope:
        model(torch.randn(8, 4)).sum().backward()
        scope.step()
    assert {item.name for item in scope.report().not_measured} == listed
    assert [*scope.census()] == (["encode/relu", "encode/reglu"] if activated else [])


class Auxiliary(nn.Module):
    """A TopK autoencoder whose auxiliary loss selects again, among the latents that were not picked."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(INPUTS, LATENTS), nn.Linear(LATENTS, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.enc(x).relu()
        values, index = latents.topk(3, -1)
        picked = torch.zeros_like(latents).scatter(-1, index, values)
        values, index = latents.masked_fill(picked > 0, -torch.inf).topk(2, -1)
        again = torch.zeros_like(latents).scatter(-1, index, values)
        reconstruction: Tensor = self.dec(picked) + self.dec(again)
        return reconstruction


def test_a_latent_that_an_auxiliary_loss_does_not_select_may_be_alive() -> None:
    model = Auxiliary()
    with torch.no_grad():
        model.enc.bias.copy_(torch.tensor([9.0] * 3 + [3.0] * 3 + [-9.0] * 3))
        model.enc.weight.mul_(0.1)
    with ns.watch(model) as scope:
        for step in range(STEPS):
            model(torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(step))).sum().backward()
            scope.step()
    report, census = scope.report(), scope.census()
    first, second = ((census[name].zero_outputs < ROWS * STEPS).sum() for name in ("enc/topk relu", "enc/topk relu#1"))
    assert (first, second) == (3, 3)
    never = report.silent + report.dead
    assert (report["enc/topk relu"].silent + report["enc/topk relu"].dead, never) == (6, 6)
