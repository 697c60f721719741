"""What batch norms say of neurons before and behind them, against what was counted in training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from neuronscope.checkpoints.model.examine_model import examine_model

WIDTH = 16
Fired = dict[str, npt.NDArray[np.float64]]


def said_of(model: nn.Module, example: Tensor) -> dict[tuple[str, str, str], npt.NDArray[np.float64]]:
    """The number behind each claim: by site, claim and basis, float64 ``(N,)``, NaN where nothing is claimed."""
    found: dict[tuple[str, str, str], npt.NDArray[np.float64]] = {}
    for one in examine_model(model.eval(), example=example).evidence:
        if one.source == "batch norm activity":
            numbers = found.setdefault((one.site, one.claim, one.basis), np.full(one.width, np.nan))
            numbers[one.neurons] = one.numbers
    return found


def train(model: nn.Sequential, batches: int, change: Callable[[int], None] = lambda _: None) -> Fired:
    """Run batches in training mode; the share of positions in each batch at which each ReLU's neurons fired."""
    torch.manual_seed(1)
    fired: dict[str, list[Tensor]] = {}
    for number in range(batches):
        change(number)
        x = torch.randn(8, 3, 6, 6)
        with torch.no_grad():
            for at, module in enumerate(model.train()):
                x = module(x)
                if isinstance(module, (nn.ReLU, nn.ReLU6)):
                    fired.setdefault(str(at), []).append((x > 0).double().mean((0, 2, 3)))
    return {name: torch.stack(shares).numpy() for name, shares in fired.items()}


def test_a_neuron_behind_a_positive_shift_fires_in_each_training_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU6())
    model[1].bias.data = torch.linspace(-4, 4, WIDTH)
    fired = train(model, 30)["2"]
    said = said_of(model, torch.zeros(1, 3, 6, 6))
    alive = ~np.isnan(said["1/relu6", "alive", "inferred"])
    assert alive.tolist() == (model[1].bias > 0).tolist()
    assert (fired[:, alive] > 0).all()
    assert set(said) == {("1/relu6", "alive", "inferred")}


@pytest.mark.parametrize(("pool", "covers"), [(2, True), ((3, 2), True), (4, False)], ids=str)
def test_a_batch_norm_before_a_max_pool_tells_of_the_activation_behind_it(pool, covers) -> None:
    """Shares that fire are at most what is said; a pool that leaves a border out proves no life."""
    torch.manual_seed(0)
    kernel, stride = pool if isinstance(pool, tuple) else (pool, pool)
    between = nn.MaxPool2d(kernel, stride, padding=int(kernel == 3))
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), between, nn.ReLU())
    model[1].bias.data = torch.linspace(-30, 4, WIDTH)
    fired = train(model, 30)["3"]
    found = examine_model(model.eval(), example=torch.zeros(1, 3, 6, 6)).evidence
    assert {one.site for one in found} == {"1/relu"}
    said = {one.claim: one for one in found if one.source.startswith("batch norm")}
    assert set(said) == ({"quiet", "dead", "alive"} if covers else {"quiet", "dead"})
    shares = said["quiet"].numbers
    assert (fired[:, said["quiet"].neurons].mean(0) <= shares).all()
    assert (shares <= 0.1).all()
    assert said["dead"].basis == "suspected"
    assert said["dead"].neurons.tolist() == np.flatnonzero(model[1].bias.detach().numpy() <= -4).tolist()
    if covers:
        assert said["alive"].neurons.tolist() == np.flatnonzero(model[1].bias.detach().numpy() > 0).tolist()
        assert (fired[:, said["alive"].neurons] > 0).all()


def test_nothing_is_said_of_an_activation_that_is_zero_above_a_positive_shift() -> None:
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Threshold(0.5, 0.0))
    model[1].bias.data.fill_(0.25)
    train(model, 3)
    assert not said_of(model, torch.zeros(1, 3, 6, 6))


