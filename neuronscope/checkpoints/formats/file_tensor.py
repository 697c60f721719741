"""Tensors in a file: each is checked against the file when that is opened, and read when its values are needed."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.formats.byte_range import MOST_DIMENSIONS, ByteRange, quoted
from neuronscope.errors import CheckpointError

__all__ = ["FileTensor", "Storage", "allocate", "check_sizes", "find_dtype", "is_readable"]

# The most memory for a tensor that repeats stored numbers (one that was expanded), so that a few bytes in a file cannot
# take any amount of it. A tensor that is written out in full takes as much as it does in the file.
_MOST_REPEATED_BYTES = 1 << 28
_LARGEST = 2**63 - 1


def find_dtype(name: object) -> torch.dtype | None:
    """Return the dtype of that name, or ``None`` if the installed torch has none.

    >>> find_dtype("bfloat16")
    torch.bfloat16
    >>> find_dtype("load") is None
    True
    """
    found = vars(torch).get(name) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None


@functools.cache
def is_readable(dtype: torch.dtype) -> bool:
    """Return whether torch can turn numbers of this type into float64 (or complex128) on the CPU.

    It cannot for types that only other devices support (packed floats, integers of less than a byte, raw bits).

    >>> is_readable(torch.float8_e5m2), is_readable(torch.bits8)
    (True, False)
    """
    try:
        numbers = torch.zeros(dtype.itemsize, dtype=torch.uint8).view(dtype)
        numbers.to(torch.complex128 if dtype.is_complex else torch.float64)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def check_sizes(sizes: Any) -> tuple[int, ...]:
    """Return sizes, strides or offsets as a tuple; raise a ValueError if no tensor can have them.

    >>> check_sizes([2, 3])
    (2, 3)
    """
    if (
        not isinstance(sizes, tuple | list)
        or len(sizes) > MOST_DIMENSIONS
        or any(type(size) is not int or not 0 <= size <= _LARGEST for size in sizes)
    ):
        raise ValueError(f"{quoted(sizes)} was found where sizes were expected")
    return tuple(sizes)


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU whose numbers are not set; raise a CheckpointError if there is not enough memory.

    Args:
        shape: Its shape.
        dtype: Its dtype.
    """
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        raise CheckpointError(f"There is not enough memory for a tensor of shape {quoted(shape)}.") from error


class Storage:
    """A sequence of numbers in a file that tensors, its ``views`` that were not checked yet, are views of.

    Args:
        dtype: Type of its numbers.
        numel: How many numbers the file says that it holds.
        location: Its bytes; ``None`` until it is known where they are.
    """

    __slots__ = ("dtype", "location", "numel", "views")

    def __init__(self, dtype: torch.dtype, numel: int, location: ByteRange | None = None) -> None:
        self.dtype, self.numel, self.location = dtype, numel, location
        self.views: list[FileTensor] = []

    def check_views(self) -> None:
        """Raise a CheckpointError if a tensor that is a view of it does not lie within it."""
        for view in self.views:
            view.check()
        self.views.clear()


class FileTensor(StoredTensor):
    """A tensor whose numbers are in one storage of a file.

    Args:
        storage: The storage that it is a view of.
        dtype: Type of its numbers.
        shape: Its shape.
        stride: Its strides, in numbers; ``None`` if its numbers are stored in order.
        offset: Index of its first number in the storage.

    Raises:
        ValueError: No tensor can have this shape, these strides or this offset.
    """

    __slots__ = ("_offset", "_storage", "_stride")

    def __init__(self, storage: Storage, dtype: torch.dtype, shape: Any, stride: Any = None, offset: Any = 0) -> None:
        super().__init__(check_sizes(shape), dtype)
        self._storage = storage
        self._stride = None if stride is None else check_sizes(stride)
        (self._offset,) = check_sizes((offset,))
        if self._stride is not None and len(self._stride) != len(self.shape):
            raise ValueError(f"a tensor has shape {quoted(self.shape)} and strides {quoted(self._stride)}")

    def check(self) -> None:
        """Raise a CheckpointError, without reading, if the file lacks a part of it, or repeats too much of it."""
        self._location()

    def _location(self) -> ByteRange:
        """Return the bytes from the first number that the tensor uses to the last."""
        numel, itemsize, whole = math.prod(self.shape), self.torch_dtype.itemsize, self._storage.location
        if numel == 0 or self._stride is None:
            span = numel
        else:
            span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self._stride, strict=True))
        begin, length = self._offset * itemsize, span * itemsize
        if whole is None:
            raise CheckpointError(f"A tensor of shape {quoted(self.shape)} is described, but its numbers are missing.")
        if begin + length > min(whole.size, self._storage.numel * self._storage.dtype.itemsize):
            wrong = "is larger than what is stored of it"
        elif numel > span and numel * itemsize > _MOST_REPEATED_BYTES:
            wrong = f"repeats {span} stored numbers beyond measure"
        elif math.prod(size for size in self.shape if size) > _LARGEST // itemsize:
            wrong = "is larger than any tensor can be"
        else:
            return whole.part(begin, length)
        raise CheckpointError(
            f"{quoted(whole.path)} is damaged: a tensor of shape {quoted(self.shape)} of {self.dtype} {wrong}."
        )

    def read(self) -> Tensor:
        """Read the tensor; raise a CheckpointError if the file has changed since it was opened."""
        location = self._location()
        data = allocate((location.size,), torch.uint8)
        if location.size:
            location.read_into(data.numpy().data)
        if self.torch_dtype == torch.bool:
            data.ne_(0)  # a bool must be stored as 0 or 1
        numbers = data.view(self.torch_dtype)
        if self._stride is None:
            return numbers.view(self.shape)
        return numbers.as_strided(self.shape, self._stride).contiguous()
