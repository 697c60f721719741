"""The command ``neuronscope shrink``: its arguments and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from neuronscope.checkpoints.data.user_code import describe_exception
from neuronscope.errors import UsageError
from neuronscope.output import print_and_flush

__all__ = ["add_shrink"]


def add_shrink(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser; its default ``call`` runs it and returns the exit code."""
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
    command.add_argument(
        "--model",
        metavar="PKG.MOD:FACTORY",
        required=True,
        help="the network: a function or class that creates it, or a Hugging Face folder",
    )
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
    command.add_argument(
        "--trust",
        action="store_true",
        help="allow full unpickling; this runs code in the file, so only for files that you trust",
    )
    command.set_defaults(call=_run)


def _run(parsed: argparse.Namespace) -> int:
    from neuronscope.checkpoints.shrink_checkpoint import record_path, shrink_checkpoint  # loads torch

    try:
        shrunk = shrink_checkpoint(parsed.checkpoint, parsed.model, parsed.data, parsed.out, trust=parsed.trust)
    except SystemExit as error:  # raised by a method of the model or the data
        raise UsageError(
            f"Expected the model and the data to be usable, but their code {describe_exception(error)}"
        ) from error
    except OSError as error:
        raise UsageError(f"Cannot write {error.filename or parsed.out}: {error.strerror or error}.") from error
    print_and_flush(f"{shrunk}\nWrote {parsed.out}, and the new widths beside it: {record_path(parsed.out)}.\n")
    return 0
