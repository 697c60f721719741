"""A Hugging Face training that is killed and resumed again and again ends with the counts of one that never stopped."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.callbacks.killed import COUNTS
from tests.callbacks.test_resume import assert_equal
from tests.forked import start

STEPS, SAVE_STEPS = 14, 3


@pytest.mark.slow
def test_a_training_killed_and_resumed_has_the_counts_of_an_unbroken_one(tmp_path: Path) -> None:
    runs = [("whole", -1), ("run", 2), ("run", 8), ("run", -1)]  # killed before the first checkpoint, and in a window
    for name, killed_at in runs:
        arguments = (str(tmp_path / name), str(STEPS), str(SAVE_STEPS), str(killed_at))
        run = start("tests.callbacks.killed", *arguments, log=tmp_path / "log")
        run.join()
        assert run.exitcode == (0 if killed_at < 0 else -signal.SIGKILL), (tmp_path / "log.err").read_text()[-4000:]
    whole, broken = (torch.load(tmp_path / name / COUNTS, weights_only=True) for name in ("whole", "run"))
    assert_equal(broken, whole, "scope")
    windows = whole["phases"]["train"]["history"]["windows"]
    assert windows >= 2
