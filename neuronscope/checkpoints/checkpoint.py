"""The contents of a checkpoint, the same for every file format. Tensors are read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Checkpoint", "ComputedTensor", "OptimizerState", "StoredTensor"]


class StoredTensor(ABC):
    """A tensor of a checkpoint whose values are read when they are needed."""

    __slots__ = ("shape", "torch_dtype")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.torch_dtype = shape, dtype

    @property
    def dtype(self) -> str:
        """Name of the dtype, such as ``float32``."""
        return str(self.torch_dtype).removeprefix("torch.")

    @abstractmethod
    def read(self) -> Tensor:
        """Read the tensor to the CPU, in its own shape and dtype. No reference to it is kept.

        Raises:
            CheckpointError: The bytes differ from what the file declares.
        """


class ComputedTensor(StoredTensor):
    """A stored tensor that a function returns, which is called for each reading."""

    __slots__ = ("_compute",)

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], Tensor]) -> None:
        super().__init__(shape, dtype)
        self._compute = compute

    @classmethod
    def of(cls, tensor: Tensor) -> ComputedTensor:
        """Return a tensor in memory in the form of a stored one; each reading copies it.

        >>> ComputedTensor.of(torch.ones(2, requires_grad=True)).read()
        tensor([1., 1.])
        """
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().to("cpu", copy=True))

    def read(self) -> Tensor:
        """Return what the function gives."""
        return self._compute()


@dataclass(frozen=True)
class OptimizerState:
    """The saved state of one optimizer. It is not yet matched to the network's parameters."""

    #: The parameter groups in order: hyperparameters as they were saved (``lr``, ``betas``, ``weight_decay``, …),
    #: ``params`` as a list of keys into ``slots``, and ``param_names`` if torch saved them.
    groups: tuple[Mapping[str, Any], ...]
    #: The state of each parameter by its key (a number, or the parameter's name): ``exp_avg``, ``exp_avg_sq``,
    #: ``momentum_buffer`` … as a :class:`StoredTensor`; ``step`` and other numbers as a number.
    slots: Mapping[int | str, Mapping[str, StoredTensor | float]]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint."""

    path: Path  # the file or folder
    format: str  # the format, as shown to a reader: ``Lightning checkpoint``, ``safetensors, 4 files`` …
    #: Parameters and buffers of the network by name, in the order of the file. Prefixes of wrappers (``module.``,
    #: ``_orig_mod.``, ``_fsdp_wrapped_module.``) are removed from the names.
    tensors: Mapping[str, StoredTensor]
    is_ordered: bool = True  # whether this is the order of the network; safetensors sorts by name
    #: Whether they are averages of the weights that the optimizers trained (torch's ``AveragedModel``).
    is_averaged: bool = False
    networks: tuple[str, ...] = ()  # with several networks, what the names of each one's tensors begin with
    optimizers: tuple[OptimizerState, ...] = ()
    #: The states of Neuronscope's own monitors, by the key under which each was found.
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    step: int | None = None  # number of optimizer steps taken; ``None`` if the file does not hold it
    #: The network's configuration (``config.json`` of a Hugging Face folder); empty for other checkpoints.
    config: Mapping[str, Any] = field(default_factory=dict)
    #: The configuration of an adapter (``adapter_config.json`` of PEFT); empty for other checkpoints.
    adapter: Mapping[str, Any] = field(default_factory=dict)
    #: Arguments that a LightningModule was created with, by name, if they are plain data.
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # sentences that the report shows to the reader
