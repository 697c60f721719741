"""Hyperparameters: what a LightningModule was built with, as its checkpoint keeps it (``save_hyperparameters``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuronscope.checkpoints.formats.parameter_names import escape_surrogates

__all__ = ["find_hyperparameters"]

_KEY, _NAME = "hyper_parameters", "hparams_name"
# A damaged file may nest without end, or refer to one list again and again.
_MOST_PARTS = 100_000
_DEEPEST = 16


def find_hyperparameters(data: Mapping[Any, Any]) -> dict[str, Any]:
    """The arguments of a LightningModule that its checkpoint keeps and that are plain: numbers, words, lists, dicts.

    Args:
        data: What lies in the checkpoint.

    Returns:
        By name. Lightning may keep one argument that is a dictionary as such, and its name beside it.

    >>> find_hyperparameters({"hyper_parameters": {"width": 7, "loss": object()}, "hparams_name": "kwargs"})
    {'width': 7}
    >>> find_hyperparameters({"hyper_parameters": {"width": 7}, "hparams_name": "settings"})
    {'settings': {'width': 7}}
    """
    kept = data.get(_KEY)
    if not isinstance(kept, Mapping):
        return {}
    name = data.get(_NAME)
    if isinstance(name, str) and name != "kwargs":
        kept = {name: kept}
    found = {}
    remaining = _MOST_PARTS
    for key, value in kept.items():
        parts = _parts(value, remaining, 0)
        if isinstance(key, str) and parts is not None:
            found[escape_surrogates(key)] = _plain(value)
            remaining -= parts
    return found


def _parts(value: Any, remaining: int, depth: int) -> int | None:
    """Of how many parts a value is; ``None`` where one is not plain, or where there are more than there is room for."""
    if remaining < 1 or depth > _DEEPEST:
        return None
    if value is None or type(value) in (bool, int, float, str):
        return 1
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            return None
        inner = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    else:
        return None
    total = 1
    for item in inner:
        parts = _parts(item, remaining - total, depth + 1)
        if parts is None:
            return None
        total += parts
    return total


def _plain(value: Any) -> Any:
    """A copy in Python's own types."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if type(value) is list else value
