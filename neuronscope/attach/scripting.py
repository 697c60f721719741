"""Let a watched model be scripted: ``torch.jit.script`` compiles the hooks of a model, and ours cannot be compiled.

Torch has no way to mark a hook as one to leave out. So its function that compiles a module is wrapped while any model
is watched, and takes our hooks off the module while it runs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch.jit._recursive as compiler
from torch import nn

from neuronscope.attach.hook_handles import put_back, take_off

__all__ = ["allow_scripting", "stop_allowing_scripting"]

_watches: weakref.WeakSet[Any] = weakref.WeakSet()


def _without_our_hooks(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_script_module(nn_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        taken = take_off(nn_module.modules())
        try:
            return create(nn_module, *args, **kwargs)
        finally:
            put_back(taken)

    return create_script_module


_original = compiler.create_script_module
_wrapper = _without_our_hooks(_original)


def allow_scripting(watch: object) -> None:
    """Wrap torch's function until :func:`stop_allowing_scripting` was called for every watch.

    Args:
        watch: Whoever owns the hooks.
    """
    _watches.add(watch)
    if compiler.create_script_module is _original:
        compiler.create_script_module = _wrapper


def stop_allowing_scripting(watch: object) -> None:
    """Give torch its function back if nobody else watches a model.

    Args:
        watch: Whoever owns the hooks.
    """
    _watches.discard(watch)
    if not _watches and compiler.create_script_module is _wrapper:
        compiler.create_script_module = _original
