"""Pickles, read and not run: the machine of pickle's opcodes, without the power to import, call or build anything.

What a pickle names is looked up in a table of the caller's (see
:mod:`neuronscope.checkpoints.formats.safe_globals`) that gives descriptions; a name that is not in it is refused.
``torch.load(weights_only=True)`` goes the same way, but calls functions of torch that make real tensors of whatever
size a file claims; here nothing of torch is called.

The opcodes and how their arguments are written come from :mod:`pickletools` of the standard library.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from neuronscope.checkpoints.formats.byte_range import shown
from neuronscope.errors import CheckpointError

__all__ = ["ForeignError", "Placeholder", "SafeGlobal", "hashable", "read_pickle", "understood"]

# Bounds on what a pickle may cost in memory: an opcode of one byte makes up to 56 of them, or 216 where it makes an
# empty container. A checkpoint of 100,000 tensors with both of Adam's averages takes a third of each.
_MOST_OPCODES = 20_000_000
_MOST_CONTAINERS = 4_000_000
_MOST_COPIED = 1 << 26


class ForeignError(CheckpointError):
    """A pickle names something that is not in the table: it could be anything, and loading it would run it.

    Args:
        name: What it names.
        path: The file.
    """

    def __init__(self, name: str, path: object = "A pickle") -> None:
        super().__init__(
            f"{shown(path)} names {shown(name)}, which would have to be imported and run: it was not. Give `--trust` "
            "(`trust=True`) if you know where the file comes from, or save the state_dict alone."
        )
        self.name = name


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """What goes wrong while a pickle is read and its content taken apart becomes one sentence about the file.

    Raises:
        ForeignError: The pickle names code.
        CheckpointError: It is damaged.

    >>> with understood(Path("last.ckpt")):
    ...     {}["state_dict"]
    Traceback (most recent call last):
        ...
    neuronscope.errors.CheckpointError: 'last.ckpt' is damaged: what it describes makes no sense ("'state_dict'").
    """
    try:
        yield
    except ForeignError as error:
        raise ForeignError(error.name, path) from error
    except CheckpointError:
        raise
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        AssertionError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{shown(path)} is damaged: what it describes makes no sense ({shown(error)})."
        ) from error


class Placeholder:
    """What stands here for an object of a class: nothing of that class, and equal to itself only."""

    def take_state(self, state: Any) -> None:
        """Take what the pickle says of the object's attributes; here: let it go."""


class SafeGlobal(NamedTuple):
    """What a name in a pickle stands for here.

    Attributes:
        name: As the pickle has it.
        make: What calling it gives: a pure function, from plain data to plain data.
    """

    name: str
    make: Callable[..., Any]


