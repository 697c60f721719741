"""Where a rank is killed, raises, is slow or ends early, all ranks end with the exit codes of an unwatched run.

The codes are those that :mod:`tests.ranks.endings` comes to when it does not watch (torch 2.13, over gloo).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.ranks.endings import END, STEPS
from tests.ranks.spawning import ROOT, as_launched
from tests.ranks.uneven import BATCH

TIME_LIMIT_S = 150


def end(how: str) -> list[tuple[int, str, str]]:
    """Return each rank's exit code, and what it printed and warned."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.ranks.endings"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), how, "watched"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **as_launched(rank, 2, port)},
        )
        for rank in range(2)
    ]
    try:
        texts = [rank.communicate(timeout=TIME_LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, *text) for rank, text in zip(ranks, texts, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes"),
    [
        ("slow", [0, 0]),
        ("killed", [1, -signal.SIGKILL]),
        ("raises", [1, 1]),
        ("early", [1, 0]),
        ("killed_alone", [0, -signal.SIGKILL]),
    ],
)
def test_ranks_end_with_the_exit_codes_of_an_unwatched_run(how: str, codes: list[int]) -> None:
    ranks = end(how)
    assert [code for code, _, _ in ranks] == codes, ranks
    for code, text, warned in ranks:
        if how == "slow":
            assert text.startswith(f"0/relu {STEPS * BATCH} ")
            assert "NeuronscopeWarning" not in warned
        elif code == 0:  # it says that the other rank's counts are missing; those of the first window are there
            at_least = (STEPS if how == "killed_alone" else END) * BATCH // 2
            assert int(text.split()[1]) > at_least
            assert "counts of the other ranks could not be joined" in text
            assert warned.count("NeuronscopeWarning") == 1
