"""The commands ``neuronscope postmortem`` and ``shrink``: their arguments, and what they do."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from neuronscope.checkpoints.user_code import exits_refused
from neuronscope.command_output import (
    EXIT_OK,
    add_check_option,
    add_output_options,
    check_dead,
    check_targets,
    number_between,
    write_report,
)
from neuronscope.errors import CheckpointError, UsageError
from neuronscope.output import print_and_flush

if TYPE_CHECKING:
    from neuronscope.checkpoints.run import Progress

__all__ = ["add_postmortem", "add_shrink"]

_MODEL = "the network: a function or class that creates it, or a Hugging Face folder"


def add_postmortem(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``postmortem`` to a parser; its default ``call`` runs it and returns the exit code."""
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
    command.add_argument("--model", metavar="PKG.MOD:FACTORY", help=_MODEL)
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
    _add_trust(command)
    add_output_options(command)
    add_check_option(
        command,
        "more than PCT percent of all neurons are dead, never trained or without gradient, if a whole layer has "
        "collapsed, or if any neuron is NaN or infinite. Proved, measured and inferred verdicts count; suspected ones "
        "and layers that get no gradient as a whole do not",
    )
    command.set_defaults(call=_postmortem)


def add_shrink(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``shrink`` to a parser; its default ``call`` runs it and returns the exit code."""
    command = commands.add_parser(
        "shrink",
        help="write a smaller checkpoint without the neurons that are dead on data",
        description=(
            "Takes the neurons that are dead on all of the data out of a network, runs both networks on the data, and "
            "writes the smaller one if they agree, with a record of the new widths beside it. Exit codes: 0: written; "
            "2: wrong usage, or nothing can be taken out: nothing is written then."
        ),
    )
    command.add_argument("checkpoint", metavar="CKPT", help="the checkpoint: a file or a folder")
    command.add_argument("--model", metavar="PKG.MOD:FACTORY", required=True, help=_MODEL)
    command.add_argument(
        "--data",
        metavar="PKG.MOD:FACTORY",
        required=True,
        help="a function that returns batches to run both networks on",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="F",
        required=True,
        help="where to write the smaller weights: small.pt, or small.safetensors",
    )
    _add_trust(command)
    command.set_defaults(call=_shrink)


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust",
        action="store_true",
        help="allow full unpickling; this runs code in the file, so only for files that you trust",
    )


def _postmortem(parsed: argparse.Namespace) -> int:
    from neuronscope.checkpoints.run import postmortem  # loads torch

    check_targets(parsed)
    with _progress_bars() as progress, exits_refused():
        report = postmortem(
            parsed.checkpoints,
            parsed.model,
            parsed.data,
            parsed.loss,
            optimizer=parsed.optimizer,
            step=parsed.step,
            earlier=parsed.earlier,
            fixed_data=parsed.fixed_data,
            box=None if parsed.box is None else tuple(parsed.box),
            wake_seconds=parsed.wake,
            seed=parsed.seed,
            example=parsed.example,
            trust=parsed.trust,
            progress=progress,
        )
    write_report(report, parsed)
    unreadable = [] if report.timeline is None else [one for one in report.timeline.left_out if one.unreadable]
    if unreadable:
        reasons = "; ".join(one.reason.rstrip(".") for one in unreadable[:3])
        raise CheckpointError(f"Left out, since it could not be read ({len(unreadable)} in all): {reasons}.")
    return EXIT_OK if parsed.fail_above is None else check_dead(report, parsed.fail_above, report.not_finite)


def _shrink(parsed: argparse.Namespace) -> int:
    from neuronscope.checkpoints.shrink_checkpoint import record_path, shrink_checkpoint  # loads torch

    try:
        with exits_refused():
            shrunk = shrink_checkpoint(parsed.checkpoint, parsed.model, parsed.data, parsed.out, trust=parsed.trust)
    except OSError as error:
        raise UsageError(f"Cannot write {error.filename or parsed.out}: {error.strerror or error}.") from error
    print_and_flush(f"{shrunk}\nWrote {parsed.out}, and the new widths beside it: {record_path(parsed.out)}.\n")
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
    return number_between(text, sys.float_info.max, "a number of seconds, 0 or more")
