"""Report the progress of reading a checkpoint and of scanning batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from operator import length_hint
from typing import Any

from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint, ComputedTensor, StoredTensor
from neuronscope.checkpoints.data.user_arguments import check_batches

__all__ = ["Progress", "track_batches", "track_reading"]

#: ``progress(what, done, total)``: the task, how many of its items are done, and of how many (``None`` = not known).
Progress = Callable[[str, int, "int | None"], None]


def track_reading(checkpoint: Checkpoint, what: str, progress: Progress | None) -> Checkpoint:
    """Return the checkpoint with tensors that report to ``progress`` when they are read for the first time.

    Args:
        checkpoint: The opened checkpoint.
        what: Name of the task, passed to ``progress``.
        progress: The function to call; with ``None`` the checkpoint is returned unchanged.
    """
    if progress is None:
        return checkpoint
    numbers = count()
    was_read: set[int] = set()

    def read(tensor: StoredTensor, number: int) -> Tensor:
        values = tensor.read()
        if number not in was_read:
            was_read.add(number)
            progress(what, len(was_read), total)
        return values

    def track(tensor: StoredTensor) -> StoredTensor:
        return ComputedTensor(tensor.shape, tensor.torch_dtype, partial(read, tensor, next(numbers)))

    def track_slots(slots: Mapping[str, StoredTensor | float]) -> dict[str, StoredTensor | float]:
        return {name: value if isinstance(value, (int, float)) else track(value) for name, value in slots.items()}

    tracked = replace(
        checkpoint,
        tensors={name: track(tensor) for name, tensor in checkpoint.tensors.items()},
        optimizers=tuple(
            replace(optimizer, slots={key: track_slots(slots) for key, slots in optimizer.slots.items()})
            for optimizer in checkpoint.optimizers
        ),
    )
    total = next(numbers)
    progress(what, 0, total)
    return tracked


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
