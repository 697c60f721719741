"""Find the arguments that a LightningModule was built with (``save_hyperparameters``) in its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuronscope.checkpoints.formats.parameter_names import escape_surrogates
from neuronscope.checkpoints.formats.safe_globals import AttributesPlaceholder

__all__ = ["find_hyperparameters"]

_KEY, _NAME = "hyper_parameters", "hparams_name"
# Limits for a damaged file, which may nest very deeply or refer to one list many times.
_MOST_PARTS = 100_000
_DEEPEST = 16


def find_hyperparameters(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the saved arguments of a LightningModule that are plain data: numbers, strings, lists, dictionaries.

    Settings of omegaconf count as plain data too.

    Args:
        data: The content of the checkpoint.

    Returns:
        Arguments by name. If Lightning saved one dictionary and its argument's name, it is that argument.

    >>> find_hyperparameters({"hyper_parameters": {"width": 7, "loss": object()}, "hparams_name": "kwargs"})
    {'width': 7}
    >>> find_hyperparameters({"hyper_parameters": {"width": 7}, "hparams_name": "settings"})
    {'settings': {'width': 7}}
    """
    saved = _content(data.get(_KEY))
    if not isinstance(saved, Mapping):
        return {}
    name = data.get(_NAME)
    if isinstance(name, str) and name != "kwargs":
        saved = {name: saved}
    found = {}
    remaining = _MOST_PARTS
    for key, value in saved.items():
        parts = _parts(value, remaining, 0)
        if isinstance(key, str) and parts is not None:
            found[escape_surrogates(key)] = _plain(value)
            remaining -= parts
    return found


def _parts(value: Any, remaining: int, depth: int) -> int | None:
    """Count the parts of a value; ``None`` if one is not plain data, or if there are more than ``remaining``."""
    if remaining < 1 or depth > _DEEPEST:
        return None
    value = _content(value)
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
    """Copy a value with Python's own types."""
    value = _content(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if type(value) is list else value


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
