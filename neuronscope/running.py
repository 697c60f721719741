"""Run a trained model over batches: in evaluation mode, without fused kernels, and with its state restored."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "as_float64",
    "call_model",
    "evaluated",
    "in_float64",
    "map_tensors",
    "model_state_restored",
    "nothing_fused",
    "to_device_of",
]


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


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, without compiled code, fused kernels and gradients, and restore the model's state."""
    eager = torch.compiler.set_stance("force_eager")  # the compiler would trace the mode that follows the forward
    with model_state_restored(model), nothing_fused(), torch.no_grad(), eager:
        model.eval()
        yield


def in_float64(model: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Any) -> tuple[nn.Module, Any] | None:
    """Return a copy of a model and a batch in float64; ``None`` if it cannot be copied or does not run so.

    Args:
        model: The model.
        call: Runs the model on a batch.
        batch: The batch.
    """
    try:
        exact, inputs = copy.deepcopy(model).double(), as_float64(batch)
        with evaluated(exact):
            call(exact, inputs)
    except Exception:  # noqa: BLE001, whatever the model raises: then its own type must do
        return None
    return exact, inputs


def as_float64(batch: Any) -> Any:
    """Return a batch with its floating-point tensors in float64; a tensor that is given twice stays one."""
    known: dict[int, Tensor] = {}
    return map_tensors(lambda x: known.setdefault(id(x), x.double() if x.is_floating_point() else x), batch)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping as keyword arguments, the first element of a tuple or list, or a tensor.

    Args:
        model: The model.
        batch: The batch.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """Return a batch with all tensors in nested tuples, lists and mappings on a model's device.

    Args:
        model: The model; the device of its first parameter is taken.
        batch: The batch.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return map_tensors(lambda tensor: tensor.to(device), batch)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return nested tuples, lists and mappings with each tensor changed; mappings become dictionaries.

    Args:
        change: Returns what stands in a tensor's place.
        value: The nested value; whatever is no tensor stays.

    >>> map_tensors(torch.neg, {"x": [torch.ones(1), 2]})
    {'x': [tensor([-1.]), 2]}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(change, member) for name, member in value.items()}
    if isinstance(value, (tuple, list)):
        members = [map_tensors(change, member) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    return value
