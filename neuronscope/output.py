"""Write files and standard output: each write is complete, or an error says that it failed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
from pathlib import Path

__all__ = ["check_writable", "discard_output", "print_and_flush", "write_file", "write_if_named"]


def check_writable(path: str | Path) -> None:
    """Raise early the OSError that :func:`write_file` would raise later, as far as it is known without writing."""
    path = Path(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # A file is replaced by a new one, so its folder must be writable; a write-protected file is respected as well.
    writable = [path] if path.exists() else []
    if not writable or path.is_file():
        writable.append(folder)
    for place in writable:
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def write_if_named(text: str, path: str | Path | None) -> str:
    """Return a text, and write it to a file as :func:`write_file` does, if one is named.

    Args:
        text: The text.
        path: The file; ``None`` = none.
    """
    if path is not None:
        write_file(path, text)
    return text


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file completely; if that fails, keep the previous file and leave no partial one.

    The content is written to a temporary file in the same folder, which then replaces the target. A device or a pipe
    is written to directly; a pipe that nobody reads is not waited for.

    Args:
        path: The file; links are followed.
        content: The new content; text is encoded as UTF-8.

    Raises:
        OSError: The file cannot be written; the error names ``path``.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        check_writable(path)
        if _is_special(Path(path)):
            _write_into(path, data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _is_special(path: Path) -> bool:
    """Whether the path exists and is not a regular file; everything under ``/dev`` counts as special."""
    return path.exists() and (not stat.S_ISREG(path.stat().st_mode) or path.is_relative_to("/dev"))


def _write_into(path: str | Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        opened = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nothing reads from it") from error
        raise
    with os.fdopen(opened, "wb") as file:
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(opened, True)
        file.write(data)


def _replace(target: Path, data: bytes) -> None:
    part = target.with_name(f".neuronscope-{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(data)
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def print_and_flush(text: str = "") -> None:
    """Print a text and flush standard output.

    A reader that stops early (``| head``) is not an error.

    Raises:
        OSError: Standard output cannot be written to. Output that was not written yet is dropped.
    """
    if sys.stdout is None:  # closed before the program began
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    except OSError:
        discard_output()
        raise


def discard_output() -> None:
    """Send standard output to the null device; otherwise the interpreter tries to write the rest again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
