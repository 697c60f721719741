"""Every row of the table "What breaks the peers": the case that the best-known tools get wrong, and the true answer.

Where a neuron is made dead by hand its bias is −100 (or its weights zero), so that the truth is known without counting.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from tests.agreement.slow_twin import assert_bits, state_of

BURIED = [3, 17, 42]  # the units that are killed by hand


def bury(layer: nn.Linear | nn.Conv1d | nn.Conv2d, units: list[int], bias: float = -100.0) -> None:
    with torch.no_grad():
        layer.bias[units] = bias


def dead(tally: ns.Tally) -> list[int]:
    zero = tally.zero_outputs == tally.positions
    if tally.gradient_positions:
        zero &= tally.zero_gradients == tally.gradient_positions
    return np.flatnonzero(zero).tolist()


def train(model: nn.Module, scope: ns.Scope, *shape: int, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(torch.randn(*shape)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scope.step()


def test_three_dead_units_of_64_are_found_and_none_in_the_second_layer():
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    bury(model[0], BURIED)
    bury(model[2], list(range(64)), bias=1.0)  # the second layer is well above zero
    with ns.watch(model) as scope:
        train(model, scope, 256, 10)
    census = scope.census()
    assert dead(census["0/relu"]) == BURIED
    assert dead(census["2/relu"]) == []
    assert census["0/relu"].positions == 5 * 256
    assert scope.report().dead == 3


class Block(nn.Module):
    """A ResNet block: one in-place ReLU module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))))


def test_an_in_place_relu_used_twice_in_a_block_is_two_sites():
    model = nn.Sequential(Block())
    bury(model[0].conv1, [2, 11])
    bury(model[0].conv2, list(range(16)), bias=3.0)
    with ns.watch(model) as scope:
        train(model, scope, 4, 3, 8, 8)
    census = scope.census()
    assert list(census) == ["0.conv1/relu", "0.conv2/relu"]
    assert dead(census["0.conv1/relu"]) == [2, 11]  # 2 of 16, then 0 of 16
    assert dead(census["0.conv2/relu"]) == []
    assert census["0.conv1/relu"].neurons == census["0.conv2/relu"].neurons == 16
    assert census["0.conv1/relu"].positions == 5 * 4 * 8 * 8


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 64)
        self.fc2 = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def test_dead_units_of_a_functional_relu_are_found():
    model = Functional()
    bury(model.fc1, BURIED)
    with ns.watch(model) as scope:
        train(model, scope, 256, 10)
    assert list(scope.census()) == ["fc1/relu"]
    assert dead(scope.census()["fc1/relu"]) == BURIED


def test_the_neurons_of_a_relu_on_tokens_are_its_features_and_not_its_tokens():
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    bury(model[0], BURIED)
    with ns.watch(model) as scope:
        train(model, scope, 8, 12, 10)  # (B, T, D): 12 tokens are not 12 units
    tally = scope.census()["0/relu"]
    assert (tally.neurons, tally.axis) == (64, 2)
    assert dead(tally) == BURIED
    assert tally.positions == 5 * 8 * 12
    assert tally.examples == 5 * 8


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(10, 32)
        self.up = nn.Linear(10, 32)
        self.act = nn.SiLU()
        self.down = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_dead_units_of_a_swiglu_product_are_found():
    model = SwiGLU()
    bury(model.gate, [1, 2, 3], bias=-1000.0)  # silu(-1000) is -0.0: exp(1000) is infinite
    with torch.no_grad():
        model.up.weight[[7, 8]] = 0
        model.up.bias[[7, 8]] = 0
    model.requires_grad_(False)
    model.gate.requires_grad_(True)
    with ns.watch(model) as scope:
        model(torch.randn(64, 4, 10)).square().mean().backward()
        scope.step()
    census = scope.census()
    assert list(census) == ["gate/silu", "gate/swiglu"]
    assert dead(census["gate/silu"]) == [1, 2, 3]
    assert dead(census["gate/swiglu"]) == [1, 2, 3, 7, 8]  # 3 by their gate, 2 by what it gates


def test_two_dead_units_and_one_dormant_unit_of_a_gelu_are_found():
    model = nn.Sequential(nn.Linear(10, 64), nn.GELU(), nn.Linear(64, 1))
    bury(model[0], [5, 6])  # gelu(-100) underflows to an exact zero
    with torch.no_grad():
        model[0].weight[9] = 0
        model[0].bias[9] = -4.0  # gelu(-4) = -4 * Phi(-4) = -4 * 3.17e-5 = -1.27e-4: small, and never zero
    model[2].requires_grad_(False)
    with ns.watch(model) as scope:
        model(torch.randn(1000, 10)).square().mean().backward()
        scope.step()
    site = scope.report()["0/gelu"]
    assert np.flatnonzero(site.judgement.dead).tolist() == [5, 6]
    assert np.flatnonzero(site.judgement.dormant).tolist() == [9]


