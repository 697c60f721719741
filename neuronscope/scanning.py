"""Run a trained model over data and report on its neurons."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from neuronscope.errors import UsageError
from neuronscope.options import ScanArguments, WatchArguments, WatchOptions
from neuronscope.report.report import Report
from neuronscope.scope import Scope

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["model_state_restored", "scan"]


def scan(
    model: nn.Module,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    **options: Unpack[ScanArguments],
) -> Report:
    """Run a trained model over data and report on its neurons.

    The model runs in evaluation mode. Its training flags, gradients and buffers are restored afterwards.

    Args:
        model: The model.
        data: An iterable of batches, or one tensor as the only batch; tensors of shape ``(B, …)``, ``B`` examples
            each. The model is called with a batch that is a tensor, with the first element of a tuple or list, and
            with a mapping as keyword arguments.
        loss: A function ``loss(output, batch)`` that returns a scalar tensor. If given, gradients are counted too.
        forward: A function ``forward(model, batch)`` that returns the output, if the model must be called differently.
        **options: ``sites``, ``exclude``, ``functional``, ``axes``, ``policy``, ``activations``, ``examples`` and
            ``mask``, as for :func:`watch`.

    Returns:
        A report on phase ``scan``.

    Raises:
        UsageError: ``data`` has no batch, or an argument has a wrong type or value.
        NothingToWatchError: The model has no activation.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> scan(model, [torch.randn(300, 4)]).neurons
    3
    """
    for name in options.keys() & WatchArguments.__annotations__.keys() - ScanArguments.__annotations__.keys():
        raise UsageError(f"Expected options of a scan, but got `{name}`, which applies to training only: leave it out.")
    try:
        iterator = iter((data,) if isinstance(data, torch.Tensor) else data)
    except TypeError as error:
        raise UsageError(f"Expected argument `data` to be an iterable of batches, but got {data!r}.") from error
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    call = forward or _call
    batches = 0
    scope = Scope(model, WatchOptions(**options, join_ranks=False))
    with model_state_restored(model), _nothing_fused():
        model.eval()
        with scope, scope.phase("scan"), torch.set_grad_enabled(loss is not None):
            for parameter in model.parameters():  # so that gradients reach every neuron, also in frozen layers
                parameter.requires_grad_(loss is not None and parameter.is_floating_point())
            for batch in iterator:
                batch = _to_device(batch, device)
                for parameter in model.parameters():
                    parameter.grad = None
                output = call(model, batch)
                if loss is not None:
                    loss(output, batch).backward()
                batches += 1
    if batches == 0:
        raise UsageError(f"Expected argument `data` to yield at least one batch, but {type(data).__name__} gave none.")
    return scope.report("scan")


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
def _nothing_fused() -> Iterator[None]:
    """Keep torch from running transformer layers in fused kernels, in which no activation can be seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [_to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
