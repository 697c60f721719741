"""Checkpoint: what every reader makes of a file or a folder, whatever its format. Tensors are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Checkpoint", "OptimizerState", "StoredTensor"]


class StoredTensor(Protocol):
    """A tensor that lies in a checkpoint and has not been read: its shape and type are known, its numbers are not."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> str:
        """Name of its type, as in ``float32``."""
        ...

    def read(self) -> Tensor:
        """The tensor on the CPU, in its own type; held by nobody but the caller.

        Raises:
            CheckpointError: The bytes are not what the file says that they are.
        """
        ...


@dataclass(frozen=True)
class OptimizerState:
    """The state of one optimizer, as it was saved; which parameter is whose is not decided here.

    Attributes:
        groups: The parameter groups in order: hyperparameters as they were saved (``lr``, ``betas``, ``weight_decay``,
            …), ``params`` a list of keys into ``slots``, and ``param_names`` where torch saved them.
        slots: By key (a number, or the parameter's name), what is kept of each parameter: ``exp_avg``, ``exp_avg_sq``,
            ``momentum_buffer`` … as a :class:`StoredTensor`; ``step`` and other numbers as a number.
    """

    groups: tuple[Mapping[str, Any], ...]
    slots: Mapping[int | str, Mapping[str, StoredTensor | float]]


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a checkpoint.

    Attributes:
        path: Where it is.
        format: What it is, for a reader: ``Lightning checkpoint``, ``safetensors, 4 files`` …
        tensors: Parameters and buffers of the network by name, in the order of the file; wrappers' prefixes are taken
            off the names (``module.``, ``_orig_mod.``, ``_fsdp_wrapped_module.``).
        optimizers: The states of its optimizers.
        records: What Neuronscope's own monitor left in it: the state of each, by the key it was found under.
        step: Optimizer steps that had been taken, where the file says.
        config: A network's configuration beside it (a Hugging Face folder's ``config.json``), else empty.
        hyperparameters: What a LightningModule was built with, as far as it is plain: arguments by name, else empty.
        notes: Sentences that a reader should know.
    """

    path: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    optimizers: tuple[OptimizerState, ...] = ()
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
