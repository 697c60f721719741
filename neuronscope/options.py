"""The options of a watch, defined once for ``watch``, ``scan``, ``Scope`` and the callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import Policy

if TYPE_CHECKING:
    from neuronscope.attach.activations import Activation

__all__ = ["Patterns", "ScanArguments", "WatchArguments", "WatchOptions", "positive_integer"]

#: One glob pattern, several, or ``None``.
Patterns = str | Sequence[str] | None


class ScanArguments(TypedDict, total=False):
    """Keyword arguments that apply to a scan, which is one pass over data; see :func:`neuronscope.watch`."""

    sites: Patterns
    exclude: Patterns
    functional: bool
    axes: Mapping[str, int] | None
    policy: Policy | None
    activations: Mapping[Any, Activation | str] | None


class WatchArguments(ScanArguments, total=False):
    """Keyword arguments that apply to watching a training run; see :func:`neuronscope.watch`."""

    every_n_steps: int
    window_steps: int
    join_ranks: bool


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
    #: Left out of ``repr``, by which callbacks recognise their own saved state: a function prints its address.
    activations: Mapping[Any, Activation | str] | None = field(default=None, repr=False)
    window_steps: int = 100
    join_ranks: bool = True

    def __post_init__(self) -> None:
        positive_integer("every_n_steps", self.every_n_steps)
        positive_integer("window_steps", self.window_steps)
        policy: Any = self.policy
        if policy is not None and not isinstance(policy, Policy):
            raise UsageError(f"Expected argument `policy` to be a neuronscope.Policy, but got {type(policy).__name__}.")

    @property
    def thresholds(self) -> Policy:
        """The given policy, or the default one."""
        return self.policy or Policy()


def positive_integer(name: str, value: Any) -> int:
    """Return ``value`` if it is an integer of at least 1.

    Args:
        name: The argument's name, for the error message.
        value: The value that the user gave.

    Raises:
        UsageError: ``value`` is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"Expected argument `{name}` to be an integer of at least 1, but got {value!r}.")
    return value
