"""Layers whose units no activation is seen to be applied to: the report lists them, and gives no verdict on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns


class Net(nn.Module):
    """A dead layer behind something written by hand, and a healthy layer with an activation."""

    def __init__(self, by_hand: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 9), nn.Linear(9, 7), nn.Linear(7, 2)
        self.by_hand = by_hand
        nn.init.constant_(self.first.bias, -200.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.softsign(self.second(self.by_hand(self.first(x)))))


def cut(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] = 0
    return h


BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum": lambda h: torch.maximum(torch.zeros_like(h), h),
    "max": lambda h: torch.max(h, h.new_zeros(())),
    "assignment": cut,
    "absolute values": lambda h: (h + h.abs()) / 2,
    "softplus": lambda h: h.exp().log1p(),
    "gelu": lambda h: h / 2 * (1 + torch.erf(h * 0.5**0.5)),
    "gelu with a tanh": lambda h: 0.5 * h * (1 + torch.tanh(0.79788 * (h + 0.044715 * h**3))),
    "mish": lambda h: h * torch.tanh(F.softplus(h)),
    "silu of a clamped value": lambda h: (c := h.clamp(max=7.0)) * torch.sigmoid(1.7 * c),
    "square": lambda h: h * h,
    "an unknown function": torch.special.i0e,
}


@pytest.mark.parametrize("by_hand", BY_HAND.values(), ids=BY_HAND)
def test_a_layer_behind_an_activation_that_is_written_out_is_listed(by_hand: Callable[[Tensor], Tensor]) -> None:
    model = Net(by_hand)
    with ns.watch(model) as scope:
        for _ in range(4):
            model(torch.randn(6, 5)).sum().backward()
            scope.step()
    missing = {item.name: item.reason for item in scope.report().not_measured}
    assert set(missing) == {"first"}
    assert "activations={...}" in missing["first"]
    assert scope.census()["second/softsign"].positions == 24


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda h: h * (h > 0),
    "mask as a number": lambda h: (h > 0).to(h.dtype) * h,
    "where": lambda h: torch.where(h >= 0, h, 0.0),
    "masked_fill": lambda h: h.masked_fill(h.lt(0), 0.0),
}


@pytest.mark.parametrize("by_hand", MASKED.values(), ids=MASKED)
def test_a_layer_from_which_a_mask_selects_is_counted(by_hand: Callable[[Tensor], Tensor]) -> None:
    model = Net(by_hand)
    with ns.watch(model) as scope:
        for _ in range(4):
            model(torch.randn(6, 5)).sum().backward()
            scope.step()
    report = scope.report()
    assert not report.not_measured
    assert (report["first/jumprelu"].neurons, report["first/jumprelu"].dead) == (9, 9)


UNCHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "scale and shift": lambda h: 2 * h / 3 - 1,
    "dropout by hand": lambda h: h * (torch.rand_like(h) > 0.5) * 2,
    "a guard against NaN": lambda h: h.masked_fill(torch.isnan(h), 0.0),
    "a norm without weights": lambda h: F.layer_norm(h, (9,)),
    "a mask of zeros": lambda h: torch.where(torch.arange(9) < 4, h, 0.0),
    "an activation, and then its square": lambda h: torch.relu(h).square(),
    "gates of itself by position": lambda h: h * h.mean(-1, keepdim=True).sigmoid(),
}


@pytest.mark.parametrize("between", UNCHANGED.values(), ids=UNCHANGED)
def test_a_layer_that_another_reads_without_an_activation_is_not_listed(between: Callable[[Tensor], Tensor]) -> None:
    model = Net(between)
    with ns.watch(model) as scope:
        model(torch.randn(6, 5)).sum().backward()
        scope.step()
    assert not scope.report().not_measured


class Slots(nn.Module):
    """Units that data picks, in the order of picking, before an activation."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encode, self.pick, self.decode = nn.Linear(6, 20), pick, nn.LazyLinear(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.decode(self.pick(self.encode(x))))


def watched(model: Slots, before: Callable[[Tensor], Tensor]) -> tuple[ns.Scope, Tensor]:
    """Train for three steps, and return the watch, and how often each unit fired by a second computation."""
    model(torch.randn(2, 6))
    fired = torch.zeros(20, dtype=torch.int64)
    with ns.watch(model) as scope:
        for _ in range(3):
            x = torch.randn(8, 6)
            model(x).square().sum().backward()
            scope.step()
            fired += (before(model.encode(x)) > 0).sum(0)
    return scope, fired


PICKED: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda h: h.topk(4).values.relu(),
    "sort": lambda h: F.relu(torch.sort(h, -1, descending=True)[0][:, :5]),
    "gather": lambda h: F.relu(h.gather(1, h.argsort(1)[:, :3])),
    "an index": lambda h: F.relu(h[torch.arange(len(h))[:, None], h.topk(2).indices]),
}


@pytest.mark.parametrize("pick", PICKED.values(), ids=PICKED)
def test_slots_of_picked_units_are_no_neurons_and_their_layer_is_listed(pick: Callable[[Tensor], Tensor]) -> None:
    model = Slots(pick)
    model(torch.randn(2, 6))
    with ns.watch(model) as scope:
        for _ in range(3):
            model(torch.randn(8, 6)).square().sum().backward()
            scope.step()
    report = scope.report()
    assert (report.neurons, list(scope.census())) == (0, ["decode/tanh"])  # which are outputs
    assert [item.name for item in report.not_measured] == ["encode"]


