"""One watched run: real deaths, counted as a slow recount counts them, and nothing changed by the watching."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.demo import training
from neuronscope.demo.digits import Digits
from neuronscope.demo.recipe import VARIANTS, build_network
from neuronscope.demo.recount import gradient_reach, product_of_layers, recount_dead
from neuronscope.demo.results import Run
from neuronscope.demo.training import train
from neuronscope.report.report import Report

from .conftest import MINIATURE, Shown

VARIANT = {variant.name: variant for variant in VARIANTS}


def loss_of(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


def test_the_spike_kills_relu_neurons_and_no_gelu_or_silu_neurons(shown: Shown) -> None:
    relu, gelu, silu = (shown.result.of(name) for name in ("ReLU", "GELU", "SiLU"))
    for run in relu:
        before, after = (sum(run.scans[epoch].dead) for epoch in shown.result.around_spike)
        assert after >= before + 10
        assert sum(run.end.dead) >= 20  # of 4 x 64
    # GELU's neurons die now and then where they underflow: one seed of ten in the full recipe, two neurons.
    assert all(sum(run.end.dead) <= 3 for run in (*gelu, *silu))
    assert all(run.accuracy > 0.5 for run in (*relu, *gelu, *silu))  # guessing is right in 0.1


def test_births_deaths_and_revivals_add_up(shown: Shown) -> None:
    for run in shown.result.runs:
        assert sum(run.end.dead) == sum(run.start.dead) - run.revived + run.died
        assert [scan.step for scan in run.scans] == [45 * epoch for epoch in range(6)]  # 1437 images in batches of 32
        assert [epoch.step for epoch in run.epochs] == [scan.step for scan in run.scans[1:]]


def test_neurons_that_are_born_dead_are_seen_before_the_first_step(shown: Shown) -> None:
    relu = shown.result.of("ReLU")
    assert all(sum(run.start.dead) > 0 for run in relu)  # He-initialised ReLU nets are born with some
    assert all(sum(run.start.dead) == 0 for run in shown.result.of("GELU"))


def test_the_counts_of_every_demo_run_agree_with_a_recount(shown: Shown) -> None:
    assert all(run.recount_agrees for run in shown.result.runs)


def test_the_recount_of_a_demo_run_notices_a_wrong_count(digits: Digits) -> None:
    # Where the recount sees a neuron silenced after the scan, it must say so: otherwise the check above shows nothing.
    network = build_network(VARIANT["ReLU"], MINIATURE, seed=0)
    whole = [(digits.train_x, digits.train_y)]
    scanned = [site.judgement.dead.tolist() for site in ns.scan(network, whole, loss=loss_of).layers]
    assert recount_dead(network, *whole[0]) == scanned
    alive = scanned[1].index(False)
    with torch.no_grad():
        network.linear2.bias[alive] = -1e4
    assert recount_dead(network, *whole[0])[1][alive]
    assert recount_dead(network, *whole[0]) == [
        site.judgement.dead.tolist() for site in ns.scan(network, whole, loss=loss_of).layers
    ]


@pytest.mark.parametrize("name", ["ReLU", "ReLU-BatchNorm"])
def test_watching_a_demo_run_does_not_change_it(name: str, digits: Digits) -> None:
    """The same run as a plain loop, without any of the library, ends with the same accuracy and the same losses."""
    run, _ = train(VARIANT[name], 1, digits, MINIATURE)
    network = build_network(VARIANT[name], MINIATURE, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(1)
    for epoch, watched in enumerate(run.epochs, 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * (30 if epoch == 3 else 1)
        losses = []
        for batch in torch.randperm(1437, generator=order).split(32):
            loss = F.cross_entropy(network(digits.train_x[batch]), digits.train_y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        network.eval()
        with torch.no_grad():
            accuracy = (network(digits.test_x).argmax(dim=1) == digits.test_y).float().mean().item()
        network.train()
        assert watched.loss == torch.stack(losses).mean().item()
        assert watched.accuracy == accuracy


def test_a_window_is_an_epoch_and_the_last_one_agrees_with_the_scan(shown: Shown, digits: Digits) -> None:
    run, reports = train(VARIANT["ReLU"], 0, digits, MINIATURE)
    report = reports[-1]
    assert [each.window.last_step for each in reports] == [44, 89, 134, 179, 224]
    assert (report.window.first_step, report.window.last_step, report.window.long_enough) == (180, 224, True)
    assert report.layers[0].examples == 1437
    assert abs(report.dead - sum(run.end.dead)) <= 10  # weights move while an epoch is watched
    # The same seed gives the same run.
    (same,) = [other for other in shown.result.of("ReLU") if other.seed == 0]
    assert (run.scans, run.epochs) == (same.scans, same.epochs)


Others = dict[str, tuple[Run, list[Report]]]


@pytest.mark.parametrize(("name", "site"), [("GLU", "linear{}/glu"), ("SwiGLU-LayerNorm", "linear{}(44:88)/swiglu")])
def test_a_gated_neuron_is_the_product_and_its_gate_is_not_counted_beside_it(
    name: str, site: str, others: Others
) -> None:
    run, reports = others[name]
    width = VARIANT[name].width(MINIATURE)
    sites = [site.replace("44", str(width)).replace("88", str(2 * width)).format(number) for number in range(1, 5)]
    for report in reports:
        assert [each.name for each in report.layers] == sites
        assert (report.neurons, {each.neurons for each in report.layers}) == (4 * width, {width})
    assert [len(scan.dead) for scan in run.scans] == [4] * 6
    assert run.recount_agrees
    assert run.collapse is None


@pytest.mark.parametrize("name", ["GLU", "SwiGLU-LayerNorm"])
def test_the_recount_of_gated_products_sees_a_shut_gate_and_only_that(name: str, digits: Digits) -> None:
    network = build_network(VARIANT[name], MINIATURE, seed=0)
    width = VARIANT[name].width(MINIATURE)
    with torch.no_grad():
        network.linear2.bias[width + 3] = -1e4  # a gate
        network.linear2.bias[5] = -1e4  # what another gate lets through
    whole = [(digits.train_x, digits.train_y)]
    counted = recount_dead(network, *whole[0])
    assert [place for place, dead in enumerate(counted[1]) if dead] == [3]
    products = [site for site in ns.scan(network, whole, loss=loss_of).layers if site.kind == "gated"]
    assert counted == [site.judgement.dead.tolist() for site in products]


def test_the_slopes_that_a_prelu_network_learns_are_kept(others: Others) -> None:
    run, _ = others["PReLU"]
    assert len(run.slopes) == 4
    assert all(slope != 0.25 for slope in run.slopes)  # what they begin as
    assert others["GLU"][0].slopes == ()


def test_a_network_without_activations_is_the_product_of_its_layers(others: Others) -> None:
    run, reports = others["none"]
    found = run.collapse
    assert found is not None
    assert (found.layers, found.inputs, found.outputs, found.rank, found.parameters) == (5, 64, 10, 10, 650)
    assert found.equal
    assert 0 < found.difference < 6e-6
    assert found.classifier_accuracy > 0.8
    assert abs(found.classifier_accuracy - run.accuracy) < 0.1
    assert all(site.dead == 0 for report in reports for site in report.layers)
    assert [site.name for site in reports[-1].layers] == [f"linear{number}/identity" for number in range(1, 5)]


@pytest.mark.parametrize("seed", range(3))
def test_the_product_of_layers_gives_what_the_network_gives_in_float64(seed: int) -> None:
    network = build_network(VARIANT["none"], MINIATURE, seed)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias)
    matrix, offset = product_of_layers(network)
    with torch.no_grad():
        at_zero = network.double()(torch.zeros(1, 64, dtype=torch.float64))
        at_units = network(torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(offset, at_zero[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix.T + offset, at_units, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrong", [{"product"}, {"check_linear"}, {"product", "check_linear"}])
def test_a_product_that_differs_by_more_than_rounding_is_noticed(
    wrong: set[str], digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_network(VARIANT["none"], MINIATURE, 0)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.linear3.weight[7] *= 1.001
    short = replace(MINIATURE, epochs=1)
    assert training._collapse(network, 0, digits, short).equal
    found = ns.check_linear(changed, digits.train_x)
    if "product" in wrong:
        monkeypatch.setattr(training, "product_of_layers", lambda _: product_of_layers(changed))
    if "check_linear" in wrong:
        monkeypatch.setattr(ns, "check_linear", lambda *_: found)
    assert not training._collapse(network, 0, digits, short).equal


def test_sigmoid_lets_little_gradient_through_and_relu_lets_all(digits: Digits) -> None:
    reach = {
        name: gradient_reach(build_network(VARIANT[name], MINIATURE, 0), digits.train_x, digits.train_y)
        for name in ("ReLU", "Sigmoid")
    }
    # Each sigmoid multiplies the gradient by 1/4 at most, and each layer by the root of 2, on average.
    assert reach["Sigmoid"] < 2 * (2**0.5 / 4) ** 3
    assert 0.3 < reach["ReLU"] < 3
    # As a hook sees it.
    network, sizes = build_network(VARIANT["Sigmoid"], MINIATURE, 0).eval(), []
    for layer in (network.act4, network.act1):
        layer.register_full_backward_hook(lambda _, gradients, __: sizes.append(gradients[0].pow(2).mean().sqrt()))
    F.cross_entropy(network(digits.train_x.requires_grad_()), digits.train_y).backward()
    digits.train_x.requires_grad_(False)
    assert reach["Sigmoid"] == pytest.approx((sizes[1] / sizes[0]).item(), rel=1e-4)


def test_batch_norm_runs_are_scanned_in_evaluation_mode(digits: Digits) -> None:
    run, _ = train(VARIANT["ReLU-BatchNorm"], 0, digits, MINIATURE)
    bare, _ = train(VARIANT["ReLU"], 0, digits, MINIATURE)
    # Running statistics begin as 0 and 1: before training, evaluation is as without the norms.
    assert run.start.dead == bare.start.dead
    assert sum(run.end.dead) < sum(bare.end.dead)
    assert isinstance(build_network(VARIANT["ReLU-BatchNorm"], MINIATURE, 0).norm1, nn.BatchNorm1d)