class Gates(nn.Module):
    """Eight units, each of which fires exactly where its input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        self.relu = nn.ReLU()
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


def test_counts_are_right_with_accumulation_and_evaluation_passes():
    """Units 0, 1, 2 never fire in training; 2 fires in evaluation; 3 fires in 1 of 20 micro-batches."""
    model = Gates()
    model.requires_grad_(False)
    head = nn.Linear(8, 1)
    with ns.watch(model) as scope:
        for micro in range(20):
            x = torch.ones(4, 8)
            x[:, :3] = -1
            x[:, 3] = 1.0 if micro == 13 else -1.0
            head(model(x)).sum().backward()
            if micro % 4 == 3:  # four micro-batches a step
                scope.step()
                with scope.phase("val"), torch.no_grad():
                    y = -torch.ones(4, 8)
                    y[:, 2] = 1
                    model(y)
    train_census, val_census = scope.census("train"), scope.census("val")
    assert dead(train_census["fc/relu"]) == [0, 1, 2]
    assert train_census["fc/relu"].positions == 20 * 4
    assert train_census["fc/relu"].zero_outputs.tolist() == [80, 80, 80, 76, 0, 0, 0, 0]  # 19 * 4 = 76
    assert train_census["fc/relu"].last_active_step.tolist() == [
        -1,
        -1,
        -1,
        3,
        4,
        4,
        4,
        4,
    ]  # micro 13 is in step 13 // 4
    assert dead(val_census["fc/relu"]) == [0, 1, 3, 4, 5, 6, 7]
    assert val_census["fc/relu"].positions == 5 * 4
    assert val_census["fc/relu"].gradient_positions == 0


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(10, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_activation_under_checkpointing_is_counted_once(reentrant):
    model = Checkpointed(reentrant)
    bury(model.block[0], BURIED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with ns.watch(model) as scope:
        for _ in range(20):
            model(torch.randn(16, 10).requires_grad_()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
    tally = scope.census()["block.0/relu"]
    assert dead(tally) == BURIED
    assert tally.positions == tally.gradient_positions == 20 * 16  # 20 observations, not 40
    assert scope.census().steps == 20


@pytest.mark.parametrize("batch", [1, 4, 8, 32])
def test_a_healthy_net_has_no_dead_neuron_at_any_batch_size(batch):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    x = torch.randn(512, 10)
    with ns.watch(model) as scope:
        for part in x.split(batch):
            model(part).square().mean().backward()
            scope.step()
    tally = scope.census()["0/relu"]
    # Each unit fires for about half of 512 examples, whatever the batch: the chance that one never does is 2 ** -512.
    assert dead(tally) == []
    assert scope.report().dead == 0
    assert tally.positions == tally.examples == 512
    assert 0.3 < tally.zero_output_fraction.mean() < 0.7


def test_a_net_that_diverged_is_broken_and_not_healthy():
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with ns.watch(model) as scope:
        model(torch.randn(32, 10)).sum().backward()
        scope.step()
    report = scope.report()
    assert scope.census()["0/relu"].not_finite == 32  # unit 0 for each of 32 examples
    assert scope.census()["2/relu"].not_finite == 64 * 32  # and everything behind it
    assert report.not_finite == 32 + 64 * 32
    assert any("NaN" in note for note in report.notes)
    assert report["2/relu"].judgement.not_finite.all()
    assert "not finite" in {verdict.label for verdict in report.verdicts()}


def test_two_ranks_that_fire_different_units_have_no_dead_unit():
    """Rank 0 fires 0–2 of 8 and rank 1 fires 3–5: 2 are dead, where averaged percentages would say 5 or 3."""
    censuses = []
    for fires in ([0, 1, 2], [3, 4, 5]):
        model = Gates()
        x = -torch.ones(16, 8)
        x[:, fires] = 1
        with ns.watch(model) as scope:
            model(x).sum().backward()
            scope.step()
        censuses.append(scope.census())
    assert dead(censuses[0].merge(censuses[1])["fc/relu"]) == [6, 7]


def test_a_deep_copy_runs_uncounted_and_a_watched_model_is_saved():
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    bury(model[0], BURIED)
    with ns.watch(model) as scope:
        ema = copy.deepcopy(model)
        train(model, scope, 32, 10)
        before = scope.census()["0/relu"]
        for _ in range(3):
            ema(torch.randn(32, 10)).sum().backward()
        after = scope.census()["0/relu"]
        file = io.BytesIO()
        torch.save(model, file)
    assert before.positions == after.positions == 5 * 32
    np.testing.assert_array_equal(before.zero_gradients, after.zero_gradients)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_bits(state_of(loaded), {k: v for k, v in state_of(model).items() if not k.endswith(".grad")})
    loaded(torch.randn(2, 10)).sum().backward()
    assert scope.census()["0/relu"].positions == 5 * 32
