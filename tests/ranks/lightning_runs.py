"""Lightning's own strategies: each run is recorded and not watched, then watched and not recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from neuronscope.callbacks import DeadNeuronMonitor
from tests.agreement.slow_twin import hook_tables
from tests.ranks.parallel import (
    CASES,
    SITES,
    Case,
    Network,
    as_fsdp,
    as_tensor_parallel,
    counted,
    data,
    outcome,
    tried,
    whole,
)
from tests.ranks.recorded import Recorder

SAVED_AT = 3  # in the middle of a window of 2
OTHER = 10  # from here on lie the shares of data that nobody trains with


class Net(LightningModule):
    """The network, on its share of the data."""

    def __init__(self, case: Case, share: int | None = None) -> None:
        super().__init__()
        self.case, self.share = case, share
        self.net = Network(case.checkpointed)

    def configure_model(self) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            as_tensor_parallel(self.net, self.case, mesh["tensor_parallel"])
        as_fsdp(self.net, self.case, mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader[Any]:
        return self._batches(dist.get_rank() if self.share is None else self.share)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._batches(OTHER + (dist.get_rank() if self.share is None else self.share))

    def _batches(self, share: int) -> DataLoader[Any]:
        return DataLoader([pair for micro in data(share, self.case) for pair in micro], batch_size=None)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Records(Callback):
    """Attaches a recorder when the sanity check is over, and tells it of the steps."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.recorder = Recorder(module.net, SITES)

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        self.recorder.step = trainer.global_step


class Tables(Callback):
    """Looks at the hook tables before anybody watches, and after."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.before = hook_tables(module)

    def same(self, module: Any) -> bool:
        return hook_tables(module) == self.before


class Saves(Callback):
    """Saves once, on every rank."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved = path, False

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step == SAVED_AT and not self.saved:
            self.saved = True
            trainer.save_checkpoint(self.path)


def fit(module: Net, strategy: Any, folder: Path, *callbacks: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 2,
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
    return trainer


def run(case: Case, strategy: Any, folder: Path, share: int | None = None) -> dict[str, Any]:
    records, tables, monitor = Records(), Tables(), DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    plain, watched = Net(case, share), Net(case, share)
    fit(plain, strategy(), folder, records)
    path = folder / "saved.ckpt"
    fit(watched, strategy(), folder, tables, monitor, Saves(path))
    weights = (whole(plain.net), whole(watched.net))
    same_hooks = tables.same(watched)
    return {
        **outcome(
            records.recorder, monitor.scope, weights, same_hooks=same_hooks, phases=("train", "val"), within="net."
        ),
        "saved": torch.load(path, weights_only=True)["callbacks"][monitor.state_key]["scope"],
    }


def model_parallel(tensor: int = 1) -> ModelParallelStrategy:
    """FSDP2, over as many groups of ranks as there are when each group shares the layers."""
    return ModelParallelStrategy(
        data_parallel_size=dist.get_world_size() // tensor,
        tensor_parallel_size=tensor,
        save_distributed_checkpoint=False,
    )


def lightning_ddp(rank: int, folder: Path) -> dict[Case, Any]:
    return {case: run(case, lambda: "ddp", folder) for case in CASES}


def lightning_fsdp(rank: int, folder: Path) -> dict[Case, Any]:
    return {case: run(case, model_parallel, folder) for case in CASES}


class After(Callback):
    """Does something on the last rank, after the third step."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step == SAVED_AT and trainer.global_rank == trainer.world_size - 1:
            self.do()


def lightning_fault(rank: int, folder: Path) -> dict[str, Any]:
    """A fault of ours on the last rank: it counts no more, trains on, and keeps nobody waiting."""
    records, tables, monitor = Records(), Tables(), DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    plain, watched = Net(Case()), Net(Case())
    fit(plain, "ddp", folder, records, After(lambda: records.recorder.stop()))
    fail = After(lambda: monitor.scope._hooks.fail(RuntimeError("a fault of ours")))
    fit(watched, "ddp", folder, tables, monitor, fail)
    weights = (whole(plain.net), whole(watched.net))
    return outcome(
        records.recorder,
        monitor.scope,
        weights,
        same_hooks=tables.same(watched),
        phases=("train", "val"),
        within="net.",
    )


def lightning_tried(rank: int, folder: Path) -> dict[str, str]:
    return {
        "Lightning's FSDPStrategy": tried(lambda: Trainer(accelerator="cpu", devices=2, strategy="fsdp")),
        "FullyShardedDataParallel, not told of a device": tried(lambda: FullyShardedDataParallel(Network())),
    }


def lightning_model_parallel(rank: int, folder: Path) -> dict[str, Any]:
    return run(Case(), partial(model_parallel, tensor=2), folder, share=rank // 2)


class Tells(Callback):
    """Leaves what was counted where the process that spawned this one finds it."""

    def __init__(self, folder: Path, monitor: DeadNeuronMonitor) -> None:
        self.folder, self.monitor = folder, monitor

    def on_train_end(self, trainer: Any, module: Any) -> None:
        path = self.folder / f"spawned_{trainer.global_rank}.pt"
        torch.save(counted(self.monitor.scope), path)
        path.with_suffix(".told").touch()


def main(folder: str) -> None:
    """Lightning spawns two ranks of its own: ``python -m tests.ranks.lightning_runs FOLDER``."""
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    fit(Net(Case()), "ddp_spawn", Path(folder), monitor, Tells(Path(folder), monitor))


if __name__ == "__main__":
    main(*sys.argv[1:])
