"""Count zeros and add up magnitudes on a CPU: in blocks that stay in its cache, eight counters in one integer.

Converting to bool turns each number into one byte, 1 or 0, at the speed of memory. Eight bytes are read as one int64.
Adding up to 255 such integers adds eight counters at once, and none of them overflows into the next. The few bytes that
are left are converted to float32, which is exact below 2**24. Magnitudes are written into a float buffer, block by
block. For a small tensor the number of torch calls is what costs; there zeros are written into the float buffer too,
beside the magnitudes, and one sum adds up both.

A *plan* says how tensors of one shape and one order in memory are cut into blocks, and holds the views of the buffers
that this needs. It is made once. Its method ``fill`` takes such a tensor, the tolerance up to which ``|x|`` counts as
zero, and ``out``, float32 ``(quantities, N)``, which it overwrites: with zeros and, if there is a second row, with
magnitudes. A magnitude is not finite if an element is not. The methods of blocks do the same for parts of a tensor.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ScratchBuffers", "compare", "fits_float32", "magnitudes"]

#: Number of elements in a block: 1 MB as bytes.
_BLOCK = 1 << 20
#: Number of elements up to which a tensor is small.
_SMALL = 1 << 17
#: Number of elements of a small tensor up to which one sum over both of its ends is quicker than two.
_AT_ONCE = 1 << 13
#: Whole numbers below this are exact in float32.
_EXACT = 1 << 24
#: Maximal number of words whose bytes can be added without a carry.
_LIMIT = 255
#: Fewest words for which adding along memory pays, and fewest bytes of a row for which adding rows pays.
_RUN, _ROW = 16, 512
#: Fewest rows of a block, if the tensor has so many: the more rows, the fewer bytes are left to convert.
_ROWS = 32
#: Number of magnitudes computed at a time: 1 MB of float32, which stays in the cache until it is summed.
_PIECE = 1 << 18
#: Fewest numbers in a row of memory for which adding them along memory is quick.
_INNER = 32
#: Fewest neurons for which rows are added up by a matrix product, which takes twice as long for few of them.
_WIDE = 1024
#: Sums of magnitudes below this do not overflow float32 where a window adds up 2**18 of them (4096 times 64 rows).
_MOST_SUM = 2.0**110
#: Maximal number of plans that are kept; inputs of ever new lengths make ever new plans.
_PLANS = 256

Shape = tuple[int, int, int]


class ScratchBuffers(threading.local):
    """Buffers and plans, one set for each thread. Counting a tensor of a known shape allocates nothing."""

    def __init__(self) -> None:
        self._plans: dict[tuple[torch.Size, tuple[int, ...], int, int], _Small | _Large] = {}
        with torch.inference_mode(False):
            # Comparing with a tensor is quicker than with a number.
            self.zero = torch.zeros((), dtype=torch.float32, device="cpu")
            self.buffer = torch.empty(0, dtype=torch.float32, device="cpu")
            self._row = torch.empty(0, dtype=torch.float32, device="cpu")
            self.words = torch.empty(0, dtype=torch.int64, device="cpu")
            self.sums = torch.empty(0, dtype=torch.int64, device="cpu")

    def measure(self, tensor: Tensor, axis: int, tolerance: float, out: Tensor) -> bool:
        """Count the zeros of a tensor, and add up its magnitudes if ``out`` has two rows, without allocating memory.

        Args:
            tensor: Any shape, neurons along ``axis``; must not require a gradient.
            axis: Dimension of the neurons, ≥ 0.
            tolerance: ``|x| <= tolerance`` counts as zero.
            out: float32 ``(1 or 2, N)``, is overwritten: zeros, and the sum of ``|x|``. Zeros are exact, because no
                count reaches 2**24. A sum is not finite if an element is not.

        Returns:
            False if the tensor cannot be counted in this way; then the plain formula must be used.
        """
        plan = self._plan(tensor, axis, out.shape[0])
        if plan is None:
            return False
        plan.fill(tensor, tolerance, out)
        return True

    def _plan(self, tensor: Tensor, axis: int, quantities: int) -> _Small | _Large | None:
        """Return the plan for a tensor; ``None`` if the plain formula must be used."""
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.layout is not torch.strided:
            return None
        key = (tensor.shape, tensor.stride(), axis, quantities)
        plan = self._plans.get(key)
        if plan is None:
            positions = tensor.numel() // max(tensor.shape[axis], 1)
            if not tensor.is_floating_point() or not 0 < positions < _EXACT:
                return None
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            with torch.inference_mode(False):
                plan = self._plans[key] = self._make(tensor, axis, quantities)
        return plan

    def numbers(self, elements: int) -> Tensor:
        """Return the float32 buffer, grown to at least ``elements``; it stays small for a network of small layers."""
        if self.buffer.numel() < elements:
            self._plans.clear()  # they hold views of the old buffer
            size = 2 * _SMALL if elements <= 2 * _SMALL else _BLOCK
            with torch.inference_mode(False):
                self.buffer = torch.empty(size, dtype=torch.float32, device="cpu")
        return self.buffer

    def row(self, quantities: int, neurons: int) -> Tensor:
        """Return a buffer for the counts of one tensor, float32 ``(quantities, N)``: of wide layers none are kept.

        Args:
            quantities: 1 for zeros, 2 for zeros and magnitudes.
            neurons: ``N``.
        """
        size = quantities * neurons
        if self._row.numel() < size:
            with torch.inference_mode(False):
                self._row = torch.empty(size, dtype=torch.float32, device="cpu")
        return self._row[:size].view(quantities, neurons)

    def _make(self, tensor: Tensor, axis: int, quantities: int) -> _Small | _Large:
        small = tensor.numel() <= _SMALL
        buffer = self.numbers(quantities * tensor.numel() if small else _BLOCK)
        if small:
            return _Small(tensor, axis, buffer, quantities, self.zero)
        if not self.words.numel():
            self.words = torch.empty(2 * _BLOCK // 8, dtype=torch.int64, device="cpu")
            self.sums = torch.empty(_BLOCK // 8, dtype=torch.int64, device="cpu")
        return _Large(tensor, axis, self)


def _in_memory_order(tensor: Tensor, axis: int) -> tuple[list[int], list[int], Shape]:
    """Return a tensor's dimensions in the order of memory, their sizes, and its shape as ``(outer, N, inner)``."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dimension: (-strides[dimension], dimension))
    sizes = [tensor.shape[dimension] for dimension in order]
    place = order.index(axis)
    return order, sizes, (math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :]))


