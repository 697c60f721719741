"""safetensors: a length, a JSON header of names, types, shapes and offsets, then the numbers.

An own reader of the documented layout and not the ``safetensors`` package, which maps the file into memory: such a
process ends when the file is cut short under it, and every page that was read counts as its memory.
"""

from __future__ import annotations

import math
from typing import Any

from neuronscope.checkpoints.formats.byte_range import ByteRange, parse_json, quoted
from neuronscope.checkpoints.formats.lazy_tensor import FileTensor, Storage, find_dtype
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor, readable_type
from neuronscope.errors import CheckpointError

__all__ = ["looks_like_safetensors", "read_safetensors"]

_LENGTH = 8  # bytes that tell the header's length, little end first

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
    """Whether the first nine bytes of a file may be those of a header.

    >>> looks_like_safetensors((2).to_bytes(8, "little") + b"{}")
    True
    """
    return head[_LENGTH : _LENGTH + 1] == b"{"


def read_safetensors(part: ByteRange) -> dict[str, FileTensor | SkippedTensor]:
    """The tensors of a file by name, in the order of its header; those of a type that is not known are left out.

    The header must account for each byte behind it once, as the format demands.

    Raises:
        CheckpointError: It is damaged.
    """

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{quoted(part.path)} is cut short or damaged: {what}.")

    if part.size < _LENGTH:
        raise damaged(f"it has {part.size} bytes")
    length = int.from_bytes(part.part(0, _LENGTH).read(), "little")
    if length > part.size - _LENGTH:
        raise damaged(f"its header is said to have {length} bytes, and it has {part.size} in all")
    header = parse_json(part.part(_LENGTH, length))
    if not isinstance(header, dict):
        raise damaged("its header is no dictionary")
    data = part.part(_LENGTH + length, part.size - _LENGTH - length)
    tensors: dict[str, FileTensor | SkippedTensor] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise damaged(f"the entry of {quoted(name)} is none") from None
        numbers: list[Any] = [begin, end, *shape] if isinstance(shape, list) else [None]
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise damaged(f"the entry of {quoted(name)} has no shape or place")
        location = data.part(begin, end - begin)
        spans.append((begin, end))
        if not isinstance(code, str):
            raise damaged(f"the type of {quoted(name)} is {quoted(code)}")
        dtype = find_dtype(_TYPES.get(code))
        if dtype is None:  # how many bytes its numbers take is not known
            tensors[name] = SkippedTensor(f"of type {quoted(code)}")
            continue
        numel = math.prod(shape)
        if end - begin != numel * dtype.itemsize:
            raise damaged(
                f"{quoted(name)} has {numel} numbers of {dtype.itemsize} bytes, in a place of {end - begin} bytes"
            )
        known = readable_type(dtype)
        tensors[name] = (
            known if isinstance(known, SkippedTensor) else FileTensor(Storage(known, numel, location), known, shape)
        )
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise damaged(f"its tensors {'overlap' if begin < at else 'leave a gap'} at byte {min(begin, at)}")
        at = end
    if at != data.size:
        raise damaged(f"its tensors take {at} bytes, and there are {data.size}")
    return tensors
