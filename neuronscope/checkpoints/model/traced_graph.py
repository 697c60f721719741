"""The graph of one traced forward as plain data: a list of steps over numbered tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.sites import SiteInfo

__all__ = ["Graph", "Site", "Step", "TensorRef", "Value", "leaves", "substitute"]


class TensorRef(NamedTuple):
    """Stands for a tensor in the arguments of a step."""

    value: int  # the tensor's number in the graph


@dataclass(frozen=True)
class Value:
    """A tensor of the traced forward."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    constant: Tensor | None = None  # the tensor itself if it does not depend on the input, else ``None``
    name: str = ""  # its name if it is a parameter or buffer, else ``""``
    #: The names of the parameters and buffers that a constant is or was computed from.
    sources: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """One call of a torch function."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # its arguments, tensors replaced by ``TensorRef``
    kwargs: Mapping[str, Any]  # its keyword arguments, with tensors replaced too
    outputs: tuple[int, ...]  # numbers of the tensors that it returned, in order
    reads: tuple[int, ...]  # numbers of the tensors in its arguments

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
    """One call of an activation site."""

    name: str  # its name, as ``neuronscope.watch`` gives it
    info: SiteInfo  # what is known of the site
    layout: NeuronLayout  # where the neurons of its output lie
    before: int  # number of its pre-activation; for a gated product, number of the gate's output
    after: int  # number of its output
    neurons: int  # how many neurons it has

    @property
    def kind(self) -> str:
        """Kind of the activation."""
        return self.info.kind

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self.info.activation

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
    """One traced forward."""

    values: list[Value] = field(default_factory=list)  # all tensors; a tensor's number is its index
    #: The calls, in order. Calls that returned no tensor are left out, and so are calls on constants alone, whose
    #: results are constants.
    steps: list[Step] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)  # the calls of the sites, in the order in which they ran
    inputs: tuple[int, ...] = ()  # numbers of the tensors that the model was called with
    outputs: tuple[int, ...] = ()  # numbers of the tensors that it returned
    #: Names of the parameters and buffers that the forward overwrote or replaced.
    changed: set[str] = field(default_factory=set)
    #: Names of the functions through which numbers that depend on the input reached Python code.
    branches: list[str] = field(default_factory=list)
    unseen_tensors: int = 0  # how many tensors were made by calls that were not seen
    output_not_searchable: bool = False  # whether the model returned something that could not be searched for tensors
    not_seen: Mapping[str, str] = field(default_factory=dict)  # sites and modules that were not observed → the reason

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

    def steps_until(self, number: int) -> int:
        """Return how many of the steps ran until a tensor was made; 0 for an input or a constant."""
        return next((index for index, step in enumerate(self.steps, start=1) if number in step.outputs), 0)

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


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, as :func:`substitute` meets them."""
    found: list[Any] = []
    substitute(tree, found.append)
    return found
