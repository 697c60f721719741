"""Read safetensors files: a length, a JSON header of names, types, shapes and offsets, then the numbers.

This reads the documented layout itself. The ``safetensors`` package maps the file into memory: the process ends if the
file is cut short meanwhile, and every page that was read counts as the process's memory.
"""

from __future__ import annotations

import math
from typing import Any

from neuronscope.checkpoints.formats.byte_range import ByteRange, parse_json, quoted
from neuronscope.checkpoints.formats.file_tensor import FileTensor, Storage, find_dtype
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor, readable_type
from neuronscope.errors import CheckpointError

__all__ = ["looks_like_safetensors", "read_safetensors"]

_LENGTH = 8  # number of bytes that hold the header's length, little-endian

_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first nine bytes of a file can be the length and the beginning of a header.

    >>> looks_like_safetensors((2).to_bytes(8, "little") + b"{}")
    True
    """
    return head[_LENGTH : _LENGTH + 1] == b"{"


def read_safetensors(part: ByteRange) -> dict[str, FileTensor | SkippedTensor]:
    """Return the tensors of a file by name, in the order of its header. Tensors of an unknown type are skipped.

    The tensors must cover each byte after the header exactly once, as the format requires.

    Raises:
        CheckpointError: It is damaged.
    """

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{quoted(part.path)} is cut short or damaged: {what}.")

    if part.size < _LENGTH:
        raise damaged(f"it has {part.size} bytes")
    length = int.from_bytes(part.part(0, _LENGTH).read(), "little")
    if length > part.size - _LENGTH:
        raise damaged(f"its header is said to have {length} bytes, but the file has only {part.size}")
    header = parse_json(part.part(_LENGTH, length))
    if not isinstance(header, dict):
        raise damaged("its header is not a dictionary")
    data = part.part(_LENGTH + length, part.size - _LENGTH - length)
    tensors: dict[str, FileTensor | SkippedTensor] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise damaged(f"the entry of {quoted(name)} cannot be read") from None
        numbers: list[Any] = [begin, end, *shape] if isinstance(shape, list) else [None]
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise damaged(f"the entry of {quoted(name)} has no valid shape or offsets")
        location = data.part(begin, end - begin)
        spans.append((begin, end))
        if not isinstance(code, str):
            raise damaged(f"the type of {quoted(name)} is {quoted(code)}")
        dtype = find_dtype(_TYPES.get(code))
        if dtype is None:  # the number of bytes cannot be checked
            tensors[name] = SkippedTensor(f"of type {quoted(code)}")
            continue
        numel = math.prod(shape)
        if end - begin != numel * dtype.itemsize:
            raise damaged(
                f"{quoted(name)} has {numel} numbers of {dtype.itemsize} bytes, but {end - begin} bytes in the file"
            )
        known = readable_type(dtype)
        tensors[name] = (
            known if isinstance(known, SkippedTensor) else FileTensor(Storage(known, numel, location), known, shape)
        )
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            what = "overlap" if begin < position else "leave a gap"
            raise damaged(f"its tensors {what} at byte {min(begin, position)}")
        position = end
    if position != data.size:
        raise damaged(f"its tensors take {position} bytes, but there are {data.size}")
    return tensors
