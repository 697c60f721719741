"""Ranks that hold copies of a network revive the same neurons with the same numbers, or none does."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks.acting import ACTING, DEAD
from tests.ranks.spawning import together
from tests.ranks.uneven import WIDTH

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


def test_each_rank_revives_its_shards_of_weights_that_fsdp_distributes(acting: Found) -> None:
    one, other = (rank["revives_sharded"] for rank in acting)
    assert one["acts"] == other["acts"]
    assert [(act.step, act.site, act.neurons) for act in one["acts"]] == [(3, "0/relu", (DEAD,)), (3, "2/relu", (7,))]
    assert one["left"] == {}
    torch.manual_seed(zlib.crc32(b"0 3"))  # the seed and the step
    fresh = {"0": nn.Linear(WIDTH, 7), "2": nn.Linear(7, 9)}
    rows, columns = {"0": DEAD, "2": 7}, {"2.weight": DEAD, "4.weight": 7}
    for found in (one, other):
        before, after = found["states"]
        assert torch.equal(after["again"].view(torch.int32), after["output"].view(torch.int32))
        for kind in ("weights", "moments", "gradients"):
            for name, old in before[kind].items():
                assert old.any()
                expected = old.clone()
                layer, _, part = name.partition(".")
                if layer in rows:
                    drawn = getattr(fresh[layer], part).detach()
                    expected[rows[layer]] = drawn[rows[layer]] if kind == "weights" else 0.0
                if name in columns:
                    expected[:, columns[name]] = 0.0
                assert torch.equal(after[kind][name], expected), (kind, name)
        assert not torch.equal(before["weights"]["0.weight"], after["weights"]["0.weight"])


def test_what_needs_whole_weights_is_refused_where_they_are_distributed(acting: Found) -> None:
    for rank in acting:
        assert "`2` are distributed among ranks" in rank["revives_sharded"]["refused"]
        assert "`0.weight` is distributed among ranks" in rank["revives_sharded"]["uncut"]
