"""Match the entries of an optimizer's state to the network's parameters.

torch numbers the parameters of an optimizer and saves their names only if it was given names. The numbers follow the
order in which the parameters were passed to the optimizer. Within a group this is usually the model's own order, so the
entries of a group are a subsequence of the model's parameters with the same shapes. An entry is matched to a parameter
only if every such subsequence matches it to the same one.

A safetensors file sorts its tensors by name. The model's order can then still be found in part: a module's own
parameters come before those of its submodules, and all parameters of a module stand next to each other. Submodules that
are numbered (``0``, ``1``; ``fc1``, ``fc2``) come in that order, and a weight comes before its bias. Every order that
this allows and that gives the shapes of the entries is taken into account: a parameter is matched only if it has the
same place in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neuronscope.checkpoints.checkpoint import Checkpoint, StoredTensor
from neuronscope.checkpoints.file.layers import is_parameter
from neuronscope.checkpoints.file.optimizer_rules import recognize_optimizer
from neuronscope.checkpoints.verdict.evidence import Abstention

__all__ = ["ParameterState", "match_parameters"]

_SOURCE = "optimizer state"

#: Number of comparisons after which the search is given up, so that a damaged file cannot make it hang.
_MAX_COMPARISONS = 4_000_000

#: Names of sums over the rows or columns of a parameter.
_FACTORS = frozenset({"row_var", "exp_avg_sq_row"})

Shape = tuple[int, ...]
_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "state_dict.")
#: Number of sets of submodules after which the search is given up.
_MAX_STATES = 50_000
_NUMBERED = re.compile(r"(.*?)(\d{1,6})(\D*)")


@dataclass(frozen=True, eq=False)
class ParameterState:
    """The optimizer state of one parameter."""

    optimizer: int  # index of the optimizer in the checkpoint
    group: Mapping[str, Any]  # the hyperparameters of the parameter's group
    slots: Mapping[str, StoredTensor | float]  # the saved state by name; empty if the parameter was never updated


def match_parameters(
    checkpoint: Checkpoint, parameter_names: Sequence[str] | None = None
) -> tuple[dict[str, ParameterState], list[Abstention]]:
    """Return the optimizer state of each parameter that can be matched, by name, and what could not be matched.

    Args:
        checkpoint: The opened checkpoint.
        parameter_names: The names of ``model.named_parameters()`` if the model is known; by default all tensors that
            may be parameters by their name and dtype, in the order of the file.
    """
    tensors = checkpoint.tensors
    names = [name for name in tensors if is_parameter(name, tensors[name])]
    if parameter_names is not None:
        names = [name for name in parameter_names if name in tensors]
    shapes = {name: tuple(tensors[name].shape) for name in names}
    states: dict[str, ParameterState] = {}
    abstentions: list[Abstention] = []
    runs: list[_ParameterRun] = []
    for number, optimizer in enumerate(checkpoint.optimizers):
        for group in optimizer.groups:
            keys = _keys(group)
            saved_names: Any = group.get("param_names")
            found = [ParameterState(number, group, optimizer.slots.get(key, {})) for key in keys]
            labels: list[Any] = list(saved_names) if _is_names(saved_names, len(keys)) else keys
            if all(isinstance(label, str) for label in labels):
                abstentions += _match_by_name(labels, found, shapes, states)
            else:
                runs.append(_ParameterRun(number, found))
    if checkpoint.is_ordered or parameter_names is not None:
        abstentions += _match_by_order(runs, shapes, states)
    else:
        abstentions += _match_unordered(runs, shapes, states)
    return states, abstentions


def _state_shape(slots: Mapping[str, StoredTensor | float]) -> Shape | None:
    """Return the shape of the saved tensor with most dimensions; ``None`` if the state is empty or Adafactor's."""
    if not _FACTORS.isdisjoint(slots):
        return None
    shapes = [tuple(slot.shape) for slot in slots.values() if hasattr(slot, "shape")]
    return max((shape for shape in shapes if shape), key=len, default=None)


def _keys(group: Mapping[str, Any]) -> list[Any]:
    keys = group.get("params", ())
    return [key for key in keys if isinstance(key, (int, str))] if isinstance(keys, (list, tuple)) else []


def _is_names(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(name, str) for name in value)


