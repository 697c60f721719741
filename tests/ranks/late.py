"""Runs in which a rank is not ready when the others would join their counts, because it waits for them elsewhere."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import neuronscope as ns
from tests.ranks.parallel import counted
from tests.ranks.recorded import Recorder
from tests.ranks.uneven import POLICY, SITES, batch, small, windows

STEPS, WINDOW = 14, 2
SLEEP_S = 2.5


def train(rank: int, skips: Any = None, slow: int = -1, by_optimizer: bool = False) -> dict[str, Any]:
    """Under ``DistributedDataParallel``: recorded, then watched.

    Args:
        rank: The rank.
        skips: A function of rank and number that says whether this rank skips the step.
        slow: The batch after which the first rank is late, once.
        by_optimizer: Whether the optimizer's steps count; then a rank that skips one does not take it.
    """
    weights, scope = [], None
    for watched in (False, True):
        network = small()
        model = nn.parallel.DistributedDataParallel(network)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if watched:
            options: dict[str, Any] = {"optimizer": optimizer} if by_optimizer else {}
            scope = ns.watch(model, window_steps=WINDOW, policy=POLICY, **options)
        else:
            recorder = Recorder(network, SITES)
        for number in range(STEPS):
            skip = skips is not None and skips(rank, number)
            optimizer.zero_grad()
            model(batch(number, rank, 2)).square().mean().backward()
            if not (by_optimizer and skip):
                optimizer.step()
            if watched and rank == 0 and number == slow:
                time.sleep(SLEEP_S)
            if skip:
                continue
            if scope is None:
                recorder.next_step()
            elif not by_optimizer:
                scope.step()
        weights.append([weight.detach().clone() for weight in network.parameters()])
    scope.detach()
    same = all(one.equal(other) for one, other in zip(*weights, strict=True))
    report = scope.report()
    return {
        "recorded": recorder.counts(),
        "counted": counted(scope),
        "same_weights": same,
        "windows": windows(scope),
        "notes": report.notes,
    }


def one_skips_steps(rank: int) -> dict[str, Any]:
    return train(rank, skips=lambda rank, number: rank == 0 and number % 3 == 1)


def both_skip_steps(rank: int) -> dict[str, Any]:
    return train(rank, skips=lambda rank, number: number % 3 == rank)


def optimizer_skips_on_one(rank: int) -> dict[str, Any]:
    """As where a rank's own gradients overflow, and its scaler skips the step."""
    return train(rank, skips=lambda rank, number: rank == 1 and number in (1, 5), by_optimizer=True)


def slow_at_a_window(rank: int) -> dict[str, Any]:
    return train(rank, slow=2 * WINDOW - 1)


LATE = (one_skips_steps, both_skip_steps, optimizer_skips_on_one, slow_at_a_window)
