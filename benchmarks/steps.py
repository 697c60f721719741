"""What watching costs a training step: unwatched, watched at every step, and watched but not observed, interleaved.

The three runs have equal models and take turns, step by step, in one process, so that a change of the machine's speed
hits all alike. Given are the ratios to the unwatched run, of medians and of minima; the cost of watching every n-th
step follows as (observed + (n - 1) · unobserved) / n.

Run it with ``python -m benchmarks.steps [--steps 60]``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.nets import NETS

NEVER = 10**9


class Ratio(NamedTuple):
    """Cost of a watched step ÷ cost of an unwatched one."""

    observed_median: float
    observed_minimum: float
    idle_median: float
    idle_minimum: float
    step_ms: float


def one_step(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(build: Callable[[], tuple[nn.Module, Tensor, Tensor]], steps: int) -> Ratio:
    """Time ``steps`` steps of each run, in turn."""
    torch.manual_seed(0)
    model, x, y = build()
    models = [copy.deepcopy(model) for _ in range(3)]
    scopes = [None, ns.watch(models[1], every_n_steps=1), ns.watch(models[2], every_n_steps=NEVER)]
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-3) for each in models]
    times: list[list[float]] = [[], [], []]
    for step in range(steps + 5):
        for run, (net, scope, optimizer) in enumerate(zip(models, scopes, optimizers, strict=True)):
            start = time.perf_counter()
            one_step(net, x, y, optimizer)
            if scope is not None:
                scope.step()
            if step >= 5:
                times[run].append(time.perf_counter() - start)
    medians = [statistics.median(each) for each in times]
    minima = [min(each) for each in times]
    return Ratio(
        medians[1] / medians[0], minima[1] / minima[0], medians[2] / medians[0], minima[2] / minima[0], 1e3 * medians[0]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| net | step, ms | observed, median | observed, min | idle, median | idle, min | every 20th, median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, build in NETS.items():
        r = measure(build, arguments.steps)
        every_20 = (r.observed_median + 19 * r.idle_median) / 20
        print(
            f"| {name} | {r.step_ms:.1f} | {r.observed_median:.3f} | {r.observed_minimum:.3f} "
            f"| {r.idle_median:.3f} | {r.idle_minimum:.3f} | {every_20:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
