"""What one site costs, in microseconds, for tensors of 1 kB to 1 MB: where they are small, fixed costs are what counts.

A chain of linear layers and ReLUs of one width runs forward and backward, watched and not, in turns. The difference,
divided by the number of sites, is the *whole*. Of it, counting an output and a gradient of that size is measured alone;
the rest is *hooks*: Python, following the units of the layers, finding the site, asking for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import neuronscope as ns
from benchmarks.tables import Table, size
from benchmarks.turns import Times, take_turns
from neuronscope.count.counters import SiteCounters, add_gradients, add_outputs
from neuronscope.count.cpu_kernels import ScratchBuffers

__all__ = ["tables"]

SITES = 12
WIDTH = 64
STEPS = 64
ROUNDS, ROUNDS_OF_LARGE, LARGE = 15, 5, 1 << 18
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20)  # bytes of float32


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table, a row a size."""
    table = Table(
        "One site, by the size of its tensor",
        ("tensor", "whole", "an output", "a gradient", "hooks"),
        note="Microseconds a site and observed step, medians, minima in brackets; each time is the mean of "
        f"{STEPS} steps, so that it holds what small tensors cost that wait to be counted together. *Hooks* is the "
        "whole less the other two.",
    )
    for each in SIZES[:1] if quick else SIZES:
        table.rows.append(_row(each, 2 if quick else ROUNDS if each < LARGE else ROUNDS_OF_LARGE))
    yield table


def _chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(SITES) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def _row(bytes_each: int, rounds: int) -> tuple[str, ...]:
    x = torch.randn(bytes_each // 4 // WIDTH, WIDTH)
    plain, watched = _chain(), _chain()
    scope = ns.watch(watched)

    def train(model: nn.Module) -> None:
        model(x).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    def observed() -> None:
        train(watched)
        scope.step()

    def many(run: Callable[[], None]) -> Callable[[], None]:
        def repeated() -> None:
            for _ in range(STEPS):
                run()

        return repeated

    counters, scratch, y = SiteCounters(WIDTH, x.device), ScratchBuffers(), x.relu()
    times = take_turns(
        {
            "plain": many(lambda: train(plain)),
            "observed": many(observed),
            "outputs": many(lambda: add_outputs(counters, y, 1, len(y), 0, scratch, 0.0)),
            "gradients": many(lambda: add_gradients(counters, y, 1, scratch)),
        },
        rounds=rounds,
    )
    scope.detach()
    outputs, gradients = (_microseconds(times[name]) for name in ("outputs", "gradients"))
    both = zip(_microseconds(times["observed"]), _microseconds(times["plain"]), strict=True)
    whole = tuple((watched - unwatched) / SITES for watched, unwatched in both)
    hooks = tuple(all_of_it - out - grad for all_of_it, out, grad in zip(whole, outputs, gradients, strict=True))
    return (size(bytes_each), *(f"{pair[0]:.1f} ({pair[1]:.1f})" for pair in (whole, outputs, gradients, hooks)))


def _microseconds(times: Times) -> tuple[float, float]:
    return 1e6 * times.median / STEPS, 1e6 * times.minimum / STEPS
