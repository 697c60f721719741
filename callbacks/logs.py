"""Where a callback writes numbers: the protocol of a log, and the log for TensorBoard's ``SummaryWriter``."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from neuronscope.writers.tensorboard import EventWriter, folder_of

__all__ = ["Log", "SummaryWriterLog", "list_in_hparams", "series_of"]

#: How trainers and their users name what a report shows beside deaths.
_NAMES = {
    "learning_rate": re.compile(r"(train[/_])?(learning_rate|lr)([-/].*)?"),
    "loss": re.compile(r"(train(ing)?[/_])?loss(_step)?"),
    "gradient_norm": re.compile(r"(train[/_])?grad(ient)?(_(\d+(\.\d+)?|inf))?_norm(_total)?"),
}


def series_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the learning rate, the loss and the gradient norm among a trainer's metrics, under these names.

    Metrics are numbers, or tensors of one element, by the trainer's names. What is neither is left out.

    >>> loss = torch.tensor(0.75, requires_grad=True)
    >>> series_of({"train/loss": loss, "grad_2.0_norm_total": 3.0, "lr-Adam": 0.001, "eval_loss": 9.0})
    {'loss': 0.75, 'gradient_norm': 3.0, 'learning_rate': 0.001}
    """
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name = _series_name(key)
        if name is None or name in found:
            continue
        if isinstance(value, (int, float)):
            found[name] = float(value)
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            found[name] = float(value.item())
    return found


@functools.lru_cache(maxsize=4096)  # a trainer logs the same names at each step
def _series_name(key: str) -> str | None:
    """Return which series a trainer's name stands for; ``None`` if it is another metric."""
    return next((name for name, pattern in _NAMES.items() if pattern.fullmatch(key)), None)


def list_in_hparams(writer: Any, hyperparameters: Mapping[str, Any], tags: Iterable[str]) -> None:
    """List a run in TensorBoard's HParams tab: its hyperparameters, beside the newest values of some scalars.

    It stands in the run's own folder. Of several such lists of a run, TensorBoard takes the first.

    Args:
        writer: ``SummaryWriter`` of torch or tensorboardX; one that was closed is left alone.
        hyperparameters: Values by name; what is neither a number nor a text is listed as text.
        tags: Tags of the scalars.
    """
    file_writer = writer.file_writer
    if file_writer is None:
        return
    if type(file_writer).__module__.partition(".")[0] == "tensorboardX":  # accepts only protos of its own
        from tensorboardX.summary import hparams
    else:
        from torch.utils.tensorboard.summary import hparams
    for summary in hparams(dict(_flat(hyperparameters)), dict.fromkeys(tags, 0.0)):
        file_writer.add_summary(summary, 0)
    writer.flush()


def _flat(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values of nested mappings under names such as ``optimizer/lr``, as the trainers do."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{name}/")
        else:
            yield f"{place}{name}", value if isinstance(value, (bool, int, float, str)) else str(value)


class Log(Protocol):
    """A place where a run's numbers are written. Each callback wraps the loggers of its trainer in such objects."""

    @property
    def key(self) -> str:
        """Identifies the log among those of the run, and again when the run is resumed."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> Any:
        """Write numbers at a step.

        Args:
            metrics: Numbers by tag, such as ``neuronscope/dead_pct``.
            step: The trainer's optimizer step.
        """

    def event_folder(self) -> str | None:
        """Return the folder of TensorBoard's event files, for the pictures; ``None`` if the log has no such folder."""


class SummaryWriterLog:
    """A log that writes through a ``SummaryWriter`` of ``torch.utils.tensorboard`` or of ``tensorboardX``.

    Numbers go through the writer. Pictures, diagnosis and tab go to an event file of Neuronscope's own, in the
    folder ``neuronscope`` inside the writer's folder. The writer stays open: whoever made it closes it.

    Args:
        writer: The ``SummaryWriter``.

    >>> import tempfile
    >>> from torch.utils.tensorboard import SummaryWriter
    >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
    ...     log = SummaryWriterLog(writer)
    ...     log.log_metrics({"neuronscope/dead_pct": 12.5}, step=100)
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    @property
    def key(self) -> str:
        """The writer's folder: a run that is resumed in the same folder continues the same charts."""
        return f"SummaryWriter:{self.event_folder() or ''}"

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write numbers at a step.

        Args:
            metrics: Numbers by tag.
            step: The trainer's optimizer step.
        """
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()  # now: the writer's thread would keep an error, and raise it in the training

    def event_folder(self) -> str | None:
        """Return the writer's folder; ``None`` if it names none."""
        return folder_of(self._writer)

    def list_hyperparameters(self, hyperparameters: Mapping[str, Any], tags: Iterable[str], *, at_start: bool) -> None:
        """List the run in TensorBoard's HParams tab at its end, so that a list of the user's own comes first.

        Args:
            hyperparameters: Values by name.
            tags: Tags of the final numbers.
            at_start: Whether the run begins; otherwise it ends.
        """
        if not at_start:
            list_in_hparams(self._writer, hyperparameters, tags)
