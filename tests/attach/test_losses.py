"""Losses use the functions that activations are: no loss adds a neuron, a dead one, or a word on what is not measured.

A loss is computed outside of the forward, from outputs or distances, under a plain watch, in an explicit step and in
Lightning's ``training_step``, or inside the forward. Each loss is zero everywhere, as after a training that went well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import neuronscope as ns
from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.report.report import Report
from tests.agreement.slow_twin import assert_bits, state_of
from tests.callbacks.networks import trainer

ROWS, STEPS, HIDDEN = 64, 10, 12


def hinge(y: Tensor) -> Tensor:
    return F.relu(-1 - y.abs())


def distances(y: Tensor) -> Tensor:
    """As of triplets: one number for each row."""
    return F.relu(y.square().sum(1) - y.square().sum(1).max() - 0.1)


def pairs(y: Tensor) -> Tensor:
    """As a contrastive loss has it: rows against rows."""
    return F.relu(y @ y.T - 1e6)


def adversaries(y: Tensor) -> Tensor:
    return torch.relu(-1e3 + y[:, :1]) + (y[:, :1] - 1e3).relu()


def bounds(y: Tensor) -> Tensor:
    """As a constraint on weights or a budget has it."""
    return y.clamp(min=1e3) - 1e3


def wide(y: Tensor) -> Tensor:
    """Every row with every class of every other row."""
    return F.relu(y[None, :, :] - y[:, None, :] - 1e3)


def probabilities(y: Tensor) -> Tensor:
    return torch.sigmoid(y) * F.relu(y - 1e3)


def softly(y: Tensor) -> Tensor:
    return F.softplus(-1e3 - y[:, 0])


LOSSES = (hinge, distances, pairs, adversaries, bounds, wide, probabilities, softly)


class Net(nn.Module):
    """Of its hidden neurons all fire; the last layer gives the outputs."""

    def __init__(self, loss: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.act, self.out, self.loss = nn.Linear(8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 3), loss

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.act(self.fc(x)))
        return y if self.loss is None else self.loss(y).mean() + 1e-3 * y.square().mean()


def data(step: int) -> Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, loss: Callable[[Tensor], Tensor], scope: ns.Scope | None, *, explicit: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        if scope is not None and explicit:
            scope.open_step()
        y = model(data(step))
        (y if y.dim() == 0 else loss(y).mean() + 1e-3 * y.square().mean()).backward()
        if scope is not None and explicit:
            scope.close_step()
        optimizer.step()
        optimizer.zero_grad()
        if scope is not None:
            scope.step()


def assert_no_neuron_of_a_loss(report: Report) -> None:
    """Check that totals are of the hidden layer alone, and that nothing is said to be dead, unseen or missing."""
    assert (report.neurons, report.dead, report.silent, report.cut_off) == (HIDDEN, 0, 0, 0)
    assert [site.name for site in report.headline_layers] == ["fc/relu"]
    assert [site.name for site in report.layers if not site.output] == ["fc/relu"]
    assert not report.not_measured
    assert not [verdict for verdict in report.verdicts() if verdict.in_headlines]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("where", ["after the forward", "in an explicit step", "inside the forward"])
def test_a_loss_adds_no_neurons(where: str, loss: Callable[[Tensor], Tensor]) -> None:
    inside = loss if where == "inside the forward" else None
    plain, model = Net(inside), Net(inside)
    explicit = where == "in an explicit step"
    train(plain, loss, None, explicit=explicit)
    with ns.watch(model) as scope:
        train(model, loss, scope, explicit=explicit)
    assert_bits(state_of(plain), state_of(model))
    assert_no_neuron_of_a_loss(scope.report())
    if where == "after the forward":
        assert list(scope.census()) == ["fc/relu"]


class Training(LightningModule):
    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.criterion = Net(), loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = self.net(batch[0])
        return self.criterion(y).mean() + 1e-3 * y.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_loss_in_lightnings_training_step_adds_no_neurons(loss: Callable[[Tensor], Tensor], tmp_path: Any) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, on_dead="stop", threshold=1)
    batches = DataLoader(TensorDataset(torch.cat([data(step) for step in range(STEPS)])), batch_size=ROWS)
    runner = trainer(monitor, max_epochs=3, default_root_dir=tmp_path)
    runner.fit(Training(loss), batches)
    assert runner.global_step == 3 * STEPS, "on_dead='stop' must not end a healthy training"
    report = monitor.report()
    assert (report.neurons, report.dead) == (HIDDEN, 0)
    assert [site.name for site in report.headline_layers] == ["net.fc/relu"]
    assert not report.not_measured


class Penalised(nn.Module):
    """A hidden layer whose units a loss looks at, beside the layer that reads them."""

    def __init__(self, penalty: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.act, self.out = nn.Linear(4, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, 1)
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        y = self.act(h)
        return self.out(y).mean() + self.penalty(self, h, y)


@pytest.mark.parametrize(
    ("penalty", "is_loss"),
    [
        (lambda _, h, y: F.relu(h.abs() - 1e4).mean(), True),
        (lambda _, h, y: F.relu(y - 1e4).square().mean(), True),
        (lambda _, h, y: (y.mean(0).abs() - 1e4).clamp(min=0).sum(), True),
        (lambda _, h, y: F.mse_loss(F.relu(h - 1e4), torch.zeros_like(h)), True),
        (lambda net, h, y: net.out(F.relu(h - 1e4)).mean(), False),  # a layer reads it
        (lambda _, h, y: F.relu(h - 1e4).sum(1).mean(), True),
        (lambda _, h, y: F.relu(y - 1e4).square().sum(1).add(1).sqrt().mean(), True),
        (lambda _, h, y: F.relu(h - 1e4).norm(dim=1).clamp(max=9).mean(), True),
        (lambda net, h, y: net.out(h * F.relu(h - 1e4).mean()).mean(), False),  # a scale of what a layer reads
        (lambda net, h, y: net.out(h + F.relu(h - 1e4).sum(1, keepdim=True)).mean(), False),
        (lambda _, h, y: (F.relu(h - 1e4).sum(1) - h.sum(1)).square().mean(), False),  # it may be a prediction
    ],
)
def test_a_penalty_on_a_hidden_layer_kills_none_of_its_neurons(
    penalty: Callable[[nn.Module, Tensor, Tensor], Tensor], is_loss: bool
) -> None:
    model = Penalised(penalty)
    with ns.watch(model) as scope:
        for _ in range(STEPS):
            model(torch.randn(ROWS, 4)).backward()
            scope.step()
    report = scope.report()
    assert (report.neurons, report.dead) == (HIDDEN, 0 if is_loss else HIDDEN)


class ReadByProduct(nn.Module):
    """A linear layer of one unit that is written as a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.read = nn.Linear(4, HIDDEN), nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return (F.relu(self.hidden(x)) * self.read).sum(-1).mean()


def test_neurons_that_a_weight_multiplies_before_a_sum_are_no_outputs() -> None:
    model = ReadByProduct()
    with torch.no_grad():
        model.hidden.bias[2] = -100
    with ns.watch(model) as scope:
        for _ in range(STEPS):
            model(torch.rand(ROWS, 4)).backward()
            scope.step()
    assert scope.report().neurons == HIDDEN
    assert 2 in [each.neuron for each in scope.report().verdicts() if each.label == "dead"]


class ReturnsSums(nn.Module):
    """A number for each row is an output beside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x)
        return self.out(h), F.relu(h - 1e4).sum(1)


def test_a_number_for_each_row_that_the_model_returns_is_no_penalty() -> None:
    model = ReturnsSums()
    with ns.watch(model) as scope:
        for _ in range(STEPS):
            sum(each.mean() for each in model(torch.rand(ROWS, 4))).backward()
            scope.step()
    assert (scope.report().neurons, scope.report().dead) == (HIDDEN, HIDDEN)
