"""Name the arguments of a module's forward, in the order in which the forward declares them.

What runs in a forward here has no comprehension and no generator: where ``torch.compile`` runs a hook outside of its
graph, it would compile each as a frame of its own, and refuse the generator.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from neuronscope.attach.compiling import is_tracing

__all__ = ["CACHES", "CACHE_NAMES", "STARTS", "CallArguments", "inputs_only"]

#: Arguments under which a forward is given what earlier forwards computed for the same rows: key-value caches,
#: states of recurrent language models, memories of earlier segments.
CACHES = (
    "cache",
    "cache_params",
    "caches",
    "kv",
    "kv_cache",
    "kv_caches",
    "layer_past",
    "mems",
    "past",
    "past_key_value",
    "past_key_values",
    "past_kv",
    "past_kvs",
)
#: The same as a set, for what is not traced.
CACHE_NAMES = frozenset(CACHES)
#: Arguments that say at which position the tokens of a forward begin, where the model itself keeps the cache.
STARTS = ("start_pos", "input_pos")


class CallArguments:
    """Names the arguments that the modules of a model are called with.

    The signatures are read once, because ``torch.compile`` cannot trace how they are read.

    Args:
        model: The model.

    >>> arguments = CallArguments(nn.TransformerEncoderLayer(4, 1))
    >>> list(arguments.named(nn.TransformerEncoderLayer(4, 1), (1, 2), {"is_causal": False, "src_key_padding_mask": 3}))
    ['src', 'src_mask', 'src_key_padding_mask', 'is_causal']
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {kind: _parameters(kind) for kind in {type(module) for module in model.modules()}}

    def names(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the forward's parameters, without ``*args`` and ``**kwargs``."""
        positional, others = self._parameters(module)
        return positional + others

    def named(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of one call by name.

        Args:
            module: The module that is called.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.

        Returns:
            The arguments in the order of the forward's parameters; then those that it does not declare. A positional
            argument without a name gets its number.
        """
        positional, others = self._parameters(module)
        named = dict(zip(positional, args, strict=False))
        for index in range(len(named), len(args)):
            named[str(index)] = args[index]
        for name in positional + others:
            if name in kwargs:
                named[name] = kwargs[name]
        named.update(kwargs)  # a name that is there already keeps its place
        return named

    def _parameters(self, module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        kind = type(module)
        found = self._names.get(kind)
        if found is None:  # a class that was made later, as `fully_shard` does
            if is_tracing():
                return (), ()
            found = self._names[kind] = _parameters(kind)
        return found


def inputs_only(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward without its caches.

    >>> inputs_only({"x": 1, "past": 2})
    {'x': 1}
    """
    inputs = dict(named)
    if not is_tracing() and CACHE_NAMES.isdisjoint(named):
        return inputs
    for name in CACHES:
        inputs.pop(name, None)
    return inputs


def _parameters(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the parameters of a class's forward that a position can fill, and the other names."""
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # a scripted module has no signature
        return (), ()
    positional: list[str] = []
    others: list[str] = []
    for each in parameters:
        if each.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            positional.append(each.name)
        elif each.kind is inspect.Parameter.KEYWORD_ONLY:
            others.append(each.name)
    return tuple(positional), tuple(others)
