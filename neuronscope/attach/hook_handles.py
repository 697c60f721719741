"""Handles: every hook on a model, taken off while nothing is observed and put back where it stood.

A module that bears any hook is called by a longer way, so hooks that have nothing to do are not left on. But
``torch.compile`` looks at hooks once, when it traces: a model that it has traced, or may be about to, keeps them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch.utils.hooks import RemovableHandle

__all__ = ["HookHandles"]


class HookHandles:
    """The handles of one watch.

    >>> import torch
    >>> module, handles, order = torch.nn.ReLU(), HookHandles(), []
    >>> handles.add(module.register_forward_pre_hook(lambda module, args: order.append("ours")))
    >>> _ = module.register_forward_pre_hook(lambda module, args: order.append("theirs"))
    >>> handles.take_off()
    >>> _ = module(torch.ones(1))
    >>> handles.put_back()
    >>> _ = module(torch.ones(1))
    >>> order
    ['theirs', 'ours', 'theirs']
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._taken: list[list[Any]] = []  # of each handle, what stood under its number in each table

    def __bool__(self) -> bool:
        return bool(self._handles)

    def add(self, handle: RemovableHandle) -> None:
        """A hook was registered."""
        self._handles.append(handle)

    @property
    def off(self) -> bool:
        """Whether the hooks are off the model just now."""
        return bool(self._taken)

    def take_off(self) -> None:
        """Take every hook off, for a while."""
        self._taken = [[table.pop(handle.id, None) for table in _tables(handle)] for handle in self._handles]

    def put_back(self) -> None:
        """Put every hook back, before those that were registered after it."""
        for handle, taken in zip(self._handles, self._taken, strict=True):
            for table, value in zip(_tables(handle), taken, strict=False):
                if value is not None:
                    later = list(itertools.takewhile(handle.id.__lt__, reversed(table)))
                    table[handle.id] = value
                    for number in reversed(later):
                        table[number] = table.pop(number)
        self._taken = []

    def remove(self) -> None:
        """Take every hook off for good."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._taken = [], []


def _tables(handle: RemovableHandle) -> Iterator[MutableMapping[int, Any]]:
    """The tables of its module in which a hook stands: itself, and what is noted of how it is to be called."""
    for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
        table = reference()
        if table is not None:
            yield table
