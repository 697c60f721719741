"""The command ``neuronscope postmortem``: its arguments, progress bars, output files and exit code."""

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
from neuronscope.errors import CheckpointError, UsageError
from neuronscope.output import check_writable, print_and_flush, write_file

if TYPE_CHECKING:
    from neuronscope.checkpoints.postmortem_report import PostmortemReport
    from neuronscope.checkpoints.progress import Progress

__all__ = ["add_postmortem"]

EXIT_OK, EXIT_FAILED = 0, 1


def add_postmortem(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser; its default ``call`` runs it and returns the exit code."""
    command = commands.add_parser(
        "postmortem",
        help="find out from a checkpoint which neurons are dead, since when, how sure that is, and why",
        description=(
            "Reads a checkpoint and reports which neurons are dead, since when, how sure that is, and why. The file "
            "alone is enough; a model adds proofs, and data adds exact counts. Exit codes: 0: fine; 1: the check of "
            "--fail-above failed; 2: wrong usage, or a checkpoint that cannot be read."
        ),
    )
    command.add_argument(
        "checkpoints",
        metavar="CKPT",
        nargs="+",
        help=(
            "the checkpoint: a file or a folder. Several of one run, or a folder of them: the report is on the one "
            "with the most steps, with a timeline of deaths and revivals between them"
        ),
    )
    command.add_argument(
        "--model",
        metavar="PKG.MOD:FACTORY",
        help="the network: a function or class that creates it, or a Hugging Face folder",
    )
    command.add_argument(
        "--data", metavar="PKG.MOD:FACTORY", help="a function that returns batches to run the network on"
    )
    command.add_argument(
        "--fixed-data",
        action="store_true",
        help=(
            "the data is the whole training set, the same in each epoch: prove which dead neurons no training on it "
            "revives"
        ),
    )
    command.add_argument(
        "--example",
        metavar="SHAPE|PKG.MOD:FN",
        help=(
            "an input for one forward pass, needed if none can be guessed: a shape such as 1x3x224x224 (several "
            "inputs: 1x3x224x224,1x7; another dtype: 1x16:int64), or a function that returns the input"
        ),
    )
    command.add_argument("--loss", metavar="PKG.MOD:FN", help="a function loss(output, batch); adds gradients")
    command.add_argument(
        "--optimizer",
        metavar="FILE",
        help="the optimizer's state, if it lies apart from the weights: a file or a folder",
    )
    command.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="how many optimizer steps were taken, if the files do not say it, or count something else",
    )
    command.add_argument(
        "--earlier", metavar="CKPT", help="an earlier checkpoint of the same run; narrows down when neurons died"
    )
    command.add_argument(
        "--box",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="bounds of every element of the input; proofs then hold within them",
    )
    command.add_argument(
        "--wake",
        type=_seconds,
        metavar="SECONDS",
        help="search the box for inputs that make dead neurons fire, at most so long (10; 0 = do not search)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of that search (0)")
    command.add_argument(
        "--trust",
        action="store_true",
        help="allow full unpickling; this runs code in the file, so only for files that you trust",
    )
    command.add_argument("--html", type=Path, metavar="F", help="write an HTML page")
    command.add_argument("--json", type=Path, metavar="F", help="write the whole report as JSON")
    command.add_argument("--markdown", type=Path, metavar="F", help="write Markdown")
    command.add_argument(
        "--fail-above",
        type=_percentage,
        metavar="PCT",
        help=(
            "exit with code 1 if more than PCT percent of all neurons are dead, never trained or without gradient, if "
            "a whole layer has collapsed, or if any neuron is NaN or infinite. Proved, measured and inferred verdicts "
            "count; suspected ones and layers that get no gradient as a whole do not"
        ),
    )
    command.set_defaults(call=_run)


def _run(parsed: argparse.Namespace) -> int:
    from neuronscope.checkpoints.run import postmortem  # loads torch

    targets: list[tuple[Path, str]] = [
        (path, kind) for kind in ("html", "json", "markdown") if (path := getattr(parsed, kind)) is not None
    ]
    _write_all((path, partial(check_writable, path)) for path, _ in targets)  # before the long work begins
    with _progress_bars() as progress:
        try:
            report = postmortem(
                parsed.checkpoints,
                parsed.model,
                parsed.data,
                parsed.loss,
                optimizer=parsed.optimizer,
                step=parsed.step,
                earlier=parsed.earlier,
                fixed_data=parsed.fixed_data,
                box=None if parsed.box is None else (parsed.box[0], parsed.box[1]),
                wake_seconds=parsed.wake,
                seed=parsed.seed,
                example=parsed.example,
                trust=parsed.trust,
                progress=progress,
            )
        except SystemExit as error:  # raised by a method of the model or the data, wherever it is called
            raise UsageError(
                f"Expected the model and the data to be usable, but their code {describe_exception(error)}"
            ) from error
    tasks: list[tuple[Path | str, Callable[[], None]]] = [
        ("to standard output", lambda: print_and_flush(f"{report}\n"))
    ]
    tasks += [(path, partial(_write, report, kind, path)) for path, kind in targets]
    _write_all(tasks)
    unreadable = [] if report.timeline is None else [one for one in report.timeline.left_out if one.unreadable]
    if unreadable:
        reasons = "; ".join(one.reason.rstrip(".") for one in unreadable[:3])
        raise CheckpointError(f"Left out, since it could not be read ({len(unreadable)} in all): {reasons}.")
    return EXIT_OK if parsed.fail_above is None else _check(report, parsed.fail_above)


def _write(report: PostmortemReport, kind: str, path: Path) -> None:
    if kind == "markdown":
        write_file(path, report.to_markdown())
    else:
        (report.to_json if kind == "json" else report.to_html)(path)


def _write_all(tasks: Iterable[tuple[Path | str, Callable[[], None]]]) -> None:
    """Write to every target, even if one before it failed.

    Args:
        tasks: The name of each target for messages, and a function that writes to it.

    Raises:
        UsageError: Some targets cannot be written to.
    """
    failures = [failure for target, write in tasks if (failure := _try_write(target, write)) is not None]
    if failures:
        raise UsageError(f"Cannot write {'; '.join(failures)}.")


def _try_write(target: Path | str, write: Callable[[], None]) -> str | None:
    """Write to one target, and return why it failed, or ``None``."""
    try:
        write()
    except OSError as error:
        return f"{target}: {error.strerror or error}"
    return None


def _check(report: PostmortemReport, limit: float) -> int:
    """Return the exit code of ``--fail-above``, and print to standard error why the check failed."""
    dead = report.dead_percent
    counted = f"{report.dead:,} of {report.neurons:,} neurons ({dead:.4g} %) are dead"
    if report.not_finite:
        print(f"neuronscope: failed: {report.not_finite:,} neurons are NaN or infinite; {counted}.", file=sys.stderr)
        return EXIT_FAILED
    if report.collapsed:
        which = f"layer{'s' if len(report.collapsed) > 1 else ''} {', '.join(report.collapsed[:3])}"
        more = f" and {len(report.collapsed) - 3} more" if len(report.collapsed) > 3 else ""
        print(f"neuronscope: failed: {which}{more} collapsed, no neuron is left; {counted}.", file=sys.stderr)
        return EXIT_FAILED
    if math.isnan(dead):
        raise UsageError("Expected neurons to compare with --fail-above, but no layer was examined.")
    if dead > limit:
        print(f"neuronscope: failed: {counted}, more than {limit:g} %.", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


@contextlib.contextmanager
def _progress_bars() -> Iterator[Progress | None]:
    """Show progress bars on standard error; yield ``None`` if standard error is not a terminal."""
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


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, but got {text!r}")
    return number


def _percentage(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number <= 100.0:
        raise argparse.ArgumentTypeError(f"expected a percentage from 0 to 100, but got {text!r}")
    return number
