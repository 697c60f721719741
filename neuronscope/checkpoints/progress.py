"""Report the progress of reading a checkpoint and of scanning batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint, OptimizerState, StoredTensor
from neuronscope.checkpoints.data.user_arguments import check_batches

__all__ = ["Progress", "track_batches", "track_reading"]

#: ``progress(what, done, total)``: the task, how many of its items are done, and of how many (``None`` = not known).
Progress = Callable[[str, int, "int | None"], None]


class _ReadProgress:
    """Counts the tensors of a checkpoint that were read at least once."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._done = 0
        progress(what, 0, total)

    def count_one(self) -> None:
        self._done += 1
        self._progress(self._what, self._done, self._total)


@dataclass
class _TrackedTensor:
    """A stored tensor that is counted when it is read for the first time."""

    tensor: StoredTensor
    read_progress: _ReadProgress
    was_read: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def read(self) -> Tensor:
        values = self.tensor.read()
        if not self.was_read:
            self.was_read = True
            self.read_progress.count_one()
        return values


def track_reading(checkpoint: Checkpoint, what: str, progress: Progress | None) -> Checkpoint:
    """Return the checkpoint with tensors that report to ``progress`` when they are read.

    Args:
        checkpoint: The opened checkpoint.
        what: Name of the task, passed to ``progress``.
        progress: The function to call; with ``None`` the checkpoint is returned unchanged.
    """
    if progress is None:
        return checkpoint
    in_slots = sum(
        not isinstance(value, (int, float))
        for optimizer in checkpoint.optimizers
        for slots in optimizer.slots.values()
        for value in slots.values()
    )
    read_progress = _ReadProgress(what, len(checkpoint.tensors) + in_slots, progress)

    def track(value: StoredTensor | float) -> StoredTensor | float:
        return value if isinstance(value, (int, float)) else _TrackedTensor(value, read_progress)

    def track_optimizer(optimizer: OptimizerState) -> OptimizerState:
        slots = {key: {name: track(value) for name, value in kept.items()} for key, kept in optimizer.slots.items()}
        return replace(optimizer, slots=slots)

    tensors: Mapping[str, StoredTensor] = {
        name: _TrackedTensor(tensor, read_progress) for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors, optimizers=tuple(map(track_optimizer, checkpoint.optimizers)))


def track_batches(
    data: Iterable[Any], what: str, progress: Progress | None, *on_batch: Callable[[Any], None]
) -> Iterator[Any]:
    """Yield the batches of ``data``, and report each one to ``progress`` after it was used.

    Args:
        data: The user's batches; each is checked to be one.
        what: Name of the task, passed to ``progress``.
        progress: The function to call, or ``None``.
        on_batch: Functions that are called with each batch before it is yielded.
    """
    total = length_hint(data, -1) if progress is not None else -1
    for done, batch in enumerate(check_batches(data), start=1):
        for function in on_batch:
            function(batch)
        yield batch
        if progress is not None:
            progress(what, done, total if total >= 0 else None)
