"""Looks up, in the calls that lead to a Hugging Face callback, what transformers does not pass to it.

A ``TrainerCallback`` gets neither the Trainer nor its other callbacks, nor the folder that a training is resumed from.
All of these are local variables of the functions that called it. They are looked up there, once a training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_callback import CallbackHandler

__all__ = ["calling_handler", "resumed_folder"]


def calling_handler() -> CallbackHandler | None:
    """Return the handler that called the callback; ``None`` if something else called it."""
    owners = (names.get("self") for names in _callers())
    return next((owner for owner in owners if isinstance(owner, CallbackHandler)), None)


def resumed_folder() -> Path | None:
    """Return the checkpoint folder that the Trainer resumes from; ``None`` if it begins anew.

    ``resume_from_checkpoint`` is the public argument of ``Trainer.train``; by now the Trainer has made it a path.
    """
    for names in _callers():
        owner, folder = names.get("self"), names.get("resume_from_checkpoint")
        if hasattr(owner, "callback_handler") and isinstance(folder, (str, os.PathLike)):
            return Path(folder)
    return None


def _callers() -> Iterator[dict[str, Any]]:
    """Yield the local variables of every calling function, the nearest first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
