"""Match the entries of an optimizer's state to the network's parameters.

torch numbers the parameters of an optimizer and saves their names only if it was given names. The numbers follow the
order in which the parameters were passed to the optimizer. Within a group this is usually the model's own order, so the
entries of a group are a subsequence of the model's parameters with the same shapes. An entry is matched to a parameter
only if every such subsequence matches it to the same one.

A safetensors file sorts its tensors by name. The model's order can then still be found in part: a module's own
parameters come before those of its submodules, and all parameters of a module stand next to each other. Submodules that
are numbered (``0``, ``1``; ``fc1``, ``fc2``) come in that order, and a weight comes before its bias. Every order that
this allows and that gives the shapes of the entries is taken into account: an entry is matched only if it has the same
parameter in all of them. If there are fewer entries than parameters, some were frozen and not given to the optimizer:
any of them may be missing.
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
#: The search is given up after trying so many times which submodule comes next.
_MOST_TRIES = 150_000
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
        candidates = _possible_names(fitting, run.shapes)
        certain = {place: next(iter(names)) for place, names in enumerate(candidates) if len(names) == 1}
        states |= {name: run.states[place] for place, name in certain.items()}
        unsure = len(run.states) - len(certain)
        if unsure:
            abstentions.append(Abstention(_SOURCE, "", _why(unsure, run, bool(candidates), False)))
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


def _possible_names(shapes: Mapping[str, Shape], wanted: Sequence[Shape | None]) -> list[set[str]]:
    """Return the parameters that each entry may have in any possible order; none if nothing fits or too much does.

    If there are more parameters than entries, the optimizer was given only some of them: any may be left out.

    >>> shapes = {"0.bias": (2,), "0.weight": (2, 3), "b.bias": (2,)}
    >>> [sorted(names) for names in _possible_names(shapes, [(2, 3), (2,)])]
    [['0.weight'], ['0.bias', 'b.bias']]
    >>> [sorted(names) for names in _possible_names({"k.weight": (2, 2), "q.weight": (2, 2)}, [(2, 2), (2, 2)])]
    [['k.weight', 'q.weight'], ['k.weight', 'q.weight']]
    """
    root = _Module()
    for name, shape in shapes.items():
        module = root
        for part in name.split("."):
            module = module.children.setdefault(part, _Module())
        module.name, module.shape = name, shape
    if len(shapes) < len(wanted):
        return []
    try:
        pairs = _OrderSearch(wanted, some_left_out=len(shapes) > len(wanted)).ways(root, 0).get(len(wanted), set())
    except (_TooManyError, RecursionError):
        return []
    names: list[set[str]] = [set() for _ in wanted] if pairs else []
    for name, place in pairs:
        names[place].add(name)
    return names


class _TooManyError(Exception):
    """Raised when there are too many orders."""


#: Parameters with a place that they have in some order.
_Pairs = set[tuple[str, int]]
#: The children of a module that come first, and the number of entries that they have.
_Begun = tuple[frozenset[str], int]


class _OrderSearch:
    """Looks for all orders of modules that give the wanted shapes."""

    def __init__(self, wanted: Sequence[Shape | None], *, some_left_out: bool) -> None:
        self._wanted, self._some_left_out = wanted, some_left_out
        self._known: dict[tuple[_Module, int], dict[int, _Pairs]] = {}
        self._tries = 0

    def ways(self, module: _Module, start: int) -> dict[int, _Pairs]:
        """Return the places of a module's parameters, in all orders of them, by the place at which the module ends."""
        if module.name:
            found: dict[int, _Pairs] = {start: set()} if self._some_left_out else {}
            if start < len(self._wanted) and self._wanted[start] in (None, module.shape):
                found[start + 1] = {(module.name, start)}
            return found
        key = module, start
        if key not in self._known:
            self._known[key] = self._in_module(module, start)
        return self._known[key]

    def _in_module(self, module: _Module, start: int) -> dict[int, _Pairs]:
        names = list(module.children)
        before = {
            name: frozenset(other for other in names if _comes_before(module.children, other, name)) for name in names
        }
        everything = frozenset(names)

        def steps(begun: _Begun) -> Iterator[tuple[_Pairs, _Begun]]:
            done, place = begun
            for name in names:
                if name not in done and before[name] <= done:
                    for end, pairs in self.ways(module.children[name], place).items():
                        self._tries += 1
                        if self._tries > _MOST_TRIES:
                            raise _TooManyError
                        yield pairs, (done | {name}, end)

        ends: dict[_Begun, frozenset[int]] = {}  # where the module may end

        def ends_of(begun: _Begun) -> frozenset[int]:
            if begun not in ends:
                here = [begun[1]] if begun[0] == everything else []
                ends[begun] = frozenset(here).union(*(ends_of(after) for _, after in steps(begun)))
            return ends[begun]

        found: dict[int, _Pairs] = {end: set() for end in ends_of((frozenset(), start))}
        for begun, possible in list(ends.items()):
            if possible:
                for pairs, after in steps(begun):
                    for end in ends[after]:
                        found[end] |= pairs
        return found


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
