"""Healthy trainings that ``on_dead="stop"`` must not stop: metric learning, a GAN, shared heads, actor and critic.

In each, something is zero all the time that is no neuron, or a neuron is silent in one call of its layer and fires in
another. Every network is built so that all its neurons fire, and learns too slowly to change that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neuronscope.callbacks import DeadNeuronMonitor
from tests.callbacks.networks import trainer

ROWS, BATCHES = 64, 20
RATE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def layer(*rows: Sequence[float], bias: Sequence[float] | None = None) -> nn.Linear:
    """A linear layer with these weights, one row for each neuron."""
    linear = nn.Linear(len(rows[0]), len(rows))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(rows))
        linear.bias.copy_(torch.zeros(len(rows)) if bias is None else torch.tensor(bias))
    return linear


class Slow(LightningModule):
    """Learns slowly, with plain gradient descent."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Triplets(Slow):
    """An encoder whose triplets are far apart, so that the hinge of the loss is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(layer([1.0], [-1.0]), nn.ReLU(), layer([1.0, 0.0], [0.0, 1.0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        anchor, positive, negative = (self.encoder(x) for x in batch)
        near, far = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
        return F.relu(near - far + 0.1).mean() + 1e-3 * anchor.square().mean()


class Adversaries(Slow):
    """A GAN: each hidden neuron of the discriminator fires on real or on generated data, and the hinges are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(layer([1.0], [-1.0]), nn.ReLU(), layer([-1.0, -1.0], bias=[-5.0]))
        self.discriminator = nn.Sequential(
            layer([1.0], [2.0], [-1.0], [-2.0]), nn.ReLU(), layer([1.0, 1.0, -1.0, -1.0])
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (real,) = batch
        judge, maker = self.optimizers()
        fake = self.generator(torch.randn_like(real))
        judge.zero_grad()
        hinges = F.relu(1.0 - self.discriminator(real)), F.relu(1.0 + self.discriminator(fake.detach()))
        self.manual_backward(sum(hinge.mean() for hinge in hinges))
        judge.step()
        maker.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        maker.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=RATE) for part in (self.discriminator, self.generator)]


class Detector(Slow):
    """Heads that are shared by three levels of a pyramid: each of their neurons fires on some levels only."""

    def __init__(self) -> None:
        super().__init__()
        self.laterals = nn.ModuleList([nn.Conv2d(1, 1, 1, bias=False) for _ in range(3)])
        self.tower = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            for lateral, scale in zip(self.laterals, (1.0, -1.0, 10.0)):
                lateral.weight.fill_(scale)
            self.tower[0].weight.copy_(torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1))
            self.tower[0].bias.copy_(torch.tensor([0.0, 0.0, -5.0]))
            self.boxes.bias.fill_(-100.0)  # boxes without a width

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (images,) = batch
        levels = [lateral(F.avg_pool2d(images, 2**n)) for n, lateral in enumerate(self.laterals)]
        losses = []
        for level in levels:
            features = self.tower(level)
            scores, widths = torch.sigmoid(self.classes(features)), F.relu(self.boxes(features))
            overlap = F.relu(torch.minimum(widths[:, 0], widths[:, 1]) - torch.maximum(widths[:, 2], widths[:, 3]))
            losses.append(scores.square().mean() + (1.0 - overlap).mean())
        return torch.stack(losses).sum()


class ActorCritic(Slow):
    """Collects its data without gradients, where half of the neurons never fire, and learns from more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.torso = nn.Sequential(layer([1.0], [2.0], [-1.0], [-2.0]), nn.ReLU())
        self.policy, self.value = nn.Linear(4, 2), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (start,) = batch
        seen, returns, state = [], [], start
        with torch.no_grad():
            for _ in range(3):
                features = self.torso(state)
                returns.append(self.value(features) + 100.0)
                seen.append(state)
                state = state + 0.1 * torch.softmax(self.policy(features), -1)[:, :1]
        states, wanted = torch.cat([*seen, *(-state for state in seen)]), torch.cat([*returns, *returns])
        features = self.torso(states)
        value = self.value(features)
        above = F.relu(value - wanted)  # never
        return (wanted - value).square().mean() + above.mean() - self.policy(features).log_softmax(-1).mean()


def far_apart() -> list[Tensor]:
    x = torch.randn(ROWS * BATCHES, 1)
    return [x, x, -x - x.sign()]


CASES: dict[str, tuple[type[Slow], Any, dict[str, int]]] = {
    "metric learning": (Triplets, far_apart, {"encoder.0": 2}),
    "GAN": (Adversaries, lambda: [5.0 + torch.rand(ROWS * BATCHES, 1)], {"generator.0": 2, "discriminator.0": 4}),
    "detection": (Detector, lambda: [1.0 + torch.rand(ROWS * BATCHES, 1, 4, 4)], {"tower.0": 3}),
    "reinforcement learning": (ActorCritic, lambda: [1.0 + torch.rand(ROWS * BATCHES, 1)], {"torso.0": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_healthy_training_is_not_stopped(case: str) -> None:
    kind, data, hidden = CASES[case]
    torch.manual_seed(0)
    module = kind()
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=5, on_dead="stop", threshold=10)
    loader = DataLoader(TensorDataset(*data()), batch_size=ROWS)
    run = trainer(monitor, max_epochs=1)
    run.fit(module, loader)
    assert run.fit_loop.epoch_progress.current.completed == 1
    assert run.fit_loop.epoch_loop.total_batch_idx + 1 == BATCHES
    assert monitor.stop_reason is None
    report = monitor.report()
    assert not report.provisional
    assert report.dead == 0
    headlines = {each.name.partition("/")[0]: each.neurons for each in report.layers if not each.output}
    assert {name: count for name, count in headlines.items() if name in hidden} == hidden
    assert report.observed_neurons == sum(headlines.values())
