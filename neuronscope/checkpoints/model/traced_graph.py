"""The graph of one traced forward as plain data: a list of steps over numbered tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.sites import SiteInfo

__all__ = ["Graph", "Site", "Step", "TensorRef", "Value", "references", "substitute"]


class TensorRef(NamedTuple):
    """Stands for a tensor in the arguments of a step.

    Attributes:
        value: The tensor's number in the graph.
    """

    value: int


@dataclass(frozen=True)
class Value:
    """A tensor of the traced forward.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        constant: The tensor itself if it does not depend on the input, else ``None``.
        name: Its name if it is a parameter or buffer, else ``""``.
        sources: The names of the parameters and buffers that a constant is or was computed from.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    constant: Tensor | None = None
    name: str = ""
    sources: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """One call of a torch function.

    Attributes:
        function: The function.
        args: Its arguments, tensors replaced by :class:`TensorRef`.
        kwargs: Its keyword arguments, with tensors replaced too.
        outputs: Numbers of the tensors that it returned, in order.
        reads: Numbers of the tensors in its arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    reads: tuple[int, ...]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument.

        Args:
            place: Its place among the positional arguments.
            name: Its name, if it is given by name.
            default: Returned if it is not given.
        """
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def arguments(self, change: Callable[[int], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with what ``change`` gives for its number in place of each tensor."""
        found: tuple[tuple[Any, ...], dict[str, Any]] = substitute(
            (self.args, dict(self.kwargs)), lambda leaf: change(leaf.value) if isinstance(leaf, TensorRef) else leaf
        )
        return found


@dataclass(frozen=True)
class Site:
    """One call of an activation site.

    Attributes:
        name: Its name, as :func:`neuronscope.watch` gives it.
        info: What is known of the site.
        layout: Where the neurons of its output lie.
        before: Number of its pre-activation; for a gated product, number of the gate's output.
        after: Number of its output.
        neurons: How many neurons it has.
    """

    name: str
    info: SiteInfo
    layout: NeuronLayout
    before: int
    after: int
    neurons: int

    @property
    def kind(self) -> str:
        """Kind of the activation."""
        return self.info.kind

    @property
    def units(self) -> tuple[tuple[str, int, int, int], ...]:
        """The units that the neurons are; see :class:`neuronscope.sites.SiteInfo`."""
        return self.info.units

    @property
    def in_headlines(self) -> bool:
        """Whether totals include the site."""
        return self.info.in_headlines

    @property
    def normalises(self) -> str:
        """Path of the layer that the site's layer normalises, unit by unit; ``""`` if it normalises none."""
        return self.info.normalises


@dataclass
class Graph:
    """One traced forward.

    Attributes:
        values: All tensors; a tensor's number is its index.
        steps: The calls, in order. Calls that returned no tensor are left out, and so are calls on constants alone,
            whose results are constants.
        sites: The calls of the sites, in the order in which they ran.
        inputs: Numbers of the tensors that the model was called with.
        outputs: Numbers of the tensors that it returned.
        changed: Names of the parameters and buffers that the forward overwrote or replaced.
        branches: Names of the functions through which numbers that depend on the input reached Python code.
        unseen_tensors: How many tensors were made by calls that were not seen.
        output_not_searchable: Whether the model returned something that could not be searched for tensors.
        not_seen: Sites and modules that were not observed → the reason.
    """

    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    changed: set[str] = field(default_factory=set)
    branches: list[str] = field(default_factory=list)
    unseen_tensors: int = 0
    output_not_searchable: bool = False
    not_seen: Mapping[str, str] = field(default_factory=dict)

    def constant(self, argument: Any) -> Tensor | None:
        """Return the tensor that an argument of a step stands for, if it does not depend on the input."""
        return self.values[argument.value].constant if isinstance(argument, TensorRef) else None

    def variable_inputs(self, step: Step) -> list[int]:
        """Return the numbers of the tensors that a step reads and that depend on the input, each once."""
        return [number for number in dict.fromkeys(step.reads) if self.values[number].constant is None]

    def first_calls(self) -> tuple[Site, ...]:
        """Return the first call of each site."""
        return tuple(calls[0] for calls in self.calls.values())

    @cached_property
    def calls(self) -> dict[str, list[Site]]:
        """The calls of each site, by its name, in order; to be read when the forward is over."""
        calls: dict[str, list[Site]] = {}
        for site in self.sites:
            calls.setdefault(site.name, []).append(site)
        return calls

    @cached_property
    def producers(self) -> dict[int, Step]:
        """The step that made each tensor, by the tensor's number; to be read when the forward is over."""
        return {number: step for step in self.steps for number in step.outputs}


def substitute(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Copy a tree of tuples, lists, dictionaries and slices, with each leaf changed.

    Args:
        tree: The tree.
        change: Returns what replaces a leaf.
    """
    if isinstance(tree, TensorRef):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        changed = [substitute(part, change) for part in tree]
        return changed if isinstance(tree, list) else tuple(changed)
    if isinstance(tree, dict):
        return {key: substitute(part, change) for key, part in tree.items()}
    if isinstance(tree, slice):
        return slice(*(substitute(part, change) for part in (tree.start, tree.stop, tree.step)))
    return change(tree)


def references(tree: Any) -> Iterator[int]:
    """Return the numbers of the tensors in a tree of arguments."""
    found: list[int] = []
    substitute(tree, lambda leaf: found.append(leaf.value) if isinstance(leaf, TensorRef) else None)
    return iter(found)
