"""The command line: parse, call, exit code (0 fine, 1 a check failed, 2 bad use or unreadable input)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import neuronscope
from neuronscope.checkpoints.command import add_postmortem
from neuronscope.errors import NeuronscopeError, UsageError
from neuronscope.output import discard_printed, print_whole
from neuronscope.writers.formatting import visible

__all__ = ["main"]

FINE, BAD_USE, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``neuronscope`` as from a shell.

    Args:
        arguments: What follows the command's name; ``sys.argv`` where it is not given.

    Returns:
        The exit code.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    try:
        return _called(arguments)
    finally:
        try:
            print_whole()  # what is printed by others, as help and the version are
        except OSError as error:
            print(f"neuronscope: Cannot write to standard output: {error.strerror}.", file=sys.stderr)
            sys.exit(BAD_USE)


def _called(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a "±" must not end a run on a console that lacks it
    call: Callable[[argparse.Namespace], int] | None = getattr(parsed, "call", None)
    if call is None:
        parser.print_help(sys.stderr)
        return BAD_USE
    try:
        return call(parsed)
    except NeuronscopeError as error:
        if parsed.debug:
            raise
        # One line, whatever a user's own error or a hostile name in a checkpoint put into it.
        print(f"neuronscope: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        print("neuronscope: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuronscope", description="Dead-neuron diagnostics for PyTorch.")
    parser.add_argument("--version", action="version", version=f"neuronscope {neuronscope.__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    add_postmortem(commands)
    for command in commands.choices.values():  # after the command too, where one thinks of it
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error came from"
        )
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train the activation comparison on real data",
        description=(
            "Trains the same network on scikit-learn's digits with ReLU, LeakyReLU, GELU, SiLU and others, and watches "
            "which neurons die. Ends with a table, a picture, TensorBoard logs and an HTML report, in a minute or two."
        ),
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder for what it makes (default: %(default)s); only an earlier demo's own files in it are replaced",
    )
    demo.add_argument(
        "--seeds", type=_positive, default=5, metavar="N", help="training runs of each set-up (default: %(default)s)"
    )
    demo.add_argument("--quick", action="store_true", help="ReLU, GELU and SiLU only")
    demo.set_defaults(call=_demo)


def _demo(parsed: argparse.Namespace) -> int:
    from neuronscope.demo.program import run_demo  # loads torch

    try:
        run_demo(parsed.out, parsed.seeds, quick=parsed.quick)
    except OSError as error:
        if error.filename is None:
            discard_printed()
        where = error.filename or f"to standard output or into {parsed.out}"
        raise UsageError(f"Cannot write {where}: {error.strerror or error}.") from error
    return FINE


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {text!r}")
    return number
