"""Run a trained model over batches: in evaluation mode, without fused kernels, and with its state restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["call_model", "model_state_restored", "nothing_fused", "to_device"]


@contextlib.contextmanager
def model_state_restored(model: nn.Module) -> Iterator[None]:
    """Restore the model's training flags, gradients, ``requires_grad`` and buffers on exit.

    >>> model = torch.nn.Dropout()
    >>> with model_state_restored(model):
    ...     _ = model.eval()
    >>> model.training
    True
    """
    flags = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter, gradient, required in parameters:
            parameter.grad = gradient
            parameter.requires_grad_(required)
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer.copy_(values)


@contextlib.contextmanager
def nothing_fused() -> Iterator[None]:
    """Keep torch from running transformer layers in fused kernels, in which no activation can be seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping as keyword arguments, the first element of a tuple or list, or a tensor.

    Args:
        model: The model.
        batch: The batch.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with all tensors in nested tuples, lists and mappings on a device.

    Args:
        batch: The batch.
        device: The device.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
