"""Describe one call of a torch function to a rule, without tensors, and say what becomes of units without a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from neuronscope.attach.origins import CONSTANT, ENDED, LOST, RAW, ROWS, UNKNOWN, WEIGHT, Operand, Origin, combine
from neuronscope.attach.torch_functions import spellings

__all__ = [
    "Function",
    "Index",
    "Listed",
    "Operation",
    "Rule",
    "Shape",
    "end",
    "integers",
    "lose",
    "table",
    "tensors_in",
]

Shape = tuple[int, ...]
Function = Callable[..., Any]


class Index(NamedTuple):
    """A slice, which cannot be a key of a dictionary itself.

    Attributes:
        start: As of a slice.
        stop: As of a slice.
        step: As of a slice.
    """

    start: Any
    stop: Any
    step: Any


class Listed(tuple[Any, ...]):
    """A list among the arguments: as an index, a list picks, and a tuple has a part for each dimension."""

    __slots__ = ()


class Operation(NamedTuple):
    """One call of a torch function.

    Attributes:
        function: The function.
        args: The positional arguments: tensors as :class:`~neuronscope.attach.origins.Operand`, lists as
            :class:`Listed`, slices as :class:`Index`.
        kwargs: The keyword arguments, likewise.
        outputs: The shapes of the tensors that it returned.
        call: The number that it has if it is a call of a layer.
        sides: By layer, the dimension of its weight that indexes its units, or did so first; see
            :func:`~neuronscope.attach.unit_rules.layer_rules.produce`.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Shape, ...]
    call: int
    sides: dict[str, int] | None = None

    def argument(self, place: int, *names: str, default: Any = None) -> Any:
        """Return an argument by its place or by one of its names.

        Args:
            place: Its place among the positional arguments.
            names: Its names.
            default: What to return if it was not given.
        """
        if len(self.args) > place:
            return self.args[place]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def sizes(self, place: int, *names: str) -> list[int]:
        """Return the integers from a place on, as of ``permute(2, 0, 1)``, or those of a keyword.

        Args:
            place: The place of the first.
            names: Names of the keyword.
        """
        return integers(self.args[place:]) or integers([self.argument(place, *names)])

    def dimensions(self, place: int, *names: str) -> list[int]:
        """Return the dimensions that one argument says, a number or several.

        Args:
            place: Its place among the positional arguments.
            names: Its names.
        """
        return integers([self.argument(place, *names)])

    @property
    def tensors(self) -> list[Operand]:
        """All tensors among the arguments, in their order."""
        return list(tensors_in((self.args, tuple(self.kwargs.values()))))

    @property
    def first(self) -> Operand:
        """The first tensor among the arguments.

        Raises:
            LookupError: There is none.
        """
        named = self.kwargs.get("input")
        if isinstance(named, Operand):
            return named
        for found in tensors_in((self.args, tuple(self.kwargs.values()))):
            return found
        raise LookupError("no tensor")

    @property
    def upstream(self) -> int:
        """The calls of layers that the arguments depend on, as bits."""
        upstream = 0
        for each in self.tensors:
            upstream |= each.origin.upstream
        return upstream


#: Returns the origin of each output of an operation, or one for all.
Rule = Callable[[Operation], "Sequence[Origin] | Origin"]


def table(names: str, rule: Rule, *, in_place: bool = False) -> dict[Function, Rule]:
    """Return a rule by each of the torch functions that it is for.

    Args:
        names: Names of functions, with spaces between them.
        rule: The rule.
        in_place: Whether it is for the functions that end in an underscore too.
    """
    return dict.fromkeys(spellings(*names.split(), in_place=in_place), rule)


def tensors_in(values: Any) -> Iterable[Operand]:
    """Yield the operands in nested tuples."""
    if isinstance(values, Operand):
        yield values
    elif isinstance(values, tuple):
        for value in values:
            yield from tensors_in(value)


def integers(values: Iterable[Any]) -> list[int]:
    """Return the integers in nested tuples, in their order; tensors and slices have none."""
    found: list[int] = []
    for value in values:
        if isinstance(value, tuple) and not isinstance(value, (Operand, Index)):
            found.extend(integers(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
    return found


def lose(operation: Operation) -> Origin:
    """Say that units are lost, if there were any: the rule of every function without one."""
    tensors = operation.tensors
    states = {each.origin.state for each in tensors}
    if states <= {CONSTANT, WEIGHT}:
        return combine(tensors, ())
    upstream = operation.upstream
    if ROWS in states:
        return Origin.of(ROWS, upstream)
    if states <= {CONSTANT, ENDED}:
        return Origin.of(ENDED, upstream)
    if states <= {CONSTANT, RAW}:
        return Origin.of(RAW)
    return Origin.of(LOST, upstream) if upstream else Origin.of(UNKNOWN)


def end(operation: Operation) -> Origin:
    """Say that the results are no units: the rule of losses, distances, and functions that sort or count."""
    tensors = operation.tensors
    if all(each.origin.state in (CONSTANT, WEIGHT) for each in tensors):
        return combine(tensors, ())
    return Origin.of(ENDED, operation.upstream)
