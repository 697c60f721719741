"""Take the dead neurons out of a checkpoint: read it, scan it, shrink it, and write the smaller weights."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuronscope.act.shrink import Shrunk, shrink
from neuronscope.checkpoints.data.user_arguments import check_batches, resolve_batches
from neuronscope.checkpoints.model.load_model import build_model
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.checkpoints.user_code import user_code
from neuronscope.errors import MissingExtraError, UsageError
from neuronscope.output import check_writable, write_file
from neuronscope.report.report import Report
from neuronscope.scanning import scan

__all__ = ["record_path", "shrink_checkpoint"]


def record_path(out: Path) -> Path:
    """Return where the record of the new widths is written: ``small-widths.json`` beside ``small.pt``."""
    return out.with_name(f"{out.stem}-widths.json")


def _config_path(out: Path) -> Path:
    """Return where the configuration of a smaller network of transformers is written: ``small-config.json``."""
    return out.with_name(f"{out.stem}-config.json")


def shrink_checkpoint(
    path: str | Path,
    model: nn.Module | str | Path | Callable[..., nn.Module],
    data: Iterable[Any] | str | Callable[[], Iterable[Any]],
    out: str | Path,
    *,
    trust: bool = False,
) -> Shrunk:
    """Write a smaller checkpoint, without the neurons that are dead on data, and a record of the new widths beside it.

    Of a network of transformers whose layers allow one width for all, the configuration is written too.

    Args:
        path: The checkpoint: a file or a folder.
        model: The network, as for :func:`~neuronscope.checkpoints.run.postmortem`.
        data: Batches, as for it.
        out: The file to write: safetensors if its name ends so, else a state dict as ``torch.save`` writes it.
        trust: Allow full unpickling. **This runs code in the file**, so only for files that you trust.

    Returns:
        The smaller model, and what was taken out.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not fit the model.
        UsageError: An argument is wrong, or nothing can be taken out, or the smaller model computes something else.
            Then nothing is written.
        MissingExtraError: ``out`` is to be safetensors, which is not installed.
        OSError: A file cannot be written.
    """
    target = Path(out)
    for file in (target, record_path(target), _config_path(target)):
        check_writable(file)  # before the long work begins
    if target.exists() and Path(path).resolve() in (target.resolve(), *target.resolve().parents):
        raise UsageError(f"Expected the smaller weights to get a file of their own, but {target} is of the checkpoint.")
    encode = _as_safetensors if target.suffix == ".safetensors" else _as_torch_file
    checkpoint = open_checkpoint(path, trust=trust)
    network = build_model(model, checkpoint)
    batches = resolve_batches(data)
    if batches is None:
        raise UsageError("Expected argument `data` to be batches, but got none.")
    if isinstance(batches, Iterator):
        batches = list(batches)
    with user_code("Expected the model to run over the data"):
        report = scan(network, check_batches(batches))
        shrunk, config = _with_config(network, report, batches)
    if not shrunk.removed:
        raise UsageError("Expected neurons to take out, but none is dead on the data: nothing was written.")
    record = {
        "schema_version": 1,
        "checkpoint": Path(path).name,
        "layers": shrunk.widths,
        "removed": shrunk.removed,
        "folded": shrunk.folded,
        "parameters": shrunk.parameters,
        "difference": None if shrunk.difference is None else shrunk.difference._asdict(),
    }
    content = encode(shrunk.model)
    if config is not None:
        write_file(_config_path(target), json.dumps(config, indent=1, sort_keys=True) + "\n")
    write_file(record_path(target), json.dumps(record, indent=1) + "\n")
    write_file(target, content)
    return shrunk


def _with_config(network: nn.Module, report: Report, batches: Iterable[Any]) -> tuple[Shrunk, dict[str, Any] | None]:
    """Return the smaller network, and the configuration that builds it if it is of transformers and has one.

    A configuration has one width for all layers, so that as many neurons go from each. If none can go so, those go that
    can, without a configuration.
    """
    if callable(getattr(getattr(network, "config", None), "to_dict", None)):
        with contextlib.suppress(UsageError):
            level = shrink(network, report, batches, same_widths=True)
            config = _smaller_config(network, level.model) if level.removed else None
            if config is not None:
                return level, config
    return shrink(network, report, batches), None


def _smaller_config(network: Any, small: nn.Module) -> dict[str, Any] | None:
    """Return the configuration that builds a smaller network: one number of it changed; ``None`` if no number does."""
    wanted = {name: tensor.shape for name, tensor in small.state_dict().items()}
    widths = {
        (before, after)
        for name, tensor in network.state_dict().items()
        for before, after in zip(tensor.shape, wanted.get(name, tensor.shape), strict=True)
        if before != after
    }
    for before, after in sorted(widths):
        for name in [name for name, value in vars(network.config).items() if type(value) is int and value == before]:
            config = copy.deepcopy(network.config)
            setattr(config, name, after)
            with contextlib.suppress(Exception), torch.device("meta"):
                built = {name: tensor.shape for name, tensor in type(network)(config).state_dict().items()}
                if built == wanted:
                    found: dict[str, Any] = config.to_dict()
                    return found
    return None


def _as_torch_file(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def _as_safetensors(model: nn.Module) -> bytes:
    """Return the weights in the format of safetensors."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtraError(
            "Expected the package safetensors, which writes this format: `pip install safetensors`, or name a file "
            "that ends in `.pt`."
        ) from error
    return save({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()})
