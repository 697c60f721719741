"""Load files that the user trusts with torch's own unpickler, which runs the code that they name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.checkpoints.checkpoint import ComputedTensor
from neuronscope.checkpoints.formats.byte_range import quoted
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor, readable_type
from neuronscope.errors import CheckpointError

__all__ = ["load_trusted"]

_DEEPEST = 16


def load_trusted(path: Path, *, script: bool = False) -> Any:
    """Load a file as plain data, with a stored tensor for each tensor; code that the file names is run.

    Args:
        path: A file of ``torch.save``, or a TorchScript archive. A module becomes its ``state_dict``.
        script: Whether it is a TorchScript archive.

    Raises:
        CheckpointError: It cannot be loaded, or the code that it names raises anything.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if script:
                loaded = torch.jit.load(path, map_location="cpu")
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=False)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file's own code runs here, and may call sys.exit
        first_line = f"{type(error).__name__}: {quoted((str(error).splitlines() or [''])[0])}"
        done = "loaded as TorchScript" if script else "unpickled"
        raise CheckpointError(f"{quoted(path)} could not be {done}: {first_line}.") from error
    return _plain(loaded, 0)


def _plain(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        return None
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            return SkippedTensor("sparse, quantised or without numbers")
        known = readable_type(value.dtype)
        return known if isinstance(known, SkippedTensor) else ComputedTensor.of(value)
    if isinstance(value, nn.Module):
        return _plain(dict(value.state_dict()), depth + 1)
    if isinstance(value, Mapping):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(inner, depth + 1) for inner in value]
        return items if isinstance(value, list) else tuple(items)
    return value
