"""Read folders of ``torch.distributed.checkpoint`` (FSDP, Lightning's sharded ones): tensors in parts, and their plan.

The plan, ``.metadata``, is a pickle. It is read with the restricted unpickler, and may use the names of the classes of
such plans too. Each part of a tensor is a file of ``torch.save`` inside a ``.distcp`` file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.formats.build_checkpoint import RawCheckpoint
from neuronscope.checkpoints.formats.byte_range import ByteRange, quoted, sibling_file
from neuronscope.checkpoints.formats.file_tensor import FileTensor, allocate, check_sizes
from neuronscope.checkpoints.formats.restricted_pickle import as_checkpoint_error, read_pickle, safe_key
from neuronscope.checkpoints.formats.safe_globals import (
    AttributesPlaceholder,
    SkippedTensor,
    UnknownType,
    attributes_of,
    find_safe_global,
    not_built,
    readable_type,
)
from neuronscope.checkpoints.formats.single_file import read_file
from neuronscope.checkpoints.formats.torch_file import read_zip
from neuronscope.errors import CheckpointError
from neuronscope.writers.formatting import plural

__all__ = ["METADATA", "ShardedTensor", "read_distributed"]

#: Name of the file that holds the plan of such a folder.
METADATA = ".metadata"

_META = "meta.pt"  # Lightning's file of what is not in the weights or optimizers
_MOST_PARTS = 4096
_LONGEST_PLAN = 1 << 28
_LONGEST_OBJECT = 1 << 20
_MOST_OBJECTS = 1 << 25  # bytes of all objects together
_DEEPEST = 32


class _TensorPart(NamedTuple):
    """A part of a tensor: its first index and its size in each dimension, and its file of ``torch.save``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    location: ByteRange


class ShardedTensor(StoredTensor):
    """A tensor that is stored in parts, which must cover it without overlap, or a CheckpointError is raised.

    Args:
        name: Its name, for messages.
        dtype: Its dtype.
        shape: Its shape.
        parts: Its parts.
    """

    __slots__ = ("_name", "_parts")

    def __init__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Sequence[_TensorPart]) -> None:
        super().__init__(shape, dtype)
        self._name, self._parts = name, tuple(parts)
        are_there = all(math.prod(part.sizes) * dtype.itemsize <= part.location.size for part in parts)
        if not are_there or not _covers(shape, self._parts):
            raise CheckpointError(
                f"The parts of {quoted(name)}, of shape {quoted(shape)}, do not make up the whole of it."
            )

    def read(self) -> Tensor:
        """Read the tensor from its parts; raise a CheckpointError if one is missing, or not what the plan says."""
        whole: Tensor | None = None
        for part in self._parts:
            stored = read_zip(part.location)
            if (
                not isinstance(stored, FileTensor)
                or stored.shape != part.sizes
                or stored.torch_dtype != self.torch_dtype
            ):
                raise CheckpointError(
                    f"{quoted(part.location.path)} is damaged: a part of {quoted(self._name)} is not what was planned."
                )
            numbers = stored.read()
            if part.sizes == self.shape:
                return numbers
            if whole is None:
                whole = allocate(self.shape, self.torch_dtype)
            whole[tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))] = numbers
        return allocate(self.shape, self.torch_dtype) if whole is None else whole


def read_distributed(folder: Path, *, trust: bool) -> RawCheckpoint:
    """Read a folder of ``torch.distributed.checkpoint``.

    Args:
        folder: The folder, with its ``.metadata``.
        trust: Whether Lightning's ``meta.pt`` in it may run the code that it names. The plan never may.

    Raises:
        CheckpointError: The plan is invalid or names code, or a file is missing or damaged.
    """
    plan = ByteRange.of(folder / METADATA)
    if plan.size > _LONGEST_PLAN:
        raise CheckpointError(f"{quoted(plan.path)} has {plan.size} bytes, which is more than a plan has.")
    with as_checkpoint_error(plan.path):
        metadata = _state(read_pickle(io.BytesIO(plan.read()), partial(find_safe_global, more=_CLASSES)), "Metadata")
        files = _Files(folder, metadata["storage_data"])
        paths = metadata.get("planner_data") or {}
        notes: list[str] = []
        content = _Branch()
        for name, entry in metadata["state_dict_metadata"].items():
            value = (
                files.tensor(name, entry)
                if entry.cls == f"{_METADATA}.TensorStorageMetadata"
                else files.object(name, notes)
            )
            _put(content, paths.get(name, (name,)), value)
    data: dict[str, Any] = {str(key): _with_lists(value) for key, value in content.items()}
    if (folder / _META).exists():
        meta = read_file(folder / _META, trust=trust).data
        data = {**(meta if isinstance(meta, dict) else {}), **data}
    return RawCheckpoint(f"distributed checkpoint, {plural(len(files.opened), 'file')}", data, notes=notes)


