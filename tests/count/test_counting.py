"""Counting in blocks equals counting plainly, for any shape, stride, dtype, axis, tolerance and value.

The plain count is numpy's, in float64 and int64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from neuronscope.count import counter_tensors
from neuronscope.count.counter_tensors import NEVER
from neuronscope.count.counters import SiteCounters, add_gradients, add_outputs
from neuronscope.count.cpu_kernels import ScratchBuffers, fits_float32
from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.count.pieces import TensorToCount
from neuronscope.count.small_tensors import SmallTensors
from neuronscope.sites import SiteInfo
from neuronscope.tally.collect import read_tallies

SCRATCH = ScratchBuffers()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def plain(tensor: Tensor, axis: int, tolerance: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zeros, values that are not finite, and summed magnitudes of each neuron."""
    rows = np.moveaxis(tensor.detach().double().numpy(), axis, 0).reshape(tensor.shape[axis], -1)
    finite = np.isfinite(rows)
    return (np.abs(rows) <= tolerance).sum(1), (~finite).sum(1), np.where(finite, np.abs(rows), 0).sum(1)


class OutputCounts(NamedTuple):
    """What was counted of one output; ``not_finite`` is ``None`` if the kernels counted it."""

    zeros: Tensor
    not_finite: Tensor | None
    abs_sum: Tensor


def count_outputs(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float = 0.0) -> OutputCounts:
    """Count an output that does not wait, as a site does."""
    row = torch.empty(2, tensor.shape[axis])
    if scratch.measure(tensor, axis, tolerance, row) and fits_float32(row):
        return OutputCounts(row[0].long(), None, row[1].double())
    counters = SiteCounters(tensor.shape[axis], torch.device("cpu"))
    counters.add_plain(TensorToCount(tensor, NeuronLayout(axis), 0, tolerance))
    return OutputCounts(counters.tensors.zero_outputs, counters.tensors.not_finite, counters.tensors.abs_sum)


def count_zeros(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float = 0.0) -> Tensor:
    """Count the zeros of a gradient that does not wait."""
    row = torch.empty(1, tensor.shape[axis])
    if scratch.measure(tensor, axis, tolerance, row):
        return row[0].long()
    return count_outputs(tensor, axis, scratch, tolerance).zeros


