"""What one site costs, in microseconds, for tensors of 1 kB to 1 MB: where small tensors are, hooks are what counts.

A chain of linear layers and ReLUs of one width runs forward and backward, watched and not, interleaved in one process;
times are of this process alone (CPU time), so that others on the machine do not count. The difference is divided by the
number of sites: *whole*. Of it, what counting an output and a gradient of that size
takes is measured alone (*outputs*, *gradients*); the rest is *hooks*: Python, numbering the call, following the
neurons' axis, asking for the gradient. Medians and, in brackets, minima.

Run it with ``python -m benchmarks.sites [--repeats 300]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import neuronscope as ns
from neuronscope.counting import Scratch
from neuronscope.meters import Meter, add_gradients, add_outputs

SITES = 12
WIDTH = 64
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20)  # bytes of float32


class Cost(NamedTuple):
    """Microseconds a site, each as (median, minimum)."""

    whole: tuple[float, float]
    outputs: tuple[float, float]
    gradients: tuple[float, float]

    @property
    def hooks(self) -> tuple[float, float]:
        """What is left of the whole when counting is taken off."""
        return tuple(w - o - g for w, o, g in zip(*self, strict=True))  # type: ignore[return-value]


def interleaved(runs: list[Callable[[], object]], repeats: int) -> list[tuple[float, float]]:
    """Median and minimum of each run's time, in microseconds; they take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 5):
        for run, kept in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            if number >= 5:
                kept.append(1e6 * (time.process_time() - start))
    return [(statistics.median(each), min(each)) for each in times]


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(SITES) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def measure(size: int, repeats: int) -> Cost:
    """The cost of a site whose tensors have ``size`` bytes."""
    x = torch.randn(size // 4 // WIDTH, WIDTH)
    plain, watched = chain(), chain()
    scope = ns.watch(watched)

    def train(model: nn.Module) -> None:
        model(x).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    def observed() -> None:
        train(watched)
        scope.step()

    meter, scratch, y = Meter(WIDTH, x.device), Scratch(), x.relu()
    unwatched, whole, outputs, gradients = interleaved(
        [
            lambda: train(plain),
            observed,
            lambda: add_outputs(meter, y, 1, len(y), 0, scratch, 0.0),
            lambda: add_gradients(meter, y, 1, scratch),
        ],
        repeats,
    )
    return Cost(((whole[0] - unwatched[0]) / SITES, (whole[1] - unwatched[1]) / SITES), outputs, gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| kB | whole, µs | outputs | gradients | hooks |")
    print("| --- | --- | --- | --- | --- |")
    for size in SIZES:
        cost = measure(size, arguments.repeats)
        cells = [f"{median:.1f} ({least:.1f})" for median, least in (*cost, cost.hooks)]
        print(f"| {size >> 10} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
