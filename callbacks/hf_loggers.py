"""Reporters: where a Hugging Face Trainer reports, as :class:`neuronscope.callbacks.publishing.Publisher` sees it.

The Trainer reports through callbacks: each has an ``on_log``. They are called one by one here rather than through
``Trainer.log``, which some Trainers extend by numbers of their own that they then start to count anew.
"""

# ruff: noqa: ARG002  # some logs take the step from the event

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from neuronscope.callbacks.publishing import Log
from neuronscope.writers.tensorboard import folder_of

__all__ = ["Event", "reporters"]


class Event(NamedTuple):
    """What a Trainer's event is about.

    Attributes:
        args: ``TrainingArguments``.
        state: ``TrainerState``.
        control: ``TrainerControl``.
        is_log: Whether the Trainer logs something itself just now.
    """

    args: Any
    state: Any
    control: Any
    is_log: bool = False


def reporters(handler: CallbackHandler, own: TrainerCallback, event: Event) -> list[Log]:
    """Everything that a Trainer reports to.

    Args:
        handler: Holds the Trainer's callbacks.
        own: The callback that reports; it is left out.
        event: In which this happens.
    """
    found: list[Log] = [_TrainerLog(event.state, before_last=event.is_log)]
    for place, callback in enumerate(handler.callbacks):
        if callback is own or type(callback).on_log is TrainerCallback.on_log:
            continue
        kind = _Board if isinstance(callback, TensorBoardCallback) else _Reporter
        found.append(kind(place, callback, handler, event))
    return found


def _of_the_network(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers of the whole network: those of sites would fill a console."""
    return {tag: value for tag, value in metrics.items() if tag.startswith(("neuronscope/", "neuronscope.more/"))}


class _TrainerLog:
    """``TrainerState.log_history``, which the Trainer saves in its checkpoints.

    The Trainer's own entry stays the last one of its event: users look for it there.
    """

    key = "log_history"

    def __init__(self, state: Any, *, before_last: bool) -> None:
        self._state = state
        self._before_last = before_last

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        history = self._state.log_history
        place = len(history) - 1 if self._before_last and history else len(history)
        history.insert(place, {**_of_the_network(metrics), "epoch": self._state.epoch, "step": step})

    def event_folder(self) -> None:
        return None


class _Reporter:
    """A callback that listens to ``on_log``: Weights & Biases', MLflow's, the printing one, a user's own."""

    def __init__(self, place: int, callback: TrainerCallback, handler: CallbackHandler, event: Event) -> None:
        self.key = f"{place}:{type(callback).__name__}"
        self._callback = callback
        self._handler = handler
        self._event = event

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        keeps_all = isinstance(self._callback, tuple(INTEGRATION_TO_CALLBACK.values()))
        handler = self._handler
        self._callback.on_log(
            self._event.args,
            self._event.state,
            self._event.control,
            logs=dict(metrics) if keeps_all else _of_the_network(metrics),
            model=handler.model,
            processing_class=handler.processing_class,
            optimizer=handler.optimizer,
            lr_scheduler=handler.lr_scheduler,
            train_dataloader=handler.train_dataloader,
            eval_dataloader=handler.eval_dataloader,
        )

    def event_folder(self) -> str | None:
        return None


class _Board(_Reporter):
    """TensorBoard's: the tags are written as they are, where the Trainer would put ``train/`` before each of them."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        writer = self._writer()
        if writer is not None:
            for tag, value in metrics.items():
                writer.add_scalar(tag, value, step)

    def event_folder(self) -> str | None:
        return folder_of(self._writer())

    def _writer(self) -> Any | None:
        return getattr(self._callback, "tb_writer", None)
