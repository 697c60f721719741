"""The callback for Hugging Face: it watches a training of ``transformers.Trainer``.

This file only says when; the rest is in :class:`neuronscope.callbacks.Monitor`. The Trainer says when a training step
begins and ends, but not when an evaluation begins, nor whether it is an evaluation or a prediction. So what the model
runs between two steps is counted as a pass of validation, and kept only if the Trainer then says that an evaluation is
over; otherwise it is discarded.
"""

# ruff: noqa: ARG002  # an event has the arguments that the Trainer passes

from __future__ import annotations

import dataclasses
import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from neuronscope.errors import MissingExtraError, warn_user

try:
    from transformers.trainer_callback import CallbackHandler, TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        f"Expected transformers for `DeadNeuronCallback`, but it could not be imported ({error}): "
        "pip install 'neuronscope[transformers]'"
    ) from error

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from neuronscope.callbacks.hf_trainer import (
    Event,
    calling_handler,
    load_state,
    resumed_folder,
    save_state,
    trainer_logs,
)
from neuronscope.callbacks.monitor import Monitor
from neuronscope.callbacks.publishing import summary, totals
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.report.report import Report
from neuronscope.tally.distributed.sync import world_size
from neuronscope.writers.formatting import percent

__all__ = ["DeadNeuronCallback"]

_LOGGER = logging.getLogger("transformers.neuronscope")
#: Ends a key in what the Trainer logs at the end of an evaluation, after the evaluation's prefix.
_RUNTIME = "_runtime"


