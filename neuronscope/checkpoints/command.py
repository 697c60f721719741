"""The command ``neuronscope postmortem``: its arguments, progress bars on a terminal, files to write, exit code."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from neuronscope.checkpoints.data.user_code import describe_exception
from neuronscope.errors import UsageError
from neuronscope.output import check_writable, print_whole, write_file

if TYPE_CHECKING:
    from neuronscope.checkpoints.postmortem_report import PostmortemReport
    from neuronscope.checkpoints.progress import Progress

__all__ = ["add_postmortem"]

EXIT_OK, EXIT_FAILED = 0, 1


def add_postmortem(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a command line; its ``call`` gives the exit code."""
    command = commands.add_parser(
        "postmortem",
        help="find out from a checkpoint which neurons are dead, since when, how sure that is, and why",
        description=(
            "Reads a checkpoint and says which neurons are dead, since when, how sure that is, and why. The file alone "
            "will do; a model adds proofs, data exact counts. Exit code 0: fine; 1: --fail-above; 2: bad use, or a "
            "checkpoint that cannot be read."
        ),
    )
    command.add_argument("checkpoint", metavar="CKPT", help="the checkpoint: a file or a folder")
    command.add_argument(
        "--model",
        metavar="PKG.MOD:FACTORY",
        help="the network: a function or class that makes it, or a Hugging Face folder",
    )
    command.add_argument("--data", metavar="PKG.MOD:FACTORY", help="a function that gives batches to run it over")
    command.add_argument(
        "--example",
        metavar="SHAPE|PKG.MOD:FN",
        help=(
            "an input to run the network on once, where none can be guessed: a shape, as 1x3x224x224 (several inputs: "
            "1x3x224x224,1x7; of another type: 1x16:int64), or a function that makes it"
        ),
    )
    command.add_argument("--loss", metavar="PKG.MOD:FN", help="loss(output, batch): adds gradients")
    command.add_argument("--earlier", metavar="CKPT", help="an earlier checkpoint of the same run: sharpens since when")
    command.add_argument(
        "--box", nargs=2, type=float, metavar=("LOW", "HIGH"), help="every element of the input lies between these"
    )
    command.add_argument("--trust", action="store_true", help="unpickle what names code: this runs the file's code")
    command.add_argument("--html", type=Path, metavar="F", help="write a page to look at")
    command.add_argument("--json", type=Path, metavar="F", help="write everything, for programs")
    command.add_argument("--markdown", type=Path, metavar="F", help="write markdown")
    command.add_argument(
        "--fail-above",
        type=_percentage,
        metavar="PCT",
        help=(
            "exit code 1 when more than PCT percent of all neurons are dead, never trained or without gradient on firm "
            "ground (proved, measured, inferred; what is only suspected, and layers that are idle as a whole, do not "
            "count), when a whole layer has collapsed, or when any neuron is not finite"
        ),
    )
    command.set_defaults(call=_run)


def _run(parsed: argparse.Namespace) -> int:
    from neuronscope.checkpoints.run import postmortem  # loads torch

    targets: list[tuple[Path, str]] = [
        (path, kind) for kind in ("html", "json", "markdown") if (path := getattr(parsed, kind)) is not None
    ]
    _each_written((path, partial(check_writable, path)) for path, _ in targets)
    with _bars() as progress:
        try:
            report = postmortem(
                parsed.checkpoint,
                parsed.model,
                parsed.data,
                parsed.loss,
                earlier=parsed.earlier,
                box=None if parsed.box is None else (parsed.box[0], parsed.box[1]),
                example=parsed.example,
                trust=parsed.trust,
                progress=progress,
            )
        except SystemExit as error:  # of the model's or the data's own methods, wherever they are called
            raise UsageError(
                f"Expected the model and the data to be usable, but their code {describe_exception(error)}"
            ) from error
    tasks: list[tuple[Path | str, Callable[[], None]]] = [("to standard output", lambda: print_whole(f"{report}\n"))]
    tasks += [(path, partial(_write, report, kind, path)) for path, kind in targets]
    _each_written(tasks)
    return EXIT_OK if parsed.fail_above is None else _checked(report, parsed.fail_above)


def _write(report: PostmortemReport, kind: str, path: Path) -> None:
    render: Callable[[], str] = getattr(report, f"to_{kind}")
    write_file(path, render())


def _each_written(tasks: Iterable[tuple[Path | str, Callable[[], None]]]) -> None:
    """Write to each target, though one before it failed.

    Args:
        tasks: Targets, as a message names them, and what writes to each.

    Raises:
        UsageError: Some could not be written to.
    """
    faults = [fault for target, write in tasks if (fault := _fault(target, write)) is not None]
    if faults:
        raise UsageError(f"Cannot write {'; '.join(faults)}.")


def _fault(target: Path | str, write: Callable[[], None]) -> str | None:
    try:
        write()
    except OSError as error:
        return f"{target}: {error.strerror or error}"
    return None


def _checked(report: PostmortemReport, limit: float) -> int:
    """The exit code of ``--fail-above``; says on standard error what was compared."""
    dead = report.dead_percent
    said = f"{report.dead:,} of {report.neurons:,} neurons ({dead:.4g} %) dead on firm ground"
    if report.not_finite:
        print(f"neuronscope: failed: {report.not_finite:,} neurons are NaN or infinite; {said}.", file=sys.stderr)
        return EXIT_FAILED
    if report.collapsed:
        which = f"layer{'s' if len(report.collapsed) > 1 else ''} {', '.join(report.collapsed[:3])}"
        more = f" and {len(report.collapsed) - 3} more" if len(report.collapsed) > 3 else ""
        print(f"neuronscope: failed: {which}{more} collapsed, no neuron is left; {said}.", file=sys.stderr)
        return EXIT_FAILED
    if math.isnan(dead):
        raise UsageError("Expected neurons to compare with --fail-above, but no layer could be examined.")
    if dead > limit:
        print(f"neuronscope: failed: {said}, more than {limit:g} %.", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


@contextlib.contextmanager
def _bars() -> Iterator[Progress | None]:
    """Progress bars on standard error; none where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield progress


def _percentage(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number <= 100.0:
        raise argparse.ArgumentTypeError(f"expected a percentage from 0 to 100, but got {text!r}")
    return number
