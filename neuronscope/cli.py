"""The command line: parse the arguments, run the command, return an exit code.

Exit codes: 0 = fine, 1 = a check failed, 2 = wrong use or unreadable input, 130 = interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import neuronscope
from neuronscope.checkpoints.checkpoint_commands import add_postmortem, add_shrink
from neuronscope.command_output import positive_number
from neuronscope.errors import NeuronscopeError, UsageError
from neuronscope.output import discard_output, print_and_flush
from neuronscope.report_commands import add_diff, add_report, add_scan
from neuronscope.writers.formatting import visible

__all__ = ["command_parser", "main"]

OK, WRONG_USE, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``neuronscope`` command with arguments, by default those of ``sys.argv``, and return the exit code.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    try:
        return _run(arguments)
    finally:
        try:
            print_and_flush()  # argparse prints help and the version without flushing
        except OSError as error:
            print(f"neuronscope: Cannot write to standard output: {error.strerror}.", file=sys.stderr)
            sys.exit(WRONG_USE)


def _run(arguments: Sequence[str] | None) -> int:
    parser = command_parser()
    parsed = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that cannot show "±" must not end a run
    command: Callable[[argparse.Namespace], int] | None = getattr(parsed, "call", None)
    if command is None:
        parser.print_help(sys.stderr)
        return WRONG_USE
    try:
        return command(parsed)
    except NeuronscopeError as error:
        if parsed.debug:
            raise
        # One line, even if a user's own error or a hostile name in a checkpoint contains several.
        print(f"neuronscope: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("neuronscope: interrupted", file=sys.stderr)
        return INTERRUPTED


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the ``neuronscope`` command; tools make shell completion from it."""
    parser = argparse.ArgumentParser(prog="neuronscope", description="Dead-neuron diagnostics for PyTorch.")
    parser.add_argument("--version", action="version", version=f"neuronscope {neuronscope.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    add_postmortem(commands)
    add_shrink(commands)
    add_scan(commands)
    add_report(commands)
    add_diff(commands)
    for command in commands.choices.values():  # `--debug` is accepted after the command too
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="compare activation functions on real data",
        description=(
            "Trains the same network on scikit-learn's digits with ReLU, GELU, SiLU and others, and with no "
            "activation, and watches which neurons die. Makes a table, a picture, TensorBoard logs and an HTML report "
            "in two to three minutes."
        ),
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="output folder (default: %(default)s); only files of an earlier demo are replaced in it",
    )
    demo.add_argument(
        "--seeds",
        type=positive_number,
        default=5,
        metavar="N",
        help="training runs per activation function (default: %(default)s)",
    )
    demo.add_argument("--quick", action="store_true", help="ReLU, GELU and SiLU only")
    demo.add_argument(
        "--processes",
        type=positive_number,
        default=2,
        metavar="N",
        help="training runs at a time; the results do not depend on it (default: %(default)s)",
    )
    demo.set_defaults(call=_demo)


def _demo(parsed: argparse.Namespace) -> int:
    from neuronscope.demo.program import run_demo  # loads torch

    try:
        run_demo(parsed.out, parsed.seeds, quick=parsed.quick, processes=parsed.processes)
    except OSError as error:
        if error.filename is None:
            discard_output()
        target = error.filename or f"to standard output or into {parsed.out}"
        raise UsageError(f"Cannot write {target}: {error.strerror or error}.") from error
    return OK
