"""Train and watch one network: an ordinary PyTorch loop plus the four lines that Neuronscope adds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.arrays import BoolArray
from neuronscope.demo.digits import Digits
from neuronscope.demo.recipe import ACTIVATIONS, Recipe, Variant, build_classifier, build_network
from neuronscope.demo.recount import gradient_reach, product_of_layers, recount_dead
from neuronscope.demo.results import Collapse, Epoch, Moment, Run
from neuronscope.report.report import Report

__all__ = ["train"]

#: Largest difference between outputs in float32 and in float64 that is taken for rounding, as a share of the largest
#: output: 100 roundings of 2⁻²⁴. An output is a sum of 64 products in each of 7 layers, and as many roundings, of both
#: signs, come to about the root of their number, 21.
_ROUNDING = 100 * 2.0**-24
#: The same for two products of the same matrices in float64, multiplied in other orders.
_ROUNDING_OF_PRODUCTS = 1e-9


def train(variant: Variant, seed: int, data: Digits, recipe: Recipe) -> tuple[Run, list[Report]]:
    """Train one network from scratch and watch it; each epoch is one window.

    Args:
        variant: The variant.
        seed: Seed of the weights and of the order of the images.
        data: The digits.
        recipe: The settings that all runs share.

    Returns:
        The numbers of the run, and the report at the end of each epoch, of one site per hidden layer.
    """
    start = time.monotonic()
    network = build_network(variant, recipe, seed)
    reach = gradient_reach(network, data.train_x, data.train_y)
    steps = math.ceil(len(data.train_y) / recipe.batch_size)

    def scan() -> Report:
        whole = [(data.train_x, data.train_y)]
        return _one_site_per_layer(ns.scan(network, whole, loss=_loss, activations=ACTIVATIONS))

    scans = [scan()]
    epochs, reports = [], []
    with ns.watch(network, window_steps=steps, activations=ACTIVATIONS) as scope:

        def after_epoch(loss: float) -> None:
            with scope.phase("val"):
                accuracy = _accuracy(network, data)
            report = _one_site_per_layer(scope.report())
            reports.append(report)
            epochs.append(
                Epoch(scope.global_step, **_by_layer(report, "dead", "dormant"), loss=loss, accuracy=accuracy)
            )
            with scope.paused():
                scans.append(scan())

        _fit(network, seed, data, recipe, scope.step, after_epoch, spike=variant.spike)
    dead_at_start, dead_at_end = _dead_mask(scans[0]), _dead_mask(scans[-1])
    recounted = recount_dead(network, data.train_x, data.train_y)
    run = Run(
        variant=variant.name,
        seed=seed,
        scans=tuple(_moment(number * steps, scanned) for number, scanned in enumerate(scans)),
        epochs=tuple(epochs),
        died=int((dead_at_end & ~dead_at_start).sum()),
        revived=int((dead_at_start & ~dead_at_end).sum()),
        recount_agrees=bool((dead_at_end == np.concatenate(recounted)).all()),
        gradient_reach=reach,
        slopes=tuple(float(each.weight.detach()) for each in network if isinstance(each, nn.PReLU)),
        collapse=_collapse(network, seed, data, recipe) if variant.activation is nn.Identity else None,
        seconds=time.monotonic() - start,
    )
    return run, reports


def _fit(
    network: nn.Module,
    seed: int,
    data: Digits,
    recipe: Recipe,
    after_step: Callable[[], object],
    after_epoch: Callable[[float], None],
    *,
    spike: bool,
) -> None:
    """Train a network in the way in which all are trained; ``after_epoch`` is given the mean loss."""
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    order = torch.Generator().manual_seed(seed)
    for number in range(1, recipe.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(number, spike=spike)
        losses = []
        for batch in torch.randperm(len(data.train_y), generator=order).split(recipe.batch_size):
            loss = F.cross_entropy(network(data.train_x[batch]), data.train_y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after_step()
            losses.append(loss.detach())
        after_epoch(float(torch.stack(losses).mean()))


def _collapse(network: nn.Sequential, seed: int, data: Digits, recipe: Recipe) -> Collapse:
    """Compute the one map that a network without activations is, and train a linear classifier beside it."""
    (found,) = ns.check_linear(network, data.train_x).stretches
    matrix, offset = product_of_layers(network)
    apart = np.inf if found.matrix is None else np.abs(found.matrix - matrix.numpy()).max() / matrix.abs().max()
    images = torch.cat([data.train_x, data.test_x])
    outputs = F.linear(images.double(), matrix, offset)
    with torch.no_grad():
        difference = float((network(images) - outputs).abs().max() / outputs.abs().max())
    classifier = build_classifier(seed)
    _fit(classifier, seed, data, recipe, lambda: None, lambda _: None, spike=True)
    return Collapse(
        layers=len(found.layers),
        inputs=found.inputs,
        outputs=found.outputs,
        rank=found.rank,
        parameters=found.parameters_of_one,
        difference=difference,
        equal=difference <= _ROUNDING and bool(apart <= _ROUNDING_OF_PRODUCTS),
        classifier_accuracy=_accuracy(classifier, data),
    )


def _one_site_per_layer(report: Report) -> Report:
    """Leave out the gates of gated products: the product is the neuron that the next layer reads."""
    products = tuple(site for site in report.layers if site.kind == "gated")
    return replace(report, layers=products or report.layers)


def _loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


def _accuracy(network: nn.Module, data: Digits) -> float:
    network.eval()
    with torch.no_grad():
        right = (network(data.test_x).argmax(dim=1) == data.test_y).float().mean()
    network.train()
    return float(right)


def _by_layer(report: Report, *labels: str) -> dict[str, tuple[int, ...]]:
    """Return how many neurons of each layer have a label, by label."""
    return {label: tuple(getattr(site, label) for site in report.layers) for label in labels}


def _dead_mask(report: Report) -> BoolArray:
    return np.concatenate([site.judgement.dead for site in report.layers])


def _moment(step: int, report: Report) -> Moment:
    return Moment(
        step=step,
        **_by_layer(report, "dead", "silent", "dormant", "cut_off"),
        zero_outputs=float(np.mean([site.zero_output_fraction for site in report.layers])),
        zero_gradients=float(np.mean([site.zero_gradient_fraction for site in report.layers])),
        not_finite=report.not_finite,
    )