class _Small:
    """A plan for small tensors: writes zeros and magnitudes into the buffer, in the tensor's own shape."""

    def __init__(self, tensor: Tensor, axis: int, buffer: Tensor, quantities: int, zero: Tensor) -> None:
        order, sizes, shape = _in_memory_order(tensor, axis)
        elements = tensor.numel()
        used = buffer[: quantities * elements]
        self._zero = zero
        self._order = order if order != sorted(order) else None
        self._parts = [part.view(sizes) for part in used.view(quantities, elements)]
        outer, _, inner = shape
        self._work = used.view(quantities, *shape)
        self._dims: tuple[int, ...] = (1, 3)
        self._in_two = elements > _AT_ONCE  # two plain sums are quicker then
        if inner == 1:
            self._work, self._dims, self._in_two = self._work.squeeze(3), (1,), False
        elif outer == 1:
            self._work, self._dims, self._in_two = self._work.squeeze(1), (2,), False

    def fill(self, tensor: Tensor, tolerance: float, out: Tensor) -> None:
        if self._order is not None:
            tensor = tensor.permute(self._order)
        compare(tensor, tolerance, self._zero, self._parts[0])
        if len(self._parts) > 1:
            magnitudes(tensor, self._parts[1])
        if self._in_two:
            torch.sum(self._work.sum(3), 1, out=out)
        else:
            torch.sum(self._work, self._dims, out=out)


