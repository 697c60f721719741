"""Build a :class:`Checkpoint` from the plain data in a file, by the conventions of common training loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuronscope.checkpoints.checkpoint import Checkpoint, OptimizerState, StoredTensor
from neuronscope.checkpoints.formats.byte_range import deepspeed_refused, quoted, quoted_list
from neuronscope.checkpoints.formats.hyperparameters import find_hyperparameters
from neuronscope.checkpoints.formats.monitor_state import find_records
from neuronscope.checkpoints.formats.optimizer_state import find_optimizers, is_optimizer_state, steps_taken
from neuronscope.checkpoints.formats.parameter_names import COUNTERS, prefix_stripper
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor
from neuronscope.errors import CheckpointError

__all__ = ["RawCheckpoint", "build_checkpoint"]

# Keys under which training loops store the weights, most specific first.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
_STEPS = ("global_step", "step")
_AVERAGES = "averaging_state"  # Lightning's callbacks keep the counters apart from the averages
_DEEPSPEED = frozenset({"ds_config", "ds_version", "param_shapes"})
_TENSORS = (StoredTensor, SkippedTensor)
_DEEPEST = 5  # levels of the keys above, one in the other
_DEEPEST_NETWORK = 16  # levels of any other keys


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
    lightning = "pytorch-lightning_version" in data
    weights, networks = _weights(data, notes)
    strip = prefix_stripper(weights, wrapped=not lightning)
    tensors = {strip(name): tensor for name, tensor in weights.items()}
    if len(tensors) < len(weights):
        raise CheckpointError(f"{quoted(path)} is damaged: two of its tensors have the same name.")
    everything = {**data, **raw.other_files}
    optimizers = find_optimizers(everything if raw.optimizer is None else raw.optimizer, strip, notes)
    records = find_records(everything)
    if not (weights or optimizers or records):
        raise CheckpointError(
            f"{quoted(path)} holds no weights: no tensor was found in it, plain or under {', '.join(_WEIGHTS)}. "
            f"{' '.join(notes)}".rstrip()
        )
    if not weights:
        notes.append("It holds no weights of a network.")
    return Checkpoint(
        path=path,
        format=_lightning_name(raw.format) if lightning else raw.format,
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


def _lightning_name(kind: str) -> str:
    """Return the name of a format when Lightning wrote the file or folder."""
    if kind.startswith("torch file"):
        return kind.replace("torch file", "Lightning checkpoint")
    return f"Lightning's {kind}"


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
        own = {path: _sizes(network) for path, network in levels[level].items()}
        for path, network in levels[level].items():
            if not above or (_holds_layer(network) and own[path] not in above):
                found[path] = network
            else:
                left.append(path)
        above.update(own.values())
    if left:
        notes.append(f"Not looked at, as copies of other networks or no networks: {quoted_list(left)}.")
    return found


def _sizes(network: Mapping[Any, Any]) -> frozenset[Any]:
    return frozenset((name, getattr(tensor, "shape", None)) for name, tensor in network.items())


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