def assert_counts(tensor: Tensor, axis: int, tolerance: float = 0.0) -> None:
    before = tensor.clone()
    zeros, broken, magnitude = plain(tensor, axis, tolerance)
    counted = count_outputs(tensor, axis, SCRATCH, tolerance)
    assert counted.zeros.dtype == torch.int64
    assert counted.zeros.tolist() == zeros.tolist()
    assert (counted.not_finite is None and not broken.any()) or counted.not_finite.tolist() == broken.tolist()
    assert counted.abs_sum.dtype == torch.float64
    np.testing.assert_allclose(counted.abs_sum.numpy(), magnitude, rtol=1e-5, atol=1e-30)
    assert count_zeros(tensor, axis, SCRATCH, tolerance).tolist() == zeros.tolist()
    torch.testing.assert_close(tensor, before, rtol=0, atol=0, equal_nan=True)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same shape in several memory layouts."""
    shape = tensor.shape
    found = {
        "contiguous": tensor,
        "reversed": tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim()))),
        "strided": torch.stack((tensor, tensor + 1), -1)[..., 0],
        "sliced": torch.cat((tensor, tensor), 0)[: shape[0]],
        "expanded": tensor[:1].expand(shape),
        "offset": torch.cat((tensor.new_ones(1), tensor.reshape(-1)))[1:].view(shape),
    }
    if tensor.dim() == 4:
        found["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
    if tensor.dim() == 5:
        found["channels_last_3d"] = tensor.contiguous(memory_format=torch.channels_last_3d)
    if tensor.dim() > 1:
        found["transposed"] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (1, 4), (4, 1), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 2, 3), (1, 1, 1)])
def test_zeros_are_counted_along_every_axis_of_every_layout(shape, dtype):
    values = torch.randn(shape).relu().to(dtype)
    values.view(-1)[::3] = -0.0  # minus zero is zero
    for tensor in layouts(values).values():
        for axis in range(tensor.dim()):
            assert_counts(tensor, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["contiguous", "reversed", "strided", "expanded", "channels_last"])
def test_values_that_are_not_finite_are_counted_apart(value, dtype, layout):
    tensor = torch.randn(3, 4, 2, 5).relu().to(dtype)
    tensor[:, 2, :, 1] = value
    tensor[0, 0, 0, 0] = value
    for axis in range(4):
        assert_counts(layouts(tensor)[layout], axis)


# Binary fractions, so that the comparison means the same in every precision.
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-14, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_within_the_tolerance_count_as_zero(tolerance, dtype):
    tensor = (torch.randn(6, 5, 4) / 4).to(dtype)
    tensor[0] = tolerance
    tensor[1] = -tolerance
    tensor[2, 0, 0] = math.nan
    for axis in range(3):
        assert_counts(tensor, axis, tolerance)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 5), (2, 3, 0), (0,)])
def test_empty_tensors_count_nothing(shape):
    for axis in range(len(shape)):
        counted = count_outputs(torch.empty(shape), axis, SCRATCH)
        assert counted.zeros.tolist() == [0] * shape[axis]
        assert counted.abs_sum.tolist() == [0.0] * shape[axis]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 3e38),  # a handful of them overflow a float32 sum, and none is infinite
        (torch.float64, 1e300),  # infinite as a float32
        (torch.float64, 1e-300),  # zero as a float32, and not zero
        (torch.float32, 1e-45),  # the smallest number there is
        (torch.float16, 65504.0),
        (torch.bfloat16, 3e38),
    ],
    ids=str,
)
def test_extremes_are_finite_and_not_zero(dtype, value):
    tensor = torch.full((40, 3), value, dtype=dtype)
    for axis in (0, 1):
        counted = count_outputs(tensor, axis, SCRATCH)
        assert counted.zeros.tolist() == [0] * tensor.shape[axis]
        assert counted.not_finite is None or not counted.not_finite.any()
        expected = float(tensor[0, 0]) * (tensor.numel() // tensor.shape[axis])
        # 1e-300 and 1e-45 sum up to nothing beside what a float32 holds: 4e-44 at most.
        np.testing.assert_allclose(counted.abs_sum.numpy(), expected, rtol=1e-2, atol=1e-40)


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 20_003), (2, 70_001), (31, 5_000)])
def test_few_positions_of_many_neurons(shape, dtype, tolerance):
    """Rows that do not end on a word, in one block."""
    tensor = torch.randn(shape).relu().to(dtype)
    tensor[:, 7], tensor[:, -1], tensor[0, -2] = 0, -0.0, 2.0**-14
    tensor[0, 0] = 1e-300  # a zero in all types but float64
    assert_counts(tensor, 1, tolerance)
    assert_counts(layouts(tensor)["transposed"], 1, tolerance)
    tensor[1, 3], tensor[0, 4] = math.nan, math.inf
    assert_counts(tensor, 1, tolerance)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(900_000, 1), (900_000, 2), (300_000, 3, 2)], ids=str)
def test_sums_of_very_many_positions_are_accurate(shape, sign):
    """A float32 sum that adds one number after another is off by a thousandth here."""
    assert_counts(torch.full(shape, sign * 0.1), 1)


def test_few_positions_of_more_neurons_than_a_block_holds():
    tensor = torch.randn(3, 700_001).relu()
    assert_counts(tensor, 1)


@pytest.mark.parametrize("below", [None, 3, 499_999])
def test_few_positions_with_and_without_a_number_below_zero(below):
    """Where no sign bit is set, magnitudes are added up in place; a tensor with one, and those after it, are not."""
    tensor = torch.randn(9, 100_003).relu()
    scratch = ScratchBuffers()
    for _ in range(2):
        if below is not None:
            tensor.view(-1)[below] = -2.5
        zeros, _, magnitude = plain(tensor, 1)
        counted = count_outputs(tensor, 1, scratch)
        assert counted.zeros.tolist() == zeros.tolist()
        np.testing.assert_allclose(counted.abs_sum.numpy(), magnitude, rtol=1e-6)


def test_wide_counters_know_when_each_neuron_fired():
    """So wide that only one row of counts waits: 2 × 20,000 numbers."""
    counters, scratch = SiteCounters(20_000, torch.device("cpu")), ScratchBuffers()
    outputs = [torch.randn(4, 20_000).relu() * (torch.rand(20_000) < 0.5) for _ in range(3)]
    for step, y in zip((3, 5, 8), outputs, strict=True):
        add_outputs(counters, y, 1, 4, step, scratch, 0.0)
        add_gradients(counters, y, 1, scratch)
    tensors = counters.flush()
    zeros = sum(plain(y, 1)[0] for y in outputs)
    assert tensors.zero_outputs.tolist() == tensors.zero_gradients.tolist() == zeros.tolist()
    np.testing.assert_allclose(tensors.abs_sum.numpy(), sum(plain(y, 1)[2] for y in outputs), rtol=1e-5)
    fired = [(y != 0).any(0).tolist() for y in outputs]
    steps = [[step for step, those in zip((3, 5, 8), fired, strict=True) if those[n]] for n in range(20_000)]
    assert tensors.last_active.tolist() == [each[-1] if each else -1 for each in steps]
    assert tensors.first_active.tolist() == [each[0] if each else NEVER for each in steps]


@pytest.mark.parametrize("neurons", [512, 513, 1000, 4096])
def test_wide_layers_of_one_position_a_call_are_counted_exactly(neurons):
    """As where a policy acts, or a model generates. More outputs could wait than there are rows for their counts."""
    counters, scratch = SiteCounters(neurons, torch.device("cpu")), ScratchBuffers()
    outputs = torch.randn(75, 1, neurons, generator=torch.Generator().manual_seed(neurons)).relu_()
    outputs[70, 0, 0] = math.nan
    for step, y in enumerate(outputs):
        add_outputs(counters, y, 1, 1, step, scratch, 0.0)
        add_gradients(counters, y, 1, scratch)
    tensors, (zeros, broken, magnitude) = counters.flush(), plain(outputs, 2)
    assert tensors.zero_outputs.tolist() == tensors.zero_gradients.tolist() == zeros.tolist()
    assert tensors.not_finite.tolist() == broken.tolist()
    np.testing.assert_allclose(tensors.abs_sum.numpy(), magnitude, rtol=1e-5)
    steps = [np.flatnonzero(each) for each in ((outputs != 0) & outputs.isfinite())[:, 0].numpy().T]
    assert tensors.last_active.tolist() == [each[-1] for each in steps]
    assert tensors.first_active.tolist() == [each[0] for each in steps]


@pytest.mark.parametrize("neurons", [3, 20_000])
@pytest.mark.parametrize("positions", [2, 200])
def test_sums_of_huge_magnitudes_are_finite(neurons, positions):
    """No output of a network that diverges is infinite yet, but what a window adds up would be, in float32."""
    counters, scratch = SiteCounters(neurons, torch.device("cpu")), ScratchBuffers()
    y = torch.zeros(positions, neurons).index_fill_(1, torch.tensor([0]), 1e38 / positions)
    for step in range(10):
        add_outputs(counters, y, 1, positions, step, scratch, 0.0)
    tensors = counters.flush()
    np.testing.assert_allclose(tensors.abs_sum[:2].numpy(), [1e39, 0], rtol=1e-5)
    assert tensors.zero_outputs[:2].tolist() == [0, 10 * positions]


def test_counts_are_exact_beyond_a_block_and_beyond_float32():
    """2**24 + 3 positions of one neuron: a float32 counter would stick at 2**24."""
    tensor = torch.zeros(2**24 + 3, 1, dtype=torch.bfloat16)
    tensor[5] = 1
    assert count_zeros(tensor, 1, SCRATCH).tolist() == [2**24 + 2]
    assert count_zeros(tensor.view(1, 1, -1), 1, SCRATCH).tolist() == [2**24 + 2]
    counters = SiteCounters(1, torch.device("cpu"))
    for _ in range(2):
        add_outputs(counters, tensor, 1, 1, 0, SCRATCH, 0.0)
    assert counters.flush().zero_outputs.tolist() == [2**25 + 4]
    assert counters.totals()[0] == 2**25 + 6


#: Shapes that are cut and added in every way that there is; a byte counts to 255, a block holds 2**20 numbers.
LARGE = [
    (3000, 300),
    (700, 2, 1000),
    (2, 600_000),  # two rows to add
    (9, 20_001),  # eight rows are whole words: two such, and most of the second blank
    (1, 140_001),  # nothing to add
    (140_001, 1),
    (256, 600),  # one row too many for a byte
    (40, 64, 15, 15),
    (40, 64, 8, 17),  # 136 numbers are 17 words that follow each other
    (3, 64, 25, 45),  # 1125 numbers are 140.6 words: some bytes are blank
    (2, 30, 47, 53),  # 2491 numbers are 311.4 words: more than a byte counts
    (33, 1100, 37),  # more than a block, cut along the neurons
    (1, 2, 1_100_001),  # and along the positions
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_counts_over_many_blocks_are_exact(shape, dtype):
    made = torch.randn(shape).relu_().to(dtype)
    for tensor in (made, made.transpose(0, 1).contiguous().transpose(0, 1)):
        for axis in range(min(len(shape), 2)):
            assert_counts(tensor, axis)


@pytest.mark.parametrize("shape", [(3000, 400), (12, 60_000), (40, 64, 15, 35)], ids=str)
def test_large_tensors_of_every_layout_are_counted_exactly(shape):
    """More than a block, also where numbers of memory are read several times."""
    made = torch.randn(shape).relu_()
    found = layouts(made)
    found["expanded along the neurons"] = made[:, :1].expand(shape)
    found["overlapping"] = made.reshape(-1)[: sum(shape)].as_strided(shape, (1,) * len(shape))
    for tensor in found.values():
        assert_counts(tensor, 1)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, math.nan, math.inf])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_counters_that_are_full_do_not_overflow_into_their_neighbours(shape, value):
    """Every byte counts as far as it goes: what runs over would show in the neighbour."""
    tensor = torch.full(shape, value)
    tensor[:, 0] = 1 - tensor[:, 0]
    zeros, _, _ = plain(tensor, 1)
    for _ in range(2):  # the second time over what the first left in the buffers
        assert count_zeros(tensor, 1, SCRATCH).tolist() == zeros.tolist()


@pytest.mark.parametrize("shape", [(3000, 50), (50, 3000), (5, 40, 31, 31), (1, 140_001)], ids=str)
def test_the_tolerance_holds_in_large_tensors(shape):
    tensor = torch.randn(shape) / 4
    tensor[0, 0] = math.nan
    assert_counts(tensor, 1, tolerance=0.125)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 5), (3000, 50)], ids=str)
def test_the_smallest_numbers_are_not_zero(shape, dtype):
    smallest = torch.tensor(1, dtype={8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]).view(dtype)
    tensor = smallest.expand(shape).clone()
    tensor[1, :] = -tensor[1, :]
    tensor[:, 2] = -0.0
    assert count_zeros(tensor, 1, SCRATCH).tolist() == [shape[0] * (neuron == 2) for neuron in range(shape[1])]


@given(data=st.data())
def test_any_strided_tensor_is_counted_exactly(data):
    """Shapes, axes, permutations, steps, expansions and values drawn at random."""
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    dtype = data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn([2 * size for size in shape], generator=generator).to(dtype)
    tensor[tensor < data.draw(st.sampled_from([-9.0, 0.0, 9.0]))] = 0
    if data.draw(st.booleans()) and tensor.numel():
        tensor.view(-1)[seed % tensor.numel()] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    order = data.draw(st.permutations(range(len(shape))))
    tensor = tensor.permute(order)
    step = data.draw(st.integers(1, 2))
    tensor = tensor[tuple(slice(None, None, step) for _ in shape)]
    if data.draw(st.booleans()):
        tensor = tensor[:1].expand(3 if tensor.shape[0] else 0, *tensor.shape[1:])
    axis = data.draw(st.integers(0, tensor.dim() - 1))
    tolerance = data.draw(st.sampled_from([0.0, 0.25]))
    if tensor.shape[axis] > 0:
        assert_counts(tensor, axis, tolerance)


@pytest.mark.parametrize("shape", [(300, 7), (300, 70), (40_000, 7), (3000, 40, 2), (9, 16, 40, 40)], ids=str)
@pytest.mark.parametrize("surroundings", ["autocast", "inference", "deterministic", "no grad", "medium", "float64"])
def test_the_callers_torch_settings_do_not_change_counts(surroundings, shape):
    """The caller's modes are in force where hooks run; counts are the same in all of them."""
    tensor = torch.randn(shape).relu_()
    tensor[tensor > 1] = 1 + 2.0**-20  # not a number of bfloat16
    expected = plain(tensor, 1)
    precision = torch.get_float32_matmul_precision()
    try:
        if surroundings == "medium":
            torch.set_float32_matmul_precision("medium")
        if surroundings == "float64":
            torch.set_default_dtype(torch.float64)
        if surroundings == "deterministic":
            torch.use_deterministic_algorithms(True)
        context = {
            "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
            "inference": torch.inference_mode(),
            "no grad": torch.no_grad(),
        }.get(surroundings, torch.enable_grad())
        counters = SiteCounters(shape[1], torch.device("cpu"))
        scratch = ScratchBuffers()
        with context:
            add_outputs(counters, tensor, 1, 300, 4, scratch, 0.0)
            add_gradients(counters, tensor, 1, scratch)
        add_outputs(counters, tensor, 1, 300, 5, scratch, 0.0)  # and afterwards, outside
        counters.reset()
        add_outputs(counters, tensor, 1, 300, 6, scratch, 0.0)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    tensors = counters.flush()
    assert tensors.zero_outputs.tolist() == expected[0].tolist()
    np.testing.assert_allclose(tensors.abs_sum.numpy(), expected[2], rtol=1e-2 if surroundings == "medium" else 1e-5)


