"""The options of a watch, defined once for ``watch``, ``scan``, ``Scope`` and the callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union

from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import Policy

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup as TorchGroup

    from neuronscope.attach.activations import Activation

__all__ = [
    "Examples",
    "Mask",
    "Patterns",
    "ProcessGroup",
    "ScanArguments",
    "Shards",
    "WatchArguments",
    "WatchOptions",
    "positive_integer",
]

#: One glob pattern, several, or ``None``.
Patterns = str | Sequence[str] | None
#: How the independent examples of a forward are counted; a function takes ``(args, kwargs)`` of the forward.
Examples = Callable[[tuple[Any, ...], Mapping[str, Any]], int | None] | int | Literal["auto"] | None
#: Where the mask ``(B, T)`` of a forward's positions is found; a function takes ``(args, kwargs)`` of the forward.
Mask = Callable[[tuple[Any, ...], Mapping[str, Any]], "Tensor | None"] | str | None
#: The process group of the ranks that join their counts; a function returns one that the trainer makes later.
ProcessGroup = Union["TorchGroup", Callable[[], "TorchGroup"], None]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Which layers ranks share by hand, each with a plain tensor of its own part, as Megatron's layers do.

    Args:
        units: Glob patterns on the paths of layers whose units are shared (column-parallel): each rank computes as many
            of them, in the order of ranks.
        inputs: The same for layers of which each rank has some of the inputs (row-parallel, an embedding with a part of
            the vocabulary): after their sum over ranks, each rank has all units.
        process_group: The ranks that share them and get the same data, or a function that returns the group, if it is
            made later. By default all ranks.

    Raises:
        UsageError: A pattern is not a string, or is empty.

    >>> Shards(units="layers.*.fc1", inputs=["layers.*.fc2", "embedding"]).units
    ('layers.*.fc1',)
    """

    units: Patterns = ()
    inputs: Patterns = ()
    process_group: ProcessGroup = None

    def __post_init__(self) -> None:
        for name in ("units", "inputs"):
            given: Any = getattr(self, name)
            patterns = (given,) if isinstance(given, str) else tuple(given or ())
            if not all(isinstance(each, str) and each for each in patterns):
                raise UsageError(
                    f"Expected argument `{name}` to be glob patterns on paths of layers, but got {given!r}."
                )
            object.__setattr__(self, name, patterns)


class ScanArguments(TypedDict, total=False):
    """Keyword arguments that apply to a scan, which is one pass over data; see :func:`neuronscope.watch`."""

    sites: Patterns
    exclude: Patterns
    functional: bool
    axes: Mapping[str, int] | None
    policy: Policy | None
    activations: Mapping[Any, Activation | str] | None
    examples: Examples
    mask: Mask


class WatchArguments(ScanArguments, total=False):
    """Keyword arguments that apply to watching a training run; see :func:`neuronscope.watch`."""

    every_n_steps: int
    window_steps: int
    join_ranks: bool
    process_group: ProcessGroup
    shards: Shards | None


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Hold and check the options of one watch. The attributes are the arguments of :func:`neuronscope.watch`.

    Raises:
        UsageError: An option has a wrong type or value.

    >>> WatchOptions(every_n_steps=5).window_steps
    100
    """

    every_n_steps: int = 1
    sites: Patterns = None
    exclude: Patterns = None
    functional: bool = True
    axes: Mapping[str, int] | None = None
    policy: Policy | None = None
    #: These and the process group are left out of ``repr``, by which callbacks recognise their own saved state: a
    #: function prints its address.
    activations: Mapping[Any, Activation | str] | None = field(default=None, repr=False)
    examples: Examples = field(default="auto", repr=False)
    mask: Mask = field(default=None, repr=False)
    window_steps: int = 100
    join_ranks: bool = True
    process_group: ProcessGroup = field(default=None, repr=False)
    shards: Shards | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        positive_integer("every_n_steps", self.every_n_steps)
        positive_integer("window_steps", self.window_steps)
        policy: Any = self.policy
        if policy is not None and not isinstance(policy, Policy):
            raise UsageError(f"Expected argument `policy` to be a neuronscope.Policy, but got {type(policy).__name__}.")
        _check_examples(self.examples)
        _check_mask(self.mask)
        group = self.process_group
        if not (group is None or callable(group) or hasattr(group, "rank")):
            raise UsageError(
                "Expected argument `process_group` to be a torch.distributed.ProcessGroup that this rank is in, or a "
                f"function that returns one, but got {type(group).__name__}."
            )
        shards: Any = self.shards
        if shards is not None and not isinstance(shards, Shards):
            raise UsageError(f"Expected argument `shards` to be a neuronscope.Shards, but got {type(shards).__name__}.")

    @property
    def thresholds(self) -> Policy:
        """The given policy, or the default one."""
        return self.policy or Policy()


def _check_examples(examples: Any) -> None:
    axis = isinstance(examples, int) and not isinstance(examples, bool)
    if not (examples is None or examples == "auto" or axis or callable(examples)):
        raise UsageError(
            "Expected argument `examples` to be 'auto', the dimension that holds the examples (an integer), a function "
            f"of a forward's (args, kwargs) that returns their number, or None for no bound, but got {examples!r}."
        )


def _check_mask(mask: Any) -> None:
    if not (mask is None or callable(mask) or (isinstance(mask, str) and mask)):
        raise UsageError(
            "Expected argument `mask` to be the name of an argument of the model's forward, a function of a forward's "
            f"(args, kwargs) that returns a tensor of shape (B, T), or None, but got {type(mask).__name__}"
            f"{'' if not isinstance(mask, str) else ' of length 0'}."
        )


def positive_integer(name: str, value: Any) -> int:
    """Return ``value`` if it is an integer of at least 1.

    Args:
        name: The argument's name, for the error message.
        value: The value that the user gave.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"Expected argument `{name}` to be an integer of at least 1, but got {value!r}.")
    return value
