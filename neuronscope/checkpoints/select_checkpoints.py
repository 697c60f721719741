"""Select the checkpoints of one run from files and folders, and put them in the order of their steps.

The step comes from the checkpoint itself. Names and times of files are not used: copying changes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.file.layers import NEURON_KINDS, find_layers
from neuronscope.checkpoints.open_checkpoint import is_folder_checkpoint, open_checkpoint
from neuronscope.checkpoints.verdict.checkpoint_timeline import LeftOut
from neuronscope.errors import CheckpointError, UsageError

__all__ = ["ChosenCheckpoint", "Selection", "find_checkpoints", "select_checkpoints"]

_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
#: Files that lie beside checkpoints and hold no weights.
_NO_WEIGHTS = re.compile(r"(optim|sched|rng_state|random_states|training_args|scaler|sampler|neuronscope)")
#: The folders in which a Trainer of Hugging Face saves.
_TRAINER = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class ChosenCheckpoint:
    """A checkpoint of the run."""

    path: Path  # the file or folder
    step: int  # number of optimizer steps taken, by the checkpoint itself
    #: The paths of layers in the last checkpoint by those in this one, where they differ.
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """The checkpoints of a run in order."""

    chosen: tuple[ChosenCheckpoint, ...]  # the checkpoints in the order of their steps, which all differ
    left_out: tuple[LeftOut, ...]  # the others, with the reason
    notes: tuple[str, ...] = ()  # sentences for the reader


def find_checkpoints(paths: Sequence[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Return the checkpoints that files and folders hold, in order, each once; and what was left out, with the reason.

    A folder is itself a checkpoint (of Hugging Face or ``torch.distributed.checkpoint``), or the place where
    checkpoints lie: its files of weights and those of its folders that are checkpoints. In the output folder of a
    Trainer these are ``checkpoint-*``, even if the final weights lie beside them. No other folder is searched.
    """
    found: dict[Path, None] = {}
    left_out: list[LeftOut] = []
    for path in paths:
        try:
            inside = _in_folder(path, left_out) if path.is_dir() else []
        except OSError as error:
            raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
        found.update(dict.fromkeys(inside or [path]))
    return list(found), left_out


def _in_folder(folder: Path, left_out: list[LeftOut]) -> list[Path]:
    entries = sorted(folder.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and is_folder_checkpoint(entry)]
    trainer = [entry for entry in folders if _TRAINER.fullmatch(entry.name)]
    if is_folder_checkpoint(folder):
        if trainer:
            left_out.append(LeftOut(str(folder), "the final weights do not say at which step they were saved", False))
        return trainer or [folder]
    files = [
        entry
        for entry in entries
        if entry.name.endswith(_ENDINGS) and not entry.is_dir() and not _NO_WEIGHTS.match(entry.name)
    ]
    return [*folders, *files]


def select_checkpoints(paths: Iterable[Path], left_out: Iterable[LeftOut] = (), *, trust: bool = False) -> Selection:
    """Open each checkpoint, and select those that are of one run, in the order of their steps.

    The run is that of the checkpoint with the most steps. Left out are checkpoints that cannot be read, that hold no
    weights and no record, that do not say their step, that have the same step as one before them, and that are of
    another network: less than half of their layers are layers of that checkpoint, by path and size. Where all sizes
    agree in order but paths do not, the layers were renamed.

    Args:
        paths: The checkpoints.
        left_out: What was left out before.
        trust: Allow full unpickling. **This runs code in the file.**

    Raises:
        UsageError: No checkpoint can be read, or none says its step.
    """
    left_out = list(left_out)
    opened: dict[Path, _Summary] = {}
    for path in paths:
        try:
            checkpoint = open_checkpoint(path, trust=trust)
        except CheckpointError as error:
            left_out.append(LeftOut(str(path), str(error), True))
            continue
        if not checkpoint.tensors and not checkpoint.records:
            state = (
                ", but an optimizer's state: give it as `optimizer` with the weights" if checkpoint.optimizers else ""
            )
            left_out.append(LeftOut(str(path), f"it holds no weights of a network{state}", False))
            continue
        if checkpoint.step is None:
            left_out.append(LeftOut(str(path), "it does not say at which step it was saved", False))
            continue
        layers = [layer for layer in find_layers(checkpoint.tensors) if layer.kind in NEURON_KINDS]
        shapes = {layer.path: (layer.kind, layer.width, layer.inputs) for layer in layers}
        opened[path] = _Summary(checkpoint.step, checkpoint.is_ordered, shapes)
    if not opened:
        reasons = "; ".join(f"{one.path}: {one.reason}" for one in left_out[:3])
        raise UsageError(f"Expected checkpoints that can be put in the order of their steps, but got none: {reasons}")
    ordered = sorted(opened, key=lambda path: opened[path].step)
    newest = opened[ordered[-1]]
    chosen: list[ChosenCheckpoint] = []
    notes: list[str] = []
    for path in ordered:
        summary = opened[path]
        if chosen and chosen[-1].step == summary.step:
            left_out.append(LeftOut(str(path), _same_step(chosen[-1].path, path, trust=trust), False))
            continue
        difference, renamed = _compare_layers(summary, newest)
        if renamed is None:
            left_out.append(LeftOut(str(path), f"it is of another network than the last one: {difference}", False))
            continue
        if difference:
            notes.append(f"{path.name} (step {summary.step:,}): {difference}.")
        chosen.append(ChosenCheckpoint(path, summary.step, renamed))
    return Selection(tuple(chosen), tuple(left_out), tuple(notes))


class _Summary(NamedTuple):
    """The step of a checkpoint, whether its layers are in the network's order, and the shapes of the layers by path."""

    step: int
    is_ordered: bool
    layers: dict[str, tuple[str, int, int]]


def _compare_layers(one: _Summary, newest: _Summary) -> tuple[str, Mapping[str, str] | None]:
    """Return how the layers of a checkpoint differ from those of the newest one (``""``: not at all), and new paths.

    The new paths are ``None`` if it is of another network.
    """
    if one.layers == newest.layers:
        return "", {}
    common = one.layers.items() & newest.layers.items()
    if list(one.layers.values()) == list(newest.layers.values()) and one.is_ordered == newest.is_ordered:
        renamed = {old: new for old, new in zip(one.layers, newest.layers, strict=True) if old != new}
        old, new = next(iter(renamed.items()))
        return f"its layers have other names ({old} for {new}); they are taken to be the same, in order", renamed
    different = [path for path in newest.layers if (path, newest.layers[path]) not in common] or [*one.layers]
    text = f"{len(different)} of {len(newest.layers)} layers are not in it, {different[0]} first"
    return text, ({} if 2 * len(common) >= len(newest.layers) else None)


def _same_step(kept: Path, path: Path, *, trust: bool) -> str:
    """Return the reason for which the second of two checkpoints of the same step is left out."""
    first, second = (open_checkpoint(one, trust=trust).tensors for one in (kept, path))
    try:
        equal = first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)
    except CheckpointError as error:
        return str(error)
    if equal:
        return f"it has the same step and the same weights as {kept.name}"
    return f"it has the same step as {kept.name}, but other weights: it may be of another run"


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return torch.equal(first.read().nan_to_num(0.0), second.read().nan_to_num(0.0))
