"""Growth: what an observed step costs by sites, neurons and positions, and as a run goes on; and an exchange by ranks.

The networks are nothing but activations on one input, so that the difference to the unwatched one is all ours. Times
are those of the processor, of which other programs take nothing. Given is the slope of log cost on log size: 1 is
linear, 0 is constant. It is told in words over the smaller and the larger half of the sizes. The same curves are drawn.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.curves import Curve, draw
from benchmarks.scale import costs_of
from benchmarks.tables import Picture, Table, microseconds
from benchmarks.turns import take_turns

__all__ = ["chain", "step_of", "tables"]

SITES = (1, 2, 5, 10, 20, 50, 100, 200)
NEURONS = (64, 256, 1024, 4096, 16384)
POSITIONS = (16, 64, 256, 1024, 4096, 16384)
STEPS, RUN_PARTS = 10_000, 20
PASSES = 4
RANKS, RANK_SITES, RANK_NEURONS = (2, 4), 20, 4096

#: Sites, positions and neurons.
Shape = tuple[int, int, int]


def chain(sites: int) -> nn.Module:
    """ReLUs, one after another, each a site."""
    return nn.Sequential(*(nn.ReLU() for _ in range(sites)))


def step_of(model: nn.Module, x: Tensor) -> None:
    """Forward and backward; the input's gradient is thrown away."""
    model(x).sum().backward()
    x.grad = None


