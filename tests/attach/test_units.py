"""The arithmetic of units: where the units of a layer lie in a tensor, and which ones these are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronscope.attach.units import (
    Units,
    broadcast,
    fits,
    place,
    positions,
    reduce,
    reshape,
    resized,
    select,
    slice_dim,
)


def layer(shape: tuple[int, ...], *unit_dims: int) -> Units:
    width = math.prod(shape[dim] for dim in unit_dims)
    return Units((0,), "fc", (("fc", 0, width, 1),), 0, place(shape, unit_dims))


def test_a_view_that_splits_heads_off_keeps_the_units() -> None:
    dims = reshape(place((8, 12), (1,)), (8, 3, 4))
    assert dims == place((8, 3, 4), (1, 2))


def test_a_view_that_flattens_channels_and_space_keeps_the_units() -> None:
    dims = reshape(place((2, 3, 4, 5), (1,)), (2, 60))
    assert dims == (((2, 0),), ((3, 1), (20, 0)))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (4, 15), (60,)])
def test_a_view_that_cuts_units_and_positions_alike_is_lost_or_counts_on(shape: tuple[int, ...]) -> None:
    # (5 positions, 12 units) as 12 rows of 5: a row begins within the units.
    dims = reshape(place((5, 12), (1,)), shape)
    assert (dims is None) == (shape in {(12, 5), (4, 15)})


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_view_and_its_way_back_give_the_same_dimensions(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    unit_dims = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=2).map(sorted))
    before = place(shape, unit_dims)
    after = tuple(data.draw(st.permutations([factor for size in shape for factor in _primes(size)])))
    there = reshape(before, after)
    if there is not None:
        assert fits(there, after)
        assert reshape(there, shape) == before


def _primes(size: int) -> list[int]:
    return {1: [], 4: [2, 2], 6: [2, 3]}.get(size, [size])


def test_a_view_with_other_elements_is_lost() -> None:
    assert reshape(place((5, 12), (1,)), (5, 13)) is None
    assert reshape(place((5, 12), (1,)), (0, 12)) is None


def test_a_selected_unit_is_one_neuron_with_its_number() -> None:
    one = select(layer((8, 12), 1), 1, 7)
    assert (one.size, one.numbers(), one.tensor_runs(), one.text()) == (1, [7], (("fc", 7, 8, 1),), "7")


def test_a_selected_head_is_its_units() -> None:
    head = select(layer((8, 3, 4), 1, 2), 1, 2)
    assert (head.numbers(), head.text()) == ([8, 9, 10, 11], "8:12")


def test_a_selected_position_is_all_units() -> None:
    assert select(layer((8, 12), 1), 0, 3).text() == ""


def test_a_slice_of_units_has_their_numbers() -> None:
    units = layer((8, 12), 1)
    half = slice_dim(units, 1, 6, 6)
    assert half is not None
    assert (half.text(), half.tensor_runs()) == ("6:12", (("fc", 6, 12, 1),))
    odd = slice_dim(units, 1, 1, 6, 2)
    assert odd is not None
    assert (odd.text(), odd.numbers()) == ("1:12:2", [1, 3, 5, 7, 9, 11])
    assert slice_dim(units, 0, 2, 4) == layer((4, 12), 1)


def test_a_slice_of_a_slice_has_the_numbers_of_the_layer() -> None:
    half = slice_dim(layer((8, 12), 1), 1, 6, 6)
    assert half is not None
    again = slice_dim(half, 1, 2, 3)
    assert again is not None
    assert again.numbers() == [8, 9, 10]


def test_a_slice_that_cuts_within_flattened_positions_is_lost() -> None:
    flat = layer((2, 3), 1)._replace(dims=(((2, 0),), ((3, 1), (20, 0))))
    assert slice_dim(flat, 1, 10, 20) is None
    whole_channels = slice_dim(flat, 1, 20, 40)
    assert whole_channels is not None
    assert whole_channels.text() == "1:3"


def test_units_of_two_layers_are_shown_with_their_layers() -> None:
    joined = Units((0, 1), "a+b", (("a", 0, 4, 1), ("b", 2, 6, 1)), 0, place((5, 8), (1,)))
    assert joined.text() == ""
    assert joined.width == 8
    part = slice_dim(joined, 1, 2, 4)
    assert part is not None
    assert part.tensor_runs() == (("a", 2, 4, 1), ("b", 2, 4, 1))
    assert part.text() == "a:2:4,b:2:4"


def test_a_transposition_of_heads_keeps_which_units_they_are() -> None:
    heads = layer((8, 3, 4), 1, 2)
    turned = heads._replace(dims=tuple(heads.dims[dim] for dim in (0, 2, 1)))
    assert turned.which == heads.which
    assert turned.text() == ""


@pytest.mark.parametrize("dim", [0, 1])
def test_a_reduction_ends_units_and_leaves_out_positions(dim: int) -> None:
    units = layer((8, 12), 1)
    assert reduce(units.dims, [dim], keepdim=False) == (None if dim == 1 else place((12,), (0,)))
    assert reduce(units.dims, [dim], keepdim=True) == (None if dim == 1 else place((1, 12), (1,)))


def test_what_is_broadcast_or_resized_is_positions() -> None:
    assert broadcast(place((12,), (0,)), (5, 12)) == place((5, 12), (1,))
    assert broadcast(place((12, 1), (0,)), (12, 4)) == place((12, 4), (0,))
    assert resized(place((5, 12), (1,)), (9, 12)) == place((9, 12), (1,))
    assert resized(place((5, 12), (1,)), (9, 13)) is None
    assert resized(place((5, 12), (1,)), (12,)) is None


def test_the_layout_names_the_one_dimension_of_the_units() -> None:
    assert layer((2, 3, 4), 1).layout == (1, None)
    heads = layer((2, 3, 4), 1, 2)
    assert heads.layout == (2, heads.dims)
    one = select(layer((2, 3, 4), 1), 1, 0)
    assert one.layout.dims == one.dims == positions((2, 4))


def test_the_units_of_a_real_tensor_are_found_after_views() -> None:
    units = layer((2, 12), 1)
    dims = reshape(units.dims, (2, 3, 2, 2))
    assert dims is not None
    part = select(units._replace(dims=dims), 1, 1)
    x = torch.arange(12).expand(2, 12).reshape(2, 3, 2, 2)[:, 1]
    assert sorted(set(x.flatten().tolist())) == part.numbers()
