"""Output: a file lies in its place whole or not at all; what is printed arrives, or an error says that it did not."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
from pathlib import Path

__all__ = ["check_writable", "discard_output", "print_and_flush", "write_file"]


def check_writable(path: str | Path) -> None:
    """Raise now what :func:`write_file` would raise later, as far as it can be known without writing.

    Args:
        path: The file.

    Raises:
        OSError: It is a folder, lies in no folder, or may not be written.
    """
    path = Path(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {folder}", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # A file is replaced and not written into, so both must be allowed: what is protected against writing stays.
    needed = [path] if path.exists() else []
    if not needed or path.is_file():
        needed.append(folder)
    for one in needed:
        if not os.access(one, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a failure leaves what was there before, and nothing half-written.

    The content goes to a file beside it, which then takes its place. What is no ordinary file (a device, a pipe) is
    written into as it is.

    Args:
        path: The file; a link is followed.
        content: What is to be in it; text is written as UTF-8.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        check_writable(path)
        if _is_special(Path(path)):
            Path(path).write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _is_special(path: Path) -> bool:
    """Whether it is there and is no ordinary file; ``/dev/stdout`` is none, whatever it leads to."""
    return path.exists() and (not stat.S_ISREG(path.stat().st_mode) or path.is_relative_to("/dev"))


def _replace(target: Path, data: bytes) -> None:
    beside = target.with_name(f".neuronscope-{secrets.token_hex(8)}.part")
    try:
        beside.write_bytes(data)
        if target.exists():
            shutil.copymode(target, beside)
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def print_and_flush(text: str = "") -> None:
    """Print a text, and see that it and all that was printed before arrive.

    A reader that stops early (``| head``) is no fault.

    Raises:
        OSError: Standard output takes no more. What is left of what was printed is dropped.
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
    """Drop what was printed and cannot be written, and all that follows: the interpreter would try once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
