"""The one tree of errors and warnings that Neuronscope raises on purpose.

Messages say what was expected, what came, at which site, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DetachedError",
    "MissingExtraError",
    "NeuronscopeError",
    "NeuronscopeWarning",
    "NothingToWatchError",
    "StateError",
    "UsageError",
]


class NeuronscopeError(Exception):
    """Base of every error that Neuronscope raises on purpose."""


class UsageError(NeuronscopeError, ValueError):
    """An argument is not what the function takes."""


class NothingToWatchError(UsageError):
    """The model has no activation site, or the patterns leave none."""


class DetachedError(NeuronscopeError, RuntimeError):
    """A scope was told to go on watching after it was detached."""


class StateError(NeuronscopeError, ValueError):
    """A saved census or history does not fit what it is loaded into."""


class CheckpointError(NeuronscopeError, ValueError):
    """A checkpoint cannot be read: it is not there, damaged, foreign, or would have to be unpickled."""


class MissingExtraError(NeuronscopeError, ImportError):
    """An optional package is needed; the message names the pip command."""


class NeuronscopeWarning(UserWarning):
    """Something is wrong with the watching, and training goes on."""
