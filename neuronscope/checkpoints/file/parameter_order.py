"""Match shapes in the model's order to parameters whose own order is not known.

A safetensors file sorts its tensors by name. The model's order, in which optimizers number parameters, can still be
found in part: a module's own parameters come before those of its submodules, and all parameters of a module stand next
to each other. Submodules that are numbered (``0``, ``1``; ``fc1``, ``fc2``) come in that order, and a weight comes
before its bias. Every order that this allows and that gives the wanted shapes is taken into account: a parameter is
matched only if it has the same place in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["possible_places"]

Shape = tuple[int, ...]

#: Number of sets of submodules after which the search is given up.
_MAX_STATES = 50_000
_NUMBERED = re.compile(r"(.*?)(\d{1,6})(\D*)")


@dataclass(eq=False)
class _Module:
    """A module, or a parameter."""

    name: str = ""  # full name of a parameter; ``""`` for a module
    shape: Shape = ()  # shape of a parameter
    children: dict[str, _Module] = field(default_factory=dict)  # the parameters and submodules of a module by name
    size: int = 0  # number of parameters in it


def possible_places(shapes: Mapping[str, Shape], wanted: Sequence[Shape | None]) -> dict[str, set[int]]:
    """Return the places that each parameter has in all possible orders; none if no order fits, or there are too many.

    Args:
        shapes: The shape of each parameter by its name, in any order.
        wanted: The shapes in the model's order; ``None`` fits any parameter.

    >>> sorted(possible_places({"0.bias": (2,), "0.weight": (2, 3), "b.bias": (2,)}, [(2, 3), (2,), (2,)]).items())
    [('0.bias', {1}), ('0.weight', {0}), ('b.bias', {2})]
    >>> sorted(possible_places({"k.weight": (2, 2), "q.weight": (2, 2)}, [(2, 2), (2, 2)]).items())
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