def read_pickle(
    file: BinaryIO,
    find: Callable[[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The plain data that a pickle describes. The file is left behind the pickle's last byte.

    Args:
        file: The pickle, from where the file stands.
        find: Gives what a module's name and a name in it stand for, a :class:`SafeGlobal` where it can be called; or
            raises :class:`ForeignError`.
        persistent: Gives what a persistent id stands for.

    Raises:
        ForeignError: ``find`` raised it.
        ValueError, TypeError, LookupError: It is no pickle, or a damaged one.

    >>> import io, pickle
    >>> read_pickle(io.BytesIO(pickle.dumps({"a": [1, 2.5, None, (True, b"x")]})), find=None)
    {'a': [1, 2.5, None, (True, b'x')]}
    """
    machine, read = _Machine(find, persistent), file.read
    try:
        for _ in range(_MOST_OPCODES):
            code = read(1)
            if code == pickle.STOP:
                return machine.pop()
            act, argument = _ACTS[code]
            act(machine, None if argument is None else argument(file))
    except KeyError:
        raise ValueError(f"it has opcode {code!r}, or ends, where none can be understood") from None
    except IndexError as error:
        raise ValueError("its opcodes take more than there is") from error
    raise ValueError(f"it has more than {_MOST_OPCODES} opcodes")


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.containers = 0
        self.find = find
        self.persistent = persistent

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def put_up(self, container: Any) -> None:
        """Push an empty container."""
        self.containers += 1
        if self.containers > _MOST_CONTAINERS:
            raise ValueError(f"it has more than {_MOST_CONTAINERS} containers")
        self.stack.append(container)

    def mark(self) -> None:
        self.put_up(None)
        self.stack.pop()
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def memoize(self) -> None:
        self.put(len(self.memo))

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError("it refers to something that was not before it")
        self.push(self.memo[place])

    def last(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(
                f"something is put into a {type(self.stack[-1]).__name__} that belongs into a {kind.__name__}"
            )
        return self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        self.last(list).extend(items)

    def append(self) -> None:
        self.extend([self.pop()])

    def update(self, items: list[Any]) -> None:
        self.last(dict).update(paired(items))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

    def add(self, items: list[Any]) -> None:
        self.last(set).update(hashable(item) for item in items)

    def take(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it names something by what is no name")
        self.push(self.find(module, name))

    def global_(self, names: tuple[str, str]) -> None:
        self.name(*names)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def call(self, symbol: Any, arguments: Any) -> None:
        if not isinstance(symbol, SafeGlobal) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that cannot be called")
        self.copied += sum(16 * len(given) for given in arguments if isinstance(given, set | dict))
        self.copied += sum(len(given) for given in arguments if isinstance(given, str | bytes | list | tuple))
        if self.copied > _MOST_COPIED:
            raise ValueError("it copies something large again and again")
        self.push(symbol.make(*arguments))

    def reduce(self) -> None:
        arguments, symbol = self.pop(), self.pop()
        self.call(symbol, arguments)

    def new_with_keywords(self) -> None:
        keywords, arguments, symbol = self.pop(), self.pop(), self.pop()
        if keywords:
            raise ValueError("it calls something with keywords")
        self.call(symbol, arguments)

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if isinstance(made, Placeholder):
            made.take_state(state)
        elif not isinstance(made, dict):  # attributes of an OrderedDict (a state_dict's `_metadata`) are left out
            raise ValueError("it gives a state to something that has none")

    def by_id(self, key: Any) -> None:
        if self.persistent is None:
            raise ValueError("it refers to something that lies outside of it")
        self.push(self.persistent(key))


def hashable(key: Any, *, inside: bool = False) -> Any:
    """A key that hashing cannot make us walk through, or a ValueError."""
    if isinstance(key, tuple) and not inside:
        return tuple(hashable(part, inside=True) for part in key)
    if key is None or isinstance(key, (str, bytes, float)):
        return key
    if isinstance(key, int):
        if -(2**63) <= key < 2**64:
            return key
        raise ValueError("a key is an integer out of bounds")
    if isinstance(key, (Placeholder, torch.dtype)):
        return key
    raise ValueError(f"a key is a {type(key).__name__}")


def paired(items: Sequence[Any]) -> dict[Any, Any]:
    """A dictionary of keys and values in turn."""
    if len(items) % 2:
        raise ValueError("a key has no value")
    return {hashable(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _two_lines(file: BinaryIO) -> tuple[str, str]:
    """A module's name and a name in it, as GLOBAL has them."""
    module, name = file.readline(), file.readline()
    if module[-1:] != b"\n" or name[-1:] != b"\n":
        raise ValueError("it ends in the middle of a name")
    return module[:-1].decode("utf-8"), name[:-1].decode("utf-8")


# What each opcode does. Those that are missing have no place in a checkpoint: extension codes, out-of-band buffers,
# what protocol 0 writes as quoted text and no checkpoint has.
_BY_NAME: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda *_: None),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        ),
        _Machine.push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.put_up([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.put_up({}),
    "EMPTY_SET": lambda machine, _: machine.put_up(set()),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop() if machine.stack else machine.pop_mark(),
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.memoize(),
    "LIST": lambda machine, _: machine.push(machine.pop_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "DICT": lambda machine, _: machine.push(paired(machine.pop_mark())),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(hashable, machine.pop_mark()))),
    "TUPLE1": lambda machine, _: machine.push(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.take(3)),
    "APPEND": lambda machine, _: machine.append(),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_item(),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.pop_mark()),
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "NEWOBJ": lambda machine, _: machine.reduce(),
    "NEWOBJ_EX": lambda machine, _: machine.new_with_keywords(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.by_id(machine.pop()),
}

# By the byte of an opcode: what it does, and what reads its argument from the file.
_ACTS: dict[bytes, tuple[Callable[[_Machine, Any], Any], Callable[[Any], Any] | None]] = {
    opcode.code.encode("latin-1"): (_BY_NAME[opcode.name], opcode.arg.reader if opcode.arg else None)
    for opcode in pickletools.opcodes
    if opcode.name in _BY_NAME
} | {
    pickle.GLOBAL: (_Machine.global_, _two_lines)
}  # pickletools' reader takes backslashes for escapes, pickle does not
