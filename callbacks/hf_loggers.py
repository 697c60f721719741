"""The logs of a Hugging Face Trainer, as :class:`neuronscope.callbacks.Log`.

The Trainer reports through callbacks: each has an ``on_log``. They are called one by one here rather than through
``Trainer.log``, because some Trainers override it to add numbers of their own, whose averages they then reset.
"""

# ruff: noqa: ARG002  # some logs take the step from the event

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from neuronscope.callbacks.attachments import tracker_of
from neuronscope.callbacks.logs import Log, SummaryWriterLog

__all__ = ["Event", "trainer_logs"]


class Event(NamedTuple):
    """The arguments of a Trainer's event.

    Attributes:
        args: ``TrainingArguments``.
        state: ``TrainerState``.
        control: ``TrainerControl``.
        is_log: Whether the event is ``on_log``: the Trainer is logging something itself.
    """

    args: Any
    state: Any
    control: Any
    is_log: bool = False


def trainer_logs(handler: CallbackHandler, own: TrainerCallback, event: Event) -> list[Log]:
    """Return everything that a Trainer reports to.

    Args:
        handler: Holds the Trainer's callbacks.
        own: The callback that reports; it is left out.
        event: The event in which this happens.
    """
    logs: list[Log] = [_HistoryLog(event.state, before_last=event.is_log)]
    for place, callback in enumerate(handler.callbacks):
        if callback is own or type(callback).on_log is TrainerCallback.on_log:
            continue
        kind = _TensorBoardLog if isinstance(callback, TensorBoardCallback) else _CallbackLog
        logs.append(kind(place, callback, handler, event))
    return logs


def _network_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the few numbers of the whole network: those of every layer would fill a console."""
    return {tag: value for tag, value in metrics.items() if tag.startswith(("neuronscope/", "neuronscope.more/"))}


class _HistoryLog:
    """Writes to ``TrainerState.log_history``, which the Trainer saves in its checkpoints.

    The Trainer's own entry stays the last one of its event: users look for it there.
    """

    key = "log_history"

    def __init__(self, state: Any, *, before_last: bool) -> None:
        self._state = state
        self._before_last = before_last

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        history = self._state.log_history
        place = len(history) - 1 if self._before_last and history else len(history)
        history.insert(place, {**_network_only(metrics), "epoch": self._state.epoch, "step": step})

    def event_folder(self) -> None:
        return None


class _CallbackLog:
    """Writes through a callback's ``on_log``: Weights & Biases', MLflow's, the one that prints, a user's own."""

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
            logs=dict(metrics) if keeps_all else _network_only(metrics),
            model=handler.model,
            processing_class=handler.processing_class,
            optimizer=handler.optimizer,
            lr_scheduler=handler.lr_scheduler,
            train_dataloader=handler.train_dataloader,
            eval_dataloader=handler.eval_dataloader,
        )

    @property
    def tracker(self) -> tuple[str, Any] | None:
        return tracker_of(self._callback)

    def event_folder(self) -> str | None:
        return None


class _TensorBoardLog(_CallbackLog):
    """Writes tags as they are to TensorBoard, where the Trainer would put ``train/`` before each of them."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        writer = self._writer()
        if writer is not None:
            writer.log_metrics(metrics, step)

    def event_folder(self) -> str | None:
        writer = self._writer()
        return None if writer is None else writer.event_folder()

    def list_hyperparameters(self, hyperparameters: Mapping[str, Any], tags: Iterable[str], *, at_start: bool) -> None:
        writer = self._writer()
        if writer is not None:
            writer.list_hyperparameters(hyperparameters, tags, at_start=at_start)

    def _writer(self) -> SummaryWriterLog | None:
        writer = getattr(self._callback, "tb_writer", None)
        return None if writer is None else SummaryWriterLog(writer)
