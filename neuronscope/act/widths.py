"""Give layers other widths: leave rows and columns out, and set the numbers that a module keeps of its widths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.act.structure import LayerWeights
from neuronscope.attach.module_paths import walk
from neuronscope.errors import UsageError

__all__ = ["fold_columns", "leave_out", "set_widths", "widths_of"]

# Names of the numbers of units that a module gives, and that it reads.
_GIVEN = ("out_features", "out_channels", "num_features", "nf")
_READ = ("in_features", "in_channels", "num_features", "nx")


def widths_of(module: nn.Module) -> dict[str, int | bool]:
    """Return the numbers that a layer keeps of its widths, and whether it has a bias.

    >>> widths_of(nn.Linear(3, 2))
    {'in_features': 3, 'out_features': 2, 'bias': True}
    """
    names = dict.fromkeys((*_READ, *_GIVEN, "groups"))
    found: dict[str, int | bool] = {name: value for name in names if type(value := vars(module).get(name)) is int}
    if "bias" in module._parameters:
        found["bias"] = module._parameters["bias"] is not None
    return found


def leave_out(layer: LayerWeights, rows: Collection[int], columns: Collection[int]) -> None:
    """Leave rows and columns of a layer out, in place; its parameters become new ones.

    Args:
        layer: The layer.
        rows: Which units that it gives. Of a layer that takes units one by one, the units that it reads as well.
        columns: Which units that it reads.
    """
    module = layer.module
    for parts, left_out in ((layer.rows, set(rows)), (layer.columns, set(columns))):
        for part in parts if left_out else ():
            held = getattr(module, part.name)
            kept = [index for index in range(held.shape[part.dim]) if index not in left_out]
            _replace(module, part.name, held.detach().index_select(part.dim, torch.tensor(kept, device=held.device)))
    numbers = vars(module)
    for names, left in ((_GIVEN, len(rows)), (_READ, len(rows) if layer.one_by_one else len(columns))):
        for name in names:
            if type(numbers.get(name)) is int and not (name == "num_features" and names is _READ):
                numbers[name] -= left
    if layer.one_by_one and type(numbers.get("groups")) is int:
        numbers["groups"] -= len(rows)


def set_widths(model: nn.Module, widths: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give the layers of a model the widths that a record says, in place; their new weights are not initialised.

    Load a checkpoint of the smaller model afterwards.

    Args:
        model: The model, with the widths that it was written with.
        widths: Of each layer, by its path: the numbers that it keeps, as the record of a smaller model holds them.

    Returns:
        The model.

    Raises:
        UsageError: A layer is missing, or keeps other numbers.

    >>> small = set_widths(nn.Sequential(nn.Linear(3, 5)), {"0": {"in_features": 3, "out_features": 2, "bias": True}})
    >>> small(torch.zeros(1, 3)).shape
    torch.Size([1, 2])
    """
    modules = dict(walk(model))
    for path, numbers in widths.items():
        layer = LayerWeights.of(path, modules.get("" if path == "(root)" else path))
        if layer.unknown or widths_of(layer.module).keys() != numbers.keys():
            raise UsageError(f"Expected a model with the layer `{path}` of the record, but it has none of that kind.")
        before = widths_of(layer.module)
        given = next(name for name in _GIVEN if name in numbers)
        read = next(name for name in _READ if name in numbers)
        for parts, size in ((layer.rows, numbers[given]), (layer.columns, numbers[read])):
            for part in parts:
                held = getattr(layer.module, part.name)
                shape = [*held.shape[: part.dim], size, *held.shape[part.dim + 1 :]]
                _replace(layer.module, part.name, torch.empty(shape, dtype=held.dtype, device=held.device))
        if numbers.get("bias") and not before.get("bias"):
            weight = layer.rows[0].tensor
            _add_bias(layer.module, torch.zeros(numbers[given], dtype=torch.float64, device=weight.device))
        vars(layer.module).update({name: value for name, value in numbers.items() if name != "bias"})
    return model


def fold_columns(layer: LayerWeights, columns: Sequence[int], values: Sequence[float]) -> None:
    """Add to a layer's bias what columns contribute that always read the same value; a layer without a bias gets one.

    Args:
        layer: The layer.
        columns: Its columns.
        values: What each of them reads.
    """
    module = layer.module
    (weight,) = layer.columns
    added = torch.zeros(layer.units, dtype=torch.float64, device=weight.tensor.device)
    for column, value in zip(columns, values, strict=True):
        added += value * weight.of(column).detach().double().reshape(layer.units, -1).sum(1)
    _add_bias(module, added)


def _add_bias(module: nn.Module, added: Tensor) -> None:
    """Add one number for each unit to the bias of a layer; a layer without one gets one."""
    held, weight = module._parameters["bias"], module.get_parameter("weight")
    total = added if held is None else held.detach().double() + added
    module._parameters["bias"] = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    held = module._parameters.get(name)
    if held is not None:
        module._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=held.requires_grad)
    else:
        module._buffers[name] = tensor.contiguous()
