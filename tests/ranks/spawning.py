"""Starts the ranks of a run as processes of their own, and ends them when time is up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 600


def as_launched(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch's launcher tells a rank in its environment."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    told = {name: str(number) for name, number in (places | {"MASTER_PORT": port}).items()}
    return {**told, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = [sys.executable, "-m", "tests.ranks.worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEURONSCOPE_RANKS_ON": device}
    logs = [folder / f"rank_{rank}_of_{world}.log" for rank in range(world)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as errors:
                command = [*worker, str(rank), str(world), str(folder), *tasks]
                told = environment | as_launched(rank, world, port)
                ranks.append(subprocess.Popen(command, stderr=errors, cwd=ROOT, env=told))
        end = time.monotonic() + TIME_LIMIT_S
        for number, (rank, log) in enumerate(zip(ranks, logs)):
            rank.wait(timeout=max(end - time.monotonic(), 1))
            assert rank.returncode == 0 or number == killed, log.read_text()[-4000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    given = [number for number in range(world) if number != killed]
    return [torch.load(folder / f"{number}_of_{world}.pt", weights_only=False) for number in given]
