"""Lightning's Trainers: which callback class they expect, and where they log.

``pytorch_lightning`` and ``lightning.pytorch`` hold the same code under two names, so that a callback can be a true
subclass of both. All that are installed are joined, whichever is imported first, and however late: they share torch and
most of what else they load, so that the second costs about a tenth of a second.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from neuronscope.errors import MissingExtraError
from neuronscope.writers.tensorboard import folder_of

__all__ = ["FRAMEWORKS", "LightningLog", "joined_callback", "logger_of"]

#: Packages that have a Trainer.
FRAMEWORKS = ("pytorch_lightning", "lightning.pytorch")


def joined_callback() -> type[Any]:
    """A subclass of the ``Callback`` of every framework that is installed.

    Raises:
        MissingExtraError: None is.
    """
    found = [_callback_of(name) for name in FRAMEWORKS]
    bases = [callback for callback in found if isinstance(callback, type)]
    faults = [fault for fault in found if isinstance(fault, Exception)]
    if not bases:
        raise MissingExtraError(
            "Expected Lightning for `DeadNeuronMonitor`, but neither `pytorch_lightning` nor `lightning` could be "
            f"imported ({'; '.join(str(fault) for fault in faults)}): pip install pytorch-lightning"
        ) from faults[-1]
    return type("Callback", tuple(bases), {"__module__": __name__, "__doc__": "Callback of every installed framework."})


def _callback_of(name: str) -> type[Any] | Exception:
    try:
        callback: type[Any] = importlib.import_module(name).Callback
    except Exception as error:  # noqa: BLE001  # absent, or broken: then the other one is the user's
        return error
    return callback


def logger_of(trainer: Any) -> logging.Logger:
    """A logger whose lines are shown where the Trainer's own are: ``neuronscope`` below the framework's logger."""
    for kind in type(trainer).__mro__:
        for name in FRAMEWORKS:
            if kind.__module__.startswith(f"{name}."):
                return logging.getLogger(f"{name}.neuronscope")
    return logging.getLogger("neuronscope")


class LightningLog:
    """One of a Trainer's loggers, as the publisher sees it.

    Args:
        place: Its place in the Trainer's list.
        logger: The logger.
    """

    def __init__(self, place: int, logger: Any) -> None:
        self._logger = logger
        self._place = place

    @property
    def key(self) -> str:
        """Its place, kind, name and version."""
        logger = self._logger
        return f"{self._place}:{type(logger).__name__}:{logger.name}:{logger.version}"

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write numbers by tag."""
        self._logger.log_metrics(metrics, step)

    def event_folder(self) -> str | None:
        """Return the folder of TensorBoard's writer; each framework has a ``TensorBoardLogger`` of its own."""
        is_board = any(kind.__name__ == "TensorBoardLogger" for kind in type(self._logger).__mro__)
        return folder_of(self._logger.experiment) if is_board else None
