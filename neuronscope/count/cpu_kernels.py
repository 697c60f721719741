"""How a CPU counts zeros and adds up magnitudes: in blocks that stay in its cache, eight counters to an integer.

A number becomes one byte, 1 or 0: converting to bool does that at the speed of memory. Eight bytes are then one int64,
and adding up to 255 such words adds eight counters at once that cannot run over into each other. The few bytes that
are left are widened to float32, which is exact below 2**24. Magnitudes go into a float buffer, block by block. For a
small tensor, where the number of calls is the cost, zeros are compared into the float buffer instead, beside the
magnitudes, and one sum adds up both.

How tensors of one shape and one order in memory are cut, and the views of the buffers that this takes, are a *plan*,
made once.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "ScratchBuffers", "compare", "magnitudes"]

#: Elements of a block: 1 MB of bytes.
_BLOCK = 1 << 20
#: Elements up to which a tensor is small.
_SMALL = 1 << 17
#: Numbers that float32 holds exactly are smaller.
_EXACT = 1 << 24
#: Most words whose bytes are added without a carry.
_LIMIT = 255
#: Least words worth adding along memory, and least bytes of a row worth adding to another.
_RUN, _ROW = 16, 512
#: Rows that a block has at least, where the tensor has them: the more, the less is left to widen.
_ROWS = 32
#: Magnitudes made at a time: 1 MB of float32, which stays in the cache until it is summed.
_PIECE = 1 << 18
#: Least numbers that follow each other in memory and are quick to add.
_INNER = 32
#: Plans kept at once; input of ever new lengths makes ever new ones.
_PLANS = 256

Shape = tuple[int, int, int]


class Plan:
    """How tensors of one shape and one order in memory are reduced to their neurons."""

    def fill(self, tensor: Tensor, tolerance: float, out: Tensor) -> None:
        """Count zeros, and add up magnitudes where the plan was made for them.

        Args:
            tensor: One of these tensors.
            tolerance: ``|x| <= tolerance`` counts as zero.
            out: float32 ``(quantities, N)``; magnitudes are not finite where an element is not.
        """
        raise NotImplementedError


class ScratchBuffers(threading.local):
    """Buffers and plans of their use, made once a thread: counting a tensor like one before allocates nothing."""

    def __init__(self) -> None:
        self._plans: dict[tuple[torch.Size, tuple[int, ...], int, int], Plan] = {}
        with torch.inference_mode(False):
            self.zero = torch.zeros((), dtype=torch.float32, device="cpu")  # quicker to compare with than a number
            self.buffer = torch.empty(0, dtype=torch.float32, device="cpu")
            self.words = torch.empty(0, dtype=torch.int64, device="cpu")
            self.sums = torch.empty(0, dtype=torch.int64, device="cpu")

    def plan(self, tensor: Tensor, axis: int, quantities: int) -> Plan | None:
        """How to count this tensor in blocks; ``None`` where the plain formula must do it.

        Args:
            tensor: On whatever device, of whatever type.
            axis: The neurons' dimension.
            quantities: 1 for zeros, 2 for zeros and magnitudes.
        """
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
        """The buffer, for so many numbers at least; a network of small layers needs no megabytes."""
        if self.buffer.numel() < elements:
            self._plans.clear()  # their views are of the old buffer
            size = 2 * _SMALL if elements <= 2 * _SMALL else _BLOCK
            with torch.inference_mode(False):
                self.buffer = torch.empty(size, dtype=torch.float32, device="cpu")
        return self.buffer

    def _make(self, tensor: Tensor, axis: int, quantities: int) -> Plan:
        small = tensor.numel() <= _SMALL
        buffer = self.numbers(quantities * tensor.numel() if small else _BLOCK)
        if small:
            return _Small(tensor, axis, buffer, quantities, self.zero)
        if not self.words.numel():
            self.words = torch.empty(2 * _BLOCK // 8, dtype=torch.int64, device="cpu")
            self.sums = torch.empty(_BLOCK // 8, dtype=torch.int64, device="cpu")
        return _Large(tensor, axis, quantities, self)


class _Order:
    """A tensor's dimensions in the order of memory, seen as ``(outer, N, inner)``."""

    def __init__(self, tensor: Tensor, axis: int) -> None:
        strides = tensor.stride()
        self.order = sorted(range(tensor.dim()), key=lambda dimension: (-strides[dimension], dimension))
        self.sizes = [tensor.shape[dimension] for dimension in self.order]
        place = self.order.index(axis)
        self.shape: Shape = (math.prod(self.sizes[:place]), self.sizes[place], math.prod(self.sizes[place + 1 :]))


