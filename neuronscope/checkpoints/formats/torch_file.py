"""Read files of ``torch.save`` as plain data, with a description in place of each tensor.

There are two layouts: a zip archive (torch 1.6 and later) with one entry per storage, and an older one with several
pickles followed by the storages. Both are read with the restricted unpickler, which refuses a pickle that names code.
Files that the user trusts, and TorchScript archives, are loaded with torch's own, which runs the code that they name.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from neuronscope.checkpoints.checkpoint import ComputedTensor
from neuronscope.checkpoints.formats.byte_range import ByteRange, quoted
from neuronscope.checkpoints.formats.file_tensor import Storage, check_sizes
from neuronscope.checkpoints.formats.restricted_pickle import as_checkpoint_error, read_pickle
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor, StorageType, find_safe_global, readable_type
from neuronscope.errors import CheckpointError

__all__ = ["LEGACY_MAGIC", "is_script", "load_trusted", "read_legacy", "read_zip"]

#: Files of ``torch.save`` of the older layout begin with a pickle of this number.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_LONGEST_PICKLE = 1 << 28
_DEEPEST = 16  # levels of the data of a trusted file
_LOCAL_HEADER = 30  # bytes; its last four are the lengths of the name and of the extra field after it
_ZIP_ERRORS = (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError, OverflowError, EOFError, RuntimeError)


def read_zip(part: ByteRange) -> Any:
    """Read a zip archive of ``torch.save``.

    Raises:
        CheckpointError: It is not such an archive, or is damaged.
        UnsafeGlobalError: Its pickle names code.
    """
    with as_checkpoint_error(part.path), closing(part.open()) as file:
        entries = _entries(part, file)
        found = [name for name in entries if name.count("/") < 2 and f"/{name}".endswith("/data.pkl")]
        if len(found) != 1:
            raise CheckpointError(f"{quoted(part.path)} is a zip archive, but none that torch.save has written.")
        top = found[0].removesuffix("data.pkl")  # the archive's top folder, with a slash
        order = entries.get(f"{top}byteorder")
        _check_byte_order(part, order is None or _location(part, file, order).read().strip() == b"little")
        storages: dict[str, Storage] = {}

        def persistent(key: Any) -> Storage:
            name, dtype, numel = _storage_id(key)
            if name not in storages:
                entry = entries.get(f"{top}data/{name}")
                if entry is None:
                    raise CheckpointError(
                        f"{quoted(part.path)} is damaged: it lacks the numbers {quoted(name)} of a tensor."
                    )
                storages[name] = Storage(dtype, numel, _location(part, file, entry))
            return storages[name]

        location = _location(part, file, entries[found[0]])
        if location.size > _LONGEST_PICKLE:
            raise CheckpointError(
                f"{quoted(part.path)} describes its tensors in {location.size} bytes, which is more than is read."
            )
        content = read_pickle(io.BytesIO(location.read()), find_safe_global, persistent)
        for storage in storages.values():
            storage.check_views()
        return content


def is_script(part: ByteRange) -> bool:
    """Whether a zip archive is one of TorchScript, which holds code; raise a CheckpointError if it is damaged."""
    with closing(part.open()) as file:
        return any(name.endswith("/constants.pkl") for name in _entries(part, file))


def read_legacy(part: ByteRange) -> Any:
    """Read a file of ``torch.save`` of the older layout.

    Raises:
        CheckpointError: It is damaged.
        UnsafeGlobalError: Its pickle names code.
    """
    storages: dict[str, Storage] = {}
    # Storages that are parts of others: name of the other, index of its first number in it, the part.
    views: list[tuple[str, int, Storage]] = []

    def persistent(key: Any) -> Any:
        name, dtype, numel = _storage_id(key)
        storage = storages.setdefault(name, Storage(dtype, numel))
        view = key[5] if len(key) > 5 else None
        if view is None:
            return storage
        _, offset, size = check_sizes((0, *view[1:]))
        views.append((name, offset, Storage(dtype, size)))
        return views[-1][2]

    with as_checkpoint_error(part.path), closing(part.open()) as file:
        magic, _, system = (read_pickle(file, find_safe_global) for _ in range(3))
        if magic != LEGACY_MAGIC:
            raise CheckpointError(f"{quoted(part.path)} is not a file of torch.save.")
        _check_byte_order(part, isinstance(system, dict) and system.get("little_endian", True))
        content = read_pickle(file, find_safe_global, persistent)
        for name in read_pickle(file, find_safe_global):
            storage = storages[_name(name)]
            numel = int.from_bytes(file.read(8), "little")
            storage.location = part.part(file.tell(), numel * storage.dtype.itemsize)
            file.seek(storage.location.size, 1)
        for name, offset, view in views:
            whole, itemsize = storages[name].location, view.dtype.itemsize
            view.location = None if whole is None else whole.part(offset * itemsize, view.numel * itemsize)
        for storage in (*storages.values(), *(view for _, _, view in views)):
            storage.check_views()
        return content


def _check_byte_order(part: ByteRange, is_little: bool) -> None:
    if not is_little:
        raise CheckpointError(
            f"{quoted(part.path)} was written on a machine of the other byte order, which is not read."
        )


def _storage_id(key: Any) -> tuple[str, Any, int]:
    """Return name, dtype and length of the storage that a persistent id refers to."""
    if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or not isinstance(key[1], StorageType):
        raise ValueError("it refers to something that is not a storage")
    (numel,) = check_sizes((key[4],))
    return _name(key[2]), key[1].dtype, numel


def _name(key: Any) -> str:
    """Return the name of a storage, after checking that it is a string."""
    if not isinstance(key, str):
        raise ValueError(f"{quoted(key)} was found where a storage's name was expected")
    return key


def _entries(part: ByteRange, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return {entry.filename: entry for entry in archive.infolist()}
    except _ZIP_ERRORS as error:
        raise CheckpointError(
            f"{quoted(part.path)} is cut short or damaged: its zip archive has no readable index."
        ) from error


def _location(part: ByteRange, file: BinaryIO, entry: zipfile.ZipInfo) -> ByteRange:
    """Return where the bytes of an entry are. torch never compresses; a compressed entry could unpack to any size."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise CheckpointError(f"{quoted(part.path)} holds packed entries, which torch.save does not write.")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise CheckpointError(f"{quoted(part.path)} is damaged: {quoted(entry.filename)} is not where its index says.")
    lengths = (int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little"))
    return part.part(entry.header_offset + _LOCAL_HEADER + sum(lengths), entry.file_size)


def load_trusted(path: Path, *, script: bool = False) -> Any:
    """Load a file as plain data, with a stored tensor for each tensor; code that the file names is run.

    Args:
        path: A file of ``torch.save``, or a TorchScript archive. A module becomes its ``state_dict``.
        script: Whether it is a TorchScript archive.

    Raises:
        CheckpointError: It cannot be loaded, or the code that it names raises anything.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if script:
                loaded = torch.jit.load(path, map_location="cpu")
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=False)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file's own code runs here, and may call sys.exit
        first_line = f"{type(error).__name__}: {quoted((str(error).splitlines() or [''])[0])}"
        done = "loaded as TorchScript" if script else "unpickled"
        raise CheckpointError(f"{quoted(path)} could not be {done}: {first_line}.") from error
    return _plain(loaded, 0)


def _plain(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        return None
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            return SkippedTensor("sparse, quantised or without numbers")
        known = readable_type(value.dtype)
        return known if isinstance(known, SkippedTensor) else ComputedTensor.of(value)
    if isinstance(value, nn.Module):
        return _plain(dict(value.state_dict()), depth + 1)
    if isinstance(value, Mapping):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(inner, depth + 1) for inner in value]
        return items if isinstance(value, list) else tuple(items)
    return value
