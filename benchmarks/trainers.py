"""What the monitor costs under a Lightning Trainer, with its defaults and a TensorBoard logger.

Whole runs take turns, unwatched and watched. Compared is the time from the first batch to the last one, so that all
that the monitor does in the loop is in it: hooks, observed steps, closing windows, reports and scalars. Setting a run
up is not, nor is a drawing: the runs are too short for one before their end.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from benchmarks import nets
from benchmarks.tables import Table, milliseconds, ratio
from neuronscope.callbacks import DeadNeuronMonitor

__all__ = ["tables"]


class Case(NamedTuple):
    """A network, and the steps of a run: whole multiples of the default of 20."""

    build: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    steps: int


#: The networks of the plain loop. The two slow ones have smaller batches here, so that a run has its 20 steps soon.
CASES = {
    "small MLP": Case(nets.small, 2000),
    "MLP": Case(nets.mlp, 40),
    "CNN, batch 4": Case(partial(nets.cnn, 4), 20),
    "transformer, batch 2": Case(partial(nets.transformer, 2), 20),
}
ROUNDS = 5


# ruff: noqa: ARG002  # a hook takes what Lightning gives it


class Module(pl.LightningModule):
    """A network that is trained on one batch again and again."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Clock(pl.Callback):
    """Notes when batches begin; the first five are not counted."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Seconds a step, on average."""
        return (self.began[-1] - self.began[5]) / (len(self.began) - 6)


class Batches:
    """The same batch so many times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)

    def __len__(self) -> int:
        return self.count


def run(net: nn.Module, batch: Any, steps: int, folder: str, callbacks: list[pl.Callback]) -> float:
    """Train with callbacks, and give the seconds of a step."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(folder),
        callbacks=[clock, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    gc.collect()
    trainer.fit(Module(net), Batches(batch, steps + 6))
    return clock.step


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table, a row a network."""
    table = Table(
        "A training step under a Lightning Trainer, the monitor's defaults",
        ("net", "steps of a run", "unwatched", "watched ÷ unwatched", "a callback that does nothing ÷ unwatched"),
        note="Means over a run; ratios of the medians of the runs, of their minima in brackets. Lightning calls every "
        "method of every callback at each step, also those that do nothing. Windows end every 100 steps; runs as short "
        "as these are drawn at their end only, which is not in it.",
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in list(CASES.items())[: 1 if quick else None]:
            torch.manual_seed(0)
            net, x, y = case.build()
            steps = 1 if quick else case.steps
            means: dict[Callable[[], list[pl.Callback]], list[float]] = {
                list: [],
                lambda: [DeadNeuronMonitor()]: [],
                lambda: [pl.Callback()]: [],
            }
            for _ in range(1 if quick else ROUNDS):
                for callbacks, of in means.items():
                    of.append(run(copy.deepcopy(net), (x, y), steps, folder, callbacks()))
            plain, *others = means.values()
            pairs = [(statistics.median(seen) / statistics.median(plain), min(seen) / min(plain)) for seen in others]
            table.rows.append((name, str(steps), milliseconds(statistics.median(plain)), *map(ratio, pairs)))
    yield table
