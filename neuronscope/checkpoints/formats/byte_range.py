"""Read a range of bytes of a regular file. Its size is known, and no read goes beyond it.

Files are read with ordinary reads and not through a memory map: pages of a mapped file count as this process's memory,
and a file that is cut short while it is mapped ends the process.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from neuronscope.errors import CheckpointError

__all__ = [
    "MOST_DIMENSIONS",
    "ByteRange",
    "deepspeed_refused",
    "parse_json",
    "quoted",
    "quoted_list",
    "read_json",
    "sibling_file",
]

#: No tensor of torch has more dimensions.
MOST_DIMENSIONS = 64

_LONGEST_SHOWN = 80
_LONGEST_PATH = 400
_LONGEST_READ = 1 << 27
_LONGEST_JSON = 1 << 25  # each byte can take twenty in memory; the index of 100,000 tensors has a third of this


def quoted(thing: object) -> str:
    r"""Return text from a checkpoint as one short line of printable characters, for use in a message.

    >>> print(quoted("layer\x1b[2J\n1"), quoted((2, 3)), quoted([[]]))
    'layer\x1b[2J\n1' (2, 3) a list
    >>> quoted("w" * 1000) == repr("w" * 79 + "…")
    True
    """
    if isinstance(thing, tuple) and len(thing) <= MOST_DIMENSIONS and all(type(n) is int and n < 2**64 for n in thing):
        return str(thing)
    if not isinstance(thing, str | PurePath | Exception):
        return f"a {type(thing).__name__}"  # its text could be of any length
    text, most = str(thing), _LONGEST_PATH if isinstance(thing, PurePath) else _LONGEST_SHOWN
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def quoted_list(names: Collection[object]) -> str:
    """Return the first five names, and how many more there are, for use in a message.

    >>> quoted_list("abcdefg")
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    first = [quoted(name) for name in names][:5]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def deepspeed_refused(path: Path) -> CheckpointError:
    """Return the error for a file or folder of DeepSpeed."""
    return CheckpointError(
        f"{quoted(path)} is a checkpoint of DeepSpeed, which is not understood: turn it into a state_dict with its own "
        "`zero_to_fp32.py` and give that."
    )


@dataclass(frozen=True)
class ByteRange:
    """A range of bytes of a regular file.

    No file is kept open. Links are followed; a path that is not a regular file (a folder, a pipe, a device) is refused
    without waiting for it.
    """

    path: Path
    start: int  # position of the first byte
    size: int  # number of bytes

    @classmethod
    def of(cls, path: Path) -> ByteRange:
        """Return the range of all bytes of a file.

        Raises:
            CheckpointError: The file does not exist, may not be read, is not a regular file, or is empty.

        >>> ByteRange.of(Path("no/such/file"))
        Traceback (most recent call last):
            ...
        neuronscope.errors.CheckpointError: Cannot read 'no/such/file': No such file or directory.
        """
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CheckpointError(f"Cannot read {quoted(path)}: the file is empty.")
        return cls(path, 0, size)

    def part(self, offset: int, length: int) -> ByteRange:
        """Return a part of this range; raise a CheckpointError if it does not lie within.

        Args:
            offset: Where the part starts, from the start of this range.
            length: Its number of bytes.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{quoted(self.path)} is cut short or damaged: it refers to bytes {offset} to {offset + length}, and "
                f"there are only {self.size}."
            )
        return ByteRange(self.path, self.start + offset, length)

    def read(self) -> bytes:
        """Return all bytes of the range.

        Raises:
            CheckpointError: The file has become shorter, or may no longer be read.
        """
        data = bytearray(self.size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer with the first bytes of the range; raises as :meth:`read` does."""
        with _opened(self.path) as file:
            _read_exactly(file, self.start, buffer, self.path)

    def open(self) -> BinaryIO:
        """Open the range as a file whose reads are bounded: for lengths and indices in a file, not for tensors."""
        return _Bounded(_Window(self), buffer_size=1 << 16)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: It cannot be read, is not JSON, or is longer than any index of a checkpoint.
    """
    return parse_json(ByteRange.of(path))


def parse_json(part: ByteRange) -> Any:
    """Parse JSON text; raise a CheckpointError if it is not JSON, is nested too deeply, or is too long.

    A repeated key is an error too, since readers differ in which of the two values they use.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"{quoted(repeated)} comes twice")
        return found

    path = part.path
    if part.size > _LONGEST_JSON:
        raise CheckpointError(f"{quoted(path)} has {part.size} bytes of JSON; at most {_LONGEST_JSON} are read.")
    text = part.read()
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError:
        raise CheckpointError(
            f"{quoted(path)} is not the JSON that was expected of it: it is nested too deeply."
        ) from None
    except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{quoted(path)} is not the JSON that was expected of it: {error}.") from error


def sibling_file(folder: Path, name: object) -> Path:
    """Return the path of a file in a folder that a checkpoint names; raise a CheckpointError if it is no plain name.

    Args:
        folder: The folder.
        name: The name in the checkpoint.

    >>> sibling_file(Path("run"), "../secret")
    Traceback (most recent call last):
        ...
    neuronscope.errors.CheckpointError: Expected the name of a file in 'run', but got '../secret'.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not any(char in name for char in "/\\:\0")
    if not plain:
        raise CheckpointError(f"Expected the name of a file in {quoted(folder)}, but got {quoted(name)}.")
    return folder / str(name)


def _opened(path: Path) -> io.FileIO:
    """Open a regular file for unbuffered reading. A device is never opened, and a pipe is never waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        file = io.FileIO(os.open(path, flags), "rb") if regular else None
    except (OSError, ValueError) as error:  # ValueError: a path that holds a null character
        raise CheckpointError(f"Cannot read {quoted(path)}: {getattr(error, 'strerror', None) or error}.") from error
    if file is None:
        raise CheckpointError(f"Cannot read {quoted(path)}: a file was expected, not a folder, a pipe or a device.")
    return file


def _read_exactly(file: io.FileIO, position: int, buffer: memoryview, path: Path) -> None:
    """Fill a buffer with the bytes of an open file from a position on, or raise a CheckpointError."""
    try:
        file.seek(position)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise CheckpointError(f"{quoted(path)} has become shorter while it was read.")
            buffer = buffer[count:]
    except OSError as error:
        raise CheckpointError(f"Cannot read {quoted(path)}: {error.strerror or error}.") from error


class _Bounded(io.BufferedReader):
    """A file that raises if more than ``_LONGEST_READ`` bytes are requested at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(_LONGEST_READ + 1 if size is None or size < 0 else min(size, _LONGEST_READ + 1))
        return _within_limit(data)

    def readline(self, _: int | None = -1, /) -> bytes:
        return _within_limit(super().readline(_LONGEST_READ + 1))


def _within_limit(data: bytes) -> bytes:
    if len(data) > _LONGEST_READ:
        raise ValueError(f"more than {_LONGEST_READ} bytes would have to be read at once")
    return data


class _Window(io.RawIOBase):
    """A range of bytes as a file whose positions begin at 0."""

    def __init__(self, part: ByteRange) -> None:
        self._part = part
        self._file = _opened(part.path)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._part.size}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} lies before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        left = max(0, min(len(buffer), self._part.size - self._position))
        if left:
            _read_exactly(self._file, self._part.start + self._position, memoryview(buffer)[:left], self._part.path)
        self._position += left
        return left

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
