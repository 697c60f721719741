"""Saves the counts of callbacks as a file of their own in a checkpoint folder.

The file holds tensors and primitives and is read without unpickling. It maps the ``state_key`` of each callback that
watched the training to its state, as the ``callbacks`` of a Lightning checkpoint do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neuronscope.errors import StateError

__all__ = ["FILE", "load_state", "save_state"]

#: The file's name in a checkpoint folder.
FILE = "neuronscope.pt"


def save_state(folder: Path, key: str, state: dict[str, Any]) -> None:
    """Save a callback's state beside those of others. If the process dies, the file is whole or missing.

    Args:
        folder: The checkpoint's folder, which must exist.
        key: The callback's ``state_key``.
        state: Tensors and primitives.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_state(folder, "Callback{}", {"version": 1})
    >>> load_state(folder, "Callback{}"), load_state(folder, "Another{}")
    ({'version': 1}, None)
    """
    unfinished = folder / f"{FILE}.part"
    torch.save({**_load(folder), key: state}, unfinished)
    unfinished.replace(folder / FILE)


def load_state(folder: Path, key: str) -> dict[str, Any] | None:
    """Load the state that a callback saved; ``None`` if there is none.

    Args:
        folder: The checkpoint's folder.
        key: The callback's ``state_key``.

    Raises:
        StateError: The file was not written by :func:`save_state`.
    """
    return _load(folder).get(key)


def _load(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        states: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise StateError(f"Expected {path} to hold saved counts, but it could not be read: {error}") from error
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise StateError(f"Expected {path} to map callbacks to their states, but it holds something else.")
    return states
