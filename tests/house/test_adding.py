"""Adding a thing is a change in one place: a test adds it for its own duration, and sees it work everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.attach import activations, operators
from neuronscope.attach.activations import Activation, ActivationRow
from neuronscope.attach.torch_functions import spellings
from tests.agreement.slow_twin import Twin, Watched, assert_same

ROWS = activations.ROWS


class Squared(nn.Module):
    """An activation class of a package."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.square(x)


class Net(nn.Module):
    """Applies an activation as a function, and as a module if it is given one. One neuron starts with zero weights."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)
        self.act = act
        with torch.no_grad():
            self.first.weight[0] = self.first.bias[0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).square())
        return x if self.act is None else self.act(x)


def train(watcher: Watched | Twin, model: nn.Module) -> None:
    with watcher.attach(model):
        for _ in range(3):
            watcher.backward(model(torch.randn(4, 3)).sum())
            watcher.step()


@pytest.fixture
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one row that adds the activation."""
    package = Squared.__module__.partition(".")[0]
    row = ActivationRow(
        Activation("square", "relu-like"), functions=("square",), packaged={package: (Squared.__name__,)}
    )
    monkeypatch.setattr(activations, "ROWS", (*ROWS, row))


@pytest.mark.usefixtures("_row")
def test_an_added_activation_is_counted_and_the_twin_agrees() -> None:
    watched, twin = Watched(), Twin({None: 1})
    for watcher in (watched, twin):
        torch.manual_seed(0)
        train(watcher, Net())
    assert list(watched.scope.census()) == ["first/square"]
    assert_same(watched.scope.census(), twin.tallies())


@pytest.mark.usefixtures("_row")
def test_an_added_activation_is_judged_and_drawn(tmp_path: Path) -> None:
    watched = Watched()
    train(watched, Net(Squared()))
    report = watched.scope.report()
    assert [(site.name, site.activation) for site in report.layers] == [
        ("first/square", "square"),
        ("second/square", "square"),
    ]
    assert report["first/square"].judgement.dead.tolist() == [True, False, False, False, False]
    report.to_html(tmp_path / "report.html")
    for drawing in (str(report), report.to_markdown(), (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "first/square" in drawing
    assert report["first/square"].kind == "relu-like"


def test_without_its_row_it_is_no_activation() -> None:
    with pytest.warns(ns.NeuronscopeWarning, match="No activation of Net was seen"):
        train(Watched(), Net(Squared()))


class Turned(nn.Module):
    """Puts a function that the flow of units does not know between a layer and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(torch.deg2rad(self.first(x))))


def test_an_added_operator_carries_neurons_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for spelling in spellings("deg2rad", in_place=True):
        monkeypatch.setitem(operators.RULES, spelling, operators.RULES[torch.neg])
    watched = Watched()
    train(watched, Turned())
    assert [(name, tally.neurons) for name, tally in watched.scope.census().items()] == [("first/relu", 5)]
    assert not watched.scope.report().not_measured


def test_behind_an_operator_without_a_rule_nothing_is_counted_and_that_is_said() -> None:
    watched = Watched()
    with pytest.warns(ns.NeuronscopeWarning, match="No activation of Turned was seen"):
        train(watched, Turned())
    assert not watched.scope.census()
    assert [each.name for each in watched.scope.report().not_measured] == ["relu()", "first"]
