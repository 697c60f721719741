"""Lightning's own strategies: each run is recorded and not watched, then watched and not recorded."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from neuronscope.callbacks import DeadNeuronMonitor
from tests.ranks.parallel import SITES, Case, Network, as_fsdp, as_tensor_parallel, data, whole
from tests.ranks.recorded import ARRAYS, NUMBERS, Recorder

SAVED_AT = 3  # in the middle of a window of 2


class Net(LightningModule):
    """The network, on its share of the data."""

    def __init__(self, case: Case, share: int | None = None) -> None:
        super().__init__()
        self.case, self.share = case, share
        self.net = Network(case.checkpointed)

    def configure_model(self) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None:
            as_fsdp(as_tensor_parallel(self.net, self.case, mesh["tensor_parallel"]), self.case, mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader[Any]:
        share = dist.get_rank() if self.share is None else self.share
        return DataLoader([pair for micro in data(share, self.case) for pair in micro], batch_size=None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Records(Callback):
    """Attaches a recorder, and tells it of the steps."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.recorder = Recorder(module, {f"net.{n}": (f"net.{a}", f"net.{b}") for n, (a, b) in SITES.items()})

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        self.recorder.step = trainer.global_step


class Saves(Callback):
    """Saves once, on every rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step == SAVED_AT and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(module: Net, strategy: Any, folder: Path, *callbacks: Any) -> dict[str, Tensor]:
    devices = dist.get_world_size() if dist.is_initialized() else 2
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=list(callbacks),
        precision="bf16-mixed" if module.case.autocast else "32-true",
        accumulate_grad_batches=module.case.micro_batches,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module)
    return whole(module) if dist.is_initialized() else {}


def census_of(monitor: DeadNeuronMonitor) -> dict[str, dict[str, Any]]:
    return {
        name: {field: getattr(tally, field) for field in (*ARRAYS, *NUMBERS)}
        for name, tally in monitor.census("train").items()
    }


def run(case: Case, strategy: Any, folder: Path, share: int | None = None) -> dict[str, Any]:
    records, monitor = Records(), DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    weights = fit(Net(case, share), strategy(), folder, records)
    path = folder / f"saved_{case.micro_batches}_{share is None}.ckpt"
    watched = fit(Net(case, share), strategy(), folder, monitor, Saves(path))
    return {
        "recorded": {name.removeprefix("net."): counts for name, counts in records.recorder.counts().items()},
        "counted": {name.removeprefix("net."): counts for name, counts in census_of(monitor).items()},
        "same_weights": all(weights[name].equal(watched[name]) for name in weights) and len(weights) > 0,
        "same_hooks": True,
        "unseen": {item.name: item.reason for item in monitor.report().not_measured},
        "warned": monitor._faults.first,
        "saved": torch.load(path, weights_only=True)["callbacks"][monitor.state_key]["scope"],
    }


def as_if_launched(rank: int) -> None:
    """What a launcher tells Lightning."""
    world = str(dist.get_world_size())
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(told, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    warnings.simplefilter("ignore")


LIGHTNING_CASES = [Case(), Case(autocast=True, micro_batches=4, checkpointed=True)]


def lightning_ddp(rank: int, folder: Path) -> dict[Case, Any]:
    as_if_launched(rank)
    return {case: run(case, lambda: "ddp", folder) for case in LIGHTNING_CASES}


def lightning_model_parallel(rank: int, folder: Path) -> dict[str, Any]:
    as_if_launched(rank)
    world = dist.get_world_size()
    return run(
        Case(),
        lambda: ModelParallelStrategy(
            data_parallel_size=world // 2, tensor_parallel_size=2, save_distributed_checkpoint=False
        ),
        folder,
        share=rank // 2,
    )


class Tells(Callback):
    """Leaves what was counted where the process that spawned this one finds it."""

    def __init__(self, folder: Path, monitor: DeadNeuronMonitor) -> None:
        self.folder, self.monitor = folder, monitor

    def on_train_end(self, trainer: Any, module: Any) -> None:
        path = self.folder / f"spawned_{trainer.global_rank}.pt"
        torch.save(census_of(self.monitor), path)
        path.with_suffix(".told").touch()


def main(folder: str) -> None:
    """Lightning spawns two ranks of its own: ``python -m tests.ranks.lightning_runs FOLDER``."""
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    fit(Net(Case()), "ddp_spawn", Path(folder), monitor, Tells(Path(folder), monitor))


if __name__ == "__main__":
    main(*sys.argv[1:])