def test_a_constant_channel_with_a_shift_below_zero_is_dead_behind_its_norm() -> None:
    """Channels whose input falls silent at known steps: 400, 200 and 100 batches before the end; the rest live."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        *(nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()),
    )
    model[4].bias.data[::2] = -0.1
    model[4].bias.data[1::2] = 0.1

    def silence(number: int) -> None:
        for at, channels in ((100, slice(0, 4)), (300, slice(4, 6)), (400, slice(6, 8))):
            if number == at:
                model[1].bias.data[channels] = -50.0

    fired = train(model, 500, silence)
    said = said_of(model, torch.zeros(1, 3, 6, 6))
    last = 499 - np.array([np.flatnonzero(one).max(initial=-1) for one in fired["2"].T])
    assert last.tolist() == [400] * 4 + [200] * 2 + [100] * 2 + [0] * 8
    dead, suspected = (said["4/relu", "dead", basis] for basis in ("inferred", "suspected"))
    assert np.flatnonzero(~np.isnan(dead)).tolist() == [0, 2]
    assert np.flatnonzero(~np.isnan(suspected)).tolist() == [4]
    assert np.abs(dead[[0, 2]] - 400).max() < 60
    assert (fired["5"][100:, [0, 2]] == 0).all()
    assert (fired["5"][300:, 4] == 0).all()
    # Those with a positive shift fire all the time, and what the depthwise convolution reads varies or does not.
    assert np.flatnonzero(~np.isnan(said["4/relu", "alive", "inferred"])).tolist() == list(range(1, WIDTH, 2))
    assert np.flatnonzero(~np.isnan(said["1/relu", "alive", "inferred"])).tolist() == list(range(8, WIDTH))


def test_nothing_is_compared_where_a_whole_layer_is_constant() -> None:
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU())
    model[1].bias.data.fill_(-0.1)
    model[1].running_mean.fill_(0.5)
    model[1].running_var.fill_(1e-40)
    assert not said_of(model, torch.zeros(1, 3, 6, 6))


@pytest.mark.parametrize(("momentum", "basis"), [(0.1, "inferred"), (0.0, "suspected"), (None, "suspected")])
def test_a_neuron_before_a_norm_fires_at_least_as_often_as_is_said(momentum: float | None, basis: str) -> None:
    """A momentum of 0 keeps what others have put there, and without one batch counts as much as another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.BatchNorm2d(WIDTH, momentum=momentum or None))
    model[0].bias.data = torch.linspace(-1.5, 1, WIDTH)
    fired = train(model, 100)["1"].mean(0)
    model[2].momentum = momentum
    said = said_of(model, torch.zeros(1, 3, 6, 6))
    assert set(said) == {("0/relu", "alive", basis)}
    share = said["0/relu", "alive", basis]
    assert (~np.isnan(share)).sum() >= WIDTH - 2
    known = ~np.isnan(share)
    assert (share[known] <= 1.1 * fired[known]).all()
    assert (share[known] >= 0.1 * fired[known]).all()


def test_a_neuron_before_a_norm_that_fell_silent_is_not_called_alive() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.BatchNorm2d(WIDTH))

    def silence(number: int) -> None:
        if number == 100:
            model[0].bias.data[:5] = -50.0

    train(model, 200, silence)
    share = said_of(model, torch.zeros(1, 3, 6, 6))["0/relu", "alive", "inferred"]
    assert np.flatnonzero(np.isnan(share)).tolist() == list(range(5))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH, affine=False), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.BatchNorm2d(WIDTH)),  # statistics that have not begun
        nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.Tanh(), nn.BatchNorm2d(WIDTH)),
        nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Tanh()),
    ],
    ids=["no shift", "untrained", "tanh before", "tanh behind"],
)
def test_where_nothing_follows_nothing_is_said(model: nn.Sequential) -> None:
    if not isinstance(model[1], nn.ReLU):
        train(model, 20)
    assert not said_of(model, torch.zeros(1, 3, 6, 6))


def test_a_layer_of_a_single_unit_may_have_a_weight_without_rows() -> None:
    class OneUnit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.ones(4)), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(nn.functional.linear(x, self.weight)))

    model = OneUnit()
    nn.init.ones_(model.norm.bias)
    assert {key[:2] for key in said_of(model, torch.rand(2, 3, 4))} == {("norm/relu", "alive")}
