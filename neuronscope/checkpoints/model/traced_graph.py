"""Graph: one forward of a network as plain data, a list of steps over numbered tensors. What it is made by: tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.sites import SiteInfo

__all__ = ["Graph", "Site", "Step", "TensorRef", "Value", "references", "substitute"]


class TensorRef(NamedTuple):
    """Stands for a tensor among the arguments of a step.

    Attributes:
        value: Its number.
    """

    value: int


@dataclass(frozen=True)
class Value:
    """A tensor of the traced forward.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        constant: The tensor itself where it does not depend on the input, else ``None``.
        name: Name of the parameter or buffer that it is, else ``""``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    constant: Tensor | None = None
    name: str = ""


@dataclass(frozen=True)
class Step:
    """One torch function that was called.

    Attributes:
        function: The function.
        args: Its arguments, tensors replaced by :class:`TensorRef`.
        kwargs: Its keyword arguments, likewise.
        outputs: Numbers of the tensors that it gave, in order.
        reads: Numbers of the tensors that it was given.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """An activation site that ran.

    Attributes:
        name: Its name, as :func:`neuronscope.watch` gives it.
        info: What it is.
        before: Number of its pre-activation; of the gate's output for a gated product.
        after: Number of its output.
        neurons: How many neurons it has.
    """

    name: str
    info: SiteInfo
    before: int
    after: int
    neurons: int


@dataclass
class Graph:
    """What one forward did.

    Attributes:
        values: All tensors, by number.
        steps: What was called, in order; calls that gave no tensor are left out, and so are those
            on constants alone, since their results are known.
        sites: The sites, in the order in which they ran.
        inputs: Numbers of the tensors that the model was given.
        outputs: Numbers of the tensors that it returned.
        branches: Where numbers that depend on the input went into Python, one name of a function each.
        hidden: How many tensors came from calls that were not seen.
        opaque: Whether the model returned something that could not be searched for tensors.
        not_seen: Sites and modules that the tap could not see, and why.
    """

    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    branches: list[str] = field(default_factory=list)
    unseen_tensors: int = 0
    output_not_searchable: bool = False
    not_seen: Mapping[str, str] = field(default_factory=dict)


def substitute(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A tree of tuples, lists, dicts and slices with its leaves changed."""
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
    """Numbers of the tensors in a tree of arguments."""
    found: list[int] = []
    substitute(tree, lambda leaf: found.append(leaf.value) if isinstance(leaf, TensorRef) else None)
    return iter(found)
