"""What docs/faq.md says holds of the code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns


def network(act: nn.Module | None = None) -> nn.Sequential:
    """Eight neurons with positive weights, which fire on inputs of 0 … 1 unless their bias is far below zero."""
    model = nn.Sequential(nn.Linear(4, 8), act or nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    return model


def hold_below_zero(model: nn.Sequential, *neurons: int) -> None:
    with torch.no_grad():
        model[0].bias[list(neurons)] = -100.0


def train(model: nn.Module, scope: ns.Scope, steps: int = 100) -> None:
    for _ in range(steps):
        model(torch.rand(16, 4)).sum().backward()
        scope.step()


def validate(model: nn.Module, scope: ns.Scope, inputs: Tensor | None = None) -> ns.Report:
    with scope.phase("val"), torch.no_grad():
        model.eval()(torch.rand(400, 4) if inputs is None else inputs)
    return scope.report("val")


def test_born_dead_and_died_are_told_apart_and_born_means_since_watching_began() -> None:
    model = network()
    hold_below_zero(model, 0, 1)
    with ns.watch(model) as scope:
        train(model, scope, 50)
        hold_below_zero(model, 2)
        train(model, scope, 150)
    site = scope.report()["0/relu"]
    assert (site.born_dead, site.died) == (2, 1)
    assert site.history.died_step[:4].tolist() == [-1, -1, 50, -1]
    state = scope.state_dict()
    with ns.watch(model) as late:
        train(model, late)
    assert (late.report().dead, late.report().born_dead) == (3, 3)
    with ns.watch(model) as resumed:
        resumed.load_state_dict(state)
        train(model, resumed)
    assert (resumed.report().dead, resumed.report().born_dead) == (3, 2)


def test_a_neuron_that_fired_only_between_observed_steps_counts_as_born_dead() -> None:
    model = network()
    hold_below_zero(model, 0)
    with ns.watch(model, every_n_steps=20) as scope:
        train(model, scope, 5)
        with torch.no_grad():
            model[0].bias[0] = 0.0
        train(model, scope, 5)
        hold_below_zero(model, 0)
        train(model, scope, 1000)
    assert (scope.report().dead, scope.report().born_dead) == (1, 1)


def test_dead_in_training_and_alive_in_validation_on_other_inputs() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[:4] *= -1
    with ns.watch(model) as scope:
        train(model, scope)
        report = validate(model, scope, torch.rand(400, 4) - 0.5)
    assert (scope.report().dead, report.dead) == (4, 0)


def test_dead_in_training_and_alive_in_validation_by_the_statistics_of_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[1].bias[:4] = -5.0
    with ns.watch(model) as scope:
        train(model, scope)
        with torch.no_grad():
            model[1].running_mean -= 5.0
        report = validate(model, scope)
    assert (scope.report().dead, report.dead) == (4, 0)


def test_dead_in_training_and_alive_in_validation_after_the_window() -> None:
    model = network()
    with ns.watch(model) as scope:
        hold_below_zero(model, *range(8))
        train(model, scope, 100)
        with torch.no_grad():
            model[0].bias.zero_()
        train(model, scope, 50)
        report = validate(model, scope)
        assert (scope.report().dead, report.dead) == (8, 0)
        assert (scope.report().window.first_step, scope.report().window.last_step) == (0, 99)


def test_a_silent_neuron_counts_as_dead_where_no_gradient_is_seen() -> None:
    model = network()
    hold_below_zero(model, 0, 1)
    with ns.watch(model) as scope:
        for _ in range(100):
            hidden = model[0](torch.rand(16, 4))
            (model[2](model[1](hidden)).sum() + hidden.square().sum()).backward()
            scope.step()
        report = validate(model, scope)
    assert (scope.report().dead, scope.report().silent) == (0, 2)
    assert (report.dead, report.silent) == (2, 0)


@pytest.mark.filterwarnings("ignore::neuronscope.NeuronscopeWarning")
def test_nothing_seen_is_nan_and_a_short_pass_is_provisional() -> None:
    model = network()
    with ns.watch(model) as scope:
        assert math.isnan(scope.report("val").dead_percent)
        report = validate(model, scope, torch.rand(20, 4))
    assert report.provisional
    assert (report.examples, report.examples_needed) == (20, 299)


def test_a_gelu_far_below_zero_is_dormant_and_not_dead() -> None:
    model = network(nn.GELU())
    with torch.no_grad():
        model[0].bias.fill_(1.0)
        model[0].weight.mul_(0.1)
        model[0].bias[:2] = -4.0
    report = ns.scan(model, torch.rand(400, 4))
    assert (report.dead, report.dormant) == (0, 2)
    x = torch.linspace(-8, -1, 70_001, requires_grad=True)
    y = F.gelu(x)
    y.sum().backward()
    assert -5.6 < x[y == 0].max() < -5.4  # where its output underflows
    assert x.grad is not None
    assert x.grad[(x > -5.4).nonzero()].abs().min() > 0
    assert (F.silu(x) != 0).all()


def test_one_loud_neuron_makes_all_others_of_its_layer_dormant() -> None:
    model = network(nn.GELU())
    with torch.no_grad():
        model[0].bias.fill_(1.0)
        assert ns.scan(model, torch.rand(400, 4)).dormant == 0
        model[0].bias[0] = 10_000.0
    assert ns.scan(model, torch.rand(400, 4)).dormant == 7
