"""Two gloo processes on one machine: their counts together equal one process over the union of the data, exactly."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import neuronscope as ns
from tests.core.slow_twin import assert_bits, state_of
from tests.ranks.worker import BATCH, STEPS, adam, data, disjoint, network, watched_counts

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

TIME_LIMIT_S = 90
ROOT = Path(__file__).parents[2]


def together(folder: Path, task: str) -> list[Any]:
    """What a task gives on each of two ranks; they are killed when time is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = [sys.executable, "-m", "tests.ranks.worker", task]
    ranks = [
        subprocess.Popen([*worker, str(rank), str(port), str(folder)], stderr=subprocess.PIPE, cwd=ROOT)
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


class OneProcess(NamedTuple):
    """A run of one process over both ranks' data: the two halves of each step one after the other, then the step."""

    counts: dict[str, Any]
    weights: dict[str, Tensor]
    random: list[Tensor]  # where each rank's random numbers stand in the end


def one_process(**options: Any) -> OneProcess:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have it: the order of sums is then the same
    random = [torch.Generator().manual_seed(rank).get_state() for rank in range(2)]
    model = network()
    optimizer = adam(model)
    with ns.watch(model, **options) as scope:
        for halves in zip(data(0), data(1), strict=True):
            for rank, (x, y) in enumerate(halves):
                torch.set_rng_state(random[rank])
                (nn.functional.cross_entropy(model(x), y) / 2).backward()  # DDP gives the mean over the ranks
                random[rank] = torch.get_rng_state()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
    torch.set_num_threads(threads)
    return OneProcess(watched_counts(scope), state_of(model), random)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("both_train", {}),
        ("both_train_in_short_windows", {"window_steps": 2}),
        ("both_train_observed_at_times", {"every_n_steps": 3}),
    ],
)
def test_counts_are_those_of_one_process_over_both_halves(tmp_path: Path, task: str, options: dict[str, Any]) -> None:
    """And watching changes no bit of the weights and no random number, and leaves the hook tables as they were."""
    alone = one_process(**options)
    every = options.get("every_n_steps", 1)
    assert alone.counts["1"]["examples"] == 2 * BATCH * len(range(0, STEPS, every))
    for rank, found in enumerate(together(tmp_path, task)):
        assert_equal_counts(found["counts"], alone.counts)
        for weights, random in zip(found["weights"], found["random"], strict=True):  # unwatched, watched
            assert_bits(weights, alone.weights)
            assert random.equal(alone.random[rank])
        assert found["hooks"] == [True, True]


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
