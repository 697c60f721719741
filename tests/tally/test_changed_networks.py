"""Counts that one network saved, loaded into another: what the other one does not have is left out, and named."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.checkpoints.file.monitor_record import recorded_report

ROWS, WINDOW, STEPS = 10, 2, 4
POLICY = ns.Policy(max_rate=0.2)  # sure from 14 examples on: every window closes


def net(names: tuple[str, str, str] = ("first", "act", "last"), width: int = 6, act: Any = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(3, width), act(), nn.Linear(width, 2))
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))


class Branches(nn.Module):
    """Layers of which a forward takes some; its activations are functions."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functions = functions
        self.first, self.last, self.gate = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor, which: int = 0) -> Tensor:
        gate = F.softplus(F.linear(x, self.gate)) if which == 2 else 1.0
        return self.last(self.functions[which % 2](self.first(x)) * gate)


def train(model: nn.Module, scope: ns.Scope, steps: int, *which: int) -> None:
    for _ in range(steps):
        model(torch.randn(ROWS, 3), *which).sum().backward()
        scope.step()


def saved(model: nn.Module, *whichs: int) -> dict[str, Any]:
    """Return the state after some closed windows and an open one, and a validation."""
    with ns.watch(model, window_steps=WINDOW, policy=POLICY) as scope:
        for which in whichs or ((),):
            train(model, scope, STEPS + 1, *([which] if whichs else []))
        with scope.phase("val"):
            model(torch.randn(ROWS, 3))
        return scope.state_dict()


def resumed(state: dict[str, Any], model: nn.Module) -> ns.Scope:
    scope = ns.watch(model, window_steps=WINDOW, policy=POLICY)
    scope.load_state_dict(state)
    return scope


CHANGES = {
    "another name": (
        net(("features", "act", "last")),
        "The saved counts of first/relu are left out: the network has no such layer now.",
    ),
    "another name and width": (
        net(("features", "act", "last"), width=9),
        "The saved counts of first/relu are left out: the network has no such layer now.",
    ),
    "another activation": (
        net(act=nn.GELU),
        "The saved counts of first/relu are left out: another activation follows the layer now.",
    ),
    "another width": (
        net(width=9),
        "The counts of first/relu began anew: it had 6 neurons when they were saved, now 9.",
    ),
}


@pytest.mark.parametrize(("model", "words"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("steps", [1, STEPS], ids=["one step", "windows"])
def test_what_the_network_has_no_more_is_in_no_total_and_named(model: nn.Module, words: str, steps: int) -> None:
    scope = resumed(saved(net()), model)
    train(model, scope, steps)
    with scope.phase("val"):
        model(torch.randn(ROWS, 3))
    for phase in ("train", "val"):
        report, (tally,) = scope.report(phase), scope.census(phase).values()
        (layer,) = report.layers
        assert report.neurons == scope.census(phase).neurons == tally.neurons == model[0].out_features
        assert tally.examples == ROWS * (steps if phase == "train" else 1)
        assert layer.zero_output_fraction.shape == layer.last_active_step.shape == (tally.neurons,)
        assert words in report.notes
    again = resumed(scope.state_dict(), model)
    assert list(again.census()) == list(scope.census())
    assert not any("saved" in note for note in again.report().notes)


def test_a_renamed_layer_is_left_out_before_anything_runs() -> None:
    scope = resumed(saved(net()), net(("features", "act", "last")))
    report = scope.report()
    assert (report.neurons, len(report.layers), len(scope.census())) == (0, 0, 0)
    assert any("first/relu are left out" in note for note in report.notes)
    scope.detach()


def test_an_unchanged_network_continues_before_anything_runs() -> None:
    scope = resumed(state := saved(net()), net())
    assert scope.report().neurons == 6
    assert scope.census()["first/relu"].examples == (STEPS + 1) * ROWS
    assert scope.state_dict()["phases"]["train"]["closed"]["tallies"].keys() == {"first/relu"}
    assert scope.report().notes == resumed(state, net()).report().notes
    scope.detach()


def test_a_branch_that_does_not_run_for_a_while_stays() -> None:
    def model() -> nn.Module:
        return Branches(F.relu, F.relu)

    scope = resumed(saved(network := model(), 0, 2), network := model())
    train(network, scope, STEPS, 0)
    assert {"first/relu", "gate/softplus"} < set(scope.census())  # and their gated product
    assert scope.census()["gate/softplus"].examples == (STEPS + 1) * ROWS
    assert not any("saved" in note for note in scope.report().notes)


def test_an_activation_that_runs_in_some_forwards_only_stays() -> None:
    scope = resumed(saved(Branches(F.relu, F.gelu), 0, 1), model := Branches(F.relu, F.gelu))
    train(model, scope, 1, 0)
    assert list(scope.census()) == ["first/relu", "first/gelu"]
    assert not any("saved" in note for note in scope.report().notes)


def test_an_activation_that_was_taken_for_replaced_is_there_again_when_it_runs() -> None:
    """The other one is new, and ran first."""
    scope = resumed(saved(Branches(F.relu, F.gelu), 1), model := Branches(F.relu, F.gelu))
    before = scope.census()["first/gelu"].examples
    train(model, scope, 1, 0)
    assert list(scope.census()) == ["first/relu"]
    train(model, scope, 1, 1)
    assert scope.census()["first/gelu"].examples == before + ROWS == (STEPS + 2) * ROWS
    assert not any("saved" in note for note in scope.report().notes)


def test_loading_into_a_scope_that_counts_keeps_the_width_of_its_network() -> None:
    scope = ns.watch(model := net(width=9), window_steps=WINDOW, policy=POLICY)
    train(model, scope, 1)
    scope.load_state_dict(saved(net()))
    train(model, scope, STEPS)
    assert scope.census()["first/relu"].examples == STEPS * ROWS
    assert scope.report().neurons == 9
    assert np.nanmax(scope.census()["first/relu"].zero_output_fraction) <= 1


def test_the_record_in_a_checkpoint_is_read_without_its_network() -> None:
    report = recorded_report(saved(net()))
    assert report is not None
    assert (report.neurons, report.layers[0].name) == (6, "first/relu")
