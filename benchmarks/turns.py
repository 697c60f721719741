"""Turns: runs that are compared take turns in one process, so that a change of the machine's speed hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Times", "take_turns"]


class Times(NamedTuple):
    """Seconds that each turn of one run took."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """The shortest."""
        return min(self.seconds)

    def over(self, base: Times) -> tuple[float, float]:
        """Ratios to another run: of the medians, and of the minima."""
        return self.median / base.median, self.minimum / base.minimum


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time some runs, one turn of each after another.

    Args:
        runs: What is timed, by name.
        rounds: Turns of each.
        warm: Turns of each before those that count.
        clock: What tells the time. Of ``time.thread_time`` other programs take nothing.

    Returns:
        The times of each run, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for turn in range(-warm, rounds):
        for name, run in runs.items():
            began = clock()
            run()
            took = clock() - began
            if turn >= 0:
                times[name].append(took)
    return {name: Times(seconds) for name, seconds in times.items()}
