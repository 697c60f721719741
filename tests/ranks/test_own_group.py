"""Counts are joined on a process group of the library's own, whatever the trainer does with its group meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from neuronscope.tally.distributed import collectives
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.own_group import JOIN_STEPS, OWN_GROUP, WINDOW
from tests.ranks.recorded import union
from tests.ranks.spawning import together
from tests.ranks.uneven import BATCH, recorded


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each task gives on each of two ranks."""
    return together(tmp_path_factory.mktemp("own_group"), 2, *(task.__name__ for task in OWN_GROUP))


def of_both(steps: int) -> dict[str, Any]:
    """The twin's counts of both ranks' shares of so many steps."""
    ranks = [recorded(range(steps), rank, 2) for rank in range(2)]
    return {name: union([rank[name] for rank in ranks]) for name in ranks[0]}


def test_a_collective_call_of_the_trainer_may_be_pending(given: list[dict[str, Any]]) -> None:
    """On one rank it begins before the exchange, on the other after it: on one group each would meet the other."""
    for rank in given:
        assert_equal_counts(rank["still_under_way"]["counted"], of_both(2 * WINDOW))
        assert rank["still_under_way"]["theirs"] == [(1 + 2) * 2 ** (2 * WINDOW - 1)] * 3  # each sum doubles the last


def test_the_trainer_may_recreate_its_process_group(given: list[dict[str, Any]]) -> None:
    for rank in given:
        assert_equal_counts(rank["begun_anew"]["counted"], of_both(2 * WINDOW + 1))


@pytest.mark.parametrize("task", ["joined", "joined_inside"])
def test_ranks_may_run_out_of_data_inside_torchs_join_context(given: list[dict[str, Any]], task: str) -> None:
    """The rank that is through answers DistributedDataParallel only: the exchange waits until both are."""
    found = [rank[task] for rank in given]
    wanted = {name: union([rank["recorded"][name] for rank in found]) for name in found[0]["recorded"]}
    assert {counts["examples"] for counts in wanted.values()} == {sum(JOIN_STEPS) * BATCH // 2}
    for rank in found:
        assert rank["same_weights"]
        assert_equal_counts(rank["counted"], wanted)


@pytest.mark.parametrize(
    ("default", "has_gloo", "own", "device"),
    [
        ("gloo", True, None, "cpu"),
        ("nccl", True, "gloo", "cuda"),
        ("nccl", False, None, "cuda"),
        ("mpi", True, None, "cpu"),
        ("cpu:gloo,cuda:nccl", True, None, "cpu"),
    ],
)
def test_counts_are_joined_on_the_host_if_a_backend_can(
    monkeypatch: pytest.MonkeyPatch, default: str, has_gloo: bool, own: str | None, device: str
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group=None: default)
    monkeypatch.setattr(dist, "is_gloo_available", lambda: has_gloo)
    assert collectives._own_backend() == own
    assert collectives._device_of(default) == torch.device(device)
