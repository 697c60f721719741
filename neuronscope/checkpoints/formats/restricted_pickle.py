"""Read pickles without running them: the standard library's unpickler, limited to plain data.

A name in a pickle is looked up in the caller's table (see :mod:`neuronscope.checkpoints.formats.safe_globals`), which
gives pure functions and placeholders; any other name is refused. ``torch.load(weights_only=True)`` works the same way,
but calls functions of torch that allocate real tensors of whatever size a file claims; here nothing of torch is called.

The unpickler is :class:`pickle._Unpickler`, the standard library's in Python, and not the one in C, which
:class:`pickle.Unpickler` is. Three things in C cannot be limited from outside: the memo is an array as long as the
largest index in the file (``r`` and four bytes 0xff: 64 GiB); keys are hashed unchecked (a tuple nested a
million times overflows the C stack and ends the process); and BUILD sets attributes on any object.
"""

from __future__ import annotations

import gc
import pickle
import pickletools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch

from neuronscope.checkpoints.formats.byte_range import quoted
from neuronscope.errors import CheckpointError

__all__ = ["Placeholder", "SafeGlobal", "UnsafeGlobalError", "as_checkpoint_error", "read_pickle", "safe_key"]

# Limits on the memory that a pickle can take: an opcode of one byte makes up to 56 bytes, or 216 if it makes an empty
# container. A checkpoint of 100,000 layers, weights and biases, with all of Adam's state has 24 million opcodes and 2
# million containers.
_MAX_OPCODES = 30_000_000
_MAX_CONTAINERS = 4_000_000
_MAX_COPIED = 1 << 26  # bytes or items that calls may copy from their arguments, in all

# Opcodes that no checkpoint has: extension codes, out-of-band buffers, quoted text and instances of protocol 0.
_REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID", "STRING", "INST", "OBJ"}


class UnsafeGlobalError(CheckpointError):
    """A pickle names something that is not in the table of safe globals; loading it could run any code."""

    def __init__(self, name: str, path: object = "A pickle") -> None:
        super().__init__(
            f"{quoted(path)} names {quoted(name)}, which would have to be imported and run: it was not. Give `--trust` "
            "(`trust=True`) if you know where the file comes from, or save the state_dict alone."
        )
        self.name = name


@contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Turn any error inside the block into a :class:`CheckpointError` of one sentence about the file.

    Raises:
        UnsafeGlobalError: The pickle names code.
        CheckpointError: The file is damaged.

    >>> with as_checkpoint_error(Path("last.ckpt")):
    ...     {}["state_dict"]
    Traceback (most recent call last):
        ...
    neuronscope.errors.CheckpointError: 'last.ckpt' is damaged: what it describes makes no sense ("'state_dict'").
    """
    try:
        yield
    except UnsafeGlobalError as error:
        raise UnsafeGlobalError(error.name, path) from error
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{quoted(path)} is damaged: what it describes makes no sense ({quoted(error)})."
        ) from error


class Placeholder:
    """Stands for an object of a class that is not built. It is equal to itself only."""

    def set_state(self, state: Any) -> None:
        """Ignore the attributes that the pickle gives the object."""


class SafeGlobal(NamedTuple):
    """Stands for a class or function that a pickle names."""

    name: str  # the name in the pickle
    make: Callable[..., Any]  # what is called in its place: a pure function from plain data to plain data


def read_pickle(file: BinaryIO, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Return the plain data in a pickle. Leaves the file right after the pickle's last byte.

    Args:
        file: A file that can seek, at the pickle's first byte.
        find: Returns what a module name and a name in that module stand for, a :class:`SafeGlobal` if it can be called;
            or raises :class:`UnsafeGlobalError`.
        persistent: Returns what a persistent id stands for.

    Raises:
        CheckpointError: ``find`` or ``persistent`` raised it.
        ValueError: It is not a pickle, is damaged, or exceeds a limit.

    >>> import io, pickle
    >>> read_pickle(io.BytesIO(pickle.dumps({"a": [1, 2.5, None, (True, b"x")]})), find=None)
    {'a': [1, 2.5, None, (True, b'x')]}
    """
    try:
        _check_opcodes(file)
        with _garbage_collection_paused():
            return _RestrictedUnpickler(file, find, persistent).load()
    except (CheckpointError, ValueError):
        raise
    except Exception as error:  # the unpickler raises whatever a wrong stack leads to
        raise ValueError(str(error) or type(error).__name__) from error


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause the search for circular garbage: plain data has none, and it takes longer the more data there is."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def safe_key(key: Any, *, inside: bool = False) -> Any:
    """Return a key if hashing it takes bounded time (a scalar or a flat tuple of scalars); else raise a ValueError.

    Args:
        key: The key of a dictionary, or an item of a set.
        inside: Whether it is an item of a key that is a tuple; it cannot be another tuple then.
    """
    if isinstance(key, tuple) and not inside:
        return tuple(safe_key(part, inside=True) for part in key)
    if isinstance(key, int):
        if -(2**63) <= key < 2**64:
            return key
        raise ValueError("a key is an integer out of bounds")
    if key is None or isinstance(key, (str, bytes, float, Placeholder, torch.dtype)):
        return key
    raise ValueError(f"a key is a {type(key).__name__}")


