"""Writing to TensorBoard: what each part takes, and what training loses while another thread draws."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from benchmarks.nets import NETS
from benchmarks.steps import training
from benchmarks.tables import Table, milliseconds, size
from benchmarks.turns import take_turns
from benchmarks.windows import SIZES, watched_run
from neuronscope.report import Report
from neuronscope.writers.tensorboard import write

__all__ = ["tables"]

PARTS: dict[str, dict[str, bool]] = {
    "pictures": {"images": True, "text": False, "vectors": False},
    "text": {"images": False, "text": True, "vectors": False},
    "vectors": {"images": False, "text": False, "vectors": True},
}


class _NoScalars:
    """A SummaryWriter that leaves scalars out, as the monitor's does."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        pass


def tables(*, quick: bool = False) -> Iterator[Table]:
    """The parts of one log; drawing in the loop against drawing beside it."""
    reports = {}
    for sites, neurons in SIZES:
        scope, _ = watched_run(2 if quick else sites, neurons, 2 if quick else 60)
        reports[f"{sites} sites × {neurons}"] = scope.report()
        scope.detach()
    yield _parts(reports, quick=quick)
    yield _beside(next(iter(reports.values())), quick=quick)


def _parts(reports: dict[str, Report], *, quick: bool) -> Table:
    table = Table(
        "One log to TensorBoard, until it is on the disk",
        ("part", *(name for name in reports)),
        note="Median time, and bytes of the event file. Scalars are in the table above.",
    )
    columns = []
    for report in reports.values():
        with tempfile.TemporaryDirectory() as folder:
            column = {}
            for part, which in PARTS.items():
                writer = SummaryWriter(Path(folder) / part)
                took = take_turns({part: _log(report, writer, which)}, rounds=1 if quick else 5, warm=1)[part]
                writer.close()
                written = sum(file.stat().st_size for file in (Path(folder) / part).iterdir())
                column[part] = f"{milliseconds(took.median)}, {size(written // (2 if quick else 6))}"
            columns.append(column)
    table.rows += [(part, *(column[part] for column in columns)) for part in PARTS]
    return table


def _log(report: Report, writer: SummaryWriter, which: dict[str, bool]) -> Callable[[], None]:
    def log() -> None:
        write(report, _NoScalars(writer), report.step, **which)
        writer.flush()

    return log


def _beside(report: Report, *, quick: bool) -> Table:
    """Steps go on while a thread draws: the time it takes, less what as many steps take undisturbed."""
    table = Table(
        "What training loses to one drawing (all parts, 12 sites × 4096)",
        ("net", "a step", "drawn in the loop", "drawn beside it", "longest step then"),
        note="*Drawn beside it*: the time until the drawing is done, less what the steps taken meanwhile take "
        "undisturbed; medians of three. Where all cores are busy with training, drawing costs what it costs.",
    )
    everything = {"images": True, "text": True, "vectors": True}
    for name in list(NETS)[: 1 if quick else None]:
        model, x, y = NETS[name]()
        step = training(model, x, y)
        with tempfile.TemporaryDirectory() as folder:
            writer = SummaryWriter(Path(folder))
            draw = _log(report, writer, everything)
            alone, inside, beside, longest = [], [], [], []
            draw()
            for _ in range(1 if quick else 3):
                alone += take_turns({"": step}, rounds=3 if quick else 10, warm=1)[""].seconds
                usual = sorted(alone)[len(alone) // 2]
                inside += take_turns({"": draw}, rounds=1, warm=0)[""].seconds
                took, steps = _meanwhile(step, draw)
                beside.append(took - len(steps) * usual)
                longest.append(max(steps))
            writer.close()
        middle = len(beside) // 2
        cells = (usual, sorted(inside)[middle], max(sorted(beside)[middle], 0.0), sorted(longest)[middle])
        table.rows.append((name, *map(milliseconds, cells)))
    return table


def _meanwhile(step: Callable[[], None], draw: Callable[[], None]) -> tuple[float, list[float]]:
    thread = threading.Thread(target=draw)
    began = time.perf_counter()
    thread.start()
    steps = []
    while thread.is_alive():
        before = time.perf_counter()
        step()
        steps.append(time.perf_counter() - before)
    return time.perf_counter() - began, steps
