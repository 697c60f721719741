"""Weights in several files, with an index that says which tensor lies in which (``*.index.json``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuronscope.checkpoints.formats.byte_range import ByteRange, beside, counted, read_json, shown
from neuronscope.checkpoints.formats.single_file import SingleFile, read_single
from neuronscope.errors import CheckpointError

__all__ = ["read_index"]


def read_index(path: Path, *, trust: bool) -> SingleFile:
    """The tensors of all files that an index names.

    Args:
        path: The index.
        trust: Whether a file that names code may run it.

    Raises:
        CheckpointError: The index is none, names files elsewhere, or a file is missing, damaged or lacks a tensor.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{shown(path)} is no index of a checkpoint: it has no `weight_map`.")
    files: dict[str, tuple[str, dict[str, Any]]] = {}
    tensors: dict[str, Any] = {}
    for name, file in weight_map.items():
        where = beside(path.parent, file)
        if file not in files:
            shard = read_single(ByteRange.of(where), trust=trust)
            if not isinstance(shard.data, dict):
                raise CheckpointError(f"{shown(where)} holds no tensors.")
            files[file] = (shard.format, shard.data)
        if name not in files[file][1]:
            raise CheckpointError(f"{shown(where)} lacks {shown(name)}, which {shown(path.name)} says is in it.")
        tensors[name] = files[file][1][name]
    formats = " and ".join(sorted({kind for kind, _ in files.values()}))
    return SingleFile(f"{formats}, {counted(len(files))}", tensors)