class DeadNeuronCallback(Monitor, TrainerCallback):
    """Watches which neurons die while a Hugging Face Trainer trains, and shows it where the Trainer reports.

    Scalars go to every callback that the Trainer reports to, pictures, diagnosis and tab to a file beside
    TensorBoard's. The metrics of an evaluation hold ``eval_neuronscope/dead_pct`` (of training so far),
    ``eval_neuronscope/val_dead_pct`` and the like for ``metric_for_best_model`` and ``EarlyStoppingCallback``. The
    counts are saved in the Trainer's checkpoints, as ``neuronscope.pt``, and a resumed training continues them. Steps
    of training count, and evaluations in training as phase ``val``; predictions, and evaluations before or after
    training, do not. What a step runs without gradients (a reference model, generation) counts as phase ``inference``.
    Padding is not counted: ``mask`` is ``"attention_mask"`` unless it is given. In eager mode the weights are the same,
    bit for bit, with the callback and without.

    The Trainer does not tell its callbacks when a training ends in an exception. The hooks then stay on the model until
    the next training begins, the callback is collected, or :meth:`detach` is called. As a context manager the callback
    detaches by itself.

    Raises:
        UsageError: An argument is not what is expected.

    >>> from neuronscope.callbacks.transformers import DeadNeuronCallback
    >>> callback = DeadNeuronCallback(every_n_steps=10, on_dead="stop", threshold=30)
    >>> # Trainer(model, callbacks=[callback], ...).train(), then:
    >>> # print(callback.report())
    """

    step_is_model = False
    default_mask = "attention_mask"
    how_to_use = "give it to a Trainer (`Trainer(model, callbacks=[callback])`) and train a model that has activations"
    _training = False
    _handler: CallbackHandler | None = None  # of the training that runs
    _in_step = False  # whether forward and backward passes of a training step run
    _evaluation_logged = False  # whether the evaluation that is ending was handled when it was logged

    def detach(self, *, join: bool = False) -> None:
        """Take the hooks off the model after a training that failed. Counts stay readable; twice is harmless.

        Args:
            join: See :meth:`neuronscope.callbacks.Monitor.detach`.
        """
        super().detach(join=join)
        self._training, self._handler, self.logs, self.optimizers = False, None, (), ()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach to the model under its wrappers: it was prepared and loaded, and nothing has run yet."""
        self.detach()  # from a training that failed
        self._training, self._in_step, self._evaluation_logged = True, False, False
        self._handler = calling_handler()
        self.hyperparameters = _changed(args)
        self.console = _LOGGER if state.is_world_process_zero else None
        if self._handler is None:
            self._warn("could not find the Trainer that called it: it counts, and logs nothing")
        self._load_counts(state)
        self.attach(model)  # at step 0: a training that is not resumed begins with no counts
        self.move_to(state.global_step)
        self._await_evaluation()

    def _load_counts(self, state: Any) -> None:
        """Continue the counts of the checkpoint that the training is resumed from."""
        folder, saved = resumed_folder(), None
        if folder is not None:
            with SuppressErrors("take up what was saved"):
                saved = load_state(folder, self.state_key)
        elif state.global_step:
            self._warn("could not find the folder that the training is resumed from: it counts from here")
        else:
            self.restart_logs()
        if saved is not None:
            self.load_state_dict(saved)

    def _warn(self, problem: str) -> None:
        warn_user(f"{type(self).__name__} {problem}.")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, if the Trainer has logged no end of the training."""
        self._find_logs(Event(args, state, control))
        self.finish(step=state.global_step)
        self.detach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what runs now as training, through all batches whose gradients are accumulated."""
        self._in_step = self.attached
        self.discard_evaluation()
        self.begin_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting training after the last backward pass: what other callbacks run next is not training."""
        self._await_evaluation()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Count the optimizer step, and publish a report if a window closed."""
        self.optimizers = () if optimizer is None else (optimizer,)
        self._find_logs(Event(args, state, control))
        self.discard_evaluation()
        self.begin_batch()  # the step that ends belongs to training
        reason = self.stop_reason
        self.step(state.global_step)
        if self.prog_bar and self.dead_percent is not None:
            self._show_in_bar(f"dead {percent(self.dead_percent)}")
        if self.stop_reason != reason:
            control.should_training_stop = True
            if state.is_world_process_zero:
                _LOGGER.warning("Neuronscope stops the training: %s", self.stop_reason)
        self._await_evaluation()

    def _show_in_bar(self, text: str) -> None:
        """Show a few words beside the Trainer's progress bar, if it has one that can."""
        for callback in () if self._handler is None else self._handler.callbacks:
            show = getattr(getattr(callback, "training_bar", None), "set_postfix_str", None)
            if show is not None:
                show(text, refresh=False)  # the bar's next update shows it: drawing it anew at each step takes time

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare for an evaluation."""
        self._await_evaluation()

    def _await_evaluation(self) -> None:
        """Count what runs from now on as a pass of validation, which is kept if an evaluation ends."""
        self._in_step = False
        self.discard_evaluation()
        self.begin_evaluation("val")
        self.begin_batch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Handle the end of an evaluation, before any callback looks for a metric, and the end of the training."""
        if self._training and logs and not any(key.endswith(_RUNTIME) for key in logs):
            self.note_metrics(logs)
        if not self._training or self._in_step:
            return
        event = Event(args, state, control, is_log=True)
        prefix = _evaluation_prefix(logs)
        if prefix is not None:
            self._end_pass(event, prefix, logs)
            self._evaluation_logged = True
        elif f"train{_RUNTIME}" in logs:
            self._end_training(event)
        else:
            self._await_evaluation()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """End the pass of validation, which is one window; another may come."""
        prefix = _evaluation_prefix(metrics)
        if not self._training or self._in_step:
            return
        if prefix is not None and not self._evaluation_logged:
            self._end_pass(Event(args, state, control), prefix, metrics)
        self._evaluation_logged = False
        self._await_evaluation()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Discard what was counted: it was a prediction."""
        if self._training and not self._in_step:
            self._await_evaluation()

    def _end_pass(self, event: Event, prefix: str, metrics: MutableMapping[str, float]) -> None:
        """Keep the pass of validation, and add the network's totals to the evaluation's metrics.

        The totals are added whatever fails, because a Trainer that misses the metric for its best model raises. All
        ranks get those of the first rank, because ranks that disagree about the best model wait for each other forever.
        """
        self._find_logs(event)
        reports: dict[str, Report | None] = {"val": self.end_evaluation(step=event.state.global_step), "train": None}
        if self.attached:
            with self.suppress_errors:
                reports["train"] = self.report("train")
        found = [totals(reports[phase], phase) for phase in ("train", "val")]
        if world_size() > 1:
            dist.broadcast_object_list(found)
        for values in found:
            metrics.update({f"{prefix}_{tag}": value for tag, value in values.items()})

    def _find_logs(self, event: Event) -> None:
        """Set ``logs`` to everything that the Trainer reports to, on the first rank."""
        handler = self._handler if event.state.is_world_process_zero else None
        self.logs = () if handler is None else trainer_logs(handler, self, event)
        self.folder = None if handler is None else event.args.output_dir

    def _end_training(self, event: Event) -> None:
        """End the training while the other callbacks' writers are still open, and log one line about it."""
        self._find_logs(event)
        report = self.finish(step=event.state.global_step)
        if report is not None and event.state.is_world_process_zero:
            _LOGGER.info(summary(report))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the counts of all ranks beside the Trainer's own state."""
        if not self.attached or state.is_hyper_param_search:
            return  # callbacks do not know the folder of a trial
        self._await_evaluation()
        with SuppressErrors("save what was counted"):
            counted = self.state_dict(join=True)
            if args.should_save:
                folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                save_state(folder, self.state_key, counted)


def _changed(args: Any) -> dict[str, Any]:
    """Return the arguments of a training that differ from their defaults, without names and paths.

    Of what an unknown trainer gives in their place nothing is known.
    """
    if not dataclasses.is_dataclass(args) or not hasattr(args, "to_sanitized_dict"):
        return {}
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    found = {name: value for name, value in args.to_sanitized_dict().items() if isinstance(value, (bool, int, float))}
    return {name: value for name, value in found.items() if name in defaults and value != defaults[name]}


def _evaluation_prefix(metrics: Any) -> str | None:
    """Return the prefix of the evaluation that gave these metrics, by default ``eval``; ``None`` for other metrics."""
    keys = (key for key in metrics or () if key.endswith(_RUNTIME) and key != f"train{_RUNTIME}")
    return next((key.removesuffix(_RUNTIME) for key in keys), None)