class _Small(Plan):
    """A small tensor is compared as it is into a part of the buffer that has its shape, beside its magnitudes."""

    def __init__(self, tensor: Tensor, axis: int, buffer: Tensor, quantities: int, zero: Tensor) -> None:
        order, elements = _Order(tensor, axis), tensor.numel()
        used = buffer[: quantities * elements]
        self._zero = zero
        self._order = order.order if order.order != sorted(order.order) else None
        self._parts = [part.view(order.sizes) for part in used.view(quantities, elements)]
        outer, _, inner = order.shape
        self._work = used.view(quantities, *order.shape)
        self._dimension = -1  # two plain sums are quicker than one over both ends
        if inner == 1:
            self._work, self._dimension = self._work.squeeze(3), 1
        elif outer == 1:
            self._work, self._dimension = self._work.squeeze(1), 2

    def fill(self, tensor: Tensor, tolerance: float, out: Tensor) -> None:
        if self._order is not None:
            tensor = tensor.permute(self._order)
        compare(tensor, tolerance, self._zero, self._parts[0])
        if len(self._parts) > 1:
            magnitudes(tensor, self._parts[1])
        if self._dimension < 0:
            torch.sum(self._work.sum(3), 1, out=out)
        else:
            torch.sum(self._work, self._dimension, out=out)


