"""Hugging Face: a callback that watches a training of ``transformers.Trainer``.

Everything here is about when. The Trainer says when a training step begins and ends, but not when an evaluation begins,
nor which of evaluation and prediction it is. So what the model runs between two steps is counted apart, and kept as a
pass of validation only when the Trainer then says that an evaluation is over; otherwise it is forgotten.
"""

# ruff: noqa: ARG002  # an event takes what the Trainer gives it

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any

from neuronscope.errors import MissingExtraError

try:
    from transformers.trainer_callback import CallbackHandler, TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        f"Expected transformers for `DeadNeuronCallback`, but it could not be imported ({error}): "
        "pip install 'neuronscope[transformers]'"
    ) from error

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from neuronscope.callbacks.hf_internals import handler_calling, resumed_folder
from neuronscope.callbacks.hf_loggers import Event, reporters
from neuronscope.callbacks.monitor import Monitor
from neuronscope.callbacks.publishing import summary, totals
from neuronscope.callbacks.saved_state import load_state, save_state
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.errors import NeuronscopeWarning
from neuronscope.report.report import Report
from neuronscope.tally.distributed.sync import world_size

__all__ = ["DeadNeuronCallback"]

_LOGGER = logging.getLogger("transformers.neuronscope")
_RUNTIME = "_runtime"  # ends a key in what the Trainer logs at the end of an evaluation, after the evaluation's prefix


