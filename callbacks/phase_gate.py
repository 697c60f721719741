"""Stages: what of a training framework's loop is counted, and as which phase.

A framework runs the model for more than training: sanity checks, validation in the middle of an epoch, predictions,
whatever a user's hook does between two batches. A gate is shut unless a batch runs that counts.
"""

from __future__ import annotations

from contextlib import ExitStack

from neuronscope.scope import Scope

__all__ = ["PhaseGate"]


class PhaseGate:
    """Opens and shuts a scope, batch by batch. Shut when made.

    Args:
        scope: What watches the model.
        step_is_model: Whether what a step calls outside of any module is the model's own, as in Lightning's
            ``training_step``; otherwise it is a loss, or somebody else's affair.
    """

    def __init__(self, scope: Scope, *, step_is_model: bool = True) -> None:
        self.scope = scope
        self._step_is_model = step_is_model
        self._keeps = True
        self._pause = ExitStack()
        self._phase = ExitStack()
        self.shut()

    def open(self) -> None:
        """A batch begins."""
        self._pause.close()
        if self._step_is_model:
            self.scope.open_step()

    def shut(self) -> None:
        """Nothing is counted until a batch begins; harmless when done before."""
        self.scope.close_step()
        self._pause.close()  # takes up counting again, so that what is paused next is what runs now
        self._pause.enter_context(self.scope.paused())

    def end_training_batch(self, step: int) -> bool:
        """A batch of training is over.

        Args:
            step: Optimizer steps taken; stands still while gradients are accumulated.

        Returns:
            Whether that closed a window.
        """
        self.scope.close_step()
        closed = step != self.scope.global_step and self.scope.step(step)
        self.shut()
        return closed

    def enter(self, phase: str) -> None:
        """A pass of another phase begins."""
        self.leave()
        self._phase.enter_context(self.scope.phase(phase, join=True, keep=lambda: self._keeps))
        self.shut()

    def leave(self, *, keep: bool = True) -> None:
        """That pass is over; harmless when there was none.

        Args:
            keep: Whether it turned out to be one; what ran in it is forgotten otherwise.
        """
        self._keeps = keep
        self._phase.close()
        self._keeps = True
        self.shut()

    def detach(self, *, join: bool) -> None:
        """Take the hooks off the model, whatever was running; see :meth:`neuronscope.Scope.detach`."""
        self.scope.detach(join=join)
        self._phase.close()
        self._pause.close()
