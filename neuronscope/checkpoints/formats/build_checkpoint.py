"""Build a :class:`Checkpoint` from the plain data in a file, by the conventions of common training loops.

States of Neuronscope's own scopes are found by their keys and not by where they are. Lightning stores such a state
under the monitor's key among ``callbacks``, a plain loop wherever its author put ``scope.state_dict()``, other trainers
in a file next to the weights. The arguments that a LightningModule was built with are those of
``save_hyperparameters``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuronscope.checkpoints.checkpoint import Checkpoint, OptimizerState, StoredTensor
from neuronscope.checkpoints.formats.byte_range import deepspeed_refused, quoted, quoted_list
from neuronscope.checkpoints.formats.optimizer_state import find_optimizers, is_optimizer_state, steps_taken
from neuronscope.checkpoints.formats.parameter_names import COUNTERS, escape_surrogates, prefix_stripper
from neuronscope.checkpoints.formats.safe_globals import AttributesPlaceholder, SkippedTensor
from neuronscope.errors import CheckpointError

__all__ = ["RawCheckpoint", "build_checkpoint", "find_hyperparameters"]

# Keys under which training loops store the weights, most specific first.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
_STEPS = ("global_step", "step")
_AVERAGES = "averaging_state"  # Lightning's callbacks keep the counters apart from the averages
_DEEPSPEED = frozenset({"ds_config", "ds_version", "param_shapes"})
_TENSORS = (StoredTensor, SkippedTensor)
_DEEPEST = 5  # levels of the keys above, one in the other
_DEEPEST_NETWORK = 16  # levels of any other keys
# Keys that every state of a scope has (see ``Scope.state_dict``), and how deeply it may be nested:
# callbacks / the monitor's key / scope.
_KEYS = frozenset({"version", "step", "phases"})
_DEEPEST_RECORD = 4
# A state takes a few hundred bytes per neuron. One with more bytes of tensors than this is not from Neuronscope.
_MOST_BYTES = 1 << 28
_MOST_RECORDED = 2_000_000
_DEEPEST_PART = 16
# Limits for a damaged file, which may nest very deeply or refer to one list many times.
_MOST_SETTINGS = 100_000
_DEEPEST_SETTING = 16


@dataclass
class RawCheckpoint:
    """What the reader of a format found."""

    format: str  # name of the format, for people
    data: Any  # the content as plain data, with a stored tensor in place of each tensor
    #: Plain data of other files of the checkpoint, such as an optimizer's or a monitor's.
    other_files: dict[str, Any] = field(default_factory=dict)
    #: Plain data of the file that the user names for the optimizer; no other one is looked at then.
    optimizer: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)  # the network's configuration, if a file holds one
    adapter: Mapping[str, Any] = field(default_factory=dict)  # the configuration of an adapter, if a file holds one
    step: int | None = None  # number of optimizer steps, if another file says so
    notes: list[str] = field(default_factory=list)  # sentences to show to the user


def build_checkpoint(path: Path, raw: RawCheckpoint) -> Checkpoint:
    """Build the checkpoint; raise a CheckpointError if nothing in the data describes a network.

    Args:
        path: The file or folder.
        raw: What the reader of its format found.
    """
    data, notes = raw.data, list(raw.notes)
    if not isinstance(data, Mapping):
        raise CheckpointError(
            f"{quoted(path)} holds no weights: a dictionary of tensors was expected, but got a {type(data).__name__}."
        )
    if not _DEEPSPEED.isdisjoint(data):
        raise deepspeed_refused(path)
    kind, lightning = raw.format, "pytorch-lightning_version" in data
    if lightning:
        is_file = kind.startswith("torch file")
        kind = kind.replace("torch file", "Lightning checkpoint") if is_file else f"Lightning's {kind}"
    weights, networks = _weights(data, notes)
    strip = prefix_stripper(weights, wrapped=not lightning)
    tensors = {strip(name): tensor for name, tensor in weights.items()}
    if len(tensors) < len(weights):
        raise CheckpointError(f"{quoted(path)} is damaged: two of its tensors have the same name.")
    everything = {**data, **raw.other_files}
    optimizers = find_optimizers(everything if raw.optimizer is None else raw.optimizer, strip, notes)
    records = _find_records(everything)
    if not (weights or optimizers or records):
        raise CheckpointError(
            f"{quoted(path)} holds no weights: no tensor was found in it, plain or under {', '.join(_WEIGHTS)}. "
            f"{' '.join(notes)}".rstrip()
        )
    if not weights:
        notes.append("It holds no weights of a network.")
    return Checkpoint(
        path=path,
        format=kind,
        tensors=tensors,
        is_ordered="safetensors" not in raw.format,
        is_averaged=not set(weights).isdisjoint(COUNTERS) or _AVERAGES in data,
        networks=networks,
        optimizers=optimizers,
        records=records,
        step=_step(data, raw.step, optimizers),
        config=raw.config,
        adapter=raw.adapter,
        hyperparameters=find_hyperparameters(data),
        notes=tuple(notes),
    )


def _weights(data: Mapping[Any, Any], notes: list[str]) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return the network's tensors by name, and the keys of several networks, with which each name then starts."""
    chosen, where = data, []
    for _ in range(_DEEPEST):
        inner = next((key for key in _WEIGHTS if _holds_tensors(chosen.get(key), _DEEPEST)), None)
        if inner is None:
            break
        chosen = chosen[inner]
        where.append(inner)
    others = [key for key, value in data.items() if _is_network(value) and key not in where]
    own = {key: value for key, value in chosen.items() if isinstance(value, _TENSORS)}
    parts: dict[str, Mapping[Any, Any]] = {}
    if not is_optimizer_state(chosen) and not _has_weights(own):
        parts = _networks(chosen, _has_weights, notes)
    if not parts and any(map(_is_weight, own.values())):
        if others and where:
            notes.append(f"The weights are those under {quoted(where[0])}; not looked at: {quoted_list(others)}.")
        return _tensors(chosen, notes), ()
    if not parts and not is_optimizer_state(chosen):  # dictionaries of other tensors, such as recorded inputs
        parts = _networks(chosen, _is_network, notes)
    if not parts and any(isinstance(value, StoredTensor) for value in own.values()):
        return _tensors(chosen, notes), ()
    if parts:
        beside = f"; not looked at: {quoted_list(own)}" if own else ""
        notes.append(f"The weights were found under {quoted_list(parts)}{beside}.")
    tensors = {
        f"{key}.{name}" if len(parts) > 1 else name: tensor
        for key, part in parts.items()
        for name, tensor in _tensors(part, notes).items()
    }
    return tensors, tuple(parts) if len(parts) > 1 else ()


