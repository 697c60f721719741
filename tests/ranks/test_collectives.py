"""How many collectives watching takes, and of what size: none in a step, four a window; and no count is lost by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.exchanges import BRANCHES, EXCHANGES, Noted
from tests.ranks.recorded import union
from tests.ranks.uneven import WIDTH

Runs = dict[int, list[dict[str, Any]]]

Made = list[tuple[str, int]]

# What a rank says of itself, and whether it is done.
HEADER = [("allreduce", 6)]
# The names and widths of sites that are new: the sizes of the messages, then the messages.
GATHERED = ["allgather", "allgather"]


def reduced(*neurons: int) -> Made:
    """The collectives for sites of so many neurons: a maximum, and two sums, each of its dtype."""
    n = sum(neurons)
    return [("allreduce", 2 * n + 2), ("allreduce", 3 * n + 3 * len(neurons)), ("allreduce", n)]


ONE, BOTH = reduced(BRANCHES["a"]), reduced(*BRANCHES.values())


def kinds(made: Made) -> list[str]:
    return [kind for kind, _ in made]


@pytest.mark.parametrize("task", [task.__name__ for task in EXCHANGES])
def test_a_step_makes_no_collective_call_and_no_count_is_lost(runs: Runs, task: str) -> None:
    given = [rank[task] for rank in runs[2]]
    for rank in given:
        assert rank["made"]["step"]
        assert not any(rank["made"]["step"])
        for phase, counts in rank["counted"].items():
            wanted: dict[str, Any] = {}
            for other in [rank] if task == "apart" else given:
                for name, part in other["recorded"][phase].items():
                    wanted[name] = union([wanted[name], part]) if name in wanted else part
            assert_equal_counts(counts, wanted)


@pytest.mark.parametrize("task", [task.__name__ for task in EXCHANGES])
def test_the_report_states_the_number_of_collective_calls(runs: Runs, task: str) -> None:
    for rank in runs[2]:
        made = [made for event in rank[task]["made"].values() for made in event]
        assert rank[task]["exchanges"].collectives == sum(map(len, made))


def test_a_window_costs_one_header_one_maximum_and_two_sums(runs: Runs) -> None:
    """The first time, ranks tell each other the names and widths of the sites."""
    for rank in runs[2]:
        made = rank["steady"]["made"]
        for first, *later in (made["window"], made["val"]):
            assert kinds(first) == [*kinds(HEADER), *GATHERED, *kinds(BOTH)]
            assert [first[0], *first[3:]] == later[0] == later[1] == HEADER + BOTH
        assert made["detach"] == [HEADER + BOTH]
        assert rank["steady"]["exchanges"].times == 7
        assert rank["steady"]["exchanges"].bytes == 8 * sum(size for _, size in HEADER + BOTH)


def test_ranks_that_count_for_themselves_make_no_collective_call(runs: Runs) -> None:
    for rank in runs[2]:
        assert not any(made for event in rank["apart"]["made"].values() for made in event)
        assert rank["apart"]["exchanges"].times == 0


def test_without_a_process_group_no_collective_call_is_made() -> None:
    assert not torch.distributed.is_initialized()
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU())
    with Noted() as noted, ns.watch(model, window_steps=2) as scope:
        for _ in range(4):
            model(torch.ones(3, WIDTH)).sum().backward()
            scope.step()
        with scope.phase("val", join=True):
            model(torch.ones(3, WIDTH))
        scope.state_dict(join=True)
    assert noted.made == []
    assert scope.census()["0/relu"].positions == 4 * 3


def test_an_open_window_is_joined_at_each_report(runs: Runs) -> None:
    for rank in runs[2]:
        first, *later = rank["unsure_window"]["made"]["window"]
        assert first[3:] == BOTH
        assert later == [HEADER + BOTH] * 2


def test_a_site_that_one_rank_meets_later_is_gathered_once(runs: Runs) -> None:
    for rank in runs[2]:
        first, second, *later = rank["late_site"]["made"]["window"]
        assert first[3:] == ONE
        assert kinds(second[1:3]) == GATHERED
        assert second[3:] == BOTH
        assert later == [HEADER + BOTH] * 2


def test_sites_in_another_order_are_gathered_once(runs: Runs) -> None:
    for rank in runs[2]:
        first, second = rank["other_order"]["made"]["window"]
        assert kinds(first[1:3]) == GATHERED
        assert second == HEADER + BOTH
        assert list(rank["other_order"]["counted"]["train"]) == ["a.0/relu", "b.0/relu"]  # as on the first rank


def test_ranks_in_two_phases_join_each_phase(runs: Runs) -> None:
    for rank in runs[2]:
        made = rank["mixed_phases"]["made"]
        for event in (*made["window"], *made["val"]):
            assert kinds(event[1:3]) == GATHERED
            assert event[3:] == BOTH + BOTH
        assert made["detach"] == [HEADER]


def test_a_rank_that_has_finished_makes_no_more_calls_than_the_others(runs: Runs) -> None:
    """It does not influence the layout: two windows, two validations and the end of the other rank, as always."""
    goes_on, done = (rank["one_goes_on"]["made"] for rank in runs[2])
    assert [*goes_on["window"][1:], *goes_on["val"][1:]] == [HEADER + BOTH] * 4
    assert goes_on["detach"] == [HEADER]
    assert done["detach"] == [(HEADER + BOTH) * 4 + HEADER]


def test_inference_on_one_rank_takes_a_second_exchange_of_all_ranks_from_then_on(runs: Runs) -> None:
    both = [rank["inference_on_one_rank"] for rank in runs[2]]
    for rank in both:
        first, second, third, *_ = rank["made"]["window"]
        assert first.count(HEADER[0]) == 1
        assert second.count(HEADER[0]) == third.count(HEADER[0]) == 2
        assert third == (HEADER + BOTH) * 2
    assert both[0]["counted"]["inference"].keys() == both[1]["counted"]["inference"].keys() == {"a.0/relu", "b.0/relu"}