def _match_by_name(
    labels: Sequence[str],
    found: Sequence[ParameterState],
    shapes: Mapping[str, Shape],
    states: dict[str, ParameterState],
) -> list[Abstention]:
    """Match entries that were saved with the name of their parameter."""
    unknown, misshapen = [], []
    for label, state in zip(labels, found, strict=True):
        name = label
        while name not in shapes and name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        shape = _state_shape(state.slots)
        if name not in shapes:
            unknown.append(label)
        elif shape is not None and shape != shapes[name]:
            misshapen.append(label)
        else:
            states[name] = state
    reasons = []
    if unknown:
        reasons.append(
            f"The optimizer names {len(unknown)} parameters that the network does not have, {unknown[0]!r} first."
        )
    if misshapen:
        reasons.append(
            f"The optimizer's state of {len(misshapen)} parameters has another shape, {misshapen[0]!r} first."
        )
    return [Abstention(_SOURCE, "", reason) for reason in reasons]


class _ParameterRun:
    """The entries of one parameter group, in order."""

    def __init__(self, optimizer: int, states: list[ParameterState]) -> None:
        self.optimizer = optimizer
        self.states = states
        self.shapes = [_state_shape(state.slots) for state in states]

    def places(self, names: Sequence[str], shapes: Mapping[str, Shape]) -> list[str | None] | None:
        """Return each entry's parameter, ``None`` for one with several candidates; ``None`` if nothing fits."""
        sizes = [shapes[name] for name in names]
        first = self._leftmost(self.shapes, sizes)
        last = self._leftmost(self.shapes[::-1], sizes[::-1])
        if first is None or last is None:
            return None
        end = len(names) - 1
        return [names[a] if a == end - b else None for a, b in zip(first, last[::-1], strict=True)]

    @staticmethod
    def _leftmost(wanted: Sequence[Shape | None], sizes: Sequence[Shape]) -> list[int] | None:
        """Return the earliest positions of a subsequence with the wanted shapes; an entry without a shape fits any."""
        found, place = [], 0
        for shape in wanted:
            while place < len(sizes) and shape is not None and sizes[place] != shape:
                place += 1
            if place == len(sizes):
                return None
            found.append(place)
            place += 1
        return found


def _match_by_order(
    runs: Sequence[_ParameterRun], shapes: Mapping[str, Shape], states: dict[str, ParameterState]
) -> list[Abstention]:
    """Match entries that were saved by number; a parameter that one group certainly has is no candidate for another."""
    owner: dict[str, int] = dict.fromkeys(states, -1)
    placed: list[list[str | None] | None] = [None] * len(runs)
    several = len({run.optimizer for run in runs}) > 1
    comparisons_left = _MAX_COMPARISONS
    growing = True
    while growing and comparisons_left > 0:
        growing = False
        for index, run in enumerate(runs):
            comparisons_left -= len(shapes)
            if comparisons_left <= 0:
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
            abstentions.append(Abstention(_SOURCE, "", _why(unsure, run, names is not None, comparisons_left <= 0)))
    return abstentions


def _match_unordered(
    runs: Sequence[_ParameterRun], shapes: Mapping[str, Shape], states: dict[str, ParameterState]
) -> list[Abstention]:
    """Match entries by number if the file's order is not the model's; shapes tell groups apart."""
    free = {name: shape for name, shape in shapes.items() if name not in states}
    abstentions = []
    for run in runs:
        others = {shape for other in runs if other is not run for shape in other.shapes}
        fitting = free
        if others:
            fitting = {name: shape for name, shape in free.items() if shape in run.shapes and shape not in others}
        places = _possible_places(fitting, run.shapes)
        certain = {next(iter(at)): name for name, at in places.items() if len(at) == 1}
        states |= {name: run.states[place] for place, name in certain.items()}
        unsure = len(run.states) - len(certain)
        if unsure:
            abstentions.append(Abstention(_SOURCE, "", _why(unsure, run, bool(places), False)))
    return abstentions


def _places_in_a_part(
    run: _ParameterRun, runs: Sequence[_ParameterRun], free: Sequence[str], shapes: Mapping[str, Shape]
) -> list[str | None] | None:
    """Match a group to the only submodule of the root that it fits, if each optimizer trains a submodule of its own."""
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
    """Return why some entries of a group could not be matched."""
    which = f"{unsure} of {len(run.states)} entries of a parameter group"
    if gave_up:
        return f"There are too many groups and parameters to find the parameters of {which}."
    unreadable = {recognize_optimizer(state.group, state.slots) for state in run.states}
    if len(unreadable) == 1 and isinstance(reason := unreadable.pop(), str):
        return f"The parameters of {which} are not known, and {reason}."
    if not fits:
        return (
            f"The parameters of {which} are not known: no selection of the network's parameters has their shapes in "
            "this order."
        )
    return (
        f"The parameters of {which} are not known: the file has numbers and no names, and parameters of equal shape "
        "could be swapped. Give `model=`, or pass `model.named_parameters()` to the optimizer, so that torch saves the "
        "names."
    )


