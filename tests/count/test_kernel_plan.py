"""The plans of the GPU kernels: what they leave for each other is small, and no counter in a program can overflow."""

from __future__ import annotations

import itertools

import pytest
import torch

from neuronscope.count.kernel_plan import PROGRAMS, TILE, KernelPlan, plan_for
from neuronscope.count.neuron_layout import NeuronLayout
from tests.count.device_cases import KINDS, case

SIZES = (1, 2, 7, 48, 49, 1000, 4096, 100_003)


def assert_bounded(plan: KernelPlan) -> None:
    assert plan.tile[0] * plan.tile[1] <= TILE
    assert plan.shares <= PROGRAMS
    assert plan.share < 1 << 15  # a program counts in 15 bits
    assert (plan.shares - 1) * plan.share < plan.tiles <= plan.shares * plan.share
    assert 12 * plan.shares * plan.row <= (4 << 20) + 100 * plan.neurons  # zeros, broken and sums, 4 bytes each


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_plans_of_any_size_are_bounded(axis: int, dtype: torch.dtype) -> None:
    """On `meta`: a tensor of 2³¹ positions or neurons has no plan, any other one has."""
    for shape in itertools.product(SIZES, repeat=3):
        tensor = torch.empty(shape, device="meta", dtype=dtype)
        if tensor.numel() > 1 << 37:  # more than any GPU holds
            continue
        for each in (tensor, tensor.permute(2, 0, 1), tensor.transpose(0, 1)):
            plan = plan_for(each, NeuronLayout(axis), None)
            if plan is None:
                assert each.numel() // each.shape[axis] >= 1 << 31
            else:
                assert_bounded(plan)


def test_positions_that_lie_two_and_two_are_counted_in_15_bits_or_not_by_kernels() -> None:
    """Tiles of two positions: 2²⁵ of them are shared out, and of 2²⁶ there would be too many for 1,024 programs."""
    for tiles, fits in ((1 << 25, False), ((1 << 25) - 1024, True)):
        tensor = torch.empty(tiles, 3, 4, device="meta")[..., :2]
        plan = plan_for(tensor, NeuronLayout(1), None)
        if fits:
            assert plan is not None
            assert plan.tile[0] == 2
            assert_bounded(plan)
        else:
            assert plan is None


@pytest.mark.parametrize("first", range(len(KINDS)), ids=KINDS)
def test_every_layout_of_networks_has_a_plan_that_follows_from_the_shape(first: int) -> None:
    for number in range(first, 10 * len(KINDS), len(KINDS)):
        one = case(number)
        plan = plan_for(one.tensor, one.layout, None)
        assert plan is not None, str(one)
        assert_bounded(plan)
        other = torch.empty_strided(one.tensor.shape, one.tensor.stride(), device="meta")
        assert plan == plan_for(other, one.layout, None)
