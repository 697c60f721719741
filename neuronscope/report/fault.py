"""Describe an error inside Neuronscope that ended a watch early, as a sentence and as data for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from neuronscope.errors import StateError

__all__ = ["Fault"]

_MAX_LENGTH = 300


class Fault(NamedTuple):
    """Describe an error inside Neuronscope that ended a watch.

    >>> str(Fault.from_error(ValueError("no"), 12))
    'Neuronscope stopped watching at step 12 because of an internal error; later steps are not counted. ValueError: no'
    """

    step: int  # number of optimizer steps taken when it happened
    error: str  # type and message of the exception, in one line
    earlier: bool = False  # whether it ended an earlier run, whose saved counts were loaded into this one

    @classmethod
    def from_error(cls, error: Exception, step: int) -> Fault:
        """Describe an exception.

        Args:
            error: The exception.
            step: Number of optimizer steps taken when it was raised.
        """
        return cls(step, f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_LENGTH])

    @classmethod
    def from_state(cls, state: Any) -> Fault | None:
        """Return the fault that :meth:`state_dict` saved; ``None`` for ``None``.

        Raises:
            StateError: The state is not that of a fault.
        """
        if state is None:
            return None
        step, error = (state.get("step"), state.get("error")) if isinstance(state, Mapping) else (None, None)
        if not isinstance(step, int) or not isinstance(error, str) or step < 0:
            raise StateError(f"Expected the saved state of a fault, but got {type(state).__name__}.")
        return cls(step, error[:_MAX_LENGTH], earlier=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the fault as primitives."""
        return {"step": self.step, "error": self.error}

    def __str__(self) -> str:
        missing = "later steps of that run" if self.earlier else "later steps"
        stopped = f"Neuronscope stopped watching at step {self.step} because of an internal error"
        return f"{stopped}; {missing} are not counted. {self.error}"
