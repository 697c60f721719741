"""Recognise the format of a single file by its first bytes, and read it as plain data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

from neuronscope.checkpoints.formats.byte_range import ByteRange, quoted
from neuronscope.checkpoints.formats.restricted_pickle import UnsafeGlobalError, read_pickle
from neuronscope.checkpoints.formats.safe_globals import find_safe_global
from neuronscope.checkpoints.formats.safetensors import looks_like_safetensors, read_safetensors
from neuronscope.checkpoints.formats.torch_file import LEGACY_MAGIC, is_script, read_legacy, read_zip
from neuronscope.errors import CheckpointError

__all__ = ["SingleFile", "read_single_file"]

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


class SingleFile(NamedTuple):
    """The content of one file.

    Attributes:
        format: Name of the format, for people.
        data: Plain data, with a description in place of each tensor: see
            :mod:`neuronscope.checkpoints.formats.lazy_tensor`.
    """

    format: str
    data: Any


def read_single_file(part: ByteRange, *, trust: bool) -> SingleFile:
    """Read a file of any supported format.

    Args:
        part: The file.
        trust: Whether a file that names code may run it.

    Raises:
        CheckpointError: The file has no supported format, is damaged, or names code and is not trusted.
    """
    head = part.part(0, min(32, part.size)).read()
    if head.startswith(_ZIP):
        if is_script(part):
            return _script(part, trust=trust)
        return _pickled(part, "torch file", read_zip, trust=trust)
    if head.startswith(_PICKLE):
        if not _is_legacy(part):
            raise CheckpointError(f"{quoted(part.path)} is a pickle, but none that torch.save has written.")
        return _pickled(part, "torch file of the older layout", read_legacy, trust=trust)
    if looks_like_safetensors(head):
        return SingleFile("safetensors", read_safetensors(part))
    other = next(
        (what for start, what in _OTHERS.items() if head.startswith(start)), "none of the formats that are read"
    )
    raise CheckpointError(
        f"{quoted(part.path)} is not understood: it is {other}. Files of torch.save and safetensors are read."
    )


def _pickled(part: ByteRange, kind: str, read: Callable[[ByteRange], Any], *, trust: bool) -> SingleFile:
    try:
        return SingleFile(kind, read(part))
    except UnsafeGlobalError:
        if not trust:
            raise
    from neuronscope.checkpoints.formats.trusted import load_trusted

    return SingleFile(f"{kind}, unpickled", load_trusted(part.path))


def _script(part: ByteRange, *, trust: bool) -> SingleFile:
    if not trust:
        raise CheckpointError(
            f"{quoted(part.path)} is a TorchScript archive, which holds code: it was not loaded. "
            "Give `--trust` (`trust=True`) if you know where the file comes from, or save the state_dict alone."
        )
    from neuronscope.checkpoints.formats.trusted import load_script

    return SingleFile("TorchScript archive", load_script(part.path))


def _is_legacy(part: ByteRange) -> bool:
    try:
        with closing(part.open()) as file:
            return bool(read_pickle(file, find_safe_global) == LEGACY_MAGIC)
    except ValueError:
        return False
