"""Recognise the format of a file by its first bytes, and read it as plain data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from neuronscope.checkpoints.formats.build_checkpoint import RawCheckpoint
from neuronscope.checkpoints.formats.byte_range import ByteRange, quoted, read_json, sibling_file
from neuronscope.checkpoints.formats.restricted_pickle import UnsafeGlobalError, read_pickle
from neuronscope.checkpoints.formats.safe_globals import find_safe_global
from neuronscope.checkpoints.formats.safetensors import looks_like_safetensors, read_safetensors
from neuronscope.checkpoints.formats.torch_file import LEGACY_MAGIC, is_script, load_trusted, read_legacy, read_zip
from neuronscope.errors import CheckpointError
from neuronscope.writers.formatting import plural

__all__ = ["read_file"]

# Other files that a user may take for a checkpoint, by their first bytes.
_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of Git LFS, and the file itself is not there",
    b"\x93NUMPY": "an array of numpy's",
    b"\x1f\x8b": "packed by gzip",
}
_PICKLE = b"\x80"
_ZIP = b"PK\x03\x04"


def read_file(path: Path, *, trust: bool) -> RawCheckpoint:
    """Read a file of any supported format, or all files that an index of weights (``*.index.json``) names.

    Args:
        path: The file.
        trust: Whether a file that names code may run it.

    Raises:
        CheckpointError: The file has no supported format, is damaged, or names code and is not trusted.
    """
    return (_read_index if path.name.endswith(".index.json") else _read_single)(path, trust=trust)


def _read_single(path: Path, *, trust: bool) -> RawCheckpoint:
    """Read one file, by the format that its first bytes show."""
    part = ByteRange.of(path)
    head = part.part(0, min(32, part.size)).read()
    if head.startswith(_ZIP):
        if not is_script(part):
            return _read_pickled(part, "torch file", read_zip, trust=trust)
        if trust:
            return RawCheckpoint("TorchScript archive", load_trusted(path, script=True))
        raise CheckpointError(
            f"{quoted(path)} is a TorchScript archive, which holds code: it was not loaded. Give `--trust` "
            "(`trust=True`) if you know where the file comes from, or save the state_dict alone."
        )
    if head.startswith(_PICKLE):
        if not _is_legacy(part):
            raise CheckpointError(f"{quoted(path)} is a pickle, but none that torch.save has written.")
        return _read_pickled(part, "torch file of the older layout", read_legacy, trust=trust)
    if looks_like_safetensors(head):
        return RawCheckpoint("safetensors", read_safetensors(part))
    other = next(
        (what for start, what in _OTHERS.items() if head.startswith(start)), "none of the formats that are read"
    )
    raise CheckpointError(
        f"{quoted(path)} is not understood: it is {other}. Files of torch.save and safetensors are read."
    )


def _read_pickled(part: ByteRange, kind: str, read: Callable[[ByteRange], Any], *, trust: bool) -> RawCheckpoint:
    try:
        return RawCheckpoint(kind, read(part))
    except UnsafeGlobalError:
        if not trust:
            raise
    return RawCheckpoint(f"{kind}, unpickled", load_trusted(part.path))


def _is_legacy(part: ByteRange) -> bool:
    try:
        with closing(part.open()) as file:
            return bool(read_pickle(file, find_safe_global) == LEGACY_MAGIC)
    except ValueError:
        return False


def _read_index(path: Path, *, trust: bool) -> RawCheckpoint:
    """Read the tensors of all files that an index names, each from the file that the index says."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{quoted(path)} is not an index of a checkpoint: it has no `weight_map`.")
    shards: dict[str, RawCheckpoint] = {}
    tensors: dict[str, Any] = {}
    for name, file in weight_map.items():
        where = sibling_file(path.parent, file)
        if file not in shards:
            shards[file] = _read_single(where, trust=trust)
            if not isinstance(shards[file].data, dict):
                raise CheckpointError(f"{quoted(where)} holds no tensors.")
        if name not in shards[file].data:
            raise CheckpointError(f"{quoted(where)} lacks {quoted(name)}, which {quoted(path.name)} says is in it.")
        tensors[name] = shards[file].data[name]
    formats = " and ".join(sorted({shard.format for shard in shards.values()}))
    return RawCheckpoint(f"{formats}, {plural(len(shards), 'file')}", tensors)
