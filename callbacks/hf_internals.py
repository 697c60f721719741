"""Callers: what the calls that lead to a Hugging Face callback know, and transformers does not hand on.

A ``TrainerCallback`` is given neither the Trainer nor its other callbacks, nor the folder that a training is resumed
from. All of these stand in the frames of the very call that it is in: they are looked up there, once a training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_callback import CallbackHandler

__all__ = ["handler_calling", "resumed_folder"]


def handler_calling() -> CallbackHandler | None:
    """The handler whose event this is; ``None`` where the callback was called by something else."""
    owners = (names.get("self") for names in _callers())
    return next((owner for owner in owners if isinstance(owner, CallbackHandler)), None)


def resumed_folder() -> Path | None:
    """The checkpoint folder that the Trainer resumes from; ``None`` where it begins anew.

    ``resume_from_checkpoint`` is the public argument of ``Trainer.train``; by now it has been made a path.
    """
    for names in _callers():
        owner, folder = names.get("self"), names.get("resume_from_checkpoint")
        if hasattr(owner, "callback_handler") and isinstance(folder, (str, os.PathLike)):
            return Path(folder)
    return None


def _callers() -> Iterator[dict[str, Any]]:
    """The local names of every call that leads here, the nearest first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
