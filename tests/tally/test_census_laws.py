"""Tallies and censuses obey the laws of addition, and survive a checkpoint.

Merging is associative and commutative in every count; it does not matter how a batch was split into micro-batches, over
ranks or over scopes; and what was saved comes back, through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
from dataclasses import fields, replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import neuronscope as ns
from neuronscope.count.counter_tensors import NEVER
from neuronscope.errors import StateError
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally

INFO = SiteInfo(
    activation="relu",
    kind="relu-like",
    linear_when_on=True,
    axis=1,
    axis_source="layer (fc)",
    layer="a+b",
    units=(("a", 0, 2, 1), ("b", 4, 5, 1)),
    readers=("c",),
)
COUNTS = st.integers(0, 2**40)


@st.composite
def tallies(draw, neurons: int = 3) -> Tally:
    def counts(strategy=COUNTS):
        return np.array(draw(st.lists(strategy, min_size=neurons, max_size=neurons)), dtype=np.int64)

    positions, gradient_positions = draw(COUNTS), draw(COUNTS)
    last = counts(st.integers(-1, 2**40))
    return Tally(
        **vars(INFO),
        zero_outputs=counts(st.integers(0, positions)),
        zero_gradients=counts(st.integers(0, gradient_positions)),
        not_finite_outputs=counts(st.integers(0, positions)),
        abs_sum=counts().astype(np.float64),  # whole numbers below 2**53: their float sums are exact too
        last_active_step=last,
        first_active_step=np.where(last < 0, NEVER, np.minimum(last, counts())),
        positions=positions,
        gradient_positions=gradient_positions,
        examples=draw(COUNTS),
    )


@st.composite
def censuses(draw) -> Census:
    names = draw(st.lists(st.sampled_from(["a", "b/relu", "b/relu#1", "gelu()"]), unique=True))
    steps = draw(st.integers(0, 1000))
    first = draw(st.integers(0, 1000)) if steps else -1
    return Census(
        {name: draw(tallies()) for name in names},
        first_step=first,
        last_step=first + steps if steps else -1,
        steps=steps,
    )


def parts(tally: Tally) -> dict:
    return {
        field.name: getattr(tally, field.name).tolist()
        if isinstance(getattr(tally, field.name), np.ndarray)
        else getattr(tally, field.name)
        for field in fields(tally)
    }


def contents(census: Census) -> tuple:
    span = (census.first_step, census.last_step, census.steps)
    return {name: parts(tally) for name, tally in census.items()}, span


@given(tallies(), tallies(), tallies())
def test_merging_tallies_is_associative_and_commutative(a, b, c):
    assert parts(a.merge(b)) == parts(b.merge(a))
    assert parts(a.merge(b).merge(c)) == parts(a.merge(b.merge(c)))


@given(censuses(), censuses(), censuses())
def test_merging_censuses_is_associative_and_commutative(a, b, c):
    assert contents(a.merge(b)) == contents(b.merge(a))
    assert contents(a.merge(b).merge(c)) == contents(a.merge(b.merge(c)))
    assert contents(a.merge(Census())) == contents(a) == contents(Census().merge(a))


@given(censuses(), censuses())
def test_merging_changes_neither_part(a, b):
    before = contents(a), contents(b)
    merged = a.merge(b)
    for tally in merged.values():
        tally.zero_outputs.flags.writeable = True
    assert (contents(a), contents(b)) == before
    assert list(merged)[: len(a)] == list(a)  # in the order in which sites ran


@given(censuses())
def test_the_state_of_a_census_survives_a_weights_only_checkpoint(census):
    file = io.BytesIO()
    torch.save(census.state_dict(), file)
    file.seek(0)
    loaded = Census.from_state(torch.load(file, weights_only=True))
    assert contents(loaded) == contents(census)
    for tally in loaded.values():
        assert tally.zero_outputs.dtype == tally.first_active_step.dtype == np.int64
        assert tally.abs_sum.dtype == np.float64


@given(tallies())
def test_a_saved_state_is_not_changed_by_later_counting(tally):
    before = parts(tally)
    state = tally.state_dict()
    state["zero_outputs"] += 1
    state["info"]["axis"] = 77
    assert parts(tally) == before


def test_tallies_of_different_widths_are_not_merged():
    with pytest.raises(StateError, match="3 neurons to merge, but got 4"):
        Tally.empty(INFO, 3).merge(Tally.empty(INFO, 4))


def test_fractions_of_an_unseen_site_are_not_zero():
    tally = Tally.empty(INFO, 2)
    assert np.isnan(tally.zero_output_fraction).all()
    assert np.isnan(tally.zero_gradient_fraction).all()
    assert np.isnan(tally.mean_abs_output).all()
    assert tally.zero_output_fraction.dtype == np.float64


def small() -> nn.Module:
    """Counts that do not depend on how a batch is split: no batch norm, and integers small enough to be exact."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 1))
    for parameter in model.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).float()
    return model


