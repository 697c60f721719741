"""Decide which part of a trainer's loop is counted, and as which phase.

A trainer runs the model for more than training: sanity checks, validation in the middle of an epoch, predictions,
whatever a user's hook does between two batches. A gate is closed unless a batch runs that counts.
"""

from __future__ import annotations

from contextlib import ExitStack
from threading import get_ident
from typing import Any

from neuronscope.scope import Scope

__all__ = ["PhaseGate"]


class PhaseGate:
    """Switches a scope on and off, batch by batch. A new gate is closed.

    Activation functions that a training step calls outside of any module are a part of the model if ``step_is_model``,
    as in Lightning's ``training_step``. Otherwise they belong to a loss or to other code. ``phase`` is that of the
    evaluation that runs; ``None`` if none does.
    """

    def __init__(self, scope: Scope, *, step_is_model: bool = True) -> None:
        self.scope = scope
        self.phase: str | None = None
        self._step_is_model = step_is_model
        self._keep_phase = self._ends_phase = True
        self._batch: dict[str, Any] | None = None  # of the batch that runs: what a step of it is opened with
        self._thread = get_ident()  # in which it runs
        self._open = False
        self._pause_context = ExitStack()
        self._phase_context = ExitStack()
        self._pause()
        scope.before_phase = self._open_for_phase

    def open(self, *, step_in_forward: bool = False, inputs: tuple[Any, ...] = ()) -> None:
        """Count what runs from now on: a batch begins.

        In a step that is not observed the gate stays closed, unless a phase of the user's own begins in the batch.

        Args:
            step_in_forward: See :meth:`neuronscope.scope.Scope.open_step`.
            inputs: See there.
        """
        self._batch, self._thread = {"in_forward": step_in_forward, "inputs": inputs}, get_ident()
        if self._open or not self.scope.quiet:
            self._open_now(self._batch)

    def _open_now(self, batch: dict[str, Any]) -> None:
        self._open = True
        self._pause_context.close()
        if self._step_is_model:
            self.scope.open_step(**batch)

    def _open_for_phase(self) -> None:
        """Open the gate in a step that is not observed, since a phase that the user begins in it is."""
        if self._batch is not None and not self._open and self._thread == get_ident():
            self._open_now(self._batch)

    def close(self) -> None:
        """Count nothing until the next :meth:`open`. Closing a closed gate changes nothing."""
        self._batch = None
        if self._open:
            self._pause()

    def _pause(self) -> None:
        self._batch, self._open = None, False
        self.scope.close_step()
        self._pause_context.close()  # otherwise the new pause would nest inside the previous one
        self._pause_context.enter_context(self.scope.paused())

    def end_training_batch(self, step: int) -> bool:
        """Close the gate after a batch of training, and return whether the step closed a window.

        ``step`` is the number of optimizer steps taken so far: it stays the same while gradients are accumulated.
        """
        if self._open:
            self.scope.close_step()
        closed = step != self.scope.global_step and self.scope.step(step)
        self.close()
        return closed

    def note_step(self, step: int) -> bool:
        """Count an optimizer step in the middle of a batch, and return whether it closed a window."""
        closed = self.scope.step(step)
        if self._batch is not None and not self._open and not self.scope.quiet:
            self._open_now(self._batch)
        return closed

    def enter(self, phase: str) -> None:
        """Begin a pass of another phase, after the end of the previous one; the gate is closed."""
        self.leave()
        context = self.scope.phase(phase, join=True, keep=lambda: self._keep_phase, ends=lambda: self._ends_phase)
        self._phase_context.enter_context(context)
        self.phase = phase
        self._pause()

    def leave(self, *, keep: bool = True, ends: bool = True) -> None:
        """End the pass and close the gate. If no pass runs, only the gate is closed.

        Args:
            keep: Whether to keep what was counted in the pass.
            ends: Whether the pass is over. If not, the next one of its phase continues its window.
        """
        if self.phase is None:
            self.close()
            return
        self._keep_phase, self._ends_phase = keep, ends
        self._phase_context.close()
        self._keep_phase, self._ends_phase, self.phase = True, True, None
        self._pause()

    def detach(self, *, join: bool) -> None:
        """Remove the hooks from the model, in whatever state the gate is; see :meth:`neuronscope.Scope.detach`."""
        self.scope.before_phase = None
        self.scope.detach(join=join)
        self._phase_context.close()
        self._pause_context.close()
        self.phase = None