@dataclass(eq=False)
class _Module:
    """A module, or a parameter."""

    name: str = ""  # full name of a parameter; ``""`` for a module
    shape: Shape = ()  # shape of a parameter
    children: dict[str, _Module] = field(default_factory=dict)  # the parameters and submodules of a module by name
    size: int = 0  # number of parameters in it


def _possible_places(shapes: Mapping[str, Shape], wanted: Sequence[Shape | None]) -> dict[str, set[int]]:
    """Return the places that each parameter has in all possible orders; none if no order fits, or there are too many.

    >>> sorted(_possible_places({"0.bias": (2,), "0.weight": (2, 3), "b.bias": (2,)}, [(2, 3), (2,), (2,)]).items())
    [('0.bias', {1}), ('0.weight', {0}), ('b.bias', {2})]
    >>> sorted(_possible_places({"k.weight": (2, 2), "q.weight": (2, 2)}, [(2, 2), (2, 2)]).items())
    [('k.weight', {0, 1}), ('q.weight', {0, 1})]
    """
    root = _Module()
    for name, shape in shapes.items():
        module = root
        module.size += 1
        for part in name.split("."):
            module = module.children.setdefault(part, _Module())
            module.size += 1
        module.name, module.shape = name, shape
    if root.size != len(wanted):
        return {}
    try:
        return _OrderSearch(wanted).places(root, 0) or {}
    except (_TooManyError, RecursionError):
        return {}


class _TooManyError(Exception):
    """Raised when there are too many orders."""


class _OrderSearch:
    """Looks for all orders of modules that give the wanted shapes."""

    def __init__(self, wanted: Sequence[Shape | None]) -> None:
        self._wanted = wanted
        self._known: dict[tuple[_Module, int], dict[str, set[int]] | None] = {}
        self._states = 0

    def places(self, module: _Module, start: int) -> dict[str, set[int]] | None:
        """Return the possible places of a module's parameters; ``None`` if none fits."""
        if module.name:
            fits = self._wanted[start] in (None, module.shape)
            return {module.name: {start}} if fits else None
        key = module, start
        if key not in self._known:
            self._known[key] = self._in_module(module, start)
        return self._known[key]

    def _in_module(self, module: _Module, start: int) -> dict[str, set[int]] | None:
        names = list(module.children)
        before = {
            name: frozenset(other for other in names if _comes_before(module.children, other, name)) for name in names
        }
        everything = frozenset(names)
        # From each set of children that may come first, whether the rest can follow.
        completes: dict[frozenset[str], bool] = {everything: True}

        def steps(done: frozenset[str]) -> Iterator[tuple[str, dict[str, set[int]], frozenset[str]]]:
            place = start + sum(module.children[name].size for name in done)
            for name in names:
                if name not in done and before[name] <= done:
                    found = self.places(module.children[name], place)
                    if found is not None:
                        yield name, found, done | {name}

        def can_complete(done: frozenset[str]) -> bool:
            if done not in completes:
                self._states += 1
                if self._states > _MAX_STATES:
                    raise _TooManyError
                ways = [can_complete(after) for _, _, after in steps(done)]
                completes[done] = any(ways)
            return completes[done]

        if not can_complete(frozenset()):
            return None
        places: dict[str, set[int]] = {}
        for done in [done for done, possible in completes.items() if possible]:
            for _, found, after in steps(done):
                if completes[after]:
                    for name, at in found.items():
                        places.setdefault(name, set()).update(at)
        return places


def _comes_before(children: Mapping[str, _Module], first: str, second: str) -> bool:
    """Whether one child of a module certainly comes before another."""
    own_first, own_second = bool(children[first].name), bool(children[second].name)
    if own_first != own_second:
        return own_first  # a module's own parameters come before its submodules'
    if "weight" in first and first.replace("weight", "bias") == second:
        return True
    one, other = _NUMBERED.fullmatch(first), _NUMBERED.fullmatch(second)
    if one is None or other is None or (one[1], one[3]) != (other[1], other[3]):
        return False
    return int(one[2]) < int(other[2])