def test_the_counters_of_a_site_are_right_after_each_step():
    counters = SiteCounters(3, torch.device("cpu"))
    add_outputs(counters, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, math.nan]]), 1, 2, 5, SCRATCH, 0.0)
    add_outputs(counters, torch.tensor([[0.0, 0.0, 2.0]]), 1, 1, 8, SCRATCH, 0.0)
    add_gradients(counters, torch.tensor([[0.0, -0.0, 1.0]]), 1, SCRATCH)
    assert counters.flush().zero_outputs.tolist() == [3, 2, 1]
    assert counters.flush().not_finite.tolist() == [0, 0, 1]
    assert counters.flush().abs_sum.tolist() == [0.0, 1.0, 2.0]
    assert counters.flush().last_active.tolist() == [-1, 5, 8]  # NaN is no firing: neuron 2 fired at step 8 only
    assert counters.flush().first_active.tolist() == [NEVER, 5, 8]
    assert counters.flush().zero_gradients.tolist() == [1, 1, 0]
    assert counters.totals() == (3, 1, 3)
    identity = id(counters.flush().zero_outputs)
    counters.reset()
    assert id(counters.flush().zero_outputs) == identity
    assert counters.totals() == (0, 0, 0)
    assert counters.flush().last_active.tolist() == [-1] * 3
    assert counters.flush().first_active.tolist() == [NEVER] * 3