def test_units_that_are_written_back_to_their_places_are_counted() -> None:
    """A TopK autoencoder whose ReLU comes after the scatter."""

    def keep_largest(h: Tensor) -> Tensor:
        values, index = h.topk(4)
        return F.relu(torch.zeros_like(h).scatter(1, index, values))

    model = Slots(lambda h: F.relu(h - h.topk(4).values[:, -1:]))
    scope, fired = watched(model, lambda h: h - h.topk(4).values[:, -1:])
    tally = scope.census()["encode/relu"]
    assert (24 - tally.zero_outputs).tolist() == fired.tolist()
    model = Slots(keep_largest)
    model(torch.randn(2, 6))
    with ns.watch(model) as scope:
        x = torch.randn(8, 6)
        model(x).square().sum().backward()
        scope.step()
        fired = (keep_largest(model.encode(x)) > 0).sum(0)
    assert list(scope.census()) == ["encode/topk", "encode/relu", "decode/tanh"]
    assert (8 - scope.census()["encode/relu"].zero_outputs).tolist() == fired.tolist()
    assert not scope.report().not_measured


class Mixed(nn.Module):
    """Experts that each row picks by itself."""

    def __init__(self, apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.apply_, self.out = nn.Parameter(torch.randn(3, 5, 4)), apply, nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.out(F.relu(self.apply_(self.w, x, torch.arange(len(x)) % 3))))


MIXED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rows in another order": lambda w, x, pick: torch.bmm(w[pick], x[:, :, None])[pick.argsort(), :, 0],
    "some rows": lambda w, x, pick: torch.bmm(w[pick], x[:, :, None])[1:, :, 0],
    "matrices in another order": lambda w, x, pick: torch.bmm(w[pick].flip(0), x[:, :, None])[..., 0],
    "some matrices": lambda w, x, pick: torch.bmm(w[pick][1:], x[1:, :, None])[..., 0],
    "sorted matrices": lambda w, x, pick: torch.bmm(w[pick].sort(0).values, x[:, :, None])[..., 0],
    "matrices by truth values": lambda w, x, pick: torch.einsum("nhi,bi->bnh", w[pick[:3] > 0], x)[:, 0],
    "a matrix for each row": lambda w, x, pick: torch.bmm(w[0].expand(len(x), 5, 4), x[:, :, None])[..., 0],
}


@pytest.mark.parametrize("apply", MIXED.values(), ids=MIXED)
def test_rows_of_several_experts_are_not_measured_and_said_so(apply: Callable[..., Tensor]) -> None:
    model = Mixed(apply)
    with ns.watch(model) as scope:
        model(torch.randn(6, 4)).sum().backward()
        scope.step()
    assert scope.report().neurons == 0
    (missing,) = scope.report().not_measured
    assert missing.name == "relu()"
    with ns.watch(model, axes={"relu()": 1}) as scope:
        model(torch.randn(6, 4)).sum().backward()
        scope.step()
    tally = next(iter(scope.census().values()))
    assert (tally.neurons, tally.axis_source) == (5, "declared")


class Unreadable(nn.Module):
    """An activation that gives an object."""

    def forward(self, x: Tensor) -> Any:
        return type("State", (), {"spikes": x.relu()})()


class Objects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(4, 6), Unreadable(), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.fc(x)).spikes)


def test_an_output_that_cannot_be_counted_is_listed_and_has_no_gradients() -> None:
    model = Objects()
    with ns.watch(model, activations={Unreadable: "relu-like"}) as scope:
        for _ in range(3):
            model(torch.randn(5, 4)).sum().backward()
            scope.step()
    assert {(tally.positions, tally.gradient_positions) for tally in scope.census().values()} <= {(0, 0)}
    (missing,) = scope.report().not_measured
    assert "cannot be counted" in missing.reason


def mask_of_largest(h: Tensor) -> Tensor:
    return torch.zeros_like(h).scatter_(-1, h.topk(4).indices, 1.0)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "ones that are scattered": mask_of_largest,
    "one-hot rows that are added": lambda h: F.one_hot(h.topk(4).indices, 20).sum(1).to(h.dtype),
    "softmax": lambda h: torch.softmax(h, -1),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_units_times_a_mask_that_was_computed_from_all_of_them_are_still_these_units(
    mask: Callable[[Tensor], Tensor],
) -> None:
    model = Slots(lambda h: F.relu(h * mask(h)))
    scope, fired = watched(model, lambda h: h * mask(h))
    assert list(scope.census()) == ["encode/relu", "decode/tanh"]
    assert (24 - scope.census()["encode/relu"].zero_outputs).tolist() == fired.tolist()
    assert not scope.report().not_measured


def test_a_layer_is_listed_if_a_mask_of_its_largest_units_is_all_that_is_applied_to_it() -> None:
    model = Slots(lambda h: h * mask_of_largest(h))
    model(torch.randn(2, 6))
    with ns.watch(model) as scope:
        model(torch.randn(8, 6)).square().sum().backward()
        scope.step()
    assert [item.name for item in scope.report().not_measured] == ["encode"]
