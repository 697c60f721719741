"""Memory: what watching adds to a process's peak, by neurons and by batch, and over ten thousand steps.

Every figure is of a fresh process, which has watched a tiny network and trains unwatched at first: modules are loaded
and the allocator has what training needs. On Linux the kernel is asked (``VmRSS`` and ``VmHWM``: a child's
``ru_maxrss`` begins at what its parent held); elsewhere a peak is all there is. Nothing is timed, so as many processes
run at once as there are cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks.tables import Table, size

__all__ = ["tables"]

#: What the processes share: reading memory, and ReLUs to train.
_BEGIN = """
import ctypes, gc, pathlib, resource, sys
import torch
import neuronscope as ns
from benchmarks.growth import chain, step_of

def memory(field):
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if field in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def give_back():
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)

batch, sites, neurons, window, watched, *marks = map(int, sys.argv[1:])
torch.set_num_threads(1)
model, x = chain(sites), torch.randn(batch, neurons, requires_grad=True)

def watch(model, x, steps):
    scope = ns.watch(model, window_steps=window)
    for _ in range(steps):
        step_of(model, x)
        scope.step()
    return scope

watch(chain(1), torch.ones(320, 1, requires_grad=True), window).report()
for _ in range(5):
    step_of(model, x)
give_back()
"""

#: Prints memory held and its peak, unwatched, and after a window was watched, closed and reported.
_SIZES = (
    _BEGIN
    + """
print(memory("VmRSS"), memory("VmHWM"))
scope = watch(model, x, window)
report = scope.report()
give_back()
print(memory("VmRSS"), memory("VmHWM"))
"""
)

#: Prints, at each of some steps of one run: memory, its peak, what is left once all that is free was given back, the
#: objects that Python keeps track of, windows kept and the bytes of their history.
_LONG = (
    _BEGIN
    + """
scope = ns.watch(model, window_steps=window) if watched else None
report = None
for step in range(1, marks[-1] + 1):
    step_of(model, x)
    if scope is not None:
        scope.step()
        if step % window == 0:
            report = scope.report()  # as a monitor does; the newest is kept
    if step in marks:
        kept = [] if report is None else [site.history for site in report.layers]
        resident = memory("VmRSS")
        peak = max(memory("VmHWM"), resident)  # the kernel brings the peak up to date now and then
        give_back()
        print(resident, peak, memory("VmRSS"), len(gc.get_objects()),
              max((len(each.steps) for each in kept), default=0), sum(each.levels.nbytes for each in kept))
"""
)

BATCHES, NEURONS, SITES = (64, 512), (1024, 8192, 32_768), 4
#: Steps of a window there: the least of which the smaller batch has examples enough for a sure verdict.
SHORT = 5
#: Steps of a window in the long run, and those at which its memory is read. Windows are so short that the history
#: has to be thinned twice, at the 257th and at the 513th; at steps 2,500, 5,000 and 10,000 as many are kept.
WINDOW, MARKS = 10, (100, 1_000, 2_000, 2_500, 5_000, 7_500, 10_000)
LONG_SITES, LONG_NEURONS, LONG_BATCH = 12, 1024, 32

Numbers = list[list[int]]


def _run(script: str, *arguments: int) -> Numbers:
    """The numbers that a script prints, line by line."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [[int(word) for word in line.split()] for line in printed.splitlines()]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Growth by neurons and batch; growth over many steps."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        marks = (20, 40) if quick else MARKS
        of = (LONG_BATCH, LONG_SITES, LONG_NEURONS, WINDOW)
        long = [pool.submit(_run, _LONG, *of, watched, *marks) for watched in (1, 0)]
        sizes = [(neurons, batch) for neurons in NEURONS for batch in BATCHES][: 1 if quick else None]
        runs = {
            (neurons, batch): [
                pool.submit(_run, _SIZES, batch, SITES, neurons, SHORT, 1) for _ in range(1 if quick else 3)
            ]
            for neurons, batch in sizes
        }
        yield _by_size({size: [each.result() for each in several] for size, several in runs.items()})
        yield _long_run(marks, *(each.result() for each in long))


def _by_size(runs: dict[tuple[int, int], list[Numbers]]) -> Table:
    table = Table(
        f"Memory of a watched run over an unwatched one, {SITES} sites",
        ("neurons", "batch", "activations of a step", "unwatched peak", "peak grows by", "held", "held, a neuron"),
        note=f"Resident memory, medians of three processes: five unwatched steps, then {SHORT} observed ones, the end "
        "of a window and a report. *Held* is what stays once all that is free was given back. Activations are what a "
        "library that kept them would hold. Loading modules is in none of these.",
    )
    for (neurons, batch), several in runs.items():
        held = statistics.median(after[0] - before[0] for before, after in several)
        growth = statistics.median(after[1] - before[1] for before, after in several)
        unwatched = statistics.median(before[1] for before, _ in several)
        cells = map(size, (SITES * batch * neurons * 4, int(unwatched), int(growth), int(held)))
        table.rows.append((f"{SITES * neurons:,}", f"{batch:,}", *cells, f"{held / (SITES * neurons):,.0f} B"))
    return table


def _long_run(marks: tuple[int, ...], watched: Numbers, unwatched: Numbers) -> Table:
    table = Table(
        f"Memory over a long run, {LONG_SITES} sites of {LONG_NEURONS:,} neurons, observed at every step",
        ("steps", "windows kept", "their bytes", "resident", "peak", "held", "objects", "held, unwatched"),
        note=f"A window ends every {WINDOW} steps, is judged and reported, and leaves a byte a neuron. What is kept of "
        "windows is bounded: beyond 256, or 64 MB in all, every second one goes; there is room for up to twice as many "
        "and the newest report keeps the bytes that it shows. *Held*: resident once the C library was asked to give "
        "back what is free. *Objects*: those that Python's garbage collector keeps track of.",
    )
    for mark, row, plain in zip(marks, watched, unwatched, strict=True):
        resident, peak, held, objects, windows, kept = row
        cells = (*map(size, (kept, resident, peak, held)), f"{objects:,}", size(plain[2]))
        table.rows.append((f"{mark:,}", str(windows), *cells))
    return table
