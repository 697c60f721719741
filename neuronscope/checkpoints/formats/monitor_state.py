"""Records: what Neuronscope itself left in a checkpoint, found by what a scope's state holds, not by where it lies.

A Lightning run keeps it under the monitor's key among ``callbacks``, a plain loop wherever its author put
``scope.state_dict()``, others beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neuronscope.checkpoints.formats.lazy_tensor import LazyTensor
from neuronscope.checkpoints.formats.parameter_names import escape_surrogates
from neuronscope.errors import CheckpointError

__all__ = ["find_records"]

# Keys that every state of a scope has (see Scope.state_dict), and how deep one may lie:
# callbacks / the monitor's key / scope.
_KEYS = frozenset({"version", "step", "phases"})
_DEEPEST = 4
# A record is a few hundred bytes a neuron. One that claims more than this in tensors is none of ours.
_MOST_BYTES = 1 << 28
_MOST_PARTS = 2_000_000
_DEEPEST_PART = 16


def find_records(content: Any) -> dict[str, dict[str, Any]]:
    """The state of every scope in a checkpoint, its tensors read, by the key that it was found under.

    The key is the path to it without ``callbacks`` in front and ``scope`` behind: a monitor's ``state_key``, the name
    under which a loop saved it, or ``""`` where the state is the whole file.

    Raises:
        CheckpointError: One is nested or sized as no record is.

    >>> find_records({"model": {}, "neuronscope": {"version": 1, "step": 7, "phases": {}}})
    {'neuronscope': {'version': 1, 'step': 7, 'phases': {}}}
    """
    records = {}
    for path, state in _states(content, (), set()):
        path = path[1:] if path[:1] == ("callbacks",) else path
        path = path[:-1] if path[-1:] == ("scope",) else path
        records[escape_surrogates(".".join(path))] = _StateReader().plain(state, 0)
    return records


def _states(value: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every state with the path to it. What is referred to again and again is looked into once."""
    if not isinstance(value, Mapping) or id(value) in seen:
        return
    seen.add(id(value))
    if value.keys() >= _KEYS and isinstance(value["phases"], Mapping):
        yield path, value
    elif len(path) < _DEEPEST:
        for key, inner in value.items():
            yield from _states(inner, (*path, str(key)), seen)


class _StateReader:
    """One record being read, and what is left of what it may cost."""

    def __init__(self) -> None:
        self._parts = _MOST_PARTS
        self._bytes = _MOST_BYTES

    def plain(self, value: Any, depth: int) -> Any:
        self._parts -= 1
        if isinstance(value, LazyTensor):
            self._bytes -= value.nbytes
        if self._parts < 0 or self._bytes < 0 or depth > _DEEPEST_PART:
            raise CheckpointError(
                "What looks like a record of Neuronscope's is larger or nested deeper than one can be."
            )
        if isinstance(value, LazyTensor):
            return value.read()
        if isinstance(value, Mapping):
            return {key: self.plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self.plain(inner, depth + 1) for inner in value])
        return value
