"""Checkpoints of one small network in every format that is read, written by whoever writes that format for real."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

STEPS = 3


class Saved(NamedTuple):
    """A network after some steps, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def weights(self) -> dict[str, Any]:
        return self.model.state_dict()


def trained(seed: int = 0) -> Saved:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    return Saved(model, optimizer)


def wrapped(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def _save(make: Callable[[Saved], Any], name: str, folder: Path, saved: Saved, **options: Any) -> Path:
    torch.save(make(saved), folder / name, **options)
    return folder / name


def _safetensors(folder: Path, saved: Saved) -> Path:
    safetensors.torch.save_file(saved.weights, folder / "weights.safetensors", metadata={"format": "pt"})
    return folder / "weights.safetensors"


def halves(weights: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(weights)
    return [{name: weights[name] for name in part} for part in (names[:4], names[4:])]


def _sharded(folder: Path, saved: Saved, ending: str, index: str, save: Callable[[Any, Path], None]) -> Path:
    places = {}
    for number, part in enumerate(halves(saved.weights), start=1):
        name = f"model-{number:05}-of-00002.{ending}"
        save(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder / index


def sharded_safetensors(folder: Path, saved: Saved) -> Path:
    return _sharded(folder, saved, "safetensors", "model.safetensors.index.json", safetensors.torch.save_file)


def sharded_bin(folder: Path, saved: Saved) -> Path:
    return _sharded(folder, saved, "bin", "pytorch_model.bin.index.json", torch.save)


def trainer_folder(folder: Path, saved: Saved) -> Path:
    """What a Hugging Face Trainer leaves in ``checkpoint-3``."""
    safetensors.torch.save_file(saved.weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(saved.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"python": (3, (1, 2), None), "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "hidden_size": 5}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "stateful_callbacks": {}}))
    return folder


def distributed(folder: Path, saved: Saved) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: no process group, a single process is meant
        dcp.save(
            {"model": saved.weights, "optimizer": saved.optimizer.state_dict(), "global_step": STEPS},
            checkpoint_id=folder,
            no_dist=True,
        )
    return folder


class Format(NamedTuple):
    """One way of saving.

    Attributes:
        write: Writes it into a folder and gives the path to open.
        format: What the reader calls it.
        optimizers: How many it holds.
        step: What the reader knows of steps.
    """

    write: Callable[[Path, Saved], Path]
    format: str
    optimizers: int = 0
    step: int | None = None


OLDER = {"_use_new_zipfile_serialization": False}


def _training(saved: Saved) -> dict[str, Any]:
    return {"epoch": 1, "model_state_dict": saved.weights, "optimizer_state_dict": saved.optimizer.state_dict()}


FORMATS = {
    "state_dict": Format(partial(_save, lambda saved: saved.weights, "w.pt"), "torch file"),
    "state_dict, older": Format(
        partial(_save, lambda saved: saved.weights, "w.pth", **OLDER), "torch file of the older layout"
    ),
    "state_dict, no name": Format(partial(_save, lambda saved: saved.weights, "weights"), "torch file"),
    **{
        f"under {key}": Format(
            partial(_save, lambda saved, key=key: {key: saved.weights, "epoch": 3}, "w.bin"), "torch file"
        )
        for key in ("state_dict", "model", "model_state_dict", "module", "generator")
    },
    "under model and state_dict": Format(
        partial(_save, lambda saved: {"model": {"state_dict": saved.weights}}, "w.pt"), "torch file"
    ),
    "data parallel": Format(partial(_save, lambda saved: wrapped(saved.weights, "module."), "w.pt"), "torch file"),
    "compiled": Format(
        partial(_save, lambda saved: {"model": wrapped(saved.weights, "module._orig_mod.")}, "w.pt"), "torch file"
    ),
    "training": Format(partial(_save, _training, "t.pt"), "torch file", optimizers=1, step=STEPS),
    "training, older": Format(
        partial(_save, _training, "t.pt", **OLDER), "torch file of the older layout", optimizers=1, step=STEPS
    ),
    "training, protocol 4": Format(partial(_save, _training, "t.pt", pickle_protocol=4), "torch file", 1, STEPS),
    "two optimizers": Format(
        partial(
            _save,
            lambda saved: {"model": saved.weights, "optimizers": [saved.optimizer.state_dict()] * 2, "step": 7},
            "t.pt",
        ),
        "torch file",
        optimizers=1,  # the same object twice is one
        step=7,
    ),
    "safetensors": Format(_safetensors, "safetensors"),
    "sharded safetensors": Format(sharded_safetensors, "safetensors, 2 files"),
    "sharded torch files": Format(sharded_bin, "torch file, 2 files"),
    "Hugging Face Trainer": Format(trainer_folder, "Hugging Face folder, safetensors", 1, STEPS),
    "sharded folder": Format(
        lambda folder, saved: sharded_bin(folder, saved).parent, "Hugging Face folder, torch file, 2 files"
    ),
    "distributed": Format(distributed, "distributed checkpoint, 1 file", 1, STEPS),
}


class Writes:
    """Unpickled, it makes a folder: what no reader may let happen."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def pickled(thing: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(thing, protocol=protocol)
