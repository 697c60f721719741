"""Batch norm's running statistics behind an activation, against the steps at which neurons were counted to fire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.checkpoints.diagnosis_inputs import postmortem_facts
from neuronscope.checkpoints.model.batchnorm_evidence import HALF_NORMAL
from neuronscope.checkpoints.model.examine_model import examine_model
from neuronscope.checkpoints.verdict.evidence import Evidence
from neuronscope.demo.digits import load_digits

WIDTH = 64


def found_in(model: nn.Module, example: Tensor | None = None) -> Iterator[Evidence]:
    """What the running statistics say."""
    found = examine_model(model.eval(), example=example).evidence
    return (one for one in found if one.source == "batch norm statistics")


@pytest.mark.parametrize("seed", [0, 1])
def test_silent_neurons_before_a_batch_norm_are_found_by_its_running_statistics(seed: int) -> None:
    """Linear → ReLU → BN twice on the digits, and a learning rate 30 times as high for 20 steps; firing is counted."""
    torch.manual_seed(seed)
    digits = load_digits()
    model = nn.Sequential(
        *(nn.Linear(64, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH)),
        *(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 10)),
    )
    last = {"0/relu": np.zeros(WIDTH), "3/relu": np.zeros(WIDTH)}
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(1, 1001):
        if step == 700:  # these die at a known step
            with torch.no_grad():
                model[0].bias[:8] -= 50
                model[3].bias[8:20] -= 50
        optimizer.param_groups[0]["lr"] = 3e-2 if 300 <= step < 320 else 1e-3
        rows = torch.randint(0, len(digits.train_x), (64,))
        x = first = model[1](model[0](digits.train_x[rows]))
        x = second = model[4](model[3](model[2](x)))
        for name, output in (("0/relu", first), ("3/relu", second)):
            last[name][(output != 0).any(0).numpy()] = step
        optimizer.zero_grad()
        F.cross_entropy(model[6](model[5](x)), digits.train_y[rows]).backward()
        optimizer.step()
    silence = {name: step - at for name, at in last.items()}
    said = {(name, claim): np.full(WIDTH, np.nan) for name in last for claim in ("inferred", "suspected")}
    for one in found_in(model):
        if one.claim == "dead":
            said[one.site, one.basis][one.neurons] = one.numbers
    firm = {name: ~np.isnan(said[name, "inferred"]) for name in last}
    any_basis = {name: firm[name] | ~np.isnan(said[name, "suspected"]) for name in last}
    for name, truth in silence.items():
        assert (truth >= 300).sum() >= 8
        assert any_basis[name][truth >= 60].all()
        assert firm[name][truth >= 250].all()
        assert not firm[name][truth < 45].any()
        assert (any_basis[name] & (truth < 45)).sum() <= 0.05 * WIDTH
        dated = firm[name] & (truth >= 250) & (truth < 400)
        assert np.abs(said[name, "inferred"][dated] - truth[dated]).max() <= 60


def depthwise(inputs: int) -> list[nn.Module]:
    """A pointwise and a depthwise convolution, as in MobileNet."""
    first = nn.Conv2d(inputs, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
    return [*first, nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU()]


@pytest.mark.parametrize("seed", [0, 1])
def test_silent_neurons_before_a_depthwise_convolution_are_found_and_dated(seed: int) -> None:
    """ReLU6 → depthwise → BN twice on the digits, a learning rate 100 times as high for 20 steps; firing is counted."""
    torch.manual_seed(seed)
    digits = load_digits()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.AvgPool2d(2), *depthwise(1), *depthwise(32), nn.Flatten(), nn.Linear(512, 10)
    )
    last = {4: np.zeros(32), 10: np.zeros(32)}
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(1, 501):
        if step in (220, 400):  # these die at a known step
            with torch.no_grad():
                for at in last:
                    model[at - 1].bias[: 4 if step == 220 else 8] -= 20
        optimizer.param_groups[0]["lr"] = 0.1 if 100 <= step < 120 else 1e-3
        rows = torch.randint(0, len(digits.train_x), (32,))
        x = digits.train_x[rows]
        for at, module in enumerate(model):
            x = module(x)
            if at in last:
                last[at][(x != 0).any(0).flatten(1).any(1).numpy()] = step
        optimizer.zero_grad()
        F.cross_entropy(x, digits.train_y[rows]).backward()
        optimizer.step()
    found = [one for one in found_in(model, torch.zeros(2, 64)) if one.claim == "dead"]
    errors: list[float] = []
    for at, fired in last.items():
        silence = 500 - fired
        said = {"inferred": np.zeros(32, dtype=bool), "suspected": np.zeros(32, dtype=bool)}
        for one in found:
            if one.site == f"{at - 1}/relu6":
                said[one.basis][one.neurons] = True
                dated = silence[one.neurons] >= 60
                assert one.since is not None
                errors += (one.since - fired[one.neurons])[dated].tolist()
        # Which neurons die depends on the last bits of the processor's sums, so these are shares.
        assert (silence >= 60).sum() >= 8
        assert (said["inferred"] | said["suspected"])[silence >= 60].mean() >= 0.9
        assert said["inferred"][silence >= 250].mean() >= 0.9
        assert (said["inferred"] & (silence < 45)).sum() <= 1
        assert (said["suspected"] & (silence < 45)).sum() <= 6
    assert np.quantile(np.abs(errors), 0.9) <= 100
    assert np.abs(np.median(errors)) <= 25


def test_the_counter_of_batches_dates_silence_only_if_a_batch_is_a_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3))
    for batch in range(500):
        if batch == 200:
            model[0].bias.data[1] = -100.0
        model(torch.randn(16, 4))
    for step, dates in ((None, True), (500, True), (250, False), (9, False)):
        evidence = examine_model(model.eval(), training_step=step).evidence
        (dead,) = [one for one in evidence if one.source == "batch norm statistics" and one.claim == "dead"]
        assert dead.neurons.tolist() == [1]
        assert (dead.since is not None) == dates
        if dead.since is not None:
            assert abs(int(dead.since[0]) - 200) <= 20


def test_steps_are_computed_in_double_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3)).double()
    model(torch.randn(16, 4, dtype=torch.float64))
    model[2].running_mean = torch.ones(3, dtype=torch.float64)
    model[2].running_var = torch.ones(3, dtype=torch.float64)
    model[2].running_var[1] = 0.9**-100 / HALF_NORMAL * (1 + 1e-10)  # silent for 100 steps and a billionth
    (dead,) = [one for one in found_in(model) if one.claim == "dead"]
    assert (dead.neurons.tolist(), dead.numbers.tolist()) == ([1], [100.0])


def test_a_report_says_that_its_dates_are_estimates(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2))

    torch.manual_seed(0)
    model = make()
    for batch in range(400):
        if batch == 100:
            model[0].bias.data[1] = -100.0
        model(torch.randn(16, 4))
    torch.save(model.state_dict(), tmp_path / "last.pt")
    report = ns.postmortem(tmp_path / "last.pt", model=make, example="2x4")
    text = str(report)
    assert "When they died (estimated by a clock, some too early and some too late): 1 at step" in text
    assert postmortem_facts(report.layers).estimated
    assert "earliest" not in text


@pytest.mark.parametrize(
    "between",
    [nn.Conv2d(6, 6, 3, groups=6, bias=True), nn.Conv2d(6, 6, 3, groups=3, bias=False)],
    ids=["bias", "groups"],
)
def test_a_convolution_that_adds_or_mixes_hides_silence(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), between, nn.BatchNorm2d(6))
    model[3].running_mean.copy_(torch.tensor([0.0, 1e-30, 1.0, 1.0, 1.0, 1.0]))
    model[3].running_var[:2] = 1e-30
    assert list(found_in(model, torch.zeros(1, 1, 5, 5))) == []


def test_a_neuron_that_never_fired_has_a_running_mean_of_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6))
    model[0].bias.data[2] = -100.0
    for _ in range(10):
        model(torch.randn(8, 1, 5, 5))
    (never,) = found_in(model)
    assert (never.claim, never.basis, never.neurons.tolist()) == ("dead", "inferred", [2])


def test_the_running_mean_behind_an_activation_tells_dormancy() -> None:
    """Counted: the mean output of each channel over the same batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout(0.0), nn.BatchNorm2d(6, momentum=None))
    model[0].weight.data[4] *= 1e-3
    model[0].bias.data[4] = 0.0
    batches = [torch.randn(8, 1, 5, 5) for _ in range(10)]
    with torch.no_grad():
        outputs = torch.cat([F.relu(model[0](batch)) for batch in batches])
        for batch in batches:
            model(batch)
    means = outputs.mean((0, 2, 3))
    (dormant,) = found_in(model)
    assert (dormant.claim, dormant.neurons.tolist()) == ("quiet", [4])
    assert dormant.numbers[0] == pytest.approx(float(means[4] / means.mean()), rel=1e-4)


@pytest.mark.parametrize("counted", [0, 5000])
def test_silence_is_not_dated_by_a_norm_that_counted_no_batches(counted: int) -> None:
    """Old files and converted ones hold statistics and a count of zero."""
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6))
    model[2].running_mean.copy_(torch.tensor([1.0, 1.0, 1e-30, 1.0, 1.0, 1.0]))
    model[2].running_var.copy_(torch.tensor([1.0, 1.0, 1e-30, 1.0, 1.0, 1.0]))
    model[2].num_batches_tracked.fill_(counted)
    (silent,) = (one for one in found_in(model) if one.claim == "dead")
    assert (silent.neurons.tolist(), silent.since is None) == ([2], counted == 0)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),  # the statistics of a pre-activation
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.BatchNorm2d(6)),  # a mean of zero is no silence
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),  # statistics that have not begun
    ],
    ids=["before", "tanh", "untrained"],
)
def test_running_statistics_that_show_no_silence_are_not_read(model: nn.Module) -> None:
    if not isinstance(model[1], nn.ReLU):
        model[-1 if isinstance(model[-1], nn.BatchNorm2d) else 1].running_mean.fill_(1e-20)
    assert list(found_in(model, torch.zeros(1, 1, 5, 5))) == []
