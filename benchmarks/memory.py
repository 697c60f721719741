"""Memory: what watching adds to a process's peak, by neurons and by batch, and over ten thousand steps.

Every figure is of a fresh process, which trains unwatched at first, so that the allocator has what training needs, and
then watched. Growth is what resident memory rose by since then. On Linux the kernel is asked (``VmRSS`` and ``VmHWM``:
a child's ``ru_maxrss`` begins at what its parent held); elsewhere there is a peak only.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.tables import Table, size

__all__ = ["tables"]

_KERNEL = """
import pathlib, resource, sys

def memory(field):
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if field in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""

#: A network of linear layers: prints its peak unwatched and watched.
_TRAINED = (
    _KERNEL
    + """
import torch
from torch import nn
import neuronscope as ns

batch, width, sites, steps = map(int, sys.argv[1:])
torch.set_num_threads(1)
model = nn.Sequential(*[each for _ in range(sites) for each in (nn.Linear(width, width), nn.ReLU())])
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
x = torch.randn(batch, width)

def train(after):
    for _ in range(steps):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

train(lambda: None)
print(memory("VmHWM"))
with ns.watch(model) as scope:
    train(scope.step)
    print(memory("VmHWM"))
"""
)

#: A long run of activations alone: prints memory, and what the reports' history holds, at each of some steps.
_LONG = (
    _KERNEL
    + """
import torch
import neuronscope as ns
from benchmarks.growth import chain, step_of

watched, sites, neurons, window, *marks = map(int, sys.argv[1:])
torch.set_num_threads(1)
model, x = chain(sites), torch.randn(32, neurons, requires_grad=True)
for _ in range(100):
    step_of(model, x)
scope = ns.watch(model, window_steps=window) if watched else None
report = None
for step in range(1, marks[-1] + 1):
    step_of(model, x)
    if scope is not None:
        scope.step()
        if step % window == 0:
            report = scope.report()  # as a monitor does: the newest one is kept
    if step in marks:
        kept = [] if report is None else [site.history for site in report.sites]
        print(memory("VmRSS"), memory("VmHWM"), max((len(each.steps) for each in kept), default=0),
              sum(each.levels.nbytes for each in kept))
"""
)

BATCHES, WIDTHS, SITES = (64, 512, 2048), (256, 1024), 4
#: Steps at which a long run's memory is read, and those of a window: so short that the history has to be thinned.
MARKS, WINDOW = (100, 1_000, 2_000, 5_000, 6_000, 8_000, 10_000), 20
LONG_SITES, LONG_NEURONS = 12, 1024


def _run(script: str, *arguments: int) -> list[list[int]]:
    """The numbers that a script prints, line by line."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [[int(word) for word in line.split()] for line in printed.splitlines()]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Growth by neurons and batch; growth over many steps."""
    yield _by_size(quick=quick)
    yield _long_run((2, 4) if quick else MARKS, 2 if quick else WINDOW)


def _by_size(*, quick: bool) -> Table:
    table = Table(
        f"Peak memory of a watched run over an unwatched one, {SITES} sites",
        ("neurons", "batch", "activations of a step", "unwatched peak", "growth"),
        note="Resident memory, median of three processes; observed at every step. Activations are what a library that "
        "kept them would add.",
    )
    for width in WIDTHS[:1] if quick else WIDTHS:
        for batch in BATCHES[:1] if quick else BATCHES:
            runs = [_run(_TRAINED, batch, width, SITES, 3) for _ in range(1 if quick else 3)]
            unwatched = statistics.median(before[0] for before, _ in runs)
            growth = statistics.median(after[0] - before[0] for before, after in runs)
            activations = SITES * batch * width * 4
            row = (f"{SITES * width:,}", f"{batch:,}", size(activations), size(int(unwatched)), size(int(growth)))
            table.rows.append(row)
    return table


def _long_run(marks: tuple[int, ...], window: int) -> Table:
    of = (LONG_SITES, LONG_NEURONS, window, *marks)
    watched, unwatched = _run(_LONG, 1, *of), _run(_LONG, 0, *of)
    table = Table(
        f"Memory over a long run, {LONG_SITES} sites of {LONG_NEURONS:,} neurons, observed at every step",
        ("steps", "resident", "peak", "windows kept", "their bytes", "resident, less those", "an unwatched run"),
        note=f"A window ends every {window} steps and leaves a byte a neuron and a report. What is kept of windows is "
        "bounded: beyond 256, or 64 MB in all, every second one goes. The newest report shares the history's bytes.",
    )
    for mark, (resident, peak, windows, kept), (plain, *_) in zip(marks, watched, unwatched, strict=True):
        cells = map(size, (kept, resident - kept, plain))
        table.rows.append((f"{mark:,}", size(resident), size(peak), str(windows), *cells))
    return table
