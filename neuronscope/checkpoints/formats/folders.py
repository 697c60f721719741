"""Read folders: Hugging Face's (weights, configuration, a Trainer's optimizer and state) and distributed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronscope.checkpoints.formats.build_checkpoint import RawCheckpoint
from neuronscope.checkpoints.formats.byte_range import deepspeed_refused, quoted, read_json
from neuronscope.checkpoints.formats.single_file import read_file
from neuronscope.checkpoints.formats.torch_distributed import METADATA, read_distributed
from neuronscope.errors import CheckpointError

__all__ = ["is_folder_checkpoint", "read_folder"]

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


def read_folder(folder: Path, *, trust: bool) -> RawCheckpoint:
    """Read a folder that is a checkpoint.

    Args:
        folder: The folder.
        trust: Whether a file that names code may run it.

    Raises:
        CheckpointError: It is not a checkpoint of a supported format, or one of its files cannot be read.
    """
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