@pytest.mark.parametrize(
    "full",
    [{}, {"_POSITIONS": 100}, {"_SUMS": 2}, {"_NEVER_IN_WINDOW": 9}, {"_SEEN_BY_HOST": "nowhere"}],
    ids=["roomy", "positions", "sums", "steps", "other devices"],
)
@pytest.mark.parametrize("neurons", [1, 7, 3000, 20_000])
def test_many_calls_of_one_site_are_counted_exactly(neurons, full, monkeypatch):
    """More calls than rows wait, of many sizes and steps, some not finite, read in between: as if each were added.

    So it is, too, if a window is full after a hundred positions, two sums or nine steps, or none fits into one; and if
    it counts what is not finite, as on other devices.
    """
    for name, value in full.items():
        monkeypatch.setattr(counter_tensors, name, value)
    counters = SiteCounters(neurons, torch.device("cpu"))
    zeros, broken, gradients = (np.zeros(neurons, dtype=np.int64) for _ in range(3))
    magnitude, last, first = np.zeros(neurons), np.full(neurons, -1), np.full(neurons, NEVER)
    generator = torch.Generator().manual_seed(neurons)
    for number in range(150):
        y = torch.randn(1 + number % 5, neurons, generator=generator).sub_(1).relu_()
        if number % 40 == 7:
            y[0, 0] = math.nan
        step = number // 3 * 2
        add_outputs(counters, y, 1, len(y), step, SCRATCH, 0.0)
        add_gradients(counters, y, 1, SCRATCH)
        counted = plain(y, 1)
        zeros, broken, magnitude = zeros + counted[0], broken + counted[1], magnitude + counted[2]
        gradients = gradients + counted[0]
        fired = counted[0] + counted[1] < len(y)
        last, first = np.where(fired, step, last), np.where(fired & (first == NEVER), step, first)
        if number % 60 == 50:
            counters.flush()
        if number % 60 == 20:
            counters.add_waiting()
    tensors = counters.flush()
    assert tensors.zero_outputs.tolist() == zeros.tolist()
    assert tensors.zero_gradients.tolist() == gradients.tolist()
    assert tensors.not_finite.tolist() == broken.tolist()
    assert tensors.last_active.tolist() == last.tolist()
    assert tensors.first_active.tolist() == first.tolist()
    np.testing.assert_allclose(tensors.abs_sum.numpy(), magnitude, rtol=1e-5)
    assert counters.totals() == (450, 450, 450)  # 30 rounds of 1 + 2 + 3 + 4 + 5


