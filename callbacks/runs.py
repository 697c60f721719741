"""Runs: one monitor may see several, and what it counted goes on from one to the next where that makes sense.

A run of training that is resumed from a checkpoint, or goes on with the same Trainer, continues the counts; one that
begins anew, or is of another network, does not. Evaluations in between leave the counts of training as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from neuronscope.attach.module_paths import own_class
from neuronscope.callbacks.phase_gate import PhaseGate
from neuronscope.errors import StateError
from neuronscope.options import WatchOptions
from neuronscope.scope import Scope
from neuronscope.tally.distributed.sync import world_size

__all__ = ["Runs"]

_STATE_VERSION = 1


class Runs:
    """The scopes of one monitor, one after another.

    Args:
        options: What is watched, and how often.
        step_is_model: See :class:`neuronscope.callbacks.phase_gate.PhaseGate`.

    Attributes:
        scope: What watches the model now, or watched it last.
        gate: The scope's gate while it is attached.
    """

    def __init__(self, options: WatchOptions, *, step_is_model: bool = True) -> None:
        self._options = options
        self._step_is_model = step_is_model
        self._trial()  # bad options are met here, and not when training starts
        self.scope: Scope | None = None
        self.gate: PhaseGate | None = None
        self._model = ""
        self._loaded: dict[str, Any] | None = None
        self._fitting = False
        self._open_window: dict[str, Any] | None = None  # training as it was before the end of fit closed its window

    def _trial(self) -> Scope:
        scope = Scope(nn.ReLU(), self._options)
        scope.detach(join=False)
        return scope

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is sent to another process, has the counts and no hooks; it goes on when it is attached."""
        return {**vars(self), "scope": None, "gate": None, "_fitting": False, "_loaded": self.state_dict() or None}

    def begin_fit(self, model: nn.Module, step: int) -> None:
        """Attach for training, and go on with what was loaded or with what the last run left.

        Args:
            model: The model.
            step: The Trainer's step; 0 before a checkpoint's is known.

        Raises:
            NothingToWatchError: The model has no activation.
        """
        before = self.state_dict() if self.scope is not None and step >= self.scope.global_step else None
        self._attach(model, self._loaded or before)
        self._open_window = None
        self._fitting = True

    def begin_evaluation(self, model: nn.Module) -> None:
        """Attach for a validation or a test alone; a checkpoint's counts do not replace those at hand.

        Raises:
            NothingToWatchError: The model has no activation.
        """
        before = None if self.scope is None else {**self.state_dict(), "scope": self.scope.state_dict()}
        self._attach(model, before or self._loaded)

    def _attach(self, model: nn.Module, state: Mapping[str, Any] | None) -> None:
        self.detach()
        self._loaded = None
        scope = Scope(model, self._options)
        self.scope, self.gate = scope, PhaseGate(scope, step_is_model=self._step_is_model)
        known, self._model = self._model, own_class(model).__qualname__
        if state is not None and state.get("model") == self._model:
            self._take_up(state)
        elif known != self._model:
            self._open_window = None

    def detach(self, *, join: bool = True) -> None:
        """Take the hooks off the model.

        At the end of training a window that is sure is closed for the report, yet stays open in the state, so that
        training can go on in it.

        Args:
            join: Every rank is here; ``False`` after an exception, which may be this rank's alone.
        """
        gate, self.gate = self.gate, None
        if gate is None:
            return
        fitting, self._fitting = self._fitting, False
        try:
            if fitting:
                whole = join or world_size() == 1  # else what is open is this rank's own
                self._open_window = gate.scope.state_dict(join=join)["phases"].get("train") if whole else None
        finally:  # whatever fails, the hooks go
            gate.detach(join=join)

    def give_up(self, fault: Exception) -> None:
        """After a fault, perhaps on this rank alone: count no more, but keep no other rank waiting.

        Args:
            fault: What went wrong: every later report begins with it.
        """
        if self.scope is not None:
            self.scope.retire(fault)
        if world_size() == 1:
            self.detach(join=False)

    def state_dict(self, *, join: bool = False) -> dict[str, Any]:
        """Everything counted so far, as tensors and primitives; empty before anything ran.

        Args:
            join: Every rank saves now: count what is open of a training that runs together first.
        """
        if self.scope is None:
            return dict(self._loaded or {})
        counted = self.scope.state_dict(join=join and self._fitting and self.gate is not None)
        if self._open_window is not None:
            counted["phases"]["train"] = self._open_window
        return {"version": _STATE_VERSION, "model": self._model, "scope": counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue what was counted: at once in a training run, else when one begins.

        Raises:
            StateError: The state is not one of a monitor, or of a later version.
        """
        if state.get("version") != _STATE_VERSION:
            raise StateError(f"Expected monitor state of version {_STATE_VERSION}, but got {state.get('version')!r}.")
        self._trial().load_state_dict(state.get("scope", {}))  # understood now, and not when training starts
        if self.gate is not None and self._fitting:
            self._take_up(state)
        else:
            self._loaded = dict(state)

    def _take_up(self, state: Mapping[str, Any]) -> None:
        if self.gate is not None:
            self.gate.scope.load_state_dict(state["scope"])
            self.gate.shut()
