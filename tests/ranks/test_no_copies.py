"""Counts of ranks are added up if the ranks hold copies of one network; a rank that holds another one says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope.attach.copies import WeightDigest
from neuronscope.errors import UsageError
from neuronscope.tally.distributed.sync import _numbered
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.hand_split import HIDDEN
from tests.ranks.no_copies import NO_COPIES, STEPS
from tests.ranks.recorded import side_by_side, union
from tests.ranks.spawning import together
from tests.ranks.uneven import BATCH

RANKS = 4
ALL, NONE, PAIRS = [range(RANKS)], [[rank] for rank in range(RANKS)], [range(2), range(2, RANKS)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each task gives on each of four ranks."""
    return together(tmp_path_factory.mktemp("no_copies"), RANKS, *(task.__name__ for task in NO_COPIES))


def test_experts_of_one_name_are_added_up_only_if_all_ranks_hold_the_same(given: list[dict[str, Any]]) -> None:
    """Experts that ranks share by hand have one name on all ranks, and weights of their own on each."""
    own = [rank["other_experts"] for rank in given]
    copies = [rank["experts_of_copies"] for rank in given]
    wanted = {name: union([rank["own"][name] for rank in copies]) for name in copies[0]["own"]}
    assert {"w.0/relu", "w.1/relu"} == set(wanted)
    for rank in own:
        assert_equal_counts(rank["counted"], rank["own"])
        assert any("hold no copy of it" in note for note in rank["notes"])
    for rank in copies:
        assert_equal_counts(rank["counted"], wanted)
        assert not any("copy" in note for note in rank["notes"])


@pytest.mark.parametrize(
    ("task", "groups", "words"),
    [
        ("other_weights", NONE, "counts of this rank: the other 3 ranks hold no copy of it"),
        ("one_other_weight", NONE, "counts of this rank: the other 3 ranks hold no copy of it"),
        ("other_layers", NONE, "counts of this rank: the other 3 ranks hold no copy of it"),
        ("only_parts_run", NONE, "counts of this rank: the other 3 ranks hold no copy of it"),
        ("stages_of_copies", PAIRS, "counts of the 2 ranks that hold this network: the other 2 ranks hold no copy"),
        ("local_steps", ALL, ""),
        ("local_statistics", ALL, ""),
        ("given_group", PAIRS, ""),
        ("given_group_later", PAIRS, ""),
        ("not_in_the_group", [[0, 1, 2], [3]], ""),
    ],
)
def test_only_ranks_with_copies_of_one_network_are_added_up(
    given: list[dict[str, Any]], task: str, groups: list[Any], words: str
) -> None:
    found = [rank[task] for rank in given]
    for group in groups:
        wanted = {name: union([found[rank]["own"][name] for rank in group]) for name in found[group[0]]["own"]}
        assert {counts["examples"] for counts in wanted.values()} == {len(group) * STEPS * BATCH // RANKS}
        for rank in group:
            assert_equal_counts(found[rank]["counted"], wanted)
            assert found[rank]["windows"] == found[group[0]]["windows"] > 0
    for rank in found:
        assert rank["same_weights"]
        assert any(words in note for note in rank["notes"]) if words else not any("copy" in n for n in rank["notes"])


def test_layers_that_ranks_share_by_hand_are_counted_whole_if_the_watch_is_told(given: list[dict[str, Any]]) -> None:
    """Two pairs of ranks: each pair shares `fc1` by its units and `fc2` by its inputs, and has data of its own."""
    found = [rank["hand_split"] for rank in given]
    own = [rank["own"] for rank in found]
    wanted = {name: union([own[0][name], own[2][name]]) for name in own[0]}
    halves = [side_by_side([first["fc1/relu"], second["fc1/relu"]]) for first, second in (own[:2], own[2:])]
    wanted["fc1/relu"] = union(halves)
    assert len(wanted["fc1/relu"]["zero_outputs"]) == HIDDEN
    assert wanted["fc1/relu"]["examples"] == STEPS * BATCH
    for number, rank in enumerate(found):
        assert_equal_counts(rank["told"], wanted)
        assert rank["told, notes"] == []
        assert ["by hand" in words for words in rank["told, weights"]] == [False, True, True]
        assert rank["told, same"]
        alike = own[number % 2], own[number % 2 + 2]  # they hold the same parts
        assert_equal_counts(rank["not_told"], {name: union([each[name] for each in alike]) for name in own[0]})
        assert "the other 2 ranks hold no copy" in rank["not_told, notes"][0]
        assert rank["not_told, same"]


def test_a_network_may_run_before_its_weights_are_broadcast(given: list[dict[str, Any]]) -> None:
    for rank in given:
        assert rank["tried_before"]["notes"] == []
        assert rank["tried_before"]["counted"]["0/relu"]["examples"] == RANKS * BATCH + STEPS * BATCH


@pytest.mark.parametrize(
    ("networks", "numbers"),
    [
        ([(1, {10}), (1, {11}), (1, {10}), (2, {10})], [0, 1, 0, 3]),
        ([(1, {10}), (1, {11}), (1, {11, 10})], [0, 0, 0]),  # it had the weights of both
        ([(1, {}), (1, {11}), (1, {}), (2, {})], [1, 1, 1, 3]),  # no weights were noted: the first of its layers
        ([(1, {}), (1, {})], [0, 0]),
    ],
)
def test_ranks_hold_one_network_if_they_once_had_the_same_weights(networks: Any, numbers: list[int]) -> None:
    assert _numbered([(layers, frozenset(weights)) for layers, weights in networks]) == numbers


def digest(model: nn.Module) -> Any:
    found = WeightDigest(model)
    found.note()
    return found.digest()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 3), (8, 8)])
def test_one_bit_of_one_weight_makes_another_network(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def model(change: bool = False) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Module()
        net.before, net.weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.randn(shape).to(dtype))
        if change and net.weight.numel():
            net.weight.data.view(-1)[-1] *= -1
        return net

    assert digest(model()) == digest(model())
    assert (digest(model()) == digest(model(change=True))) == (shape == (0,))


def test_a_weight_that_is_a_view_or_lies_in_another_order_has_the_same_digest() -> None:
    def model(weight: torch.Tensor) -> nn.Module:
        net = nn.Module()
        net.weight = nn.Parameter(weight)
        return net

    values = torch.randn(7, 3)
    odd = torch.empty(22)[1:].view(7, 3).copy_(values)
    assert digest(model(values)) == digest(model(odd)) == digest(model(values.t().contiguous().t()))


def test_lazy_and_meta_weights_have_a_digest() -> None:
    assert digest(nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2, device="meta"))).weights


def test_a_process_group_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"`process_group` to be a torch\.distributed\.ProcessGroup"):
        ns.watch(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), process_group=3)  # type: ignore[arg-type]