DATA = torch.randint(-3, 4, (24, 4), generator=torch.Generator().manual_seed(4)).float()


def count(pieces: list[torch.Tensor]) -> Census:
    model = small()
    with ns.watch(model) as scope:
        for piece in pieces:
            model(piece).sum().backward()
        scope.step()
    return scope.census()


@settings(max_examples=25)
@given(st.lists(st.integers(0, 24), max_size=6))
def test_any_split_into_micro_batches_gives_the_same_counts(cuts):
    bounds = [0, *sorted(cuts), 24]
    pieces = [DATA[start:stop] for start, stop in zip(bounds, bounds[1:])]
    assert contents(count(pieces)) == contents(count([DATA]))


@settings(max_examples=25)
@given(st.lists(st.booleans(), min_size=24, max_size=24))
def test_any_split_over_two_ranks_gives_the_same_counts(mine):
    chosen = torch.tensor(mine)
    one, two = count([DATA[chosen]]), count([DATA[~chosen]])
    merged = one.merge(two)
    whole = count([DATA])
    assert {name: parts(tally) for name, tally in merged.items()} == {
        name: parts(tally) for name, tally in whole.items()
    }


@pytest.mark.parametrize("at", [0, 3, 7, 10])
def test_a_resumed_run_has_the_counts_of_an_uninterrupted_run(at):
    def run(scope: ns.Scope, model: nn.Module, steps: range) -> None:
        for step in steps:
            model(DATA + step).sum().backward()
            scope.step()

    model = small()
    with ns.watch(model, window_steps=4, policy=ns.Policy(max_rate=0.05)) as whole:
        run(whole, model, range(10))
    model = small()
    with ns.watch(model, window_steps=4, policy=ns.Policy(max_rate=0.05)) as first:
        run(first, model, range(at))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
    file.seek(0)
    model = small()
    with ns.watch(model, window_steps=4, policy=ns.Policy(max_rate=0.05)) as second:
        second.load_state_dict(torch.load(file, weights_only=True))
        run(second, model, range(at, 10))
    for window in ("all", "last", "open"):
        assert contents(second.census(window=window)) == contents(whole.census(window=window)), window
    assert second.report().to_dict()["layers"] == whole.report().to_dict()["layers"]


BAD_TALLIES = {
    "a part missing": lambda state: state.pop("zero_outputs"),
    "a part too many": lambda state: state.update(surprise=1),
    "info missing": lambda state: state.pop("info"),
    "info of other fields": lambda state: state["info"].update(colour="red"),
    "a list for a tensor": lambda state: state.update(zero_outputs=[1, 2]),
    "widths that differ": lambda state: state.update(zero_outputs=torch.zeros(9, dtype=torch.int64)),
    "floats for counts": lambda state: state.update(zero_outputs=torch.full((3,), 0.5)),
}


@pytest.mark.parametrize("spoil", BAD_TALLIES.values(), ids=BAD_TALLIES)
def test_an_invalid_tally_state_raises_a_clear_error(spoil):
    state = replace(Tally.empty(INFO, 3), positions=1, gradient_positions=1, examples=1).state_dict()
    spoil(state)
    with pytest.raises(StateError, match="saved state of a tally"):
        Tally.from_state(state)


@pytest.mark.parametrize("state", [None, 3, [], {}, {"tallies": None}, {"tallies": {"a": 5}}], ids=repr)
def test_an_invalid_census_state_raises_a_clear_error(state):
    with pytest.raises(StateError):
        Census.from_state(state)


def test_a_tally_made_by_replace_merges_like_any_other():
    tally = count([DATA])["0/relu"]
    twice = tally.merge(replace(tally))
    assert twice.positions == 48
    np.testing.assert_array_equal(twice.zero_outputs, 2 * tally.zero_outputs)
    np.testing.assert_array_equal(twice.zero_output_fraction, tally.zero_output_fraction)
