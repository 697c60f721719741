"""Fault: what ended a watch before its time, in one sentence, and as plain data that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from neuronscope.errors import StateError

__all__ = ["Fault"]

_LONGEST = 300


class Fault(NamedTuple):
    """A fault of Neuronscope's own that ended a watch.

    Attributes:
        step: Optimizer steps taken when it happened.
        error: What went wrong, in one line.
        earlier: Whether it ended an earlier run, whose counts were saved and loaded since.

    >>> str(Fault.from_error(ValueError("no"), 12))
    'Neuronscope stopped watching at step 12 by a fault of its own; later steps are not counted. ValueError: no'
    """

    step: int
    error: str
    earlier: bool = False

    @classmethod
    def from_error(cls, error: Exception, step: int) -> Fault:
        """Describe an exception that was raised when ``step`` optimizer steps were taken."""
        return cls(step, f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST])

    @classmethod
    def from_state(cls, state: Any) -> Fault | None:
        """Return the fault that :meth:`state_dict` described; ``None`` for ``None``.

        Raises:
            StateError: The state is not one of a fault.
        """
        if state is None:
            return None
        if not isinstance(state, Mapping) or not {"step", "error"} <= state.keys():
            raise StateError(f"Expected the saved state of a fault, but got {type(state).__name__}.")
        return cls(int(state["step"]), str(state["error"]), earlier=True)

    def state_dict(self) -> dict[str, Any]:
        """The fault as primitives."""
        return {"step": self.step, "error": self.error}

    def __str__(self) -> str:
        missing = "later steps of that run" if self.earlier else "later steps"
        return (
            f"Neuronscope stopped watching at step {self.step} by a fault of its own; {missing} are not counted. "
            f"{self.error}"
        )
