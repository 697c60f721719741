"""Find the arguments that a LightningModule was built with (``save_hyperparameters``) in its checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from neuronscope.checkpoints.formats.parameter_names import escape_surrogates
from neuronscope.checkpoints.formats.safe_globals import AttributesPlaceholder

__all__ = ["find_hyperparameters"]

# Limits for a damaged file, which may nest very deeply or refer to one list many times.
_MOST_PARTS = 100_000
_DEEPEST = 16


def find_hyperparameters(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return those of a LightningModule's saved arguments by name that are plain data.

    If Lightning saved one dictionary and its argument's name, it is that argument.

    >>> find_hyperparameters({"hyper_parameters": {"width": 7, "loss": object()}, "hparams_name": "kwargs"})
    {'width': 7}
    >>> find_hyperparameters({"hyper_parameters": {"width": 7}, "hparams_name": "settings"})
    {'settings': {'width': 7}}
    """
    saved = _content(data.get("hyper_parameters"))
    if not isinstance(saved, Mapping):
        return {}
    name = data.get("hparams_name")
    if isinstance(name, str) and name != "kwargs":
        saved = {name: saved}
    found = {}
    left = _MOST_PARTS
    for key, value in saved.items():
        if isinstance(key, str):
            with contextlib.suppress(_NotPlainError):
                found[escape_surrogates(key)], left = _copied(value, left, 0)
    return found


class _NotPlainError(Exception):
    """A value is not plain data, or has too many parts."""


def _copied(value: Any, left: int, depth: int) -> tuple[Any, int]:
    """Copy a value with Python's own types; return the copy, and how many of ``left`` parts are left."""
    if left < 1 or depth > _DEEPEST:
        raise _NotPlainError
    value, left = _content(value), left - 1
    if value is None or type(value) in (bool, int, float, str):
        return value, left
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        copy = {}
        for key, inner in value.items():
            copy[key], left = _copied(inner, left, depth + 1)
        return copy, left
    kind = next((kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind)), None)
    if kind is None:
        raise _NotPlainError
    items = []
    for inner in value:
        item, left = _copied(inner, left, depth + 1)
        items.append(item)
    try:
        return kind(items), left
    except TypeError as error:  # a set of what holds a list
        raise _NotPlainError from error


def _content(value: Any) -> Any:
    """Return what a container or a node of omegaconf holds, and any other value as it is.

    A reference to another setting (``${model.width}``) is not resolved; it stays an object, and so is left out.
    """
    for _ in range(_DEEPEST):  # a damaged file may hold a circle
        if not isinstance(value, AttributesPlaceholder) or not value.cls.startswith("omegaconf."):
            break
        state = value.state if isinstance(value.state, dict) else {}
        inner = state.get("_content", state.get("_val", value))
        if inner is value or (isinstance(inner, str) and "${" in inner):
            break
        value = inner
    return value
