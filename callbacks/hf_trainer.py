"""What a Hugging Face callback needs of its Trainer: who called it, where it logs, and a file in its checkpoints.

A ``TrainerCallback`` gets neither the Trainer nor its other callbacks, nor the folder that a training is resumed from.
All of these are local variables of the functions that called it. They are looked up there, once a training.

The Trainer reports through callbacks: each has an ``on_log``. They are called one by one here rather than through
``Trainer.log``, because some Trainers override it to add numbers of their own, whose averages they then reset.

The counts are a file of their own in a checkpoint's folder. It holds tensors and primitives, is read without
unpickling, and maps the ``state_key`` of each callback that watched the training to its state, as the ``callbacks`` of
a Lightning checkpoint do.
"""

# ruff: noqa: ARG002  # some logs take the step from the event

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from neuronscope.callbacks.attachments import tracker_of
from neuronscope.callbacks.logs import Log, SummaryWriterLog
from neuronscope.errors import StateError

__all__ = ["FILE", "Event", "calling_handler", "load_state", "resumed_folder", "save_state", "trainer_logs"]

#: The file's name in a checkpoint folder.
FILE = "neuronscope.pt"


def calling_handler() -> CallbackHandler | None:
    """Return the handler that called the callback; ``None`` if something else called it."""
    owners = (names.get("self") for names in _callers())
    return next((owner for owner in owners if isinstance(owner, CallbackHandler)), None)


def resumed_folder() -> Path | None:
    """Return the checkpoint folder that the Trainer resumes from; ``None`` if it begins anew.

    ``resume_from_checkpoint`` is the public argument of ``Trainer.train``; by now the Trainer has made it a path.
    """
    for names in _callers():
        owner, folder = names.get("self"), names.get("resume_from_checkpoint")
        if hasattr(owner, "callback_handler") and isinstance(folder, (str, os.PathLike)):
            return Path(folder)
    return None


def _callers() -> Iterator[dict[str, Any]]:
    """Yield the local variables of every calling function, the nearest first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]


class Event(NamedTuple):
    """The arguments of a Trainer's event."""

    args: Any  # ``TrainingArguments``
    state: Any  # ``TrainerState``
    control: Any  # ``TrainerControl``
    is_log: bool = False  # whether the event is ``on_log``: the Trainer is logging something itself


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


def save_state(folder: Path, key: str, state: dict[str, Any]) -> None:
    """Save a callback's state beside those of others. If the process dies, the file is whole or missing.

    Args:
        folder: The checkpoint's folder, which must exist.
        key: The callback's ``state_key``.
        state: Tensors and primitives.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_state(folder, "Callback{}", {"version": 1})
    >>> load_state(folder, "Callback{}"), load_state(folder, "Another{}")
    ({'version': 1}, None)
    """
    unfinished = folder / f"{FILE}.part"
    torch.save({**_load(folder), key: state}, unfinished)
    unfinished.replace(folder / FILE)


def load_state(folder: Path, key: str) -> dict[str, Any] | None:
    """Load the state that a callback saved; ``None`` if none did, StateError if something else wrote the file.

    Args:
        folder: The checkpoint's folder.
        key: The callback's ``state_key``.
    """
    return _load(folder).get(key)


def _load(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        states: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise StateError(f"Expected {path} to hold saved counts, but it could not be read: {error}") from error
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise StateError(f"Expected {path} to map callbacks to their states, but it holds something else.")
    return states
