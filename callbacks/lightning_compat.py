"""What differs between the Lightning packages: the callback class that a Trainer expects, and where it logs.

``pytorch_lightning`` and ``lightning.pytorch`` hold the same code under two names, so that a callback can be a true
subclass of both. All that are installed are joined, whichever is imported first, and however late: they share torch and
most of what else they load, so that the second costs about a tenth of a second.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from neuronscope.callbacks.attachments import tracker_of
from neuronscope.callbacks.logs import list_in_hparams
from neuronscope.errors import MissingExtraError
from neuronscope.writers.tensorboard import folder_of

__all__ = [
    "FRAMEWORKS",
    "LightningLog",
    "hyperparameters_of",
    "joined_callback",
    "known_metrics",
    "logged_step",
    "logger_of",
    "step_inputs",
]

#: Packages that have a Trainer.
FRAMEWORKS = ("pytorch_lightning", "lightning.pytorch")


def joined_callback() -> type[Any]:
    """Return a subclass of the ``Callback`` of every installed framework.

    Raises:
        MissingExtraError: No framework is installed.
    """
    found = [_import_callback(name) for name in FRAMEWORKS]
    bases = [callback for callback in found if isinstance(callback, type)]
    errors = [error for error in found if isinstance(error, Exception)]
    if not bases:
        raise MissingExtraError(
            "Expected Lightning for `DeadNeuronMonitor`, but neither `pytorch_lightning` nor `lightning` could be "
            f"imported ({'; '.join(str(error) for error in errors)}): pip install pytorch-lightning"
        ) from errors[-1]
    return type("Callback", tuple(bases), {"__module__": __name__, "__doc__": "Callback of every installed framework."})


def _import_callback(name: str) -> type[Any] | Exception:
    try:
        callback: type[Any] = importlib.import_module(name).Callback
    except Exception as error:  # noqa: BLE001  # absent, or broken: then the other one is the user's
        return error
    return callback


def logger_of(trainer: Any) -> logging.Logger:
    """Return a Python logger whose lines are shown where the Trainer's own are: a child of the framework's logger."""
    for kind in type(trainer).__mro__:
        for name in FRAMEWORKS:
            if kind.__module__.startswith(f"{name}."):
                return logging.getLogger(f"{name}.neuronscope")
    return logging.getLogger("neuronscope")


def logged_step(trainer: Any) -> int:
    """Return the step under which the Trainer logs now, on which its loggers' rows and curves lie.

    While a batch ends, and in the validation after it, that is one less than the optimizer steps taken; and it counts
    batches, where several optimizers step in each. The Trainer has no public name for it; without its own one, the
    optimizer steps are taken.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def known_metrics(trainer: Any, outputs: Any, seen: dict[str, Any], *, synchronise: bool) -> dict[str, Any]:
    """Return what is known of a batch of training: the learning rate, its loss, and what was logged since the last one.

    Args:
        trainer: The Trainer.
        outputs: What its training step returned.
        seen: What was logged before, by name; brought up to date.
        synchronise: Whether to wait for numbers that are on an accelerator. The Trainer's public ``logged_metrics``
            would compute metrics, perhaps together with other ranks, so that what it has logged is read instead.
    """
    logged = getattr(getattr(trainer, "_logger_connector", None), "_logged_metrics", {})
    metrics = {name: value for name, value in logged.items() if seen.get(name) is not value}
    seen.update(metrics)
    if isinstance(outputs, Mapping) and "loss" in outputs:
        metrics["loss"] = outputs["loss"]
    elif isinstance(outputs, torch.Tensor):
        metrics["loss"] = outputs
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if groups:
        metrics["lr"] = groups[0].get("lr")
    return {
        name: value
        for name, value in reversed(metrics.items())  # the batch's own loss first
        if not isinstance(value, torch.Tensor) or synchronise or value.device.type == "cpu"
    }


def step_inputs(batch: Any, loader: Any) -> tuple[Any, ...]:
    """Return what a step is given, as the arguments of a forward are: the inputs one by one, where they are known.

    A list of tensors may be a list of examples or a list of inputs. Torch's own way to make a batch gives a list of
    inputs, each with a row for every example.

    Args:
        batch: The batch.
        loader: The loader that made it, or several of which all gave a part.

    >>> step_inputs([1, 2], DataLoader([(1, 2)])), step_inputs([1, 2], DataLoader([1, 2], collate_fn=list))
    ((1, 2), ([1, 2],))
    """
    listed = isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")
    usual = isinstance(loader, DataLoader) and loader.batch_sampler is not None and loader.collate_fn is default_collate
    return tuple(batch) if listed and usual else (batch,)


class LightningLog:
    """One of a Trainer's loggers as a :class:`neuronscope.callbacks.Log`."""

    def __init__(self, place: int, logger: Any) -> None:
        self._logger = logger
        self._place = place

    @property
    def key(self) -> str:
        """The logger's place, class, name and version."""
        logger = self._logger
        return f"{self._place}:{type(logger).__name__}:{logger.name}:{logger.version}"

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write numbers at a step.

        Args:
            metrics: Numbers by tag.
            step: The Trainer's optimizer step.
        """
        self._logger.log_metrics(metrics, step)
        if self.event_folder() is not None:
            # Written now: the writer's thread would keep an error, and raise it in the training.
            self._logger.experiment.flush()

    @property
    def tracker(self) -> tuple[str, Any] | None:
        """Where the page goes besides a folder; see :func:`neuronscope.callbacks.attachments.tracker_of`."""
        return tracker_of(self._logger)

    def event_folder(self) -> str | None:
        """Return the folder of TensorBoard's writer; ``None`` if the logger is no ``TensorBoardLogger``."""
        # By name: each framework has a `TensorBoardLogger` of its own.
        is_tensorboard = any(kind.__name__ == "TensorBoardLogger" for kind in type(self._logger).__mro__)
        return folder_of(self._logger.experiment) if is_tensorboard else None

    def list_hyperparameters(self, hyperparameters: Mapping[str, Any], tags: Iterable[str], *, at_start: bool) -> None:
        """List the run in TensorBoard's HParams tab, if the logger is a ``TensorBoardLogger``.

        Lightning lists a run when it begins, with the metric ``hp_metric``. TensorBoard takes the first list of a run,
        so ours comes before, with that metric in it. With ``default_hp_metric=False`` the user may list metrics later;
        then ours comes at the end.

        Args:
            hyperparameters: Values by name.
            tags: Tags of the final numbers.
            at_start: Whether the run begins; otherwise it ends.
        """
        default = getattr(self._logger, "_default_hp_metric", False)
        if self.event_folder() is None or at_start != default:
            return
        prefix = getattr(self._logger, "_prefix", "")
        found = [f"{prefix}-{tag}" if prefix else tag for tag in (*tags, *(["hp_metric"] if default else []))]
        list_in_hparams(self._logger.experiment, hyperparameters, found)


def hyperparameters_of(trainer: Any) -> dict[str, Any]:
    """Return the hyperparameters that a Trainer's module and data module saved for its loggers."""
    found: dict[str, Any] = {}
    for holder in (trainer.datamodule, trainer.lightning_module):
        if getattr(holder, "_log_hyperparams", False):
            found.update(holder.hparams_initial)
    return found