class _Large:
    """A plan for large tensors: cuts a tensor of shape ``(outer, N, inner)`` along all three dimensions into blocks."""

    def __init__(self, tensor: Tensor, axis: int, scratch: ScratchBuffers) -> None:
        self._order, _, self._shape = _in_memory_order(tensor, axis)
        self._scratch = scratch
        self._blocks = {self._shape: _block(self._shape, scratch)} if tensor.numel() <= _BLOCK else {}

    def fill(self, tensor: Tensor, tolerance: float, out: Tensor) -> None:
        cube = tensor.permute(self._order).reshape(self._shape)
        whole = self._blocks.get(self._shape)
        if whole is not None:
            whole.fill(cube, tolerance, out)
            return
        cuts = list(self._cuts())
        if len({(images.start, positions.start) for images, _, positions in cuts}) == 1:  # only neurons are apart
            for _, neurons, _ in cuts:
                part = cube[:, neurons]
                self._block(part).fill(part, tolerance, out[:, neurons])
            return
        total = torch.zeros(out.shape, dtype=torch.float64, device="cpu")
        row = torch.empty(out.shape, dtype=torch.float32, device="cpu")
        for images, neurons, positions in cuts:
            part = cube[images, neurons, positions]
            self._block(part).fill(part, tolerance, row[:, neurons])
            total[:, neurons] += row[:, neurons]
        out.copy_(total)

    def _block(self, part: Tensor) -> _Block | _Rows:
        shape = (part.size(0), part.size(1), part.size(2))
        block = self._blocks.get(shape)
        if block is None:
            with torch.inference_mode(False):
                block = self._blocks[shape] = _block(shape, self._scratch)
        return block

    def _cuts(self) -> Iterator[tuple[slice, slice, slice]]:
        outer, neurons, inner = self._shape
        some = min(max(_BLOCK // (min(outer, _ROWS) * inner), 1), neurons)
        images = min(max(_BLOCK // (some * inner), 1), outer)
        yield from itertools.product(_slices(outer, images), _slices(neurons, some), _slices(inner, _BLOCK))


class _Block:
    """Reduces blocks of one shape ``(outer, n, inner)``, and holds the views of the buffers that this needs."""

    def __init__(self, shape: Shape, scratch: ScratchBuffers) -> None:
        self._shape = shape
        self._positions = torch.tensor(float(shape[0] * shape[2]), dtype=torch.float32, device="cpu")
        self._zero = scratch.zero
        self._numbers = scratch.buffer[: math.prod(shape)].view(shape)
        self._word_layout = layout = _word_layout(shape)
        if layout is not None:
            outer, neurons, inner = shape
            groups, _, width = layout.words
            words = scratch.words[: math.prod(layout.words)]
            flags = words.view(torch.bool)
            used = outer * neurons * layout.pitch
            runs = flags[:used].view(outer, neurons, layout.pitch)
            self._flags = runs[..., :inner]
            self._blanks = [blank for blank in (flags[used:], runs[..., inner:]) if blank.numel()]
            self._words = words.view(layout.words)
            self._sums = scratch.sums[: groups * width].view(groups, width)
            self._bytes = self._sums.view(torch.uint8).view(layout.left)
            self._wide = scratch.buffer[: math.prod(layout.left)].view(layout.left)
        self._at_once = max(_PIECE // (shape[1] * shape[2]), 1)
        self._signed = False  # whether a tensor had other magnitudes than its numbers; then none is asked again

    def fill(self, part: Tensor, tolerance: float, out: Tensor) -> None:
        self._zeros(part, tolerance, out[0])
        if len(out) > 1:
            self._magnitudes(part, out[1])

    def _zeros(self, part: Tensor, tolerance: float, out: Tensor) -> None:
        """Count the zeros of each neuron into ``out``, float32 ``(n,)``."""
        if self._word_layout is None or tolerance != 0:
            compare(part, tolerance, self._zero, self._numbers)
        if self._word_layout is None:
            _add_up(self._numbers, out)
            return
        self._flags.copy_(part if tolerance == 0 else self._numbers)  # NaN is not zero
        for blank in self._blanks:
            blank.zero_()
        torch.sum(self._words, 1, out=self._sums)
        self._wide.copy_(self._bytes)
        torch.sum(self._wide, (0, 2), out=out)
        if tolerance == 0:
            torch.sub(self._positions, out, out=out)

    def _magnitudes(self, part: Tensor, out: Tensor) -> None:
        """Add up the magnitudes of each neuron: in place if they are the numbers, otherwise piece by piece."""
        self._signed = self._signed or _may_be_signed(part)
        if not self._signed:
            _add_up(part, out)
            return
        pieces = part.split(self._at_once)
        sums = torch.empty(len(pieces), self._shape[1], dtype=torch.float32, device="cpu")
        for piece, each in zip(pieces, sums.unbind(), strict=True):
            numbers = self._numbers[: piece.shape[0]]
            magnitudes(piece, numbers)
            _add_up(numbers, each)
        torch.sum(sums, 0, out=out)


class _Rows:
    """Reduces blocks of few positions, ``(outer, n, 1)``: whole rows are added as words, each from a new word on.

    Where no number is below zero, as behind a ReLU, magnitudes are the numbers themselves: with so few positions,
    writing them into a buffer takes longer than to see this and to add them up in place. Other magnitudes are added up
    in pieces that have all rows, so that no partial sums are left. The zeros are taken from such a piece too, so that
    the tensor itself is read once.
    """

    def __init__(self, shape: Shape, scratch: ScratchBuffers) -> None:
        outer, neurons, _ = shape
        pitch = 8 * -(-neurons // 8)
        self._positions = torch.tensor(float(outer), dtype=torch.float32, device="cpu")
        self._zero = scratch.zero
        self._words = scratch.words[: outer * pitch // 8].view(outer, pitch // 8)
        rows = self._words.view(torch.bool)
        self._flags, self._blank = rows[:, :neurons], rows[:, neurons:]
        self._sums = scratch.sums[: pitch // 8]
        self._bytes = self._sums.view(torch.uint8)[:neurons]
        self._numbers = scratch.buffer[: outer * neurons].view(outer, neurons)
        self._pieces = [
            (piece, scratch.buffer[: outer * (piece.stop - piece.start)].view(outer, -1), self._flags[:, piece])
            for piece in _slices(neurons, _PIECE // outer)
        ]
        self._signed = False  # as in `_Block`

    def fill(self, part: Tensor, tolerance: float, out: Tensor) -> None:
        rows = part.squeeze(2)
        both = len(out) > 1
        self._signed = self._signed or (both and _may_be_signed(rows))
        in_place, in_pieces = both and not self._signed, both and self._signed
        in_float32 = rows.dtype is not torch.float64  # whose smallest numbers are zeros in float32
        with_flags = in_pieces and tolerance == 0 and in_float32
        if tolerance != 0:
            compare(rows, tolerance, self._zero, self._numbers)
            self._flags.copy_(self._numbers)
        elif not with_flags:
            self._flags.copy_(rows)  # NaN is not zero
        if in_place:
            torch.sum(rows, 0, out=out[1])
        for columns, numbers, flags in self._pieces if in_pieces else ():
            magnitudes(rows[:, columns], numbers)
            torch.sum(numbers, 0, out=out[1, columns])
            if with_flags:
                flags.copy_(numbers)  # they are still in the cache
        self._blank.zero_()
        torch.sum(self._words, 0, out=self._sums)
        zeros = out[0].copy_(self._bytes)  # subtracting one type from another takes five times as long
        if tolerance == 0:
            torch.sub(self._positions, zeros, out=zeros)


def _block(shape: Shape, scratch: ScratchBuffers) -> _Block | _Rows:
    """Return what reduces blocks of a shape."""
    outer, _, inner = shape
    return _Rows(shape, scratch) if inner == 1 and 1 < outer < _ROWS else _Block(shape, scratch)


def fits_float32(counts: Tensor) -> bool:
    """Whether all magnitudes in ``counts`` are finite, and so small that a window adds them up in float32.

    ``counts`` is on the CPU, so this does not synchronize.
    """
    return bool(counts.sum().item() < _MOST_SUM)


def _may_be_signed(numbers: Tensor) -> bool:
    """Whether numbers may be other than their magnitudes in float32; if there is a NaN, so will their sum be."""
    return numbers.dtype is not torch.float32 or numbers.amin().item() < 0


def _add_up(numbers: Tensor, out: Tensor) -> None:
    """Sum ``(outer, n, inner)`` to ``(n,)``, in the way that is quickest for the shape."""
    outer, neurons, inner = numbers.shape
    if inner == 1 and neurons >= _WIDE:
        rows = numbers.squeeze(2)
        torch.mv(rows.t(), rows.new_ones(outer), out=out)  # with `out`, autocast does not change the type
    elif 1 in (outer, neurons, inner):
        torch.sum(numbers, (0, 2), out=out)
    elif inner < _INNER:
        torch.sum(numbers.sum(0), 1, out=out)
    else:
        torch.sum(numbers.sum(2), 0, out=out)


class _WordLayout(NamedTuple):
    """How the bytes of a block ``(outer, n, inner)`` are added as words of eight bytes.

    Attributes:
        words: Shape of the words, ``(groups, r, width)``; the sum is over ``r``, at most 255.
        left: Shape ``(…, n, …)`` of the bytes of the sums ``(groups, width)``.
        pitch: Bytes from one run of ``inner`` to the next.
    """

    words: Shape
    left: Shape
    pitch: int


def _word_layout(shape: Shape) -> _WordLayout | None:
    """Return the quickest way to add the bytes of a block as words; ``None`` if there are too few rows to add.

    The words never take more than twice the bytes of the block, and their sums never more than the block.
    """
    outer, neurons, inner = shape
    groups = -(-inner // (8 * _LIMIT))
    run = -(-inner // (8 * groups))
    pitch = 8 * groups * run
    if run >= _RUN and (pitch == inner or outer < _ROWS):  # adjacent words belong to one neuron
        return _WordLayout((outer * neurons * groups, run, 1), (outer, neurons, 8 * groups), pitch)
    row = neurons * inner
    fold = 8 // math.gcd(row, 8)  # so many rows make whole words, long enough to pay
    fold *= -(-_ROW // (row * fold))
    rows = -(-outer // fold)
    if rows < 2:
        return None
    groups = -(-rows // _LIMIT)
    return _WordLayout((groups, -(-rows // groups), fold * row // 8), (groups * fold, neurons, inner), inner)


def _slices(length: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, length)) for start in range(0, length, at_once)]


def compare(tensor: Tensor, tolerance: float, zero: Tensor, out: Tensor) -> None:
    """Write 1 where an element is zero and 0 elsewhere.

    Args:
        tensor: Any shape.
        tolerance: ``|x| <= tolerance`` counts as zero.
        zero: A tensor that holds 0, without dimensions.
        out: float32, of the tensor's shape, is overwritten.
    """
    if tolerance == 0:
        torch.eq(tensor, zero, out=out)
    else:
        torch.le(tensor.abs(), tolerance, out=out)


def magnitudes(tensor: Tensor, out: Tensor) -> None:
    """Write the magnitudes of a tensor as float32.

    Args:
        tensor: Any shape.
        out: float32, of the tensor's shape, is overwritten.
    """
    if tensor.dtype is torch.float32:
        torch.abs(tensor, out=out)
    else:
        out.copy_(tensor).abs_()
