"""Where an observed step's time goes: torch's operators, watched less unwatched, and then Python, by our own functions.

Operators are torch.profiler's. Python is cProfile's: the time spent in our functions themselves, module by module, and
in what they call that is none of ours (torch, built-ins). Both lengthen what is short; the tables say by how much.
"""

from __future__ import annotations

import cProfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import neuronscope as ns
from benchmarks.nets import NETS
from benchmarks.steps import NEVER, training
from benchmarks.tables import Table
from benchmarks.turns import take_turns

__all__ = ["Spent", "tables", "time_of_ours"]

_OPERATORS_SHOWN, _FUNCTIONS_SHOWN = 8, 3
_OURS = Path(ns.__file__).parent

Build = Callable[[], tuple[nn.Module, Tensor, Tensor]]
#: Of cProfile: a function's file, line and name.
_Function = tuple[str, int, str]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Operators of a network of which elements count and of one of which calls count; and that one's Python."""
    for name in ("small MLP",) if quick else ("MLP", "small MLP"):
        yield _operators_added(name, NETS[name], 2 if quick else 20)
    yield _python_added("small MLP", NETS["small MLP"], 2 if quick else 200)


def _operators_added(name: str, build: Build, steps: int) -> Table:
    torch.manual_seed(0)
    plain = training(*build())
    without = _operators(plain, steps)
    torch.manual_seed(0)
    seen, x, y = build()
    with ns.watch(seen, window_steps=NEVER) as scope:
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
        note=f"Time of the operators themselves, under torch.profiler. Without it an observed step costs {cost:,.0f} "
        f"µs more than an unwatched one of {1e6 * times['plain'].median:,.0f} µs; the operators below are "
        f"{inside:,.0f} µs under the profiler. What is not in them is Python.",
    )
    table.rows += [(f"`{key}`", f"{calls:g}", f"{took:,.0f}") for took, calls, key in added[:_OPERATORS_SHOWN]]
    rest = added[_OPERATORS_SHOWN:]
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


class Spent(NamedTuple):
    """Of functions of ours: calls, seconds in themselves, and seconds in what they called that is none of ours."""

    calls: float
    own: float
    others: float

    def plus(self, more: Spent) -> Spent:
        """Both together."""
        return Spent(*(mine + its for mine, its in zip(self, more, strict=True)))


def _python_added(name: str, build: Build, steps: int) -> Table:
    torch.manual_seed(0)
    plain = training(*build())
    torch.manual_seed(0)
    model, x, y = build()
    with ns.watch(model, window_steps=NEVER) as scope:
        watched = training(model, x, y, scope.step)
        bare = take_turns({"plain": plain, "watched": watched}, rounds=steps)
        without, ours = cProfile.Profile(), cProfile.Profile()
        profiled = take_turns(
            {"plain": lambda: without.runcall(plain), "watched": lambda: ours.runcall(watched)}, rounds=steps, warm=0
        )
    functions = time_of_ours(_calls(ours))
    modules: dict[str, Spent] = defaultdict(lambda: Spent(0, 0.0, 0.0))
    for (module, _), spent in functions.items():
        modules[module] = modules[module].plus(spent)
    cost, under = (1e6 * (times["watched"].median - times["plain"].median) for times in (bare, profiled))
    table = Table(
        f"Python that watching adds to a step of the {name}",
        ("module", "calls a step", "µs in itself", "µs in torch and built-ins", "its costliest functions"),
        note=f"By cProfile, under which an observed step costs {under:,.0f} µs more than an unwatched one, instead of "
        f"{cost:,.0f} µs: read shares here, not times. What the network calls in any case is not in it.",
    )
    for module, spent in sorted(modules.items(), key=lambda item: -_seconds(item[1])):
        own = {function: _seconds(each) for (of, function), each in functions.items() if of == module}
        costliest = sorted(own, key=lambda function: -own[function])[:_FUNCTIONS_SHOWN]
        times = (f"{1e6 * each / steps:,.0f}" for each in (spent.own, spent.others))
        table.rows.append(
            (f"`{module}`", f"{spent.calls / steps:,.0f}", *times, ", ".join(f"`{n}`" for n in costliest))
        )
    return table


def _seconds(spent: Spent) -> float:
    return spent.own + spent.others


def _calls(profiler: cProfile.Profile) -> dict[_Function, tuple[int, int, float, float, dict[_Function, Any]]]:
    """Of each function: direct and all calls, seconds in itself and in all, and the same by who called it."""
    profiler.create_stats()
    stats: dict[_Function, Any] = profiler.stats  # type: ignore[attr-defined]
    return stats


def time_of_ours(calls: dict[_Function, Any]) -> dict[tuple[str, str], Spent]:
    """What each function of ours took, by module and name.

    What it calls that is none of ours counts whole, but for what called us to be passed on: a layer's own function,
    which comes to our function mode and which that calls in its turn.
    """
    spent: dict[tuple[str, str], Spent] = defaultdict(lambda: Spent(0, 0.0, 0.0))
    passed_on: dict[_Function, int] = defaultdict(int)
    for function, (_, count, own, _, callers) in calls.items():
        if _is_ours(function):
            spent[_named(function)] = spent[_named(function)].plus(Spent(count, own, 0.0))
            for caller, of in callers.items():
                passed_on[caller] += of[0]
    for function, (_, _, _, _, callers) in calls.items():
        by_us = {} if _is_ours(function) else {caller: of for caller, of in callers.items() if _is_ours(caller)}
        count = sum(of[0] for of in by_us.values())
        for caller, of in by_us.items():
            share = max(count - passed_on[function], 0) / count
            spent[_named(caller)] = spent[_named(caller)].plus(Spent(0, 0.0, share * of[3]))
    return spent


def _is_ours(function: _Function) -> bool:
    return Path(function[0]).is_relative_to(_OURS)


def _named(function: _Function) -> tuple[str, str]:
    """A function's module and its name."""
    return ".".join(Path(function[0]).relative_to(_OURS).with_suffix("").parts), function[2]
