"""Keep errors of Neuronscope's own code, and of a logger, from ending a training run."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from neuronscope.errors import warn_user

__all__ = ["SuppressErrors"]


class SuppressErrors:
    """Context manager that suppresses exceptions and warns at the first. It can be entered again and again.

    ``KeyboardInterrupt`` and ``SystemExit`` pass through.

    Args:
        action: What could not be done if an exception comes: ends the sentence "Neuronscope could not …".
        on_error: Called with every exception.
    """

    def __init__(self, action: str, on_error: Callable[[Exception], None] | None = None) -> None:
        self._action = action
        self._on_error = on_error
        self._warned = False

    def __enter__(self) -> SuppressErrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if self._on_error is not None:
            self._on_error(error)
        if not self._warned:
            self._warned = True
            warn_user(f"Neuronscope could not {self._action}; training goes on. {type(error).__name__}: {error}")
        return True
