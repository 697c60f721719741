"""What training loses to a drawing: steps undisturbed, steps with a drawing among them, steps with one beside them.

The three take turns, round by round. What is lost to a drawing is the time of the steps that it falls into, less what
as many take undisturbed right before and after; the longest of them is what somebody notices. Where training keeps
every core busy there is none for the drawing, and a thread saves nothing in all.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from benchmarks.nets import NETS
from benchmarks.steps import training
from benchmarks.tables import Table, milliseconds
from neuronscope.report.report import Report
from neuronscope.writers.tensorboard import EventFile, append

__all__ = ["PARTS", "disturbed", "log_of"]

#: What is drawn, as :func:`neuronscope.writers.tensorboard.append` is told.
PARTS: dict[str, dict[str, bool]] = {
    "pictures": {"images": True, "text": False, "tab": False},
    "text": {"images": False, "text": True, "tab": False},
    "tab": {"images": False, "text": False, "tab": True},
}

#: Networks that are trained, and whether torch gets all cores: the small one has nothing to share out among them.
CASES = (("small MLP", False), ("MLP", False), ("MLP", True))
ROUNDS = 5


def log_of(report: Report, file: EventFile, which: dict[str, bool]) -> Callable[[], None]:
    """Return what draws some parts of a report and sees them on the disk."""

    def log() -> None:
        append(report, file, report.global_step, **which)

    return log


class Loss(NamedTuple):
    """Of one network, one report and one number of threads; seconds, one a round.

    Attributes:
        step: An undisturbed step, on average.
        inside: Lost to a drawing in the loop.
        beside: Lost to one in another thread.
        longest: The longest step undisturbed, with a drawing in the loop, and with one beside it.
    """

    step: list[float]
    inside: list[float]
    beside: list[float]
    longest: list[tuple[float, float, float]]


def disturbed(reports: dict[str, Report], *, quick: bool = False) -> Table:
    """One table, a row a network, a number of torch's threads and a report."""
    table = Table(
        "What training loses to one drawing of all parts",
        (
            "net",
            "torch's threads",
            "report",
            "a step",
            "lost, drawn in the loop",
            "lost, drawn beside it",
            "longest step",
        ),
        note="Medians, in brackets the least and the most of the rounds. *Longest step*: undisturbed, with the drawing "
        f"in the loop, and with it beside. There are {os.cpu_count()} cores: with fewer threads the drawing may have a "
        "core to itself, but for Python's lock.",
    )
    before = torch.get_num_threads()
    for net, all_cores in CASES[: 1 if quick else None]:
        threads = (os.cpu_count() or 1) if all_cores else before
        torch.set_num_threads(threads)
        for name, report in reports.items():
            loss = _measure(net, report, 1 if quick else ROUNDS)
            middle = milliseconds(statistics.median(loss.step))
            longest = (milliseconds(statistics.median(each)) for each in zip(*loss.longest, strict=True))
            lost = (_spread(loss.inside), _spread(loss.beside))
            table.rows.append((net, str(threads), name, middle, *lost, " / ".join(longest)))
        torch.set_num_threads(before)
    return table


def _spread(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):,.0f} ms ({1e3 * min(seconds):,.0f} … {1e3 * max(seconds):,.0f})"


def _measure(net: str, report: Report, rounds: int) -> Loss:
    torch.manual_seed(0)
    step = training(*NETS[net]())
    with tempfile.TemporaryDirectory() as folder:
        draw = log_of(report, EventFile(folder), {part: True for which in PARTS.values() for part in which})
        drawing, one = (min(_steps(run, 3)) for run in (draw, step))
        count = max(round(drawing / one), 3)  # steps that take as long as a drawing
        alone, inside, beside, together = [_steps(step, count)], [], [], []
        for _ in range(rounds):
            inside.append(_steps(step, count, among=draw))
            together.append(_while(step, draw, count))
            beside.append(together[-1][1])
            alone.append(_steps(step, count))
    undisturbed = [statistics.fmean(before + after) for before, after in pairwise(alone)]
    return Loss(
        undisturbed,
        [sum(steps) - count * each for steps, each in zip(inside, undisturbed, strict=True)],
        [took - len(steps) * each for (took, steps), each in zip(together, undisturbed, strict=True)],
        [(max(a), max(i), max(b)) for a, i, b in zip(alone[1:], inside, beside, strict=True)],
    )


def _steps(step: Callable[[], None], count: int, among: Callable[[], None] | None = None) -> list[float]:
    """Seconds of so many steps; one of them, in the middle, with something else in it."""
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        step()
        if among is not None and number == count // 2:
            among()
        seconds.append(time.perf_counter() - began)
    return seconds


def _while(step: Callable[[], None], draw: Callable[[], None], count: int) -> tuple[float, list[float]]:
    """Seconds until a thread has drawn and so many steps were taken at least; and those of each step."""
    thread = threading.Thread(target=draw)
    began = time.perf_counter()
    thread.start()
    seconds = []
    while thread.is_alive() or len(seconds) < count:
        seconds += _steps(step, 1)
    return time.perf_counter() - began, seconds
