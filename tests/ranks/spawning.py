"""Starts the ranks of a run as processes of their own, and ends them when time is up."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.forked import start

TIME_LIMIT_S = 600


class Ended(NamedTuple):
    """A rank's exit code (None if it was ended here), and what it printed and warned."""

    code: int | None
    printed: str
    errors: str


def launch(
    folder: Path, module: str, *commands: tuple[str, ...], may_fail: Collection[int] = (), **told: str
) -> list[Ended]:
    """Run ``python -m module`` as ranks, in the environment that torch's launcher gives them, and wait for all.

    Args:
        folder: Where logs go.
        module: Its name.
        commands: The arguments of each rank.
        may_fail: The ranks that may fail; where another one fails, all are ended.
        told: Environment variables besides.
    """
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = str(len(commands))
    told |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank_{rank}_of_{world}" for rank in range(len(commands))]
    ranks = []
    try:
        for rank, (log, command) in enumerate(zip(logs, commands)):
            ranks.append(start(module, *command, log=log, told=told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        end = time.monotonic() + TIME_LIMIT_S
        for number, rank in enumerate(ranks):
            rank.join(max(end - time.monotonic(), 1))
            if rank.exitcode != 0 and number not in may_fail:
                break
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    texts = [(log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text()) for log in logs]
    return [Ended(code, *text) for code, text in zip(codes, texts)]


def together(
    folder: Path, world: int, *tasks: str, killed: int | None = None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """What each task gives on each rank; all of them run in one process a rank, one after another.

    Args:
        folder: Where the ranks may write.
        world: Number of ranks.
        tasks: Names of functions; see :mod:`tests.ranks.worker`.
        killed: A rank that ends itself, and gives nothing.
        device: ``cpu``, over gloo, or ``cuda``, over nccl; of :mod:`tests.ranks.parallel` only.
    """
    commands = [(str(rank), str(world), str(folder), *tasks) for rank in range(world)]
    may_fail = () if killed is None else (killed,)
    ended = launch(folder, "tests.ranks.worker", *commands, may_fail=may_fail, NEURONSCOPE_RANKS_ON=device)
    given = [number for number in range(world) if number != killed]
    for number in given:
        assert ended[number].code in (0, None), f"exit code {ended[number].code}\n{ended[number].errors[-4000:]}"
    assert all(ended[number].code == 0 for number in given), "not all ranks ended in time"
    return [torch.load(folder / f"{number}_of_{world}.pt", weights_only=False) for number in given]
