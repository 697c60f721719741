"""Read weights in several files, with an index that says which file holds which tensor (``*.index.json``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuronscope.checkpoints.formats.byte_range import ByteRange, file_count, quoted, read_json, sibling_file
from neuronscope.checkpoints.formats.single_file import SingleFile, read_single_file
from neuronscope.errors import CheckpointError

__all__ = ["read_index"]


def read_index(path: Path, *, trust: bool) -> SingleFile:
    """Read the tensors of all files that an index names.

    Args:
        path: The index.
        trust: Whether a file that names code may run it.

    Raises:
        CheckpointError: The index is invalid, names files in other folders, or a file is missing, damaged or lacks a
            tensor.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{quoted(path)} is not an index of a checkpoint: it has no `weight_map`.")
    files: dict[str, tuple[str, dict[str, Any]]] = {}
    tensors: dict[str, Any] = {}
    for name, file in weight_map.items():
        where = sibling_file(path.parent, file)
        if file not in files:
            shard = read_single_file(ByteRange.of(where), trust=trust)
            if not isinstance(shard.data, dict):
                raise CheckpointError(f"{quoted(where)} holds no tensors.")
            files[file] = (shard.format, shard.data)
        if name not in files[file][1]:
            raise CheckpointError(f"{quoted(where)} lacks {quoted(name)}, which {quoted(path.name)} says is in it.")
        tensors[name] = files[file][1][name]
    formats = " and ".join(sorted({kind for kind, _ in files.values()}))
    return SingleFile(f"{formats}, {file_count(len(files))}", tensors)
