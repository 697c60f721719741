"""Growth: what an observed step costs by the number of sites, of neurons and of positions, and as a run goes on.

The networks are nothing but activations on one input, so that the difference to the unwatched one is all ours. Given
is the slope of log cost on log size between neighbours: 1 is linear, 0 is constant.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.tables import Table
from benchmarks.turns import take_turns

__all__ = ["tables"]

SITES = (1, 2, 5, 10, 20, 50, 100, 200)
NEURONS = (64, 256, 1024, 4096, 16384)
POSITIONS = (16, 64, 256, 1024, 4096, 16384)
STEPS = 2000


def chain(sites: int) -> nn.Module:
    """ReLUs, one after another, each a site."""
    return nn.Sequential(*(nn.ReLU() for _ in range(sites)))


def step_of(model: nn.Module, x: Tensor) -> None:
    """Forward and backward; the input's gradient is thrown away."""
    model(x).sum().backward()
    x.grad = None


def cost(sites: int, positions: int, neurons: int, rounds: int) -> float:
    """Seconds that an observed step takes longer than an unwatched one."""
    x = torch.randn(positions, neurons, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, watched = chain(sites), chain(sites)
    with ns.watch(watched, window_steps=10**9) as scope:

        def observed() -> None:
            step_of(watched, x)
            scope.step()

        times = take_turns({"plain": lambda: step_of(plain, x), "observed": observed}, rounds=rounds)
    return max(times["observed"].median - times["plain"].median, 1e-9)


def curve(title: str, unit: str, sizes: tuple[int, ...], shapes: list[tuple[int, int, int]], *, quick: bool) -> Table:
    """Cost over one dimension of ``(sites, positions, neurons)``."""
    table = Table(title, (unit, "an observed step costs", f"per {unit.removesuffix('s')}", "slope from the row above"))
    before: tuple[int, float] | None = None
    for size, shape in list(zip(sizes, shapes, strict=True))[: 2 if quick else None]:
        elements = math.prod(shape)
        took = cost(*shape, 2 if quick else 15 if elements > 1 << 21 else 60)
        slope = "" if before is None else f"{math.log(took / before[1]) / math.log(size / before[0]):.2f}"
        table.rows.append((f"{size:,}", f"{1e6 * took:,.0f} µs", f"{1e9 * took / size:,.0f} ns", slope))
        before = size, took
    return table


def long_run(steps: int) -> Table:
    """A run observed at every step, with windows closing as they do, in five parts."""
    model, x = chain(10), torch.randn(32, 64, requires_grad=True)
    parts: list[float] = []
    with ns.watch(model) as scope:
        for _ in range(5):
            times = []
            for _ in range(max(steps // 5, 1)):
                began = time.perf_counter()
                step_of(model, x)
                scope.step()
                times.append(time.perf_counter() - began)
            parts.append(statistics.median(times))
    return Table(
        f"An observed step as a run of {steps:,} steps goes on (10 sites of 64 neurons)",
        ("part of the run", "a step, median", "÷ first part"),
        rows=[(f"{n} of 5", f"{1e6 * each:,.0f} µs", f"{each / parts[0]:.2f}") for n, each in enumerate(parts, 1)],
    )


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Four curves."""
    yield curve("By sites (batch 32, 64 neurons each)", "sites", SITES, [(n, 32, 64) for n in SITES], quick=quick)
    yield curve("By neurons (one site, 256 positions)", "neurons", NEURONS, [(1, 256, n) for n in NEURONS], quick=quick)
    yield curve(
        "By positions (one site, 256 neurons)", "positions", POSITIONS, [(1, n, 256) for n in POSITIONS], quick=quick
    )
    yield long_run(10 if quick else STEPS)
