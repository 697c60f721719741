"""The laws of what ranks tell by sums: any steps, any number of ranks, any order of adding; no process is started."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.count.counters import NEVER
from neuronscope.tally.distributed.sums import StepWords, said_by_all, saying

NEURONS = 5
RANKS = st.one_of(st.integers(1, 8), st.sampled_from([255, 256, 1023, 1024, 4095, 4096]))


def sum_in_some_order(numbers: Any, random: Any) -> Any:
    """Two after two, in an order drawn anew each time: chains, trees and all that lies between."""
    rows = list(numbers)
    while len(rows) > 1:
        first = rows.pop(random.randrange(len(rows)))
        rows.append(first + rows.pop(random.randrange(len(rows))))
    return rows[0]


@given(RANKS, st.integers(0, 2**40), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_sums_of_words_tell_the_latest_and_the_first(ranks: int, base: int, seed: int, random: Any) -> None:
    words = StepWords(base, ranks)
    drawn = np.random.default_rng(seed)
    low, high = sorted(drawn.integers(0, words.capacity, size=2))
    steps = base + drawn.integers(low, high, size=(ranks, NEURONS), endpoint=True)
    never = drawn.random((ranks, NEURONS)) < drawn.random(NEURONS).round(1)  # of some neurons on all ranks
    latest, first = np.where(never, -1, steps), np.where(never, NEVER, steps)
    for given_, wanted, give, read in (
        (latest, latest.max(0), words.latest, words.read_latest),
        (first, first.min(0), words.first, words.read_first),
    ):
        np.testing.assert_array_equal(read(sum_in_some_order(map(give, given_), random)), wanted)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 1023, 1024, 4096, 2**20 - 1])
@pytest.mark.parametrize("below", ["nothing", "one less", "all the same"])
def test_the_ends_of_the_range(ranks: int, below: str) -> None:
    """All ranks at the last step that fits is the largest sum there is; one at the first, the smallest."""
    words = StepWords(7, ranks)
    top = 7 + words.capacity - 1
    assert words.hold(7, top)
    assert not words.hold(7, top + 1)
    assert not words.hold(6, top)
    for step in (7, top):
        others = {"nothing": -1, "one less": step - 1 if step > 7 else -1, "all the same": step}[below]
        one, other = words.latest(np.array([step])), words.latest(np.array([others]))
        # Adding R − 1 equal words is exact: an integer below 2**53 times a power of two.
        assert words.read_latest(one + (ranks - 1) * other).tolist() == [step]
        later = {"nothing": NEVER, "one less": step + 1 if step < top else NEVER, "all the same": step}[below]
        one, other = words.first(np.array([step])), words.first(np.array([later]))
        assert words.read_first(one + (ranks - 1) * other).tolist() == [step]


@pytest.mark.parametrize(
    ("ranks", "capacity"),
    # 2046 powers of two, of which a step takes as many as the number of ranks has bits
    [(1, 2046), (2, 1023), (3, 1023), (4, 682), (8, 511), (1024, 186), (4096, 157), (2**20 - 1, 102)],
)
def test_the_default_window_of_100_steps_fits(ranks: int, capacity: int) -> None:
    assert StepWords(0, ranks).capacity == capacity >= 100


@given(st.integers(0, 2**64 - 1), RANKS)
def test_what_all_say_is_heard(number: int, ranks: int) -> None:
    assert said_by_all(ranks * saying(number), ranks) == number


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_what_not_all_say_is_not(numbers: list[int], random: Any) -> None:
    told = said_by_all(sum_in_some_order(map(saying, numbers), random), len(numbers))
    assert told == (numbers[0] if len(set(numbers)) == 1 else None)


@given(st.integers(0, 2**64 - 1), st.integers(0, 63), st.integers(2, 4096))
def test_one_bit_of_one_rank_is_enough(number: int, bit: int, ranks: int) -> None:
    assert said_by_all((ranks - 1) * saying(number) + saying(number ^ 1 << bit), ranks) is None


def test_nobody_says_nothing() -> None:
    assert said_by_all(0 * saying(7), 0) is None
