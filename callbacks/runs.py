"""Keep the counts of one monitor over several runs, and continue them from one run to the next where that is right.

A training that is resumed from a checkpoint, or goes on with the same Trainer, continues the counts. One that begins
anew, or trains another network, does not. Evaluations in between leave the counts of training as they are.
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
from neuronscope.sites import INFERENCE
from neuronscope.tally.distributed.sync import world_size
from neuronscope.tally.phase_record import split_scope_state

__all__ = ["Runs"]

_STATE_VERSION = 1


class Runs:
    """Makes a scope for each run of one monitor, and hands the counts on.

    ``scope`` watches the model now, or watched it last; ``None`` before the first run. ``gate`` is the scope's gate
    while it is attached, otherwise ``None``.
    """

    def __init__(self, options: WatchOptions, *, step_is_model: bool = True) -> None:
        self._options = options
        self._step_is_model = step_is_model
        Scope(nn.ReLU(), options).detach(join=False)  # bad options raise here, and not when training starts
        self.scope: Scope | None = None
        self.gate: PhaseGate | None = None
        self._model_class = ""
        self._loaded: dict[str, Any] | None = None
        self._in_training = False
        # The states of training and inference from before the end of a run closed their windows.
        self._open_windows: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is sent to another process, has the counts and no hooks; its next run continues them."""
        return {**vars(self), "scope": None, "gate": None, "_in_training": False, "_loaded": self.state_dict() or None}

    def begin_training(self, model: nn.Module, step: int) -> None:
        """Attach for training, and continue what was loaded or what the last run counted.

        Args:
            model: The model.
            step: The Trainer's step; 0 before that of a checkpoint is known.
        """
        before = self.state_dict() if self.scope is not None and step >= self.scope.global_step else None
        self._attach(model, self._loaded or before)
        self._open_windows = {}
        self._in_training = True

    def begin_evaluation(self, model: nn.Module) -> None:
        """Attach for a validation or a test alone. The counts of a checkpoint do not replace those of a run.

        Args:
            model: The model.

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
        last_class, self._model_class = self._model_class, own_class(model).__qualname__
        if state is not None and state.get("model") == self._model_class:
            self._continue_from(state)
        elif last_class != self._model_class:
            self._open_windows = {}

    def detach(self, *, join: bool = True) -> None:
        """Remove the hooks from the model.

        At the end of training, a window that is long enough is closed for the report. In the state it stays open, so
        that training can continue in it.

        Args:
            join: Whether every rank calls this; ``False`` after an exception, which may be this rank's alone.
        """
        gate, self.gate = self.gate, None
        if gate is None:
            return
        in_training, self._in_training = self._in_training, False
        try:
            if in_training:
                is_whole = join or world_size() == 1  # otherwise the open window holds this rank's counts only
                phases = gate.scope.state_dict(join=join)["phases"] if is_whole else {}
                self._open_windows = {name: phases[name] for name in ("train", INFERENCE) if name in phases}
        finally:  # the hooks are removed whatever fails
            gate.detach(join=join)

    def give_up(self, error: Exception) -> None:
        """Count no more after an error of ours, perhaps on this rank alone; no other rank is kept waiting.

        Every later report begins with the error.
        """
        if self.scope is not None:
            self.scope.retire(error)
        if world_size() == 1:
            self.detach(join=False)

    def state_dict(self, *, join: bool = False) -> dict[str, Any]:
        """Return everything counted so far, as tensors and primitives; empty before the first run.

        Args:
            join: Whether every rank saves now: in a training that runs, the open window is then counted together first.
        """
        if self.scope is None:
            return dict(self._loaded or {})
        counted = self.scope.state_dict(join=join and self._in_training and self.gate is not None)
        counted["phases"].update(self._open_windows)
        return {"version": _STATE_VERSION, "model": self._model_class, "scope": counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue what was counted: at once in a training that runs, otherwise when one begins.

        Raises:
            StateError: The state is not one of a monitor, or of a later version.
        """
        if state.get("version") != _STATE_VERSION:
            raise StateError(f"Expected monitor state of version {_STATE_VERSION}, but got {state.get('version')!r}.")
        if not isinstance(state.get("model"), str):
            raise StateError(f"Expected monitor state with the name of a model, but got {state.get('model')!r}.")
        split_scope_state(state.get("scope", {}), self._options.thresholds)  # a bad state raises now, not in training
        if self.gate is not None and self._in_training:
            self._continue_from(state)
        else:
            self._loaded = dict(state)

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        if self.gate is not None:
            self.gate.scope.load_state_dict(state["scope"])
            self.gate.close()
