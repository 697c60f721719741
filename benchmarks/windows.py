"""What the end of a window costs, in the loop: reading the counters, closing it, judging it, logging scalars."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

import neuronscope as ns
from benchmarks.growth import chain, step_of
from benchmarks.tables import Table, milliseconds
from benchmarks.turns import take_turns
from neuronscope.scope import Scope
from neuronscope.writers.tensorboard import scalars

__all__ = ["SIZES", "tables", "watched_run"]

#: Sites and neurons of each.
SIZES = ((12, 4096), (200, 64))
#: Examples of a step: enough for a sure window.
_EXAMPLES = 300


def watched_run(sites: int, neurons: int, windows: int) -> tuple[Scope, Callable[[], None]]:
    """A scope that has closed so many windows, and what takes it a step further without the end of a window."""
    model, x = chain(sites), torch.randn(_EXAMPLES, neurons, requires_grad=True)
    scope = ns.watch(model, window_steps=1)
    for _ in range(windows):
        step_of(model, x)
        scope.step()
    scope.window_steps = 10**9

    def observe() -> None:
        step_of(model, x)
        scope.step()

    return scope, observe


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table, a column a size of network."""
    table = Table(
        "The end of a window, in the training loop",
        ("what", *(f"{sites} sites × {neurons}" for sites, neurons in SIZES)),
        note="Medians, after 60 windows; observed and unobserved steps do none of this. By default a window ends every "
        "100 steps.",
    )
    columns = []
    for sites, neurons in SIZES:
        scope, observe = watched_run(2 if quick else sites, neurons, 2 if quick else 60)
        columns.append(_costs(scope, observe, rounds=2 if quick else 20))
        scope.detach()
    for name in columns[0]:
        table.rows.append((name, *(milliseconds(column[name]) for column in columns)))
    yield table


def _costs(scope: Scope, observe: Callable[[], None], rounds: int) -> dict[str, float]:
    report = scope.report()

    def close() -> None:
        scope.window_steps = 1
        scope.step()
        scope.window_steps = 10**9

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(Path(folder))

        def log() -> None:
            for tag, value in scalars(report, since=report.global_step).items():
                writer.add_scalar(tag, value, report.global_step)

        parts: dict[str, Callable[[], object]] = {
            "read the counters (`scope.census(window='open')`)": lambda: scope.census(window="open"),
            "close the window (reading included)": close,
            "judge it (`scope.report()`, reading included)": scope.report,
            "make the scalars": lambda: scalars(report, since=report.global_step),
            "hand them to a SummaryWriter (making included)": log,
        }
        turns: dict[str, Callable[[], object]] = {}
        for name, part in parts.items():  # each after a step of its own, so that there is something to read
            turns |= {f"a step before: {name}": observe, name: part}
        times = take_turns(turns, rounds=rounds, warm=1)
        writer.close()
    return {name: times[name].median for name in parts}
