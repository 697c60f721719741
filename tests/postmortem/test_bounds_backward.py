"""Bounds that are passed backwards: they prove what intervals cannot, nothing about examples that mix, and no wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.checkpoints.model.bounds.propagate import SiteBounds, propagate_bounds, site_bounds
from neuronscope.checkpoints.model.examine_model import examine_model
from neuronscope.checkpoints.model.trace import trace

BOX = (0.0, 1.0)


class Given(nn.Module):
    """A network whose last pre-activation is given, of 3 inputs."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self._before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self._before(x))


def highest(network: nn.Module, x: Tensor, backwards: bool = True) -> float:
    """The highest pre-activation of the last site by the bounds."""
    graph = trace(network.eval(), (torch.cat([x, x]),))
    bounds = site_bounds(graph, propagate_bounds(graph, BOX, backwards=backwards))
    return float(bounds[graph.sites[-1].name].highest.max())


def half() -> Tensor:
    return torch.full((3,), 0.5)


#: What cancels exactly, so that a bound which sees that is below zero; intervals are above.
CANCEL: dict[str, Callable[[Tensor], Tensor]] = {
    "difference": lambda x: x - x - 0.1,
    "sum": lambda x: x + -x - 0.1,
    "negative": lambda x: x + x.neg() - 0.1,
    "scaled": lambda x: 2 * x - x * 0.5 - x / 0.66 - 0.1,
    "in place": lambda x: (x * 3).sub_(x).sub_(2 * x).sub_(0.1),
    "constant": lambda x: (x - half()) - x + 0.4,
    "turned": lambda x: x.unsqueeze(1).transpose(1, 2).flatten(1) - x.contiguous() - 0.1,
    "parts": lambda x: torch.cat([x[:, :1], x[:, 1:]], 1) - x - 0.1,
    "double": lambda x: x.double() - x - 0.1,
    "relu": lambda x: (y := F.relu(x - 0.5)) - y / 2 - x / 4 - 0.1,
    "mean": lambda x: x.mean(1, keepdim=True) - x.sum(1, keepdim=True) / 3 - 0.1,
    "linear": lambda x: F.linear(x, torch.eye(3)) - x @ torch.eye(3) - 0.1,
    "addmm": lambda x: torch.addmm(half(), x, torch.eye(3)) - x - 0.6,
    "norm": lambda x: F.batch_norm(x, *[half()] * 4) - (x - half()) * (0.5 / 0.50001**0.5) - 0.6,
    "pooling": lambda x: (F.avg_pool1d(x[:, None], 3) - F.adaptive_avg_pool1d(x[:, None], 1)).flatten(1) - 0.1,
}
#: Functions that mix the examples of a batch, or draw numbers: bounds of one batch size say nothing of another.
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "batch mean": lambda x: x - x.mean(0) - 0.9,
    "batch mean, kept": lambda x: x - x.mean(0, keepdim=True) - 0.9,
    "all": lambda x: x - x.mean() - 0.9,
    "turned": lambda x: x - x.flip(0) - 0.9,
    "turned by two": lambda x: x.roll(2, 0) - x - 0.9,
    "by place": lambda x: x * torch.arange(float(len(x)))[:, None] - 0.9,
    "chosen": lambda x: x[(torch.arange(len(x)) + 2) % len(x)] - x - 0.9,
    "merged": lambda x: x - x.view(1, -1)[:, :3] - 0.9,
    "rows": lambda x: x - (torch.full((len(x), len(x)), 1 / len(x)) @ x) - 0.9,
    "rows as columns": lambda x: x - x[0] - 0.9,
    "dropout": lambda x: x - F.dropout(x, 0.5, True) - 0.9,
    "norm of the batch": lambda x: F.batch_norm(x, None, None, training=True) * 0.1 - 0.05,
}


@pytest.mark.parametrize("name", CANCEL)
def test_what_cancels_is_seen(name: str) -> None:
    network = Given(CANCEL[name])
    assert highest(network, torch.zeros(1, 3), backwards=False) > 0
    bound = highest(network, torch.zeros(1, 3))
    assert bound < 0
    x = torch.cat([torch.rand(500, 3), torch.rand(100, 3).round()])
    assert float(CANCEL[name](x).max()) <= bound


