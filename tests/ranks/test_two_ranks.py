"""Two gloo processes on one machine: their counts together equal one process over the union of the data, exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import assert_bits, state_of
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.worker import BATCH, STEPS, adam, data, disjoint, network, watched_counts

Runs = dict[int, list[dict[str, Any]]]


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
def test_counts_of_two_ranks_equal_those_of_one_process_over_all_data(
    runs: Runs, task: str, options: dict[str, Any]
) -> None:
    """And watching changes no bit of the weights and no random number, and leaves the hook tables as they were."""
    alone = one_process(**options)
    every = options.get("every_n_steps", 1)
    assert alone.counts["0/relu"]["examples"] == 2 * BATCH * len(range(0, STEPS, every))
    for rank, found in enumerate(rank[task] for rank in runs[2]):
        assert_equal_counts(found["counts"], alone.counts)
        for weights, random in zip(found["weights"], found["random"], strict=True):  # unwatched, watched
            assert_bits(weights, alone.weights)
            assert random.equal(alone.random[rank])
        assert found["hooks"] == [True, True]


def test_units_that_fire_on_one_rank_only_are_not_dead(runs: Runs) -> None:
    # Unit 0 fires on rank 0 alone and unit 1 on rank 1 alone: dead are unit 2, whose bias is -100, and what the zero
    # input of the other features leaves silent on both ranks.
    apart = [rank["fire_apart"] for rank in runs[2]]
    assert apart[0] == apart[1]
    alone = []
    for rank in range(2):
        model = network()
        x = disjoint(model, rank)[0][0]
        alone.append((torch.relu(model[0](x)) == 0).all(0))
    assert apart[0] == int((alone[0] & alone[1]).sum()) < min(int(mask.sum()) for mask in alone)


def test_a_rank_that_saw_nothing_gets_what_the_other_saw(runs: Runs) -> None:
    first, second = [rank["one_sees_nothing"] for rank in runs[2]]
    assert first["0/relu"]["positions"] == STEPS * BATCH
    assert_equal_counts(second, first)


def test_a_scan_on_one_rank_waits_for_nobody(runs: Runs) -> None:
    assert [rank["one_scans"] for rank in runs[2]] == [32, 0]