class _Files:
    """The files of a folder, and where a plan says that each part and object is in them."""

    def __init__(self, folder: Path, storage_data: Any) -> None:
        self._folder = folder
        self._infos = {}
        for index, info in storage_data.items():
            key = _state(index, "MetadataIndex")
            offset = key.get("offset")
            self._infos[_text(key["fqn"]), None if offset is None else check_sizes(offset)] = _state(
                info, "_StorageInfo"
            )
        self._object_bytes = 0
        self.opened: dict[str, ByteRange] = {}

    def _location(self, name: str, offsets: tuple[int, ...] | None) -> ByteRange:
        info = self._infos.get((name, offsets))
        if info is None:
            raise CheckpointError(f"{quoted(self._folder)} is damaged: its plan does not say where {quoted(name)} is.")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{quoted(self._folder)} holds {quoted(name)} transformed (packed or encrypted), which is not read."
            )
        file = _text(info["relative_path"])
        if file not in self.opened:
            self.opened[file] = ByteRange.of(sibling_file(self._folder, file))
        return self.opened[file].part(*check_sizes((info["offset"], info["length"])))

    def tensor(self, name: Any, entry: Any) -> ShardedTensor | SkippedTensor:
        """Return a tensor; it is skipped if its dtype cannot be read."""
        state = _state(entry, "TensorStorageMetadata")
        properties = state["properties"]
        kind = properties.state[0] if isinstance(properties.state, tuple) else properties.state["dtype"]
        if not isinstance(kind, torch.dtype | UnknownType):
            raise ValueError(f"{quoted(name)} has no type")
        known = readable_type(kind)
        if isinstance(known, SkippedTensor):
            return known
        parts = []
        for chunk in state["chunks"]:
            where = _state(chunk, "ChunkStorageMetadata")
            offsets, sizes = check_sizes(where["offsets"]), check_sizes(where["sizes"])
            parts.append(_TensorPart(offsets, sizes, self._location(name, offsets)))
        return ShardedTensor(str(name), known, check_sizes(state["size"]), parts)

    def object(self, name: Any, notes: list[str]) -> Any:
        """Read what is not a tensor: a number, a list, a setting; if it is left out, ``notes`` get a sentence."""
        location = self._location(str(name), None)
        self._object_bytes += location.size
        if (
            max(location.size, self._object_bytes - _MOST_OBJECTS) > _LONGEST_OBJECT
            or location.part(0, min(4, location.size)).read() != b"PK\3\4"
        ):
            notes.append(f"{quoted(name)} is not plain data, or too large, and is left out.")
            return None
        return read_zip(location)


def _state(made: Any, cls: str) -> dict[str, Any]:
    """Return the attributes of a placeholder of that class."""
    if (
        not isinstance(made, AttributesPlaceholder)
        or made.cls.rpartition(".")[2] != cls
        or not isinstance(made.state, dict)
    ):
        raise ValueError(f"a {cls} was expected")
    return made.state


def _covers(shape: tuple[int, ...], parts: Sequence[_TensorPart]) -> bool:
    """Whether parts cover a shape without overlap."""
    if len(parts) > _MOST_PARTS or sum(math.prod(part.sizes) for part in parts) != math.prod(shape):
        return False
    for part in parts:
        if len(part.offsets) != len(shape) or len(part.sizes) != len(shape):
            return False
        if any(at + size > whole for at, size, whole in zip(part.offsets, part.sizes, shape, strict=True)):
            return False
    by_offset = sorted((part for part in parts if 0 not in part.sizes), key=lambda part: part.offsets)
    open_parts: list[_TensorPart] = []  # those that end after the next one begins, in the first dimension
    for part in by_offset:
        open_parts = [other for other in open_parts if _reaches(other, part, slice(0, 1))]
        if any(_reaches(other, part, slice(None)) and _reaches(part, other, slice(None)) for other in open_parts):
            return False
        open_parts.append(part)
    return True


def _reaches(one: _TensorPart, other: _TensorPart, dims: slice) -> bool:
    """Whether one part ends after the other begins, in each of the given dimensions."""
    return all(
        at + size > begin
        for at, size, begin in zip(one.offsets[dims], one.sizes[dims], other.offsets[dims], strict=True)
    )


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"{quoted(name)} was found where a name was expected")
    return name


class _Branch(dict[Any, Any]):
    """A dictionary that was built from paths in the plan, as opposed to one that was saved."""


def _put(content: _Branch, path: Any, value: Any) -> None:
    """Store a value under its path; missing dictionaries are made."""
    if not isinstance(path, tuple) or not 1 <= len(path) <= _DEEPEST:
        raise ValueError("the path of a value is invalid")
    keys = [safe_key(key) for key in path]
    for key in keys[:-1]:
        content = content.setdefault(key, _Branch())
        if not isinstance(content, _Branch):
            raise ValueError("a value lies inside of another")
    content[keys[-1]] = value


def _with_lists(value: Any) -> Any:
    """Replace dictionaries with the keys 0, 1, 2 … by lists."""
    if not isinstance(value, _Branch):
        return value
    inner = {key: _with_lists(part) for key, part in value.items()}
    is_list = bool(inner) and all(type(key) is int for key in inner) and sorted(inner) == list(range(len(inner)))
    return [inner[index] for index in range(len(inner))] if is_list else inner


_METADATA, _SHARDED = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
_WITH_ATTRIBUTES = (
    *(f"{_METADATA}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{_METADATA}.{kind}StorageMetadata" for kind in ("Tensor", "Bytes", "Chunk")),
    f"{_SHARDED}.TensorProperties",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
)
_MEMORY_FORMATS = (
    *(f"{home}._MEM_FORMAT_ENCODING" for home in (_METADATA, _SHARDED)),
    f"{_SHARDED}.MEM_FORMAT_ENCODING",
)
_CLASSES = {path: attributes_of(path) for path in _WITH_ATTRIBUTES} | {
    path: not_built(path) for path in _MEMORY_FORMATS
}
