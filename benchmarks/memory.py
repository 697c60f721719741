"""Memory: what watching adds to a process's peak, by neurons and by batch, and over ten thousand steps.

Every figure is of a fresh process, which says how high its resident memory rose in training: first unwatched, so that
the allocator has what training needs, and then watched. The growth is the second less the first. On Linux the peak is
the kernel's ``VmHWM``: a child's ``ru_maxrss`` begins at what its parent held.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.tables import Table, size

__all__ = ["tables"]

TRAIN = """
import pathlib, resource, sys
import torch
from torch import nn
import neuronscope as ns

batch, width, before, after = map(int, sys.argv[1:])
torch.set_num_threads(1)
model = nn.Sequential(*[each for _ in range(4) for each in (nn.Linear(width, width), nn.ReLU())])
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
x = torch.randn(batch, width)

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def train(steps, scope=None):
    for _ in range(steps):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scope is not None:
            scope.step()
    return peak()

unwatched = train(before)
with ns.watch(model, every_n_steps=1) as scope:
    print(unwatched, train(after // 5, scope), train(after - after // 5, scope))
"""

BATCHES, WIDTHS = (64, 1024, 4096), (256, 1024)
LONG = 10_000


def peaks(batch: int, width: int, before: int, after: int) -> list[int]:
    """Peaks of resident memory in bytes: unwatched, after a fifth of the watched steps, and after all of them."""
    command = [sys.executable, "-c", TRAIN, *map(str, (batch, width, before, after))]
    return [int(word) for word in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Growth by neurons and batch; growth over many steps."""
    table = Table(
        "Peak memory of a watched run over an unwatched one, four sites",
        ("neurons", "batch", "activations of a step", "unwatched peak", "growth"),
        note="Resident memory, median of three processes; observed at every step. Activations are what a library that "
        "kept them would add.",
    )
    for width in WIDTHS[:1] if quick else WIDTHS:
        for batch in BATCHES[:1] if quick else BATCHES:
            runs = [peaks(batch, width, 5, 5) for _ in range(1 if quick else 3)]
            unwatched = statistics.median(run[0] for run in runs)
            growth = statistics.median(run[2] - run[0] for run in runs)
            activations = 4 * batch * width * 4
            row = (str(4 * width), str(batch), size(activations), size(int(unwatched)), size(int(growth)))
            table.rows.append(row)
    yield table
    steps = 50 if quick else LONG
    _, fifth, end = peaks(32, 64, 5, steps)
    long = Table(
        "Memory over a long run, four sites of 64 neurons, observed at every step",
        ("steps", "peak after a fifth of them", "peak at the end", "growth in between"),
        rows=[(f"{steps:,}", size(fifth), size(end), size(end - fifth))],
    )
    yield long
