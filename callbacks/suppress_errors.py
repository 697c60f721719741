"""Faults: what goes wrong in our own code, or in a logger, warns once and never ends a training run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType

from neuronscope.errors import NeuronscopeWarning

__all__ = ["SuppressErrors"]


class SuppressErrors:
    """A context that keeps in what fails inside it, and says so once.

    Args:
        what: What is not done when it fails, for the warning.
        then: Called with what went wrong.
    """

    def __init__(self, what: str, then: Callable[[Exception], None] | None = None) -> None:
        self._what = what
        self._then = then
        self.first: Exception | None = None

    def __enter__(self) -> SuppressErrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        known, self.first = self.first, self.first or error
        if self._then is not None:
            self._then(error)
        if known is None:
            warnings.warn(
                f"Neuronscope could not {self._what}; training goes on. {type(error).__name__}: {error}",
                NeuronscopeWarning,
                stacklevel=3,
            )
        return True
