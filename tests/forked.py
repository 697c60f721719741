"""Run ``python -m MODULE`` in processes that find torch and the trainers imported: they are forked, not started anew.

To import these takes up to 7 s of a core, and most of what such a process does in a test takes less. One process
(Python's own fork server) imports them and does nothing else; our own modules are imported in each fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
#: What a fork finds imported. None of these starts a thread or computes anything.
IMPORTED = (
    *("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.utils.checkpoint"),
    *("lightning.pytorch", "accelerate", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"),
)
ALONE = {"OMP_NUM_THREADS": "1"}

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__, *IMPORTED])
_path = list(sys.path)  # in a fork: that of a new process, without what pytest adds


def start(module: str, *arguments: str, log: Path, told: dict[str, str] | None = None) -> BaseProcess:
    """Start ``python -m module arguments`` in the root of the repository, in a process group of its own.

    Args:
        module: Its name.
        arguments: Of the command.
        log: What it prints goes to this file with the suffix ``.out``, errors to that with ``.err``.
        told: Environment variables, besides those of this process.
    """
    process = _forks.Process(target=_run, args=(module, arguments, log, {**os.environ, **ALONE, **(told or {})}))
    with _as_the_server_begins():
        process.start()
    return process


@contextlib.contextmanager
def _as_the_server_begins() -> Iterator[None]:
    """Have the fork server, which the first process starts, find this module, and torch in it one thread."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with mock.patch.dict(os.environ, ALONE):
            yield
    finally:
        os.chdir(before)


def _run(module: str, arguments: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
    os.setpgrp()
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:], sys.argv[1:] = _path, arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
