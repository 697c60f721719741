"""Progress: how far long reading and scanning have come, for whoever wants to show it; and what passes by, noted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint, OptimizerState, StoredTensor
from neuronscope.checkpoints.data.user_arguments import check_batches

__all__ = ["Progress", "track_batches", "track_reading"]

#: ``progress(what, done, total)``: of ``what``, ``done`` is done; ``total`` is ``None`` where it is not known.
Progress = Callable[[str, int, "int | None"], None]


class _ReadProgress:
    """How many tensors of a checkpoint have been read at least once."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._done = 0
        progress(what, 0, total)

    def one_more(self) -> None:
        self._done += 1
        self._progress(self._what, self._done, self._total)


@dataclass
class _Watched:
    """A stored tensor that says when it is read for the first time."""

    tensor: StoredTensor
    reading: _ReadProgress
    seen: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def read(self) -> Tensor:
        read = self.tensor.read()
        if not self.seen:
            self.seen = True
            self.reading.one_more()
        return read


def track_reading(checkpoint: Checkpoint, what: str, progress: Progress | None) -> Checkpoint:
    """The checkpoint, whose tensors tell ``progress`` when they are read."""
    if progress is None:
        return checkpoint
    stored = sum(
        not isinstance(held, (int, float))
        for one in checkpoint.optimizers
        for slots in one.slots.values()
        for held in slots.values()
    )
    reading = _ReadProgress(what, len(checkpoint.tensors) + stored, progress)

    def watched(held: StoredTensor | float) -> StoredTensor | float:
        return held if isinstance(held, (int, float)) else _Watched(held, reading)

    def state(one: OptimizerState) -> OptimizerState:
        slots = {key: {name: watched(held) for name, held in kept.items()} for key, kept in one.slots.items()}
        return replace(one, slots=slots)

    tensors: Mapping[str, StoredTensor] = {name: _Watched(held, reading) for name, held in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, optimizers=tuple(map(state, checkpoint.optimizers)))


def track_batches(
    data: Iterable[Any], what: str, progress: Progress | None, note: Callable[[Any], None]
) -> Iterator[Any]:
    """The batches of ``data``, each noted as it passes by, and told to ``progress``."""
    total = length_hint(data, -1) if progress is not None else -1
    for done, batch in enumerate(check_batches(data), start=1):
        note(batch)
        yield batch
        if progress is not None:
            progress(what, done, total if total >= 0 else None)
