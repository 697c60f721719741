"""The options that say where a command's report goes, what is written there, and the check that ends with exit code 1.

They are the same for every command that makes a report.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from neuronscope.errors import UsageError
from neuronscope.output import check_writable, print_and_flush
from neuronscope.report.rendering import Shown
from neuronscope.writers.formatting import visible

if TYPE_CHECKING:
    from neuronscope.checkpoints.postmortem_report import PostmortemReport
    from neuronscope.report.report import Report

__all__ = [
    "EXIT_FAILED",
    "EXIT_OK",
    "add_check_option",
    "add_output_options",
    "check_dead",
    "check_targets",
    "fail",
    "number_between",
    "positive_number",
    "write_report",
]

EXIT_OK, EXIT_FAILED = 0, 1

#: The formats of files, and what ``--help`` says of them.
_FORMATS = {"html": "write an HTML page", "json": "write the whole report as JSON", "markdown": "write Markdown"}


def add_output_options(command: argparse.ArgumentParser, formats: Iterable[str] = _FORMATS) -> None:
    """Add the options that say where the report goes.

    Args:
        command: The command.
        formats: The formats of files that its report has.
    """
    for name in formats:
        command.add_argument(f"--{name}", type=Path, metavar="F", help=_FORMATS[name])
    command.add_argument(
        "--top",
        type=positive_number,
        default=20,
        metavar="N",
        help="most layers with a row: of more, the worst (%(default)s)",
    )
    command.add_argument(
        "--quiet", action="store_true", help="print no report; files, errors and the exit code stay the same"
    )


def add_check_option(command: argparse.ArgumentParser, what: str) -> None:
    """Add ``--fail-above``.

    Args:
        command: The command.
        what: When the command then exits with code 1, after ``exit with code 1 if``.
    """
    percentage = partial(number_between, highest=100.0, what="a percentage from 0 to 100")
    command.add_argument("--fail-above", type=percentage, metavar="PCT", help=f"exit with code 1 if {what}")


def check_targets(parsed: argparse.Namespace) -> None:
    """Raise UsageError before the long work begins if a file cannot be written."""
    _write_all((path, partial(check_writable, path)) for _, path in _targets(parsed))


def write_report(report: Shown, parsed: argparse.Namespace) -> None:
    """Print a report and write its files; each is written even if one before it failed.

    Args:
        report: The report.
        parsed: The options.
    """
    tasks: list[tuple[Path | str, Callable[[], None]]] = []
    if not parsed.quiet:
        tasks.append(("to standard output", lambda: print_and_flush(f"{report.to_text(parsed.top)}\n")))
    tasks += [(path, partial(getattr(report, f"to_{kind}"), path)) for kind, path in _targets(parsed)]
    _write_all(tasks)


def check_dead(report: Report | PostmortemReport, limit: float, not_finite: int, remark: str = "") -> int:
    """Return the exit code of ``--fail-above``, and print to standard error why the check failed.

    It fails if more than ``limit`` percent of the neurons are dead, if a layer has collapsed, or if there is NaN.

    Args:
        report: The report.
        limit: Percent.
        not_finite: Number of neurons that are NaN or infinite.
        remark: What to add about how sure it is.
    """
    dead = report.dead_percent
    counted = f"{report.dead:,} of {report.judged_neurons:,} neurons ({dead:.4g} %) are dead{remark}"
    if not_finite:
        return fail(f"{not_finite:,} neurons are NaN or infinite; {counted}.")
    if report.collapsed:
        which = f"layer{'s' if len(report.collapsed) > 1 else ''} {', '.join(report.collapsed[:3])}"
        more = f" and {len(report.collapsed) - 3} more" if len(report.collapsed) > 3 else ""
        return fail(f"{which}{more} collapsed, no neuron is left; {counted}.")
    if math.isnan(dead):
        raise UsageError("Expected neurons to compare with --fail-above, but no layer was examined.")
    return fail(f"{counted}, more than {limit:g} %.") if dead > limit else EXIT_OK


def fail(reason: str) -> int:
    """Print to standard error why a check failed, and return its exit code."""
    print(f"neuronscope: failed: {visible(reason)}", file=sys.stderr)
    return EXIT_FAILED


def _targets(parsed: argparse.Namespace) -> list[tuple[str, Path]]:
    return [(kind, path) for kind in _FORMATS if (path := getattr(parsed, kind, None)) is not None]


def _write_all(tasks: Iterable[tuple[Path | str, Callable[[], None]]]) -> None:
    """Call the function of each target, named for messages, even if one before it failed; then raise what failed."""

    def failure(target: Path | str, write: Callable[[], None]) -> str:
        try:
            write()
        except OSError as error:
            return f"{target}: {error.strerror or error}"
        return ""

    failures = [text for target, write in tasks if (text := failure(target, write))]
    if failures:
        raise UsageError(f"Cannot write {'; '.join(failures)}.")


def positive_number(text: str) -> int:
    """Return the whole number, 1 or more, that an argument gives; for ``argparse``."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {text!r}")
    return number


def number_between(text: str, highest: float, what: str) -> float:
    """Return the number, from 0 to ``highest``, that an argument gives; for ``argparse``.

    Args:
        text: The argument.
        highest: The highest number that is allowed.
        what: What was expected, in words.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number <= highest:
        raise argparse.ArgumentTypeError(f"expected {what}, but got {text!r}")
    return number
