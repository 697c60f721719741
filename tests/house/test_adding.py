"""Adding a thing is a change in one place: a test adds it for its own duration, and sees it work everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.attach import activations
from neuronscope.attach.activations import Activation, ActivationRow
from tests.core.slow_twin import Twin, Watched, assert_same

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
    assert list(watched.scope.census()) == ["square()"]
    assert_same(watched.scope.census(), twin.tallies())


@pytest.mark.usefixtures("_row")
def test_an_added_activation_is_judged_and_drawn(tmp_path: Path) -> None:
    watched = Watched()
    train(watched, Net(Squared()))
    report = watched.scope.report()
    assert [(site.name, site.activation) for site in report.layers] == [("square()", "square"), ("act", "square")]
    assert report["square()"].judgement.dead.tolist() == [True, False, False, False, False]
    report.to_html(tmp_path / "report.html")
    for drawing in (str(report), report.to_markdown(), (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "square()" in drawing
    assert report["square()"].kind == "relu-like"


def test_without_its_row_it_is_no_activation() -> None:
    with pytest.warns(ns.NeuronscopeWarning, match="No activation of Net was seen"):
        train(Watched(), Net(Squared()))