def _tensors(part: Mapping[Any, Any], notes: list[str]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    skipped: dict[str, list[str]] = {}
    others = []
    for key, value in part.items():
        name = str(key)
        if isinstance(value, StoredTensor):
            found[name] = value
        elif isinstance(value, SkippedTensor):
            skipped.setdefault(value.reason, []).append(name)
        else:
            others.append(name)
    for reason, names in skipped.items():
        notes.append(f"Tensors that are {reason} are not read: {quoted_list(names)}.")
    if others:
        notes.append(f"Values that are not tensors are left out of the weights: {quoted_list(others)}.")
    return found


def _holds_tensors(value: Any, deeper: int) -> bool:
    """Whether a value is a dictionary that holds a tensor or a network, or such a dictionary under a known key."""
    if not isinstance(value, Mapping) or is_optimizer_state(value):
        return False
    if any(isinstance(inner, _TENSORS) or _is_network(inner) for inner in value.values()):
        return True
    return deeper > 0 and any(_holds_tensors(value.get(key), deeper - 1) for key in _WEIGHTS)


def _is_network(value: Any) -> bool:
    """Whether a value is a dictionary of named tensors and nothing else."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(inner, _TENSORS) for key, inner in value.items())
    )


def _is_weight(value: Any) -> bool:
    """Whether a value is a tensor, and no single number such as a counter beside the weights."""
    return isinstance(value, SkippedTensor) or (isinstance(value, StoredTensor) and value.shape != ())


def _has_weights(value: Any) -> bool:
    """Whether a value is a dictionary of named tensors, one of which is called a weight."""
    return _is_network(value) and any("weight" in name for name in value)


def _networks(content: Any, is_network: Callable[[Any], bool], notes: list[str]) -> dict[str, Mapping[Any, Any]]:
    """Return the networks in a dictionary or list, and in those inside it, by their keys joined with dots.

    Below the level at which the first one is, what has no weight of a layer, or the names and sizes of one above, is
    left out, with a note: it is an average, a state of an optimizer, or a setting.
    """
    levels: dict[int, dict[str, Mapping[Any, Any]]] = {}
    searched: set[int] = set()  # what is referred to many times is searched once

    def search(inside: Any, path: str, level: int) -> None:
        searched.add(id(inside))
        for key, value in inside.items() if isinstance(inside, Mapping) else enumerate(inside):
            if not isinstance(value, (Mapping, list, tuple)) or is_optimizer_state(value):
                continue
            if isinstance(value, Mapping) and is_network(value):
                levels.setdefault(level, {})[f"{path}{key}"] = value
            elif level < _DEEPEST_NETWORK and id(value) not in searched:
                search(value, f"{path}{key}.", level + 1)

    search(content, "", 1)
    found: dict[str, Mapping[Any, Any]] = {}
    above: set[frozenset[Any]] = set()
    left: list[str] = []
    for level in sorted(levels):
        own = {
            path: frozenset((name, getattr(tensor, "shape", None)) for name, tensor in network.items())
            for path, network in levels[level].items()
        }
        for path, network in levels[level].items():
            if not above or (_holds_layer(network) and own[path] not in above):
                found[path] = network
            else:
                left.append(path)
        above.update(own.values())
    if left:
        notes.append(f"Not looked at, as copies of other networks or no networks: {quoted_list(left)}.")
    return found


def _holds_layer(network: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(tensor, StoredTensor) and len(tensor.shape) > 1 and str(name).rpartition(".")[2] == "weight"
        for name, tensor in network.items()
    )


def _step(data: Mapping[Any, Any], known: int | None, optimizers: tuple[OptimizerState, ...]) -> int | None:
    """Return the number of optimizer steps, from what is known already, the checkpoint's keys or the optimizers."""
    if known is not None:
        return known
    for key in _STEPS:
        value = data.get(key)
        if isinstance(value, StoredTensor) and value.shape == () and "int" in value.dtype:
            value = value.read().item()
        if type(value) is int and 0 <= value < 2**63:
            return value
    return steps_taken(optimizers)


def _find_records(content: Any) -> dict[str, dict[str, Any]]:
    """Return the state of every scope in a checkpoint by its key, with its tensors read.

    The key is the path to the state without a leading ``callbacks`` and a trailing ``scope``: a monitor's
    ``state_key``, the name under which a loop saved it, or ``""`` if the state is the whole file.

    >>> _find_records({"model": {}, "neuronscope": {"version": 1, "step": 7, "phases": {}}})
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
    elif len(path) < _DEEPEST_RECORD:
        for key, inner in value.items():
            yield from _states(inner, (*path, str(key)), seen)


def _read_state(state: Mapping[str, Any]) -> Any:
    """Copy a state to plain data with its tensors read."""
    parts_left, bytes_left = _MOST_RECORDED, _MOST_BYTES

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


def find_hyperparameters(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return those of a LightningModule's saved arguments by name that are plain data.

    If Lightning saved one dictionary and its argument's name, it is that argument.

    >>> find_hyperparameters({"hyper_parameters": {"width": 7, "loss": object()}, "hparams_name": "kwargs"})
    {'width': 7}
    >>> find_hyperparameters({"hyper_parameters": {"width": 7}, "hparams_name": "settings"})
    {'settings': {'width': 7}}
    """
    saved = _content(data.get("hyper_parameters"))
    if not isinstance(saved, Mapping):
        return {}
    name = data.get("hparams_name")
    if isinstance(name, str) and name != "kwargs":
        saved = {name: saved}
    found = {}
    left = _MOST_SETTINGS
    for key, value in saved.items():
        if isinstance(key, str):
            with contextlib.suppress(_NotPlainError):
                found[escape_surrogates(key)], left = _copied(value, left, 0)
    return found


class _NotPlainError(Exception):
    """A value is not plain data, or has too many parts."""


def _copied(value: Any, left: int, depth: int) -> tuple[Any, int]:
    """Copy a value with Python's own types; return the copy, and how many of ``left`` parts are left."""
    if left < 1 or depth > _DEEPEST_SETTING:
        raise _NotPlainError
    value, left = _content(value), left - 1
    if value is None or type(value) in (bool, int, float, str):
        return value, left
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        copy = {}
        for key, inner in value.items():
            copy[key], left = _copied(inner, left, depth + 1)
        return copy, left
    kind = next((kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind)), None)
    if kind is None:
        raise _NotPlainError
    items = []
    for inner in value:
        item, left = _copied(inner, left, depth + 1)
        items.append(item)
    try:
        return kind(items), left
    except TypeError as error:  # a set of what holds a list
        raise _NotPlainError from error


def _content(value: Any) -> Any:
    """Return what a container or a node of omegaconf holds, and any other value as it is.

    A reference to another setting (``${model.width}``) is not resolved; it stays an object, and so is left out.
    """
    for _ in range(_DEEPEST_SETTING):  # a damaged file may hold a circle
        if not isinstance(value, AttributesPlaceholder) or not value.cls.startswith("omegaconf."):
            break
        state = value.state if isinstance(value.state, dict) else {}
        inner = state.get("_content", state.get("_val", value))
        if inner is value or (isinstance(inner, str) and "${" in inner):
            break
        value = inner
    return value
