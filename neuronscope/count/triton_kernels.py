"""The kernels that count on a GPU, in Triton. This is the only module that imports triton.

Two of them count a tensor. :func:`count_share` reads each element once, and leaves what its program counted.
:func:`add_shares` adds that up and adds it to the counters of the site. No program writes where another one writes, so
nothing depends on the order in which they run. Counts are 32 bits wide in a program and 64 in the counters. Numbers of
half precision are made float32, which is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_shares", "count_share", "tl", "triton"]


@triton.jit(do_not_specialize=["tolerance", "share"])
def count_share(
    tensor,
    keep,
    counts,
    sums,
    kept,
    row,
    inner_units,
    outer_unit_stride,
    unit_stride,
    size_b,
    size_c,
    size_d,
    positions,
    stride_a,
    stride_b,
    stride_c,
    stride_d,
    keep_a,
    keep_b,
    keep_c,
    keep_d,
    tiles,
    share,
    tolerance,
    OUTPUTS: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    ALONG: tl.constexpr,
    KEEP_ALONG: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Count a share of the positions for some of the neurons; see :class:`neuronscope.count.kernel_plan.KernelPlan`.

    Args:
        tensor: What is counted.
        keep: Bytes that say which positions are counted.
        counts: Gets zeros and values that are not finite, int32 ``(shares, 2, row)``; for gradients zeros alone.
        sums: Gets magnitudes, ``(shares, row)``.
        kept: Gets the number of positions that the mask keeps, int32 ``(shares,)``.
        row: Numbers of a row of a share.
        inner_units: The size of the inner one of two dimensions of neurons, and of one if there is one.
        outer_unit_stride: The stride of the outer one.
        unit_stride: That of the inner one.
        size_b: The positions are four dimensions, a to d, of which the outermost has the rest of them.
        size_c: See there, and so are the strides.
        size_d: See there.
        positions: Number of positions.
        stride_a: In the tensor.
        stride_b: See there.
        stride_c: See there.
        stride_d: See there.
        keep_a: In the mask.
        keep_b: See there.
        keep_c: See there.
        keep_d: See there.
        tiles: Number of tiles of positions.
        share: How many of them a program takes.
        tolerance: ``|x|`` up to which a number is zero: the bits of a float64.
        OUTPUTS: Whether it is an output, and no gradient.
        EXACT: Whether the tolerance is 0.
        MASKED: Whether there is a mask.
        ALONG: Whether a tile holds adjacent positions of dimension d.
        KEEP_ALONG: Whether the mask differs along dimension d.
        HEADS: Whether two dimensions index the neurons.
        POSITIONS: Positions of a tile.
        UNITS: Numbers of a row in a tile.
    """
    one, which = tl.program_id(0), tl.program_id(1)
    unit = one * UNITS + tl.arange(0, UNITS)
    in_row = unit < row
    if HEADS:
        unit_at = (unit // inner_units).to(tl.int64) * outer_unit_stride
        unit_at += (unit % inner_units).to(tl.int64) * unit_stride
    else:
        unit_at = unit.to(tl.int64) * unit_stride
    limit = tolerance.to(tl.int64).to(tl.float64, bitcast=True)
    wide: tl.constexpr = tl.float64 if tensor.dtype.element_ty == tl.float64 else tl.float32
    both = tl.zeros([POSITIONS, UNITS], tl.int32)  # zeros, and above 16 bits what is not finite: fewer registers
    total = tl.zeros([POSITIONS, UNITS], wide)
    used = tl.zeros([POSITIONS], tl.int32)
    first = which * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        if ALONG:
            across = tl.cdiv(size_d, POSITIONS)
            outer = tile // across
            d = (tile % across) * POSITIONS + tl.arange(0, POSITIONS)
            counted = d < size_d
        else:
            place = tile * POSITIONS + tl.arange(0, POSITIONS)
            counted = place < positions
            d = place % size_d
            outer = place // size_d
        c = outer % size_c
        rest = outer // size_c
        b = (rest % size_b).to(tl.int64)
        a = (rest // size_b).to(tl.int64)
        c = c.to(tl.int64)
        d = d.to(tl.int64)
        if MASKED:
            keep_at = a * keep_a + b * keep_b + c * keep_c
            if ALONG and not KEEP_ALONG:  # one number for the tile, so that the tensor can be read in long words
                counted = counted & (tl.load(keep + keep_at) != 0)
            else:
                counted = counted & (tl.load(keep + keep_at + d * keep_d, mask=counted, other=0) != 0)
            used += counted.to(tl.int32)
        at = a * stride_a + b * stride_b + c * stride_c + d * stride_d
        read = counted[:, None] & in_row[None, :]
        size = tl.abs(tl.load(tensor + at[:, None] + unit_at[None, :], mask=read, other=0).to(wide))
        zero = size == 0 if EXACT else size <= limit.to(wide)
        both += (zero & read).to(tl.int32)
        if OUTPUTS:
            finite = size < float("inf")
            both += (~finite).to(tl.int32) << 16  # what is not read is finite
            total += tl.where(finite, size, 0)
    begin = which.to(tl.int64) * row
    if OUTPUTS:
        tl.store(sums + begin + unit, tl.sum(total, 0), mask=in_row)
        begin *= 2
        tl.store(counts + begin + row + unit, tl.sum(both >> 16, 0), mask=in_row)
    tl.store(counts + begin + unit, tl.sum(both & 0xFFFF, 0), mask=in_row)
    if MASKED and one == 0:
        tl.store(kept + which, tl.sum(used, 0))


@triton.jit(do_not_specialize=["neurons", "shares", "step", "positions", "added_positions", "added_examples"])
def add_shares(
    counts,
    sums,
    kept,
    zeros_of,
    not_finite,
    abs_sum,
    last_active,
    first_active,
    traced,
    clock,
    neurons,
    fold,
    shares,
    step,
    positions,
    added_positions,
    added_examples,
    OUTPUTS: tl.constexpr,
    MASKED: tl.constexpr,
    CAPTURED: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Add up what the programs of :func:`count_share` left, and add it to the counters.

    Args:
        counts: As in :func:`count_share`.
        sums: See there.
        kept: See there.
        zeros_of: The counter of zeros, of outputs or of gradients. The next five are not touched for gradients.
        not_finite: Counter of values that are not finite.
        abs_sum: Counter of magnitudes.
        last_active: Step at which each neuron fired last.
        first_active: Step at which it fired first.
        traced: Positions and examples that are counted on the device; for gradients positions alone.
        clock: Has the optimizer step.
        neurons: Number of neurons.
        fold: How many numbers of a row belong to one neuron.
        shares: Number of shares.
        step: The optimizer step, if it is not read from the clock.
        positions: Number of positions. What the mask leaves out of them is taken off ``traced``.
        added_positions: How many to add to ``traced``.
        added_examples: How many examples to add.
        OUTPUTS: As in :func:`count_share`, and so is the next.
        MASKED: See there.
        CAPTURED: Whether to read the clock.
        SHARES: Most shares.
        ROWS: Numbers of a neuron in a tile.
        UNITS: Neurons of a tile.
    """
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    in_row = unit < neurons
    row = neurons.to(tl.int64) * fold
    kinds = 2 if OUTPUTS else 1
    zeros = tl.zeros([ROWS, UNITS], tl.int64)
    broken = tl.zeros([ROWS, UNITS], tl.int64)
    total = tl.zeros([ROWS, UNITS], tl.float64)
    rows = shares * fold
    for first in range(0, rows, ROWS):
        index = first + tl.arange(0, ROWS)
        share = (index // fold).to(tl.int64)
        within = unit.to(tl.int64)[None, :] * fold + (index % fold)[:, None]
        read = (index < rows)[:, None] & in_row[None, :]
        at = (share * kinds * row)[:, None] + within
        zeros += tl.load(counts + at, mask=read, other=0).to(tl.int64)
        if OUTPUTS:
            broken += tl.load(counts + at + row, mask=read, other=0).to(tl.int64)
            total += tl.load(sums + (share * row)[:, None] + within, mask=read, other=0).to(tl.float64)
    left_out = positions.to(tl.int64) * 0
    if MASKED:
        each = tl.arange(0, SHARES)
        used = tl.load(kept + each, mask=each < shares, other=0).to(tl.int64)
        left_out += positions - tl.sum(used, 0) * fold
    zero = tl.sum(zeros, 0)
    old = tl.load(zeros_of + unit, mask=in_row, other=0)
    tl.store(zeros_of + unit, (old + zero).to(old.dtype), mask=in_row)
    if OUTPUTS:
        bad = tl.sum(broken, 0)
        old = tl.load(not_finite + unit, mask=in_row, other=0)
        tl.store(not_finite + unit, (old + bad).to(old.dtype), mask=in_row)
        held = tl.load(abs_sum + unit, mask=in_row, other=0)
        tl.store(abs_sum + unit, (held + tl.sum(total, 0)).to(held.dtype), mask=in_row)
        now = tl.load(clock) if CAPTURED else step.to(tl.int64)
        fired = zero + bad < positions - left_out
        last = tl.load(last_active + unit, mask=in_row, other=0)
        tl.store(last_active + unit, tl.where(fired, tl.maximum(last, now.to(last.dtype)), last), mask=in_row)
        start = tl.load(first_active + unit, mask=in_row, other=0)
        tl.store(first_active + unit, tl.where(fired, tl.minimum(start, now.to(start.dtype)), start), mask=in_row)
    if tl.program_id(0) == 0:
        tl.store(traced, tl.load(traced) + added_positions - left_out)
        if OUTPUTS:
            tl.store(traced + 1, tl.load(traced + 1) + added_examples)