def _skip_global(file: BinaryIO) -> None:
    """Skip two lines. The reader of :mod:`pickletools` takes backslashes for escapes, which pickle does not."""
    if file.readline()[-1:] != b"\n" or file.readline()[-1:] != b"\n":
        raise ValueError("it ends in the middle of a name")


# The opcodes that may occur, and what reads the argument of each.
_ARGUMENTS: dict[bytes, Callable[[Any], Any] | None] = {
    opcode.code.encode("latin-1"): opcode.arg.reader if opcode.arg else None
    for opcode in pickletools.opcodes
    if opcode.proto <= 5 and opcode.name not in _REFUSED
} | {pickle.GLOBAL: _skip_global}

_CONTAINERS = {pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.MARK}


def _check_opcodes(file: BinaryIO) -> None:
    """Read a pickle's opcodes without acting on them, and go back to its first byte.

    Arguments that claim to be longer than the rest of the file are found before any memory is set aside for them.
    """
    start, containers = file.tell(), 0
    for _ in range(_MAX_OPCODES):
        code = file.read(1)
        if code not in _ARGUMENTS:
            raise ValueError(f"it has {code!r} in the place of an opcode" if code else "it ends before its last opcode")
        containers += code in _CONTAINERS
        if containers > _MAX_CONTAINERS:
            raise ValueError(f"it has more than {_MAX_CONTAINERS} containers")
        read_argument = _ARGUMENTS[code]
        if read_argument is not None:
            read_argument(file)
        if code == pickle.STOP:
            file.seek(start)
            return
    raise ValueError(f"it has more than {_MAX_OPCODES} opcodes")


class _RestrictedUnpickler(pickle._Unpickler):
    """Builds plain data from a pickle that was checked, and calls nothing but the functions of :class:`SafeGlobal`.

    The opcodes that hash, call, or set attributes are replaced; the others only move plain data.
    """

    # Attributes of the standard library's class
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, file: BinaryIO, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(file, encoding="latin-1")
        self._find, self._persistent = find, persistent
        self._copied = 0

    def find_class(self, module: str, name: str) -> Any:
        return self._find(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise ValueError("it refers to something outside of it")
        return self._persistent(pid)

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"keys and values of a {type(target).__name__} do not match")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[safe_key(key)] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(safe_key, items)))

    def load_additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set):
            raise ValueError(f"items are added to a {type(target).__name__} as to a set")
        target.update(map(safe_key, items))

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, SafeGlobal) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that cannot be called")
        self._copied += sum(16 * len(given) for given in arguments if isinstance(given, set | dict))
        self._copied += sum(len(given) for given in arguments if isinstance(given, str | bytes | list | tuple))
        if self._copied > _MAX_COPIED:
            raise ValueError("it copies something large again and again")
        self.append(function.make(*arguments))

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise ValueError("it calls something with keyword arguments")
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Placeholder):
            target.set_state(state)
        elif not isinstance(target, dict):  # the attributes of an OrderedDict (`_metadata`) are left out
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) in _ARGUMENTS
    } | {
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
    }
