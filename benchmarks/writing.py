"""Writing to TensorBoard: what each part takes; what training loses to it is in :mod:`benchmarks.disturbance`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.disturbance import PARTS, disturbed, log_of
from benchmarks.tables import Table, milliseconds, size
from benchmarks.turns import take_turns
from benchmarks.windows import SIZES, watched_run
from neuronscope.report.report import Report
from neuronscope.writers.tensorboard import EventFile

__all__ = ["tables"]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """The parts of one log; drawing in the loop against drawing beside it."""
    reports = {}
    for sites, neurons in SIZES[: 1 if quick else None]:
        scope, _ = watched_run(2 if quick else sites, neurons, 2 if quick else 60)
        reports[f"{sites} sites × {neurons}"] = scope.report()
        scope.detach()
    yield _parts(reports, quick=quick)
    yield disturbed(reports, quick=quick)


def _parts(reports: dict[str, Report], *, quick: bool) -> Table:
    table = Table(
        "One log to TensorBoard, until it is on the disk",
        ("part", *(name for name in reports)),
        note="Median time, and bytes of the event file. Scalars are in *The end of a window*.",
    )
    columns = []
    for report in reports.values():
        with tempfile.TemporaryDirectory() as folder:
            column = {}
            for part, which in PARTS.items():
                run = Path(folder) / part
                run.mkdir()
                log = log_of(report, EventFile(str(run)), which)
                took = take_turns({part: log}, rounds=1 if quick else 5, warm=1)[part]
                written = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
                column[part] = f"{milliseconds(took.median)}, {size(written // (2 if quick else 6))}"
            columns.append(column)
    table.rows += [(part, *(column[part] for column in columns)) for part in PARTS]
    return table