@pytest.mark.parametrize("name", MIXED)
def test_examples_that_mix_prove_nothing(name: str) -> None:
    network = Given(MIXED[name])
    assert highest(network, torch.zeros(1, 3)) >= min(highest(network, torch.zeros(1, 3), backwards=False), 0.05)
    found = examine_model(network, example=torch.zeros(2, 3), box=BOX).evidence
    assert not any(one.claim == "dead" for one in found)


def test_a_bound_that_is_not_finite_stays_so() -> None:
    network = Given(lambda x: F.relu(torch.exp(100 * x) - 5) - x)
    assert highest(network, torch.zeros(1, 3)) > 1e30
    graph = trace(network, (torch.zeros(2, 3),))
    bounds = site_bounds(graph, propagate_bounds(graph, None, backwards=True))
    assert bounds["act"].highest.max() == np.inf


def test_a_relu_of_the_input_itself_has_its_interval() -> None:
    graph = trace(nn.Sequential(nn.ReLU(), nn.Linear(3, 3), nn.ReLU()), (torch.zeros(2, 3),))
    bounds = site_bounds(graph, propagate_bounds(graph, (-1.0, 1.0), backwards=True))
    assert any(found.highest.max() == 1.0 for found in bounds.values())


def test_proofs_name_their_method() -> None:
    found = examine_model(Given(CANCEL["relu"]), example=torch.zeros(1, 3), box=BOX).evidence
    (one,) = [one for one in found if one.claim == "dead"]
    assert one.basis == "proved"
    assert one.source == "backward bound"
    assert "linear bounds that are passed backwards" in one.text
    assert (one.numbers < 0).all()


def test_a_box_by_example_is_left_to_intervals() -> None:
    low = torch.tensor([[0.0], [0.5], [0.2]]).expand(3, 3)
    found = examine_model(Given(CANCEL["relu"]), example=torch.zeros(3, 3), box=(low, low + 0.4)).evidence
    assert not any(one.source == "backward bound" for one in found)


def trained(picture: bool, seed: int) -> nn.Module:
    """A network that learned a little, with biases that were then pulled far below zero."""
    torch.manual_seed(seed)
    if picture:
        network = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 1)),
        )
        x = torch.rand(256, 1, 8, 8)
    else:
        widths = (10, 32, 32, 32)
        layers = [layer for pair in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
        network = nn.Sequential(*layers, nn.Linear(32, 1))
        x = torch.rand(256, 10)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.mse_loss(network(x).flatten(), x.flatten(1).sin().sum(1)).backward()
        optimizer.step()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.bias -= module.weight.flatten(1).abs().sum(1) * torch.rand(len(module.bias)) * 0.5
    return network.eval()


@pytest.mark.parametrize("picture", [False, True])
def test_a_hundred_thousand_inputs_contradict_no_proof(picture: bool) -> None:
    network = trained(picture, 0)
    example = torch.zeros(2, 1, 8, 8) if picture else torch.zeros(2, 10)
    graph = trace(network, (example,))
    plain: dict[str, SiteBounds] = site_bounds(graph, propagate_bounds(graph, BOX))
    found = site_bounds(graph, propagate_bounds(graph, BOX, backwards=True))
    more = sum(int((found[name].dead & ~plain[name].dead).sum()) for name in found)
    assert more >= 3
    assert all((plain[name].dead <= found[name].dead).all() for name in found)
    acts = [module for module in network if isinstance(module, nn.ReLU)]
    given: list[Tensor] = []
    for act in acts:
        act.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    for number in range(20):  # 20 × 5000, every other time corners of the box
        given.clear()
        x = torch.rand(5000, *example.shape[1:])
        with torch.no_grad():
            network(x.round() if number % 2 else x)
        for before, site in zip(given, graph.sites, strict=True):
            values = before.double().flatten(2).movedim(1, -1).flatten(0, -2) if before.dim() > 2 else before.double()
            assert bool((values.amax(0) <= torch.from_numpy(found[site.name].highest)).all())
            assert bool((values.amin(0) >= torch.from_numpy(found[site.name].lowest)).all())
