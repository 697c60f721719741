"""What each rank gives: parts of a layer are laid side by side, copies of it are added up; no process is started."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.count.counter_tensors import NEVER
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.sync import Exchanges, RankSync
from tests.ranks.meeting import on_each_rank

INFO = SiteInfo(activation="relu", kind="relu-like", linear_when_on=True, axis=1, axis_source="layer (fc)")
LAYER = Tally(
    **vars(INFO),
    zero_outputs=np.array([5, 0, 3, 1, 2]),
    zero_gradients=np.array([4, 1, 3, 0, 2]),
    not_finite_outputs=np.array([0, 0, 1, 0, 0]),
    abs_sum=np.array([0.0, 2.5, 1.0, 4.0, 3.0]),
    last_active_step=np.array([-1, 7, 6, 7, 2]),
    first_active_step=np.array([NEVER, 0, 1, 0, 2]),
    positions=5,
    gradient_positions=4,
    examples=3,
)
ARRAYS = [name for name, value in vars(LAYER).items() if isinstance(value, np.ndarray)]


def part(first: int, neurons: int) -> Tally:
    """What a rank counts that holds some of the layer's neurons."""
    arrays = {name: getattr(LAYER, name)[first : first + neurons] for name in ARRAYS}
    return replace(LAYER, first=first, whole=LAYER.neurons, **arrays)


def assert_same(found: Tally, wanted: Tally) -> None:
    assert (found.first, found.whole) == (0, 0)
    for name, value in vars(wanted).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def joined(*given: tuple[Tally, bool]) -> Tally:
    """The layer, of ranks whose tallies are duplicates of others or not."""

    def work(rank: int) -> Tally:
        ranks = RankSync()
        tally, ranks.duplicate = given[rank]
        return ranks.join(Census({"relu": tally}), phase="train")["relu"]

    layer, *others = on_each_rank(len(given), work)
    for other in others:
        assert_same(other, layer)
    return layer


@given(cut=st.integers(1, 4))
def test_two_shards_of_a_layer_are_joined_to_the_whole_layer(cut: int) -> None:
    parts = [(part(*place), place[0] > 0) for place in ((0, cut), (cut, LAYER.neurons - cut))]
    assert_same(joined(*parts), LAYER)


@pytest.mark.parametrize(
    ("info", "duplicate", "counts"),
    [
        (INFO, False, True),
        (INFO, True, False),  # another rank has the same data, and this layer whole
        (replace(INFO, whole=5), True, True),  # cut along its positions: its own
        (replace(INFO, first=-1, whole=5), False, False),  # a copy, known to be one
    ],
)
def test_a_replicated_layer_is_counted_once(info: SiteInfo, duplicate: bool, counts: bool) -> None:
    copies = [(LAYER, False), (replace(LAYER, **vars(info)), duplicate)]
    assert_same(joined(*copies), LAYER.merge(LAYER) if counts else LAYER)


def test_one_rank_alone_exchanges_nothing() -> None:
    ranks, census = RankSync(), Census({"relu": LAYER})
    assert ranks.join(census, phase="train", done=True) is census
    assert ranks.alone
    assert ranks.all_done
    assert ranks.exchanges == Exchanges(ranks=1, times=0, collectives=0, bytes=0, seconds=0.0)
