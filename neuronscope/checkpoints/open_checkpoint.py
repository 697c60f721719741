"""Open a checkpoint of any supported format as a :class:`~neuronscope.checkpoints.checkpoint.Checkpoint`.

The format is recognised by the content. No code that a checkpoint names is imported or run, unless the user trusts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.formats.build_checkpoint import RawCheckpoint, build_checkpoint
from neuronscope.checkpoints.formats.byte_range import deepspeed_refused, quoted, read_json
from neuronscope.checkpoints.formats.optimizer_state import find_optimizers
from neuronscope.checkpoints.formats.single_file import read_file
from neuronscope.checkpoints.formats.torch_distributed import METADATA, read_distributed
from neuronscope.errors import CheckpointError

__all__ = ["is_folder_checkpoint", "open_checkpoint"]

# Names of files of weights; the first that exists is read. `.index.json` marks weights in several files.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_FSDP = "pytorch_model_fsdp_0"  # the folder of a Trainer's sharded weights; its optimizer's is `optimizer_0`


def open_checkpoint(
    path: str | Path, *, optimizer: str | Path | None = None, step: int | None = None, trust: bool = False
) -> Checkpoint:
    """Open a checkpoint without loading its tensors; each tensor is read when it is needed.

    Supported are files of ``torch.save`` (a ``state_dict``, a training checkpoint, Lightning's), safetensors, sharded
    weights with an index file, folders of Hugging Face and of ``torch.distributed.checkpoint``: see
    ``docs/checkpoints.md``.

    Args:
        path: The checkpoint file or folder.
        optimizer: A file or folder with the optimizer's state, if it lies apart from the weights.
        step: Number of optimizer steps taken, if it is known better than from the files.
        trust: Allow full unpickling. **This runs code in the file.** Without it, a file that needs this is refused.

    Raises:
        CheckpointError: The checkpoint does not exist, is damaged, has an unknown format, or needs full unpickling.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict(), "global_step": 7}, f"{folder}/last.ckpt")
    ...     checkpoint = open_checkpoint(f"{folder}/last.ckpt")
    ...     print(checkpoint.format, checkpoint.step, {name: t.shape for name, t in checkpoint.tensors.items()})
    torch file 7 {'weight': (2, 3), 'bias': (2,)}
    """
    path = Path(path)
    try:
        raw = _contents(path, trust=trust)
        raw.step = raw.step if step is None else step
        if optimizer is not None:
            raw.optimizer = _optimizer(Path(optimizer), trust=trust)
        return build_checkpoint(path, raw)
    except OSError as error:
        raise CheckpointError(f"Cannot read {quoted(error.filename or path)}: {error.strerror or error}.") from error
    except MemoryError as error:
        raise CheckpointError(f"Cannot read {quoted(path)}: there is not enough memory for it.") from error


def _contents(path: Path, *, trust: bool) -> RawCheckpoint:
    return (_read_folder if path.is_dir() else read_file)(path, trust=trust)


def _optimizer(path: Path, *, trust: bool) -> Any:
    """Return the plain data of a file that holds an optimizer's state."""
    raw = _contents(path, trust=trust)
    found = {**(raw.data if isinstance(raw.data, dict) else {}), **raw.other_files}
    if not find_optimizers(found):
        raise CheckpointError(f"{quoted(path)} holds no state of an optimizer.")
    return found


def is_folder_checkpoint(folder: Path) -> bool:
    """Whether a folder is itself a checkpoint by its names, and not only a place where checkpoints lie.

    A folder with one safetensors file is one if nothing else in it looks like weights.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    if METADATA in names or _FSDP in names or _is_deepspeed(names) or not set(_WEIGHTS).isdisjoint(names):
        return True
    if _only(names, ".index.json") is not None:
        return True
    others = any(name.endswith((".ckpt", ".pt", ".pth")) for name in names)
    return _only(names, ".safetensors") is not None and not others


def _read_folder(folder: Path, *, trust: bool) -> RawCheckpoint:
    """Read a folder of Hugging Face (weights, configuration, a Trainer's optimizer and state) or a distributed one."""
    if (folder / METADATA).exists():
        return read_distributed(folder, trust=trust)
    names = sorted(entry.name for entry in folder.iterdir())
    if _is_deepspeed(names):
        raise deepspeed_refused(folder)
    if _FSDP in names:
        raw = read_distributed(folder / _FSDP, trust=trust)
        for name in names:
            if name.startswith("optimizer_") and (folder / name / METADATA).exists():
                raw.other_files[name] = read_distributed(folder / name, trust=trust).data
    else:
        raw = _weights(folder, names, trust=trust)
    for name, kind in (("config.json", "config"), ("adapter_config.json", "adapter")):
        if name in names:
            config = read_json(folder / name)
            setattr(raw, kind, config if isinstance(config, dict) else {})
    for name in names:
        if name in _OPTIMIZERS or (name.startswith("neuronscope") and name.endswith(".pt")):
            raw.other_files[name.removesuffix(".pt")] = read_file(folder / name, trust=trust).data
    if "trainer_state.json" in names:
        _add_trainer_state(raw, read_json(folder / "trainer_state.json"))
    return raw


def _is_deepspeed(names: list[str]) -> bool:
    return "zero_to_fp32.py" in names or "latest" in names or any(name.startswith("mp_rank_") for name in names)


def _weights(folder: Path, names: list[str], *, trust: bool) -> RawCheckpoint:
    """Read the weights of a folder, from one file or several."""
    known = next((name for name in _WEIGHTS if name in names), None)
    weights = known or _only(names, ".safetensors") or _only(names, ".index.json")
    if weights is None:
        raise _no_checkpoint(folder, names)
    raw = read_file(folder / weights, trust=trust)
    return replace(raw, format=f"Hugging Face folder, {raw.format}")


def _add_trainer_state(raw: RawCheckpoint, state: Any) -> None:
    """Add the step count and the callbacks' states of a Hugging Face Trainer."""
    if not isinstance(state, Mapping):
        return
    step = state.get("global_step")
    if type(step) is int and step >= 0:
        raw.step = step
    raw.other_files["callbacks"] = state.get("stateful_callbacks")


def _only(names: list[str], ending: str) -> str | None:
    """Return the one name that ends so, if there is exactly one."""
    found = [name for name in names if name.endswith(ending)]
    return found[0] if len(found) == 1 else None


def _no_checkpoint(folder: Path, names: list[str]) -> CheckpointError:
    files = [name for name in names if name.endswith((".ckpt", ".pt", ".pth", ".bin", ".safetensors"))]
    if files:
        return CheckpointError(
            f"{quoted(folder)} is a folder of files and not itself a checkpoint: give one of them, such as "
            f"{', '.join(quoted(name) for name in files[:5])}."
        )
    return CheckpointError(
        f"{quoted(folder)} is a folder without a checkpoint in it: weights (`model.safetensors`, `pytorch_model.bin` "
        "or their `.index.json`) or the `.metadata` of a distributed checkpoint were expected."
    )
