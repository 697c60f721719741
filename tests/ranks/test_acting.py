"""Ranks that hold copies of a network revive the same neurons with the same numbers, or none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.acting import ACTING, DEAD
from tests.ranks.spawning import together

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def acting(folder: Path) -> Found:
    (own := folder / "acting").mkdir()
    return together(own, 2, *(task.__name__ for task in ACTING))


def assert_copies(acting: Found, task: str) -> None:
    one, other = (rank[task] for rank in acting)
    assert one["acts"] == other["acts"]
    assert [name for name, each in one["weights"].items() if not torch.equal(each, other["weights"][name])] == []
    assert all(map(torch.equal, one["moments"], other["moments"]))


@pytest.mark.parametrize(("task", "step"), [("revives_by_hand", 3), ("revives_monitored", 2)])
def test_all_ranks_revive_what_is_dead_on_all_of_them(acting: Found, task: str, step: int) -> None:
    assert_copies(acting, task)
    first = acting[0][task]["acts"][0]
    assert (first.step, first.site, first.neurons) == (step, "0/relu", (DEAD,))  # not what fires on one rank only
    assert acting[0][task]["weights"]["0.bias"][DEAD] > -1


@pytest.mark.parametrize("task", ["revives_with_a_retired_rank", "revives_on_one_rank_only"])
def test_if_one_rank_cannot_no_rank_does(acting: Found, task: str) -> None:
    assert_copies(acting, task)
    assert acting[0][task]["acts"] == ()
    assert [rank[task]["step"] for rank in acting] == [6, 6]


def test_a_rank_that_has_ended_is_not_waited_for(acting: Found) -> None:
    task = "revives_with_fewer_batches"
    assert [rank[task]["acts"] for rank in acting] == [(), ()]
    assert [rank[task]["step"] for rank in acting] == [6, 1]


def test_distributed_weights_are_left_as_they_are(acting: Found) -> None:
    for rank in acting:
        assert rank["revives_sharded"]["acts"] == ()
        assert "made of other tensors" in rank["revives_sharded"]["left"]["0/relu"]
