"""Checks of what a user gives: the argument as it is meant, or one plain error."""

from __future__ import annotations

from typing import Any

from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import Policy

__all__ = ["checked_policy", "positive"]


def positive(name: str, value: Any) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"Expected argument `{name}` to be an integer of at least 1, but got {value!r}.")
    return value


def checked_policy(policy: Any) -> Policy:
    """A policy; the default one for ``None``."""
    if policy is None:
        return Policy()
    if isinstance(policy, Policy):
        return policy
    raise UsageError(f"Expected argument `policy` to be a neuronscope.Policy, but got {type(policy).__name__}.")