class DeadNeuronCallback(Monitor, TrainerCallback):
    """Watches which neurons die while a Hugging Face Trainer trains, and shows it where the Trainer reports.

    Scalars go to every callback that the Trainer reports to, pictures, diagnosis and vectors to a file beside
    TensorBoard's. The metrics of an evaluation hold ``eval_neuronscope/dead_pct`` (of training so far),
    ``eval_neuronscope/val_dead_pct`` and the like for ``metric_for_best_model`` and ``EarlyStoppingCallback``. What was
    counted is saved in the Trainer's
    checkpoints, as ``neuronscope.pt``; a resumed training continues it. Steps of training count, and evaluations in
    training as phase ``val``; predictions, and evaluations before or after training, do not. In eager mode weights come
    out the same, bit for bit, with the callback and without.

    The Trainer tells nobody when a training ends in an exception. The hooks then stay on the model until the next
    training begins, the callback is collected, or :meth:`detach` is called; as a context manager it calls that itself.

    Raises:
        UsageError: An argument is not what is expected.

    >>> from neuronscope.callbacks.transformers import DeadNeuronCallback
    >>> callback = DeadNeuronCallback(every_n_steps=10, on_dead="stop", threshold=30)
    >>> # Trainer(model, callbacks=[callback], ...).train(), then:
    >>> # print(callback.report())
    """

    step_is_model = False
    used_like = "give it to a Trainer (`Trainer(model, callbacks=[callback])`) and train a model that has activations"
    _training = False
    _handler: CallbackHandler | None = None  # of the training that runs
    _in_step = False  # whether forward and backward passes of a training step run
    _evaluated = False  # whether the evaluation that is ending was told already
    _bound = False  # whether the hooks go when the callback goes

    # --- on and off ------------------------------------------------------------------------------------------------

    def __enter__(self) -> DeadNeuronCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the hooks off the model, after a training that failed. Counts stay readable; harmless otherwise."""
        self._runs.detach(join=False)
        self._publisher.finish()
        self._training, self._handler = False, None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach to the model under its wrappers: it was prepared and loaded, and nothing has run yet."""
        self.detach()  # from a training that failed
        self._training, self._in_step, self._evaluated = True, False, False
        if not self._bound:
            weakref.finalize(self, self._runs.detach, join=False).atexit = False
            self._bound = True
        self._handler = handler_calling()
        if self._handler is None:
            self._warn("could not find the Trainer that it is called by: it counts, and logs nothing")
        self._take_up_saved(state)
        self._begin_training(model, 0)  # a training that is not resumed goes on with nothing
        self._move_to(state.global_step)
        self._stand_by()

    def _take_up_saved(self, state: Any) -> None:
        """Continue what the checkpoint holds that the training is resumed from."""
        folder, saved = resumed_folder(), None
        if folder is not None:
            with SuppressErrors("take up what was saved"):
                saved = load_state(folder, self.state_key)
        elif state.global_step:
            self._warn("could not find the folder that the training is resumed from: it counts from here")
        else:
            self._publisher.load_state_dict({})
        if saved is not None:
            self.load_state_dict(saved)

    def _warn(self, what: str) -> None:
        warnings.warn(f"{type(self).__name__} {what}.", NeuronscopeWarning, stacklevel=3)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, if the Trainer has logged no end of the training."""
        self._end_training(Event(args, state, control))
        self.detach()

    # --- training --------------------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What runs now counts as training, through all batches whose gradients are accumulated."""
        gate = self._runs.gate
        if gate is not None:
            self._in_step = True
            with self._faults:
                gate.leave(keep=False)
                gate.open()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last backward pass is over: what other callbacks run from here on is no training."""
        self._stand_by()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A report is due when a window closed."""
        gate = self._runs.gate
        if gate is not None:
            with self._faults:
                gate.leave(keep=False)
                gate.open()  # the step that ends is training's
        self._end_training_batch(Event(args, state, control), state.global_step)
        self._stand_by()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may come."""
        self._stand_by()

    def _stand_by(self) -> None:
        """Count what runs from now on as a pass of validation, until it is known to be one."""
        self._in_step = False
        gate = self._runs.gate
        if gate is not None:
            with self._faults:
                gate.leave(keep=False)
                gate.enter("val")
                gate.open()

    def _stop_training(self, run: Any, alarm: str) -> None:
        run.control.should_training_stop = True
        if run.state.is_world_process_zero:
            _LOGGER.warning("Neuronscope stops the training: %s", alarm)

    # --- evaluation ------------------------------------------------------------------------------------------------

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The Trainer logs: at the end of an evaluation, before any callback looks for a metric; at the end of all."""
        if not self._training or self._in_step:
            return
        event = Event(args, state, control, is_log=True)
        prefix = _evaluation(logs)
        if prefix is not None:
            self._end_pass(event, prefix, logs)
            self._evaluated = True
        elif f"train{_RUNTIME}" in logs:
            self._say_end(event)
        else:
            self._stand_by()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """An evaluation is over, and one window of its phase with it; another may come."""
        prefix = _evaluation(metrics)
        if not self._training or self._in_step:
            return
        if prefix is not None and not self._evaluated:
            self._end_pass(Event(args, state, control), prefix, metrics)
        self._evaluated = False
        self._stand_by()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """It was a prediction, and does not count."""
        if self._training and not self._in_step:
            self._stand_by()

    def _end_pass(self, event: Event, prefix: str, metrics: MutableMapping[str, float]) -> None:
        """Keep what was counted since the last event, and put the network's totals among the evaluation's metrics.

        They are there whatever happens, for a Trainer that misses the metric for its best model fails; and they are
        the first rank's, for ranks that disagree about the best model wait for each other for ever.
        """
        reports: dict[str, Report] = {}
        with self._faults:
            if self._runs.gate is not None:
                self._runs.gate.leave()
                reports["val"] = self._tell(event, "val")
                reports["train"] = self._watched().report("train")
        found = [totals(reports.get(phase), phase) for phase in ("train", "val")]
        if world_size() > 1:
            dist.broadcast_object_list(found)
        for values in found:
            metrics.update({f"{prefix}_{tag}": value for tag, value in values.items()})

    # --- telling and saving ----------------------------------------------------------------------------------------

    def _tell(self, run: Any, phase: str, *, final: bool = False) -> Report:
        report = self._watched().report(phase)
        if self._handler is not None and run.state.is_world_process_zero:
            self._publisher.publish(report, reporters(self._handler, self, run), run.state.global_step, final=final)
        return report

    def _say_end(self, event: Event) -> None:
        """The training is over, and the other callbacks' writers are still open."""
        report = self._end_training(event)
        if report is not None and event.state.is_world_process_zero:
            _LOGGER.info(summary(report))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what was counted beside the Trainer's own state, what other ranks counted included."""
        gate = self._runs.gate
        if gate is None or state.is_hyper_param_search:
            return  # of a trial no callback knows the folder
        self._stand_by()
        with SuppressErrors("save what was counted"):
            counted = self.state_dict(join=True)
            if args.should_save:
                folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                save_state(folder, self.state_key, counted)


def _evaluation(metrics: Any) -> str | None:
    """The prefix of the evaluation that gave these metrics, ``eval`` unless the user chose it; ``None`` for others."""
    keys = (key for key in metrics or () if key.endswith(_RUNTIME) and key != f"train{_RUNTIME}")
    return next((key.removesuffix(_RUNTIME) for key in keys), None)
