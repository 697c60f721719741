"""Two gloo processes on one machine: their counts together equal one process over the union of the data, exactly."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import neuronscope as ns

from .worker import BATCH, STEPS, data, disjoint, network, watched_counts

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

TIME_LIMIT_S = 90
ROOT = Path(__file__).resolve().parents[2]


def together(folder: Path, task: str, script: str = "worker.py") -> list[Any]:
    """What a task gives on each of two ranks; they are killed when time is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = str(Path(__file__).with_name(script))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, path, task, str(rank), str(port), str(folder)], stderr=subprocess.PIPE, env=environment
        )
        for rank in range(2)
    ]
    end = time.monotonic() + TIME_LIMIT_S
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=max(end - time.monotonic(), 1))
            assert rank.returncode == 0, errors.decode()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal_counts(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for name in wanted:
        for field, value in wanted[name].items():
            np.testing.assert_array_equal(found[name][field], value, err_msg=f"{name} {field}")


@pytest.mark.parametrize("task", ["both_train", "both_train_in_short_windows"])
def test_counts_are_those_of_one_process_over_both_halves(tmp_path: Path, task: str) -> None:
    # Gradients are of each rank's own loss, so one process sees them by running each half for itself; no step is
    # taken on the weights, so both halves meet the same network.
    model = network()
    with ns.watch(model) as scope:
        for halves in zip(data(0), data(1), strict=True):
            for x, y in halves:
                nn.functional.cross_entropy(model(x), y).backward()
            scope.step()
    wanted = watched_counts(scope)
    assert wanted["1"]["examples"] == 2 * STEPS * BATCH
    for found in together(tmp_path, task):
        assert_equal_counts(found, wanted)


def test_ranks_that_fire_disjoint_units(tmp_path: Path) -> None:
    # Unit 0 fires on rank 0 alone and unit 1 on rank 1 alone: dead are unit 2, whose bias is -100, and what the zero
    # input of the other features leaves silent on both ranks.
    apart = together(tmp_path, "fire_apart")
    assert apart[0] == apart[1]
    alone = []
    for rank in range(2):
        model = network()
        x = disjoint(model, rank)[0][0]
        alone.append((torch.relu(model[0](x)) == 0).all(0))
    assert apart[0] == int((alone[0] & alone[1]).sum()) < min(int(mask.sum()) for mask in alone)


def test_a_rank_that_saw_nothing_gets_what_the_other_saw(tmp_path: Path) -> None:
    first, second = together(tmp_path, "one_sees_nothing")
    assert first["1"]["positions"] == STEPS * BATCH
    assert_equal_counts(second, first)


def test_a_scan_on_one_rank_waits_for_nobody(tmp_path: Path) -> None:
    assert together(tmp_path, "one_scans") == [32, 0]