class _Large(Plan):
    """A tensor seen as ``(outer, N, inner)`` is cut along all three into blocks."""

    def __init__(self, tensor: Tensor, axis: int, quantities: int, scratch: ScratchBuffers) -> None:
        order = _Order(tensor, axis)
        self._order, self._shape = order.order, order.shape
        self._quantities = quantities
        self._scratch = scratch
        self._blocks = {self._shape: _Block(self._shape, scratch)} if tensor.numel() <= _BLOCK else {}

    def fill(self, tensor: Tensor, tolerance: float, out: Tensor) -> None:
        cube = tensor.permute(self._order).reshape(self._shape)
        whole = self._blocks.get(self._shape)
        if whole is not None:
            self._fill(whole, cube, tolerance, out)
            return
        total = torch.zeros(out.shape, dtype=torch.float64, device="cpu")
        row = torch.empty(out.shape, dtype=torch.float32, device="cpu")
        for images, neurons, positions in self._cuts():
            part = cube[images, neurons, positions]
            shape = (part.size(0), part.size(1), part.size(2))
            block = self._blocks.get(shape)
            if block is None:
                with torch.inference_mode(False):
                    block = self._blocks[shape] = _Block(shape, self._scratch)
            self._fill(block, part, tolerance, row[:, neurons])
            total[:, neurons] += row[:, neurons]
        out.copy_(total)

    def _fill(self, block: _Block, part: Tensor, tolerance: float, out: Tensor) -> None:
        block.zeros(part, tolerance, out[0])
        if self._quantities > 1:
            block.magnitudes(part, out[1])

    def _cuts(self) -> Iterator[tuple[slice, slice, slice]]:
        outer, neurons, inner = self._shape
        some = min(max(_BLOCK // (min(outer, _ROWS) * inner), 1), neurons)
        images = min(max(_BLOCK // (some * inner), 1), outer)
        yield from itertools.product(_slices(outer, images), _slices(neurons, some), _slices(inner, _BLOCK))


class _Block:
    """Blocks of one shape ``(outer, n, inner)``, and the views of the buffers that they need."""

    def __init__(self, shape: Shape, scratch: ScratchBuffers) -> None:
        self._shape = shape
        self._positions = torch.tensor(float(shape[0] * shape[2]), dtype=torch.float32, device="cpu")
        self._zero = scratch.zero
        self._numbers = scratch.buffer[: math.prod(shape)].view(shape)
        self._lanes = lanes = _lanes(shape)
        if lanes is not None:
            outer, neurons, inner = shape
            groups, _, width = lanes.words
            words = scratch.words[: math.prod(lanes.words)]
            flags = words.view(torch.bool)
            used = outer * neurons * lanes.pitch
            runs = flags[:used].view(outer, neurons, lanes.pitch)
            self._flags = runs[..., :inner]
            self._blanks = [blank for blank in (flags[used:], runs[..., inner:]) if blank.numel()]
            self._words = words.view(lanes.words)
            self._sums = scratch.sums[: groups * width].view(groups, width)
            self._bytes = self._sums.view(torch.uint8).view(lanes.left)
            self._wide = scratch.buffer[: math.prod(lanes.left)].view(lanes.left)
        self._at_once = max(_PIECE // (shape[1] * shape[2]), 1)

    def zeros(self, part: Tensor, tolerance: float, out: Tensor) -> None:
        """Zeros of each neuron, float32 ``(n,)``."""
        if self._lanes is None or tolerance != 0:
            compare(part, tolerance, self._zero, self._numbers)
        if self._lanes is None:
            _add_up(self._numbers, out)
            return
        self._flags.copy_(part if tolerance == 0 else self._numbers)  # NaN is not zero
        for blank in self._blanks:
            blank.zero_()
        torch.sum(self._words, 1, out=self._sums)
        self._wide.copy_(self._bytes)
        _add_up(self._wide, out)
        if tolerance == 0:
            torch.sub(self._positions, out, out=out)

    def magnitudes(self, part: Tensor, out: Tensor) -> None:
        """Sum of magnitudes of each neuron, float32 ``(n,)``, piece by piece."""
        pieces = part.split(self._at_once)
        sums = torch.empty(len(pieces), self._shape[1], dtype=torch.float32, device="cpu")
        for piece, each in zip(pieces, sums.unbind(), strict=True):
            numbers = self._numbers[: piece.shape[0]]
            magnitudes(piece, numbers)
            _add_up(numbers, each)
        torch.sum(sums, 0, out=out)


def _add_up(numbers: Tensor, out: Tensor) -> None:
    """``(some, n, some)`` → ``(n,)``, in the way that is quickest for the shape."""
    outer, neurons, inner = numbers.shape
    if outer * inner == 1:
        out.copy_(numbers.view(neurons))
    elif outer == 1:
        torch.sum(numbers.squeeze(0), 1, out=out)
    elif inner >= _INNER:
        torch.sum(numbers.sum(2), 0, out=out)
    else:
        rows, ones = numbers.view(outer, neurons * inner), numbers.new_ones(outer)
        sums = out if inner == 1 else numbers.new_empty(neurons * inner)
        torch.mv(rows.t(), ones, out=sums)  # into something: autocast leaves that alone
        if inner > 1:
            torch.sum(sums.view(neurons, inner), 1, out=out)


class _Lanes(NamedTuple):
    """How the bytes of a block ``(outer, n, inner)`` are added as words.

    Attributes:
        words: ``(groups, r, width)``, of which ``r`` are added, 255 at most.
        left: ``(…, n, …)``: as what the bytes of the sums ``(groups, width)`` are to be seen.
        pitch: Bytes from one run of ``inner`` to the next.
    """

    words: Shape
    left: Shape
    pitch: int


def _lanes(shape: Shape) -> _Lanes | None:
    """The quickest lanes for a block; ``None`` where there are too few rows to add.

    All are shorter than twice the block, and their sums no longer than it.
    """
    outer, neurons, inner = shape
    groups = -(-inner // (8 * _LIMIT))
    run = -(-inner // (8 * groups))
    pitch = 8 * groups * run
    if run >= _RUN and (pitch == inner or outer < _ROWS):  # words that follow each other belong to one neuron
        return _Lanes((outer * neurons * groups, run, 1), (outer, neurons, 8 * groups), pitch)
    row = neurons * inner
    fold = 8 // math.gcd(row, 8)  # so many rows are whole words, and long enough to be added to the next so many
    fold *= -(-_ROW // (row * fold))
    rows = -(-outer // fold)
    if rows < 2:
        return None
    groups = -(-rows // _LIMIT)
    return _Lanes((groups, -(-rows // groups), fold * row // 8), (groups * fold, neurons, inner), inner)


def _slices(length: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, length)) for start in range(0, length, at_once)]


def compare(tensor: Tensor, tolerance: float, zero: Tensor, out: Tensor) -> None:
    """1 where an element is zero, 0 elsewhere."""
    if tolerance == 0:
        torch.eq(tensor, zero, out=out)
    else:
        torch.le(tensor.abs(), tolerance, out=out)


def magnitudes(tensor: Tensor, out: Tensor) -> None:
    """Magnitudes as float32."""
    if tensor.dtype is torch.float32:
        torch.abs(tensor, out=out)
    else:
        out.copy_(tensor).abs_()