def differences(shape: Shape, rounds: int, *, window_steps: int, parts: int = 1) -> list[list[float]]:
    """Seconds that each observed step takes longer than the unwatched one beside it, part of the run after part."""
    sites, positions, neurons = shape
    x = torch.randn(positions, neurons, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, watched = chain(sites), chain(sites)
    with ns.watch(watched, window_steps=window_steps) as scope:

        def observed() -> None:
            step_of(watched, x)
            scope.step()

        runs = {"plain": lambda: step_of(plain, x), "observed": observed}
        all_times = [
            take_turns(runs, rounds=rounds, warm=0 if part else 3, clock=time.thread_time) for part in range(parts)
        ]
    return [
        [ours - theirs for ours, theirs in zip(times["observed"].seconds, times["plain"].seconds, strict=True)]
        for times in all_times
    ]


def cost(shape: Shape, rounds: int) -> float:
    """The median of what an observed step costs, where no window ends."""
    (steps,) = differences(shape, rounds, window_steps=10**9)
    return max(statistics.median(steps), 1e-9)


def curve(title: str, unit: str, shapes: dict[int, Shape], *, quick: bool) -> Curve:
    """Cost over one dimension: the least of some passes over all sizes, since a machine may be slow for seconds."""
    costs: dict[int, float] = {}
    for _ in range(1 if quick else PASSES):
        for size, shape in list(shapes.items())[: 2 if quick else None]:
            took = cost(shape, 2 if quick else 11 if math.prod(shape) > 1 << 21 else 51)
            costs[size] = min(took, costs.get(size, math.inf))
    return Curve(title, unit, list(costs), {"measured": list(costs.values())}, grows=True)


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the straight line that fits log cost on log size best."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(each) for each in seconds]).slope


def in_words(line: Curve) -> str:
    """How fast a curve rises, over the smaller and over the larger half of its sizes."""
    words = (
        *(
            (-0.15, "falling"),
            (0.15, "nearly constant"),
            (0.5, "far slower than linear"),
            (0.85, "slower than linear"),
        ),
        *((1.15, "linear"), (math.inf, "faster than linear")),
    )
    sizes, seconds = line.sizes, line.lines["measured"]
    middle, said = len(sizes) // 2, []
    for part in (slice(0, middle + 1), slice(middle, None)):
        if len(sizes[part]) > 1:
            rises = slope(sizes[part], seconds[part])
            word = next(word for limit, word in words if rises < limit)
            ends = f"From {sizes[part][0]:,} to {sizes[part][-1]:,} {line.unit}"
            said.append(f"{ends} the cost is {word} (slope {rises:.2f}).")
    return " ".join(said)


def table_of(line: Curve, how: str) -> Table:
    """A curve's figures, with the slope between neighbours and in words.

    Args:
        line: The curve.
        how: How it was measured.
    """
    one = line.unit.removesuffix("s")
    table = Table(
        line.title,
        (line.unit, f"{line.what} costs", f"per {one}", "slope from the row above"),
        note=f"{how} {in_words(line)}",
    )
    before: tuple[int, float] | None = None
    for size, took in zip(line.sizes, line.lines["measured"], strict=True):
        rises = "" if before is None else f"{math.log(took / before[1]) / math.log(size / before[0]):.2f}"
        table.rows.append((f"{size:,}", microseconds(took), f"{1e9 * took / size:,.0f} ns", rises))
        before = size, took
    return table


def by_ranks() -> tuple[Curve, float]:
    """What an exchange costs a rank, and what reading the same counts costs one that has no other."""
    alone, *took = (costs_of(ranks, RANK_SITES, RANK_NEURONS).join_cpu_s for ranks in (1, *RANKS))
    title = f"By ranks ({RANK_SITES} sites of {RANK_NEURONS:,} neurons)"
    return Curve(title, "ranks", RANKS, {"measured": took}, grows=False, what="an exchange"), alone


def how_ranks(alone: float) -> str:
    """How the curve by ranks was measured."""
    return (
        "Reading the counts and joining them: the processor time of the first rank, the least of three. The ranks are "
        f"processes over gloo. One rank alone, which only reads, takes {microseconds(alone)}."
    )


def long_run(steps: int, parts: int) -> tuple[Curve, Table]:
    """A run observed at every step, with windows closing as they do."""
    each = steps // parts
    costs = differences((10, 32, 64), each, window_steps=100, parts=parts)
    medians, means = [statistics.median(part) for part in costs], [statistics.fmean(part) for part in costs]
    title = f"As a run of {steps:,} steps goes on (10 sites of 64 neurons)"
    line = Curve(
        title,
        "steps taken",
        [each * (part + 1) for part in range(parts)],
        {"median": medians, "mean, with the windows' ends": means},
        grows=False,
    )
    table = Table(
        title,
        ("steps", "an observed step costs, median", "÷ first", "mean, with the windows' ends", "÷ first"),
        note="Each step less the unwatched one beside it. A window ends, and is judged and kept, every 100 steps. The "
        f"median of the last part is {medians[-1] / medians[0]:.2f} times that of the first: "
        f"{'constant' if medians[-1] < 1.15 * medians[0] else 'it grows'}.",
    )
    for end, median, mean in zip(line.sizes, medians, means, strict=True):
        first = f"{median / medians[0]:.2f}", f"{mean / means[0]:.2f}"
        table.rows.append((f"{end - each:,} – {end:,}", microseconds(median), first[0], microseconds(mean), first[1]))
    return line, table


def tables(*, quick: bool = False) -> Iterator[Table | Picture]:
    """Five curves, as tables and as a picture."""
    curves = []
    for title, unit, shapes in (
        ("By sites (32 positions, 64 neurons each)", "sites", {n: (n, 32, 64) for n in SITES}),
        ("By neurons (one site, 256 positions)", "neurons", {n: (1, 256, n) for n in NEURONS}),
        ("By positions (one site, 256 neurons)", "positions", {n: (1, n, 256) for n in POSITIONS}),
    ):
        curves.append(curve(title, unit, shapes, quick=quick))
        yield table_of(curves[-1], f"The least median of {PASSES} passes over all sizes.")
    if not quick:  # it starts processes
        line, alone = by_ranks()
        curves.append(line)
        yield table_of(line, how_ranks(alone))
    line, table = long_run(20 if quick else STEPS, 2 if quick else RUN_PARTS)
    yield table
    says = (
        "What an observed step costs by the number of sites, neurons and positions, and as a run goes on, and an "
        "exchange by the number of ranks"
    )
    yield Picture("cost-growth.png", says, functools.partial(draw, [*curves, line]))
