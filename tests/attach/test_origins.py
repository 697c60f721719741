"""What an elementwise function of several tensors is: the examples of the contract, "Several sources"."""

from __future__ import annotations

import pytest

from neuronscope.attach.origins import CONSTANT, ENDED, LOST, RAW, UNITS, WEIGHT, Operand, Origin, combine
from neuronscope.attach.units import Units, place

SHAPE = (8, 12)


def of(layer: str, call: int, *upstream: int, shape: tuple[int, ...] = SHAPE, boolean: bool = False) -> Operand:
    """What a layer gave: the call's number, and those of the calls that it depends on."""
    dim = len(shape) - 1
    units = Units((call,), layer, ((layer, 0, shape[dim], 1),), 0, place(shape, (dim,)))
    bits = sum(1 << each for each in {call, *upstream})
    return Operand(shape, Origin.of(UNITS, bits, units=units), boolean)


def a(state: str, shape: tuple[int, ...] = SHAPE, upstream: int = 0) -> Operand:
    return Operand(shape, Origin.of(state, upstream))


def layer_of(*operands: Operand, shape: tuple[int, ...] = SHAPE) -> str:
    units = combine(operands, shape).units
    return "" if units is None else units.layer


@pytest.mark.parametrize("turned", [False, True])
def test_a_residual_sum_has_the_units_of_the_branch(turned: bool) -> None:
    x, f = of("x", 0), of("f", 1, 0)
    assert layer_of(*((f, x) if turned else (x, f))) == "f"


@pytest.mark.parametrize("turned", [False, True])
def test_of_parallel_branches_the_first_called_decides(turned: bool) -> None:
    bn2, downsample = of("bn2", 4, 0, 1, 2, 3), of("downsample", 5, 0)
    assert layer_of(*((downsample, bn2) if turned else (bn2, downsample))) == "bn2"


def test_the_two_products_of_a_recurrent_cell_are_those_of_the_input() -> None:
    ih, hh = of("ih", 2, 0), of("hh", 3, 1)
    assert layer_of(ih, hh) == layer_of(hh, ih) == "ih"


def test_an_adapter_beside_its_base_leaves_the_units_to_the_base() -> None:
    base, adapter = of("base", 0), of("lora_B", 2, 1)
    assert layer_of(base, adapter) == layer_of(adapter, base) == "base"


def test_a_gate_that_is_broadcast_never_wins_over_what_it_gates() -> None:
    gate = of("gate", 2, 0, 1, shape=(1, 12))
    assert layer_of(of("x", 0), gate) == layer_of(gate, of("x", 0)) == "x"
    assert layer_of(a(RAW), gate) == ""


def test_a_mask_decides_nothing() -> None:
    mask = of("x", 0, boolean=True)
    assert layer_of(mask, of("f", 1)) == layer_of(of("f", 1), mask) == "f"
    assert layer_of(mask) == "x"


def test_the_result_depends_on_all_sources() -> None:
    assert combine([of("x", 0), of("f", 3, 2), of("mask", 5, boolean=True)], SHAPE).upstream == 0b101101


def test_numbers_and_weights_beside_units_change_nothing() -> None:
    units = of("x", 0)
    assert combine([a(CONSTANT), units, a(WEIGHT)], SHAPE) is units.origin


def test_what_has_no_units_beside_units_leaves_them() -> None:
    assert layer_of(a(RAW), of("x", 0)) == layer_of(a(ENDED, upstream=1), of("x", 1)) == "x"
    assert layer_of(a(LOST, upstream=1), of("x", 1)) == "x"


def test_of_several_without_units_the_state_is_the_strongest() -> None:
    assert combine([a(RAW), a(ENDED, upstream=1)], SHAPE).state == ENDED
    assert combine([a(LOST, upstream=1), a(RAW)], SHAPE).state == LOST
    assert combine([a(CONSTANT), a(RAW)], SHAPE).state == RAW
    assert combine([a(CONSTANT), a(CONSTANT)], SHAPE).state == CONSTANT


def test_weights_alone_are_a_weight_of_the_first_layer_that_is_named() -> None:
    named = Operand(SHAPE, Origin.of(WEIGHT, layer="fc"))
    found = combine([a(WEIGHT), a(CONSTANT), named], SHAPE)
    assert (found.state, found.layer) == (WEIGHT, "fc")


def test_what_is_broadcast_to_the_result_is_repeated_along_positions() -> None:
    found = combine([of("x", 0, shape=(12,)), a(RAW, (8, 1))], SHAPE)
    assert found.units is not None
    assert found.units.dims == place(SHAPE, (1,))


def test_units_whose_rank_shrinks_are_lost() -> None:
    assert combine([of("x", 0)], (12,)).state == LOST


def test_a_function_that_is_not_linear_is_remembered() -> None:
    assert combine([of("x", 0)], SHAPE, bent="tanh").bends == (("x", "tanh"),)
    assert combine([of("x", 0)], SHAPE).bends == ()
