"""What watching costs a training step in a plain loop: at every step, by default, and on a step that is not observed.

The runs have equal models and take turns, step by step. The default observes every 20th step, so that its cost is
(observed + 19 · idle) ÷ 20 of the medians; what closing a window costs besides is in :mod:`benchmarks.windows`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.nets import NETS
from benchmarks.tables import Table, milliseconds, ratio
from benchmarks.turns import Times, take_turns
from neuronscope.callbacks.monitor import DEFAULT_EVERY_N_STEPS

__all__ = ["NEVER", "by_default", "one_step", "spread_over", "tables", "training"]

NEVER = 10**9
ROUNDS = {"small MLP": 400, "MLP": 60, "CNN": 15, "transformer": 15}


def one_step(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One training step."""
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def training(model: nn.Module, x: Tensor, y: Tensor, after: Callable[[], Any] | None = None) -> Callable[[], None]:
    """A training step of a model with an optimizer of its own, to be called again and again.

    Args:
        model: The model.
        x: Its input.
        y: The target.
        after: Called after each optimizer step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step() -> None:
        one_step(model, x, y, optimizer)
        if after is not None:
            after()

    return step


def measure(build: Callable[[], tuple[nn.Module, Tensor, Tensor]], rounds: int) -> dict[str, Times]:
    """Time ``rounds`` steps of each run, in turn."""
    torch.manual_seed(0)
    model, x, y = build()
    plain, every, idle = (copy.deepcopy(model) for _ in range(3))
    with ns.watch(every, every_n_steps=1) as observed, ns.watch(idle, every_n_steps=NEVER) as unobserved:
        return take_turns(
            {
                "unwatched": training(plain, x, y),
                "observed": training(every, x, y, observed.step),
                "idle": training(idle, x, y, unobserved.step),
            },
            rounds=rounds,
            warm=5,
        )


def spread_over(n: int, observed: tuple[float, float], idle: tuple[float, float]) -> tuple[float, float]:
    """What steps cost of which one in n is observed.

    Args:
        n: Steps from one observed step to the next.
        observed: Ratios to the unwatched step, of an observed one; see :meth:`benchmarks.turns.Times.over`.
        idle: The same of a step that is not.
    """
    return (observed[0] + (n - 1) * idle[0]) / n, (observed[1] + (n - 1) * idle[1]) / n


def by_default(observed: tuple[float, float], idle: tuple[float, float]) -> tuple[float, float]:
    """What steps cost by default, of which one in 20 is observed; see :func:`spread_over`."""
    return spread_over(DEFAULT_EVERY_N_STEPS, observed, idle)


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table, a row a network."""
    table = Table(
        "A training step in a plain loop",
        ("net", "unwatched", "observed", "default", "idle", "observed costs"),
        note="Ratios to the unwatched step: of medians, of minima in brackets. *Default* is every "
        f"{DEFAULT_EVERY_N_STEPS}th step observed. *Observed costs* is the difference of the medians.",
    )
    for name in list(NETS)[: 1 if quick else None]:
        times = measure(NETS[name], 1 if quick else ROUNDS[name])
        base, observed, idle = times["unwatched"], times["observed"].over(times["unwatched"]), times["idle"]
        quiet = idle.over(base)
        more = milliseconds(max(times["observed"].median - base.median, 0.0))
        table.rows.append(
            (name, milliseconds(base.median), ratio(observed), ratio(by_default(observed, quiet)), ratio(quiet), more)
        )
    yield table