def test_counts_beyond_32_bits_are_exact():
    """2**31 zeros of a wide layer, and more, in calls of 2**24 − 1 positions, as the host is told of them."""
    counters, most = SiteCounters(3, torch.device("cpu")), 2**24 - 1
    row = torch.tensor([[most, most - 1, 0], [0.0, 0.5, 1.0]])
    for step in range(300):
        counters.add_row(row, most, 10**12 + step, SCRATCH)
        counters.add_row(row[:1], most, 0, SCRATCH)
    info = SiteInfo(activation="relu", kind="relu-like", linear_when_on=True, axis=1, axis_source="declared")
    tally = read_tallies([(info, counters)])[0]
    assert tally.zero_outputs.tolist() == tally.zero_gradients.tolist() == [300 * most, 300 * (most - 1), 0]
    assert tally.zero_outputs[0] > 2**32
    assert tally.abs_sum.tolist() == [0.0, 150.0, 300.0]
    assert tally.last_active_step.tolist() == [-1, 10**12 + 299, 10**12 + 299]
    assert tally.first_active_step.tolist() == [NEVER, 10**12, 10**12]
    assert [each.tolist() for each in counters.flush()[:2]] == [tally.zero_outputs.tolist()] * 2


def test_small_tensors_of_many_kinds_at_one_site_are_counted_exactly():
    """What waits is of one kind at a time; the others are counted at once, and nothing is lost or mistaken."""
    counters = SiteCounters(6, torch.device("cpu"))
    kinds = [
        (torch.float32, (3, 6), 1, 0.0),
        (torch.float64, (3, 6), 1, 0.0),
        (torch.bfloat16, (6, 2), 0, 0.0),
        (torch.float32, (2, 6, 4), 1, 0.0),
        (torch.float32, (3, 6), 1, 0.5),
        (torch.float32, (6,), 0, 0.0),
    ]
    zeros, broken, magnitude, last, positions = np.zeros(6), np.zeros(6), np.zeros(6), np.full(6, -1), 0
    generator = torch.Generator().manual_seed(0)
    for number in range(400):
        dtype, shape, axis, tolerance = kinds[(number // 37 + (number % 5 == 0)) % len(kinds)]
        y = torch.randn(shape, generator=generator).sub_(0.5).relu_().to(dtype)
        if number % 90 == 11:
            y.view(-1)[0] = math.inf
        if dtype is torch.float64 and number % 7 == 0:
            y.view(-1)[1] = 1e-300  # zero as a float32, and not zero
        add_outputs(counters, y, axis, 1, number, SCRATCH, tolerance)
        found = plain(y, axis, tolerance)
        zeros, broken, magnitude = zeros + found[0], broken + found[1], magnitude + found[2]
        last = np.where(found[0] + found[1] < y.numel() // 6, number, last)
        positions += y.numel() // 6
        y.fill_(1)  # what the program does with its tensor afterwards is its own affair
    tensors = counters.flush()
    assert tensors.zero_outputs.tolist() == zeros.tolist()
    assert tensors.not_finite.tolist() == broken.tolist()
    assert tensors.last_active.tolist() == last.tolist()
    np.testing.assert_allclose(tensors.abs_sum.numpy(), magnitude, rtol=1e-5)
    assert counters.totals()[0] == positions


def test_a_reset_drops_counts_that_are_still_pending():
    counters = SiteCounters(3, torch.device("cpu"))
    add_outputs(counters, torch.zeros(2, 3), 1, 2, 0, SCRATCH, 0.0)
    add_gradients(counters, torch.zeros(2, 3), 1, SCRATCH)
    counters.reset()
    assert counters.flush().zero_outputs.tolist() == [0, 0, 0]
    assert counters.flush().zero_gradients.tolist() == [0, 0, 0]


def test_counting_draws_no_random_number():
    state = torch.get_rng_state()
    assert_counts(torch.ones(500, 40), 1)
    assert torch.get_rng_state().equal(state)


def test_the_scratch_buffer_is_reused():
    """Counting a tensor ten times allocates its buffers once."""
    scratch = ScratchBuffers()
    tensor = torch.randn(4000, 100)
    count_outputs(tensor, 1, scratch)
    first = scratch.buffer.data_ptr()
    for _ in range(10):
        count_outputs(tensor, 1, scratch)
    assert scratch.buffer.data_ptr() == first


def test_small_tensors_that_differ_from_those_that_wait_are_not_added_to_them() -> None:
    """Each has the same shape as they have, or the same number of elements."""
    waiting = SmallTensors(2, most=8)
    first = torch.ones(3, 3)
    assert waiting.try_add(first, 1, step=0, tolerance=0.0)
    for other in (first.to(torch.bfloat16), first.to_sparse(), first.to("meta"), first.view(1, 9), first[:, :1]):
        assert not waiting.try_add(other, 1, step=0, tolerance=0.0), other
    assert not waiting.try_add(first, 0, step=0, tolerance=0.0)
    assert not waiting.try_add(first, 1, step=0, tolerance=0.5)
    assert waiting.try_add(first.t(), 1, step=1, tolerance=0.0)
    assert waiting.steps == [0, 1]
    waiting.clear()
    assert waiting.try_add(first, 0, step=2, tolerance=0.5)
    assert (waiting.axis, waiting.tolerance) == (0, 0.5)
