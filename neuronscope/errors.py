"""All errors and warnings that Neuronscope raises on purpose.

Each message says what was expected, what was given, at which site, and what to do.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from types import FrameType

__all__ = [
    "CheckpointError",
    "DetachedError",
    "MissingExtraError",
    "NeuronscopeError",
    "NeuronscopeWarning",
    "NothingToWatchError",
    "ReportError",
    "StateError",
    "UsageError",
    "requiring",
    "warn_user",
]


class NeuronscopeError(Exception):
    """Base of every error that Neuronscope raises on purpose."""


class UsageError(NeuronscopeError, ValueError):
    """An argument has a wrong type or value."""


class NothingToWatchError(UsageError):
    """The model has no activation that can be watched, or the patterns exclude all of them."""


class DetachedError(NeuronscopeError, RuntimeError):
    """A scope was used for watching after it was detached."""


class StateError(NeuronscopeError, ValueError):
    """A saved state is damaged, or does not fit the object that loads it."""


class CheckpointError(NeuronscopeError, ValueError):
    """A checkpoint cannot be read: it is missing, damaged, of an unknown format, or needs full unpickling."""


class ReportError(NeuronscopeError, ValueError):
    """A saved report cannot be read: it is missing, damaged, no report, or from another version of Neuronscope."""


class MissingExtraError(NeuronscopeError, ImportError):
    """An optional package is missing; the message names the pip command."""


class NeuronscopeWarning(UserWarning):
    """Something is wrong with the watching; training continues."""


@contextlib.contextmanager
def requiring(package: str, purpose: str, install: str) -> Iterator[None]:
    """Raise MissingExtraError if the package that is imported inside is missing.

    Args:
        package: Its name, for the message.
        purpose: What it is needed for, for the message.
        install: What pip installs.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"Expected {package} for {purpose}, but it is not installed: pip install {install}"
        ) from error


def warn_user(message: str) -> None:
    """Warn with the line of the user's code that called Neuronscope, however many of its own functions lie between."""
    level = 2
    above: FrameType | None = sys._getframe(1)
    while above is not None and above.f_globals.get("__name__", "").partition(".")[0] in ("neuronscope", "contextlib"):
        level, above = level + 1, above.f_back
    warnings.warn(message, NeuronscopeWarning, stacklevel=level)
