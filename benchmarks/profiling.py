"""Where an observed step's time goes: torch.profiler's operators, watched less unwatched, and Python around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import neuronscope as ns
from benchmarks.nets import NETS
from benchmarks.steps import training
from benchmarks.tables import Table
from benchmarks.turns import take_turns

__all__ = ["tables"]

_SHOWN = 8


def tables(*, quick: bool = False) -> Iterator[Table]:
    """A table for a network of which elements count, and one for a network of which calls count."""
    for name in ("small MLP",) if quick else ("MLP", "small MLP"):
        yield _profile(name, NETS[name], 2 if quick else 20)


def _profile(name: str, build: Callable[[], tuple[nn.Module, Tensor, Tensor]], steps: int) -> Table:
    torch.manual_seed(0)
    model, x, y = build()
    plain = training(model, x, y)
    without = _operators(plain, steps)
    torch.manual_seed(0)
    seen, x, y = build()
    with ns.watch(seen, window_steps=10**9) as scope:
        watched = training(seen, x, y, scope.step)
        ours = _operators(watched, steps)
        times = take_turns({"plain": plain, "watched": watched}, rounds=steps)
    more = {
        key: (ours[key][0] - without.get(key, (0, 0.0))[0], ours[key][1] - without.get(key, (0, 0.0))[1])
        for key in ours
    }
    added = sorted(((took, calls, key) for key, (calls, took) in more.items() if calls > 0), reverse=True)
    cost = 1e6 * (times["watched"].median - times["plain"].median)
    inside = sum(took for took, _, _ in added)
    table = Table(
        f"Operators that watching adds to a step of the {name}",
        ("operator", "calls a step", "µs a step"),
        note=f"Time of the operators themselves, under the profiler, which lengthens short ones. Without it an "
        f"observed step costs {cost:,.0f} µs more than an unwatched one of {1e6 * times['plain'].median:,.0f} µs; "
        f"the operators below are {inside:,.0f} µs under the profiler. What is not in them is Python.",
    )
    table.rows += [(f"`{key}`", f"{calls:g}", f"{took:,.0f}") for took, calls, key in added[:_SHOWN]]
    rest = added[_SHOWN:]
    if rest:
        calls, took = sum(each[1] for each in rest), sum(each[0] for each in rest)
        table.rows.append((f"{len(rest)} others", f"{calls:g}", f"{took:,.0f}"))
    return table


def _operators(step: Callable[[], None], steps: int) -> dict[str, tuple[float, float]]:
    """Calls, and microseconds of its own, of each operator a step."""
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    return {each.key: (each.count / steps, each.self_cpu_time_total / steps) for each in profiler.key_averages()}
