"""Ranks with other numbers of batches, faults on one rank, a rank that dies, and runs that go on with fewer ranks."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neuronscope as ns
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.recorded import union
from tests.ranks.spawning import together
from tests.ranks.uneven import BATCH, POLICY, STAGES, WINDOW, elastic, recorded, small, steps, windows

Runs = dict[int, list[dict[str, Any]]]


def union_of(recorded: list[dict[str, Any]]) -> dict[str, Any]:
    names = next(counts for counts in recorded if counts)
    return {name: union([counts[name] for counts in recorded if counts]) for name in names}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("task", ["uneven", "uneven_and_validated", "fault", "retired"])
def test_ranks_with_different_numbers_of_batches_lose_no_count_and_none_hangs(
    runs: Runs, world: int, task: str
) -> None:
    given = [rank[task] for rank in runs[world]]
    wanted = union_of([rank["recorded"] for rank in given])
    for rank in given:
        assert_equal_counts(rank["counted"], wanted)


@pytest.mark.parametrize("task", ["lightning_fault", "hugging_fault"])
def test_a_fault_of_ours_on_one_rank_does_not_stop_the_training(runs: Runs, task: str) -> None:
    """The training ends as the one that nobody watches; the other rank's counts are whole."""
    healthy, broken = given = [rank[task] for rank in runs[2]]
    assert (healthy["warned"], str(broken["warned"])) == (None, "a fault of ours")
    for phase in ("train", "val"):
        wanted = union_of([rank["recorded"][phase] for rank in given])
        for rank in given:
            assert_equal_counts(rank["counted"][phase], wanted)
    seen = [next(iter(rank["recorded"]["train"].values()))["examples"] for rank in given]
    assert seen[0] > seen[1] > 0
    for rank in given:
        assert rank["same_weights"]
        assert rank["same_hooks"]


@pytest.mark.parametrize("world", [2, 4])
def test_mean_magnitudes_are_computed_over_all_ranks(runs: Runs, world: int) -> None:
    """Joined sums depend on the order of ranks, in their last bits only.

    All terms are at least 0, so that each float64 addition is wrong by 2**-53 of the whole at most. Five steps are
    added up in three windows on each rank (5 additions), ranks in each of three exchanges (3 x world), windows at last
    (3); the ranks' own, to which they are compared, take 5 + 3 as well.
    """
    given = [rank["sums"] for rank in runs[world]]
    bound = (2 * (5 + 3) + 3 * world) * 2.0**-53
    for name in given[0]["joined"]:
        own = np.array([rank["own"][name] for rank in given])
        wanted = np.array([math.fsum(column) for column in own.T])
        assert (wanted > 0).any()
        for rank in given:
            assert (np.abs(rank["joined"][name] - wanted) <= bound * wanted).all()
        assert all((rank["joined"][name] == given[0]["joined"][name]).all() for rank in given)


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_ranks_agree_on_windows(runs: Runs, world: int) -> None:
    first, *others = (rank["uneven"] for rank in runs[world])
    # The first rank takes 7 steps more than each next one. Windows of 3 close at 3, 6, … if they have 29 examples: of
    # two ranks, the seventh step has 20; of four, which give 10 each, three steps of the first rank alone have 30.
    assert first["windows"]["0/relu"] == {2: [2, 5], 4: [2, 5, 8, 11, 14, 17, 20]}[world]
    for rank in others:
        assert_equal_counts(rank["last"], first["last"])
        assert rank["windows"] == first["windows"]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_may_validate_while_others_train(runs: Runs, world: int) -> None:
    for rank in runs[world]:
        assert rank["uneven_and_validated"]["validated"]["0/relu"]["positions"] == BATCH


def test_layers_whose_width_differs_between_ranks_are_not_measured(runs: Runs) -> None:
    # The first activation has 6 neurons on one rank and 7 on the other; the second has 5 on both, of 3 positions each.
    for rank in runs[2]:
        assert {name: counts["positions"] for name, counts in rank["other_widths"].items()} == {"0": 0, "2/relu": 2 * 3}


def test_a_state_saved_by_four_ranks_is_continued_by_two_and_by_one(runs: Runs, folder: Path) -> None:
    """In the middle of a window each time: totals and history are those of one process that saw everything."""
    stages = [*(rank["elastic"] for rank in (runs[4][0], runs[2][0])), elastic(0, folder)]
    seen: list[dict[str, Any]] = []
    alone = ns.watch(model := small(), window_steps=WINDOW, policy=POLICY)
    for (world, numbers), stage in zip(STAGES.items(), stages, strict=True):
        seen += [recorded(numbers, share, world) for share in range(world)]
        assert_equal_counts(stage["counted"], union_of(seen))
        steps(model, alone, numbers, 0, 1)
        assert stage["windows"] == windows(alone)
        assert stage["step"] == numbers.stop == alone.global_step
    assert stage["counted"]["0/relu"]["positions"] == BATCH * len([*chain(*STAGES.values())])
    assert stage["windows"]["0/relu"]["died_step"][2] == 5  # silenced while two ranks ran
    alone.detach()


def test_when_a_rank_dies_the_error_is_torchs_and_the_checkpoint_is_complete(tmp_path: Path) -> None:
    survivor = together(tmp_path, 2, "killed", killed=1)[0]["killed"]
    assert survivor["error"] is not None
    assert survivor["detached"]
    scope = ns.watch(small())
    scope.load_state_dict(torch.load(tmp_path / "killed.pt", weights_only=True))
    early = scope.census()["first/relu"]
    assert early.examples == early.positions == 3 * BATCH  # three steps of both ranks' halves
    scope.detach()
