"""Find the states of Neuronscope's own scopes in a checkpoint, by their keys and not by where they are.

Lightning stores such a state under the monitor's key among ``callbacks``, a plain loop wherever its author put
``scope.state_dict()``, other trainers in a file next to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.formats.parameter_names import escape_surrogates
from neuronscope.errors import CheckpointError

__all__ = ["find_records"]

# Keys that every state of a scope has (see Scope.state_dict), and how deeply it may be nested:
# callbacks / the monitor's key / scope.
_KEYS = frozenset({"version", "step", "phases"})
_DEEPEST = 4
# A state takes a few hundred bytes per neuron. One with more bytes of tensors than this is not from Neuronscope.
_MOST_BYTES = 1 << 28
_MOST_PARTS = 2_000_000
_DEEPEST_PART = 16


def find_records(content: Any) -> dict[str, dict[str, Any]]:
    """Return the state of every scope in a checkpoint by its key, with its tensors read.

    The key is the path to the state without a leading ``callbacks`` and a trailing ``scope``: a monitor's
    ``state_key``, the name under which a loop saved it, or ``""`` if the state is the whole file.

    Raises:
        CheckpointError: A state is nested more deeply or is larger than one can be.

    >>> find_records({"model": {}, "neuronscope": {"version": 1, "step": 7, "phases": {}}})
    {'neuronscope': {'version': 1, 'step': 7, 'phases': {}}}
    """
    records = {}
    for path, state in _states(content, (), set()):
        path = path[1:] if path[:1] == ("callbacks",) else path
        path = path[:-1] if path[-1:] == ("scope",) else path
        records[escape_surrogates(".".join(path))] = _read_state(state)
    return records


def _states(value: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every state with the path to it. An object that is referred to many times is searched once."""
    if not isinstance(value, Mapping) or id(value) in seen:
        return
    seen.add(id(value))
    if value.keys() >= _KEYS and isinstance(value["phases"], Mapping):
        yield path, value
    elif len(path) < _DEEPEST:
        for key, inner in value.items():
            yield from _states(inner, (*path, str(key)), seen)


def _read_state(state: Mapping[str, Any]) -> Any:
    """Copy a state to plain data with its tensors read."""
    parts_left, bytes_left = _MOST_PARTS, _MOST_BYTES

    def plain(value: Any, depth: int) -> Any:
        nonlocal parts_left, bytes_left
        parts_left -= 1
        if isinstance(value, StoredTensor):
            bytes_left -= math.prod(value.shape) * value.torch_dtype.itemsize
        if parts_left < 0 or bytes_left < 0 or depth > _DEEPEST_PART:
            raise CheckpointError(
                "What looks like a record of Neuronscope's is larger or nested deeper than one can be."
            )
        if isinstance(value, StoredTensor):
            return value.read()
        if isinstance(value, Mapping):
            return {key: plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([plain(inner, depth + 1) for inner in value])
        return value

    return plain(state, 0)
