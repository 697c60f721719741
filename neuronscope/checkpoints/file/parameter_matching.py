"""Ownership: which parameter each entry of an optimizer's state belongs to.

torch numbers an optimizer's parameters and saves no names unless it was given some. The numbers run through its
groups in the order in which the parameters were handed over, which is the model's own order within a group as a rule.
So the entries of a group are a subsequence of the model's parameters with the same shapes. An entry is tied to a
parameter only when every such subsequence gives it the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuronscope.checkpoints.checkpoint import OptimizerState, StoredTensor
from neuronscope.checkpoints.file.layers import is_parameter
from neuronscope.checkpoints.verdict.evidence import Abstention

__all__ = ["ParameterMatches", "ParameterState", "match_parameters"]

_SOURCE = "optimizer state"

#: Comparisons of a parameter with a group after which the search is given up: a damaged file must not hang it.
_PATIENCE = 4_000_000

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ParameterState:
    """The state of one parameter.

    Attributes:
        optimizer: Which of the checkpoint's optimizers.
        group: The hyperparameters of its group.
        slots: What was kept of it; empty where it was never updated.
    """

    optimizer: int
    group: Mapping[str, Any]
    slots: Mapping[str, StoredTensor | float]


@dataclass(frozen=True, eq=False)
class ParameterMatches:
    """Entries by the name of their parameter, and what could not be told."""

    states: Mapping[str, ParameterState]
    abstentions: tuple[Abstention, ...]


def match_parameters(
    tensors: Mapping[str, StoredTensor],
    optimizers: Sequence[OptimizerState],
    parameter_names: Sequence[str] | None = None,
) -> ParameterMatches:
    """Tie the entries of all optimizers to parameters.

    Args:
        tensors: The network's, by name, in the order of the file.
        optimizers: Their states.
        parameter_names: The names of ``model.named_parameters()`` where the model is known; by default all tensors that
            may be parameters by their name and type.
    """
    names = [name for name in tensors if is_parameter(name, tensors[name])]
    if parameter_names is not None:
        names = [name for name in parameter_names if name in tensors]
    shapes = {name: tuple(tensors[name].shape) for name in names}
    states: dict[str, ParameterState] = {}
    abstentions: list[Abstention] = []
    runs: list[_ParameterRun] = []
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.groups:
            keys = _keys(group)
            given: Any = group.get("param_names")
            found = [ParameterState(number, group, optimizer.slots.get(key, {})) for key in keys]
            labels: list[Any] = list(given) if _is_names(given, len(keys)) else keys
            if all(isinstance(label, str) for label in labels):
                abstentions += _take_by_name(labels, found, shapes, states)
            else:
                runs.append(_ParameterRun(number, found))
    abstentions += _take_by_order(runs, shapes, states)
    return ParameterMatches(states, tuple(abstentions))


def state_shape(slots: Mapping[str, StoredTensor | float]) -> Shape | None:
    """Shape of the parameter that some slots are of, as far as they say: that of their largest tensor."""
    kept = [tuple(slot.shape) for slot in slots.values() if hasattr(slot, "shape")]
    kept = [shape for shape in kept if shape]
    return max(kept, key=len) if kept else None


def _keys(group: Mapping[str, Any]) -> list[Any]:
    keys = group.get("params", ())
    return [key for key in keys if isinstance(key, (int, str))] if isinstance(keys, (list, tuple)) else []


def _is_names(given: Any, count: int) -> bool:
    return isinstance(given, (list, tuple)) and len(given) == count and all(isinstance(name, str) for name in given)


_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "state_dict.")


def _take_by_name(
    labels: Sequence[str],
    found: Sequence[ParameterState],
    shapes: Mapping[str, Shape],
    states: dict[str, ParameterState],
) -> list[Abstention]:
    """Tie entries whose parameters were saved by name."""
    strangers, misfits = [], []
    for label, state in zip(labels, found, strict=True):
        name = label
        while name not in shapes and name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        shape = state_shape(state.slots)
        if name not in shapes:
            strangers.append(label)
        elif shape is not None and shape != shapes[name]:
            misfits.append(label)
        else:
            states[name] = state
    told = []
    if strangers:
        told.append(
            f"The optimizer names {len(strangers)} parameters that the network does not have, {strangers[0]!r} first."
        )
    if misfits:
        told.append(f"The optimizer's state of {len(misfits)} parameters has another shape, {misfits[0]!r} first.")
    return [Abstention(_SOURCE, "", reason) for reason in told]


class _ParameterRun:
    """The entries of one group, in order, and the parameters that each may belong to: a stretch of a list."""

    def __init__(self, optimizer: int, states: list[ParameterState]) -> None:
        self.optimizer = optimizer
        self.states = states
        self.shapes = [state_shape(state.slots) for state in states]

    def places(self, names: Sequence[str], shapes: Mapping[str, Shape]) -> list[str | None] | None:
        """The only parameter that each entry can belong to, ``None`` where there are several; ``None`` if none fit."""
        sizes = [shapes[name] for name in names]
        first = self._leftmost(self.shapes, sizes)
        last = self._leftmost(self.shapes[::-1], sizes[::-1])
        if first is None or last is None:
            return None
        end = len(names) - 1
        return [names[a] if a == end - b else None for a, b in zip(first, last[::-1], strict=True)]

    @staticmethod
    def _leftmost(wanted: Sequence[Shape | None], sizes: Sequence[Shape]) -> list[int] | None:
        """Where a subsequence lies that begins as early as can be; an entry without a shape fits any."""
        found, place = [], 0
        for shape in wanted:
            while place < len(sizes) and shape is not None and sizes[place] != shape:
                place += 1
            if place == len(sizes):
                return None
            found.append(place)
            place += 1
        return found


def _take_by_order(
    runs: Sequence[_ParameterRun], shapes: Mapping[str, Shape], states: dict[str, ParameterState]
) -> list[Abstention]:
    """Tie entries that were saved by number: what one group surely has, no other can have."""
    owner: dict[str, int] = dict.fromkeys(states, -1)
    placed: list[list[str | None] | None] = [None] * len(runs)
    several = len({run.optimizer for run in runs}) > 1
    patience = _PATIENCE
    growing = True
    while growing and patience > 0:
        growing = False
        for index, run in enumerate(runs):
            patience -= len(shapes)
            if patience <= 0:
                break
            free = [name for name in shapes if owner.get(name, index) == index]
            names = run.places(free, shapes)
            if several and (names is None or None in names):
                names = _places_in_a_part(run, runs, free, shapes) or names
            for name in names or ():
                if name is not None and name not in owner:
                    owner[name], growing = index, True
            placed[index] = names
    abstentions = []
    for run, names in zip(runs, placed, strict=True):
        unsure = 0
        for state, name in zip(run.states, names or [None] * len(run.states), strict=True):
            if name is None:
                unsure += 1
            else:
                states[name] = state
        if unsure:
            abstentions.append(Abstention(_SOURCE, "", _why(unsure, run, names is not None, patience <= 0)))
    return abstentions


def _places_in_a_part(
    run: _ParameterRun, runs: Sequence[_ParameterRun], free: Sequence[str], shapes: Mapping[str, Shape]
) -> list[str | None] | None:
    """Where each of several optimizers has a part of the network to itself: the one child of the root that fits it."""
    if sum(other.optimizer == run.optimizer for other in runs) > 1:
        return None
    parts: dict[str, list[str]] = {}
    for name in free:
        parts.setdefault(name.partition(".")[0], []).append(name)
    fitting = [
        part
        for part in parts.values()
        if len(part) == len(run.shapes) and None not in (run.places(part, shapes) or [None])
    ]
    return run.places(fitting[0], shapes) if len(fitting) == 1 else None


def _why(unsure: int, run: _ParameterRun, fits: bool, gave_up: bool) -> str:
    which = f"{unsure} of {len(run.states)} entries of a parameter group"
    if gave_up:
        return f"There are too many groups and parameters to tell whose {which} are."
    if not fits:
        return f"Whose {which} are cannot be told: no selection of the network's parameters has their shapes in order."
    return (
        f"Whose {which} are cannot be told: the file has numbers and no names, and parameters of equal shape could be "
        "swapped. Give `model=`, or hand `model.named_parameters()` to the optimizer, so that torch saves the names."
    )
