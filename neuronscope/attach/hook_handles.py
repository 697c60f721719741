"""Put hooks on the modules of a model, take them off while they are in the way, and leave none in a copy of the model.

Torch calls a module that has any hook by a slower path, so hooks are taken off while they have nothing to do. With the
callbacks' defaults this saves 3 % of a training step of 1 ms. ``torch.compile`` reads the hooks of a model only once,
when it traces it, so a model that was traced, or may be traced next, keeps its hooks.

They are also taken off a part of a model while something runs that would not work with them: see
:mod:`neuronscope.attach.fused_calls` and :mod:`neuronscope.attach.scripting`.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from neuronscope.attach.gradient_hooks import InertHook

__all__ = ["HookHandles", "Taken", "is_ours", "put_back", "tables", "take_off"]

Table = OrderedDict[Any, Any]
#: A table of hooks, all that it held, in order, the keys of the hooks that were taken off, and how they are called.
Taken = list[tuple[Table, dict[Any, Any], set[Any], list[tuple[dict[Any, Any], dict[Any, Any]]]]]

_numbers = itertools.count()


class _Flag:
    """Says how a hook is called, as ``True`` does in torch's tables, and takes the hook out of a copied model.

    A module of torch holds the table of such flags after the table of hooks, so that it is copied and loaded after it.

    Args:
        table: The table of hooks.
        key: The hook's key in it.
    """

    def __init__(self, table: Table, key: str) -> None:
        self._table = table
        self._key = key

    def __deepcopy__(self, memo: dict[int, Any]) -> bool:
        copied = memo.get(id(self._table))
        if copied is not None:
            copied.pop(self._key, None)
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.delitem, (self._table, self._key)  # of the standard library: it can be loaded without us


class HookHandles:
    """The hooks of one watch.

    Attributes:
        off: Whether the hooks are off the model at the moment.

    >>> import copy, torch
    >>> class Note(InertHook):
    ...     def __call__(self, module, args, kwargs):
    ...         order.append("ours")
    >>> module, handles, order = torch.nn.ReLU(), HookHandles(), []
    >>> handles.add_before(module, Note())
    >>> _ = module.register_forward_pre_hook(lambda module, args: order.append("theirs"))
    >>> _ = copy.deepcopy(module)(torch.ones(1))
    >>> handles.take_off()
    >>> _ = module(torch.ones(1))
    >>> handles.put_back()
    >>> _ = module(torch.ones(1))
    >>> order
    ['theirs', 'theirs', 'ours', 'theirs']
    """

    def __init__(self) -> None:
        self._hooks: set[InertHook] = set()
        self._keys: set[str] = set()
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self._taken: Taken = []
        self.off = False

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def add_before(self, module: nn.Module, hook: InertHook) -> None:
        """Call a hook with ``(module, args, kwargs)`` before a module's forward.

        Args:
            module: The module.
            hook: The hook.
        """
        _, table = tables(module)
        key = self._add(module, table, hook)
        _, _, with_kwargs = _flags(module)
        with_kwargs[key] = _Flag(table, key)

    def add_after(self, module: nn.Module, hook: InertHook, *, with_kwargs: bool = False) -> None:
        """Call a hook with ``(module, args, output)`` after a module's forward; the output is ``None`` if it failed.

        Args:
            module: The module.
            hook: The hook.
            with_kwargs: Call it with ``(module, args, kwargs, output)``.
        """
        table, _ = tables(module)
        key = self._add(module, table, hook)
        named, always_called, _ = _flags(module)
        if with_kwargs:
            named[key] = True
        always_called[key] = _Flag(table, key)

    def _add(self, module: nn.Module, table: Table, hook: InertHook) -> str:
        key = f"neuronscope {next(_numbers)}"  # torch's own keys are numbers, which another process gives again
        table[key] = hook
        self._hooks.add(hook)
        self._keys.add(key)
        self._modules[id(module)] = weakref.ref(module)
        return key

    def take_off(self) -> None:
        """Take every hook off until :meth:`put_back`."""
        self._taken = take_off(self._bearers(), self._is_own)
        self.off = bool(self._taken)

    def put_back(self) -> None:
        """Put every hook back, ahead of the hooks that were registered after it."""
        put_back(self._taken)
        self._taken, self.off = [], False

    def remove(self, model: nn.Module | None) -> None:
        """Take every hook off for good, also those that somebody moved to another module of the model.

        Args:
            model: The model, if it is still there.
        """
        self.put_back()
        bearers = {id(module): module for module in (*self._bearers(), *(() if model is None else model.modules()))}
        for module in bearers.values():
            moved = {key for table in tables(module) for key, hook in table.items() if self._is_own(hook)}
            for each in (*tables(module), *_flags(module)):
                for key in [key for key in each if key in moved or key in self._keys]:
                    del each[key]
        self._hooks, self._keys, self._modules = set(), set(), {}

    def _bearers(self) -> Iterator[nn.Module]:
        for reference in self._modules.values():
            module = reference()
            if module is not None:
                yield module

    def _is_own(self, hook: Any) -> bool:
        return isinstance(hook, InertHook) and hook in self._hooks


def tables(module: nn.Module) -> tuple[Table, Table]:
    """Return the tables of the hooks that are called around a module's forward."""
    return module._forward_hooks, module._forward_pre_hooks  # type: ignore[return-value]


def _flags(module: nn.Module) -> tuple[Any, Any, Any]:
    """Return torch's tables of how hooks are called: after a forward with its keyword arguments, always; before it."""
    return (
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    )


def is_ours(hook: Any) -> bool:
    """Whether a hook is Neuronscope's, of whichever watch."""
    return isinstance(hook, InertHook)


def take_off(modules: Iterable[nn.Module], wanted: Callable[[Any], bool] = is_ours, *, running: bool = False) -> Taken:
    """Take hooks off modules, and return what :func:`put_back` needs.

    Args:
        modules: The modules.
        wanted: Whether to take a hook off.
        running: Whether torch is calling the hooks of a module, so that it goes on asking how they are called.
    """
    taken: Taken = []
    for module in modules:
        for table in tables(module):
            keys = {key for key, hook in table.items() if wanted(hook)} if table else set()
            if keys:
                settings = [each for each in _flags(module) if each] if not running else []
                flags = [(each, {key: each.pop(key) for key in keys & each.keys()}) for each in settings]
                taken.append((table, dict(table), keys, flags))
                for key in keys:
                    del table[key]
    return taken


def put_back(taken: Taken) -> None:
    """Put hooks back where :func:`take_off` took them from: ahead of those that were registered since."""
    for table, before, keys, flags in taken:
        now = list(table)
        table.update((key, hook) for key, hook in before.items() if key in keys)
        if now:  # each stays in the table, which another thread may be reading
            first = itertools.takewhile(lambda key: key not in before, now)  # noqa: B023  # used at once
            order = [*first, *(key for key in before if key in keys or key in now), *now]
            for key in dict.fromkeys(order):
                table.move_to_end(key)
        for each, values in flags:
            each.update(values)
