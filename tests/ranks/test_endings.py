"""Where a rank is killed, raises, is slow or ends early, all ranks end with the exit codes of an unwatched run.

The codes are those that :mod:`tests.ranks.endings` comes to when it does not watch (torch 2.13, over gloo).
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ranks.endings import END, STEPS
from tests.ranks.spawning import launch
from tests.ranks.uneven import BATCH


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
def test_ranks_end_with_the_exit_codes_of_an_unwatched_run(tmp_path: Path, how: str, codes: list[int]) -> None:
    ranks = launch(tmp_path, "tests.ranks.endings", ("0", how, "watched"), ("1", how, "watched"), may_fail=(0, 1))
    assert [rank.code for rank in ranks] == codes, ranks
    for rank in ranks:
        if how == "slow":
            assert rank.printed.startswith(f"0/relu {STEPS * BATCH} ")
            assert "NeuronscopeWarning" not in rank.errors
        elif rank.code == 0:  # it says that the other rank's counts are missing; those of the first window are there
            at_least = (STEPS if how == "killed_alone" else END) * BATCH // 2
            assert int(rank.printed.split()[1]) > at_least
            assert "counts of the other ranks could not be joined" in rank.printed
            assert rank.errors.count("NeuronscopeWarning") == 1
