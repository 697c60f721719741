"""Train and watch one network: an ordinary PyTorch loop plus the four lines that Neuronscope adds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.demo.digits import Digits
from neuronscope.demo.recipe import Recipe, Variant, build_network
from neuronscope.demo.recount import recount_dead
from neuronscope.demo.results import Epoch, Moment, Run
from neuronscope.report.report import Report

__all__ = ["AfterEpoch", "train"]

#: A function that is called after each epoch, with its numbers and the report at its end.
AfterEpoch = Callable[[Epoch, Report], None]


def train(
    variant: Variant, seed: int, data: Digits, recipe: Recipe, after_epoch: AfterEpoch | None = None
) -> tuple[Run, Report]:
    """Train one network from scratch and watch it; each epoch is one window.

    Args:
        variant: The variant.
        seed: Seed of the weights and of the order of the images.
        data: The digits.
        recipe: The settings that all runs share.
        after_epoch: Called after each epoch.

    Returns:
        The numbers of the run, and the report at its end.
    """
    start = time.monotonic()
    network = build_network(variant, recipe, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    order = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(data.train_y) / recipe.batch_size)

    def scan() -> Report:
        return ns.scan(network, [(data.train_x, data.train_y)], loss=_loss)

    scans = [scan()]
    epochs = []
    with ns.watch(network, window_steps=steps) as scope:
        for number in range(1, recipe.epochs + 1):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(number, spike=variant.spike)
            losses = []
            for batch in torch.randperm(len(data.train_y), generator=order).split(recipe.batch_size):
                loss = F.cross_entropy(network(data.train_x[batch]), data.train_y[batch])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scope.step()
                losses.append(loss.detach())
            with scope.phase("val"):
                accuracy = _accuracy(network, data)
            report = scope.report()
            epochs.append(
                Epoch(scope.global_step, _dead(report), _dormant(report), float(torch.stack(losses).mean()), accuracy)
            )
            if after_epoch is not None:
                after_epoch(epochs[-1], report)
            with scope.paused():
                scans.append(scan())
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
        seconds=time.monotonic() - start,
    )
    return run, report


def _loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


def _accuracy(network: torch.nn.Module, data: Digits) -> float:
    network.eval()
    with torch.no_grad():
        right = (network(data.test_x).argmax(dim=1) == data.test_y).float().mean()
    network.train()
    return float(right)


def _dead(report: Report) -> tuple[int, ...]:
    return tuple(site.dead for site in report.layers)


def _dormant(report: Report) -> tuple[int, ...]:
    return tuple(site.dormant for site in report.layers)


def _dead_mask(report: Report) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.concatenate([site.judgement.dead for site in report.layers])


def _moment(step: int, report: Report) -> Moment:
    return Moment(
        step=step,
        dead=_dead(report),
        silent=tuple(site.silent for site in report.layers),
        dormant=_dormant(report),
        cut_off=tuple(site.cut_off for site in report.layers),
        zero_outputs=float(np.mean([site.zero_output_fraction for site in report.layers])),
        zero_gradients=float(np.mean([site.zero_gradient_fraction for site in report.layers])),
        not_finite=report.not_finite,
    )
