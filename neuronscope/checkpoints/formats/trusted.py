"""Files that the user trusts: unpickled as torch does it, with whatever code they name. Nothing else comes here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.checkpoints.formats.byte_range import quoted
from neuronscope.checkpoints.formats.lazy_tensor import LoadedTensor
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor, readable_type
from neuronscope.errors import CheckpointError

__all__ = ["load_script", "load_trusted"]

_DEEPEST = 16


def load_trusted(path: Path) -> Any:
    """What a file of ``torch.save`` holds, as plain data with a :class:`LoadedTensor` in the place of every tensor.

    A module becomes its ``state_dict``. Code that the file names is run.

    Raises:
        CheckpointError: It cannot be loaded, whatever the code it names raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=False)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of anybody runs here, and may call sys.exit
        raise CheckpointError(f"{quoted(path)} could not be unpickled: {_first_line(error)}.") from error
    return _plain(loaded, 0)


def load_script(path: Path) -> Any:
    """The ``state_dict`` of a TorchScript archive, as plain data. Code that the file holds is loaded.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.jit.load(path, map_location="cpu")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of anybody runs here, and may call sys.exit
        raise CheckpointError(f"{quoted(path)} could not be loaded as TorchScript: {_first_line(error)}.") from error
    return _plain(loaded, 0)


def _first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {quoted((str(error).splitlines() or [''])[0])}"


def _plain(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        return None
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            return SkippedTensor("sparse, quantised or without numbers")
        known = readable_type(value.dtype)
        return known if isinstance(known, SkippedTensor) else LoadedTensor(value)
    if isinstance(value, nn.Module):
        return _plain(dict(value.state_dict()), depth + 1)
    if isinstance(value, Mapping):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(inner, depth + 1) for inner in value]
        return items if isinstance(value, list) else tuple(items)
    return value
