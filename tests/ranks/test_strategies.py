"""Tensor parallelism over gloo, alone and under FSDP2: counts are the slow twin's over all ranks, weights unchanged.

In bfloat16 and float32, with and without gradient accumulation and activation checkpointing. The twin is a run of its
own that nobody watches: its activations are kept and counted by :mod:`tests.ranks.recorded`. Without tensor
parallelism: ``test_combinations.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.ranks.assertions import assert_equal_counts
from tests.ranks.parallel import BATCH, CASES, HIDDEN, SPLIT, STEPS, WIDTH, Case, Network
from tests.ranks.recorded import side_by_side, union

UNITS = {
    **{name: [(0, WIDTH, 1)] for name in ("first", "blocks.0.down", "blocks.1.down")},
    **{name: [(0, HIDDEN, 1)] for name in ("blocks.0.gate", "blocks.1.gate")},
}


def expected(recorded: list[dict[str, Any]], parts: int) -> dict[str, Any]:
    """The twin's counts of a run in which every ``parts`` ranks hold one copy of the model."""
    copies = [recorded[first : first + parts] for first in range(0, len(recorded), parts)]
    sites = {}
    for name in recorded[0]:
        together = [side_by_side([part[name] for part in copy]) if name in SPLIT else copy[0][name] for copy in copies]
        sites[name] = union(together)
    return sites


def check(given: list[dict[str, Any]], parts: int, start: dict[str, Tensor], examples: dict[str, int]) -> None:
    """Of one way to train, what every rank gave.

    Args:
        given: By rank, an outcome; see :func:`tests.ranks.parallel.outcome`.
        parts: Ranks that hold one copy of the model.
        start: The weights before.
        examples: Of all ranks, by phase.
    """
    wanted = {phase: expected([rank["recorded"][phase] for rank in given], parts) for phase in examples}
    for phase, number in examples.items():
        assert {site["examples"] for site in wanted[phase].values()} == {number}
    learnt = given[0]["weights"]
    assert not all(value.equal(start[name]) for name, value in learnt.items())
    for rank in given:
        assert rank["warned"] is None
        assert rank["unseen"] == {}
        assert rank["same_weights"]
        assert all(value.equal(learnt[name]) for name, value in rank["weights"].items())
        assert rank["same_hooks"]
        assert rank["counted"].keys() == examples.keys()
        for phase, counts in rank["counted"].items():
            assert_equal_counts(counts, wanted[phase])


def check_network(given: list[dict[str, Any]], case: Case, parts: int) -> None:
    """The same of the gated network, every ``parts`` ranks of which were given the same data."""
    recorded = expected([rank["recorded"]["train"] for rank in given], parts)
    assert {len(recorded[name]["zero_outputs"]) for name in SPLIT} == {HIDDEN}
    for rank in given:  # all know the whole layer's units, whatever part they hold
        assert {name: [run[1:] for run in units] for name, units in rank["units"].items()} == UNITS
    examples = len(given) // parts * STEPS * case.micro_batches * BATCH
    check(given, parts, Network().state_dict(), {"train": examples})


TABLE = [(world, strategy, case) for world, strategy in ((2, "tensor"), (4, "both")) for case in CASES]


@pytest.mark.parametrize(("world", "strategy", "case"), TABLE, ids=str)
def test_counts_over_all_ranks_equal_the_twins(
    runs: dict[int, list[dict[str, Any]]], world: int, strategy: str, case: Case
) -> None:
    """Pairs of ranks share each layer's neurons; of two pairs, with FSDP2 over them."""
    check_network([rank[strategy][case] for rank in runs[world]], case, 2)


@pytest.mark.parametrize("world", [2, 4])
def test_activations_that_are_distributed_tensors_are_counted(
    runs: dict[int, list[dict[str, Any]]], world: int
) -> None:
    check_network([rank["tensor_distributed"] for rank in runs[world]], Case(local=False), world)


def test_an_activation_sharded_along_its_positions_is_counted(runs: dict[int, list[dict[str, Any]]]) -> None:
    given = [rank["sequence_parallel"] for rank in runs[2]]
    recorded = [rank["recorded"] for rank in given]
    wanted = {
        "0/relu": side_by_side([rank["0/relu"] for rank in recorded]),
        "2/relu": union([rank["2/relu"] for rank in recorded]),
    }
    # The batch is BATCH x 2 positions: the first layer has them all, and half of its neurons, on each rank.
    assert [len(recorded[0][name]["zero_outputs"]) for name in ("0/relu", "2/relu")] == [HIDDEN // 2, WIDTH]
    assert [recorded[0][name]["positions"] for name in ("0/relu", "2/relu")] == [2 * BATCH, BATCH]
    for rank in given:
        assert_equal_counts(rank["counted"], wanted)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tensor"])
def test_a_wrapped_model_is_reported_under_its_own_name(runs: dict[int, list[dict[str, Any]]], strategy: str) -> None:
    assert {rank[strategy][CASES[0]]["model"] for rank in runs[2]} == {"Network"}


def test_the_report_states_the_cost_of_joining_ranks(runs: dict[int, list[dict[str, Any]]]) -> None:
    # 5 steps in windows of 2: after 2, after 4 and in the end. The network has 7 sites, 3 of 6 neurons and 4 of 10: 58
    # neurons of 48 bytes, 3 numbers of 8 bytes a site, two steps and a header of 4 numbers: 3,000 bytes in four
    # collectives. The first time, the names and widths of the sites are gathered in two more.
    for rank in runs[4]:
        note = rank["ddp"][CASES[0]]["notes"][-1]
        assert note.startswith("Counts of 4 ranks were joined 3 times: 0.003 MB each, 14 collectives, "), note
    assert not any("joined" in note for note in runs[1][0]["ddp"][CASES[0]]["notes"])


@pytest.mark.slow
def test_a_compiled_model_whose_layers_ranks_share_is_not_measured(runs: dict[int, list[dict[str, Any]]]) -> None:
    for rank in runs[2]:
        counted, reasons = rank["tensor_compiled"]
        assert counted == []
        assert {"act", "late"} == set(reasons)  # by their places: the layers are not known
        assert "tensor parallelism" in reasons["act"]
