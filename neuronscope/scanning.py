"""Run a trained model over data and report on its neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from neuronscope.errors import UsageError
from neuronscope.linear.check import LinearLayersOfForward
from neuronscope.options import ScanArguments, WatchArguments, WatchOptions
from neuronscope.report.report import Report
from neuronscope.running import call_model, model_state_restored, nothing_fused, to_device_of
from neuronscope.scope import Scope, only_counted_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["run_over", "scan"]


def scan(
    model: nn.Module,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    **options: Unpack[ScanArguments],
) -> Report:
    """Run a trained model over data and report on its neurons.

    The model runs in evaluation mode. Its training flags, gradients and buffers are restored afterwards. A scope that
    watches the model counts nothing of it.

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
    in_a_row = LinearLayersOfForward(model)
    scope = Scope(model, WatchOptions(**options, join_ranks=False))
    run_over(model, scope, data, loss, forward, first=in_a_row.of)
    report = scope.report("scan")
    return replace(report, notes=(*report.notes, *in_a_row.notes()))


def run_over(
    model: nn.Module,
    scope: Scope,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    *,
    first: Callable[[Callable[[nn.Module, Any], Any], Any], Any] | None = None,
) -> None:
    """Run a model over data as phase ``scan`` of a scope, which is detached afterwards.

    Args:
        model: The model.
        scope: The scope that watches it.
        data: See :func:`scan`.
        loss: See there.
        forward: See there.
        first: Runs the first batch, given how the model is called and the batch, and returns the output.
    """
    batches = 0
    with scope, only_counted_by(scope, model), model_state_restored(model), nothing_fused():
        try:
            iterator = iter((data,) if isinstance(data, torch.Tensor) else data)
        except TypeError as error:
            raise UsageError(f"Expected argument `data` to be an iterable of batches, but got {data!r}.") from error
        call = forward or call_model
        model.eval()
        with scope.phase("scan"), torch.set_grad_enabled(loss is not None):
            for parameter in model.parameters():  # so that gradients reach every neuron, also in frozen layers
                parameter.requires_grad_(loss is not None and parameter.is_floating_point())
            for batch in iterator:
                batch = to_device_of(model, batch)
                for parameter in model.parameters():
                    parameter.grad = None
                output = first(call, batch) if first is not None and batches == 0 else call(model, batch)
                if loss is not None:
                    loss(output, batch).backward()
                batches += 1
    if batches == 0:
        raise UsageError(f"Expected argument `data` to yield at least one batch, but {type(data).__name__} gave none.")
