"""A small LightningModule that keeps its own record, for either framework, and the counts made from it by hand.

The record is written by the module's own code: no hook, and no line shared with Neuronscope.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, HIDDEN, SECOND, CLASSES = 8, 12, 10, 3
#: Neurons by site: of an activation module, and of a function that the step itself calls.
SITES = {"first/relu": HIDDEN, "second/relu": SECOND}


@dataclass
class Note:
    """One activation call: where, in which stage of the run, at which optimizer step."""

    site: str
    stage: str
    step: int
    x: Tensor
    y: Tensor


@dataclass
class Counts:
    """What the record says of one site."""

    zero_outputs: npt.NDArray[np.int64]
    zero_gradients: npt.NDArray[np.int64]
    last_active_step: npt.NDArray[np.int64]
    positions: int = 0
    gradient_positions: int = 0


class Recorded:
    """What the module does, in both frameworks: an activation module, and a functional call at the step's own level."""

    notes: list[Note]
    batch_step: int = 0
    manual: bool = False
    fails_at: int = -1

    def build(self) -> None:
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.25)
        self.second = nn.Linear(HIDDEN, SECOND)
        self.last = nn.Linear(SECOND, CLASSES)
        with torch.no_grad():
            self.first.bias[:3] = -100.0  # three neurons that never fire
        self.notes = []

    def logits(self, x: Tensor) -> Tensor:
        a = self.first(x)
        h = self.note("first/relu", a, self.act(a))
        b = self.second(self.drop(h))
        return self.last(self.note("second/relu", b, F.relu(b)))

    def note(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        trainer = self.trainer  # type: ignore[attr-defined]
        if x.requires_grad:
            x.retain_grad()
        step = self.batch_step if trainer.training else trainer.global_step
        self.notes.append(Note(site, str(trainer.state.stage.value), step, x, y.detach().clone()))
        return y

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batch_step = self.trainer.global_step  # type: ignore[attr-defined]

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.batch_step == self.fails_at:
            raise RuntimeError("the user's own mistake")
        if not self.manual:
            return self.loss(batch)
        for optimizer in self.optimizers():  # type: ignore[attr-defined]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))  # type: ignore[attr-defined]
            optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))  # type: ignore[attr-defined]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))  # type: ignore[attr-defined]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.act(torch.zeros(4, HIDDEN))  # what runs between two batches does not count

    def configure_optimizers(self) -> Any:
        parameters = [[*self.first.parameters(), *self.second.parameters()], [*self.last.parameters()]]
        if self.manual:
            return [torch.optim.SGD(some, lr=0.1) for some in parameters]
        return torch.optim.SGD([weight for some in parameters for weight in some], lr=0.1, momentum=0.9)


def network(framework: str = "pytorch_lightning", *, manual: bool = False, fails_at: int = -1) -> Any:
    """A network for a framework, always with the same weights."""
    base: Any = importlib.import_module(framework).LightningModule

    class Net(Recorded, base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.automatic_optimization = not manual
            self.manual = manual
            self.fails_at = fails_at
            self.build()

    torch.manual_seed(0)
    return Net()


def batches(count: int, size: int = 8) -> DataLoader[Any]:
    """Batches of random data, always the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(CLASSES, (count * size,), generator=generator)), batch_size=size)


def trainer(*callbacks: Any, framework: str = "pytorch_lightning", **options: Any) -> Any:
    """A Trainer that shows nothing and leaves nothing, unless told otherwise."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        **quiet,
    }
    module: Any = importlib.import_module(framework)
    return module.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def counted(notes: list[Note], site: str, stage: str, steps: Collection[int] | None = None) -> Counts:
    """The counts of one site from the record, in a stage and, unless ``None``, at some steps only."""
    neurons = SITES[site]
    counts = Counts(*(np.zeros(neurons, np.int64) for _ in range(2)), np.full(neurons, -1, np.int64))
    for note in notes:
        if note.site != site or note.stage != stage or (steps is not None and note.step not in steps):
            continue
        zero = (note.y == 0).numpy()
        counts.zero_outputs += zero.sum(0)
        counts.last_active_step = np.where(zero.all(0), counts.last_active_step, note.step)
        counts.positions += len(zero)
        if note.x.grad is not None:
            counts.zero_gradients += (note.x.grad == 0).numpy().sum(0)
            counts.gradient_positions += len(zero)
    return counts


def assert_counts(tally: Any, counts: Counts) -> None:
    """A tally is what was counted by hand, integer by integer."""
    assert counts.positions > 0
    assert (tally.positions, tally.gradient_positions) == (counts.positions, counts.gradient_positions)
    np.testing.assert_array_equal(tally.zero_outputs, counts.zero_outputs)
    np.testing.assert_array_equal(tally.zero_gradients, counts.zero_gradients)
    np.testing.assert_array_equal(tally.last_active_step, counts.last_active_step)


@dataclass
class Setup:
    """One way to train, and the optimizer steps that are observed of it."""

    name: str
    every_n_steps: int
    steps: set[int]
    manual: bool = False
    options: dict[str, Any] = field(default_factory=dict)


SETUPS = [
    # 2 epochs of 8 batches: steps 0 … 15.
    Setup("every step", 1, set(range(16))),
    Setup("every third step", 3, {0, 3, 6, 9, 12, 15}),
    # 8 batches, 3 at a time: the third step of an epoch has the 2 that are left. 6 steps in all.
    Setup("accumulation", 2, {0, 2, 4}, options={"accumulate_grad_batches": 3}),
    # Two optimizers move the step by 2: 0, 2, … 30. The first step at or after each multiple of 5 is observed.
    Setup("manual, two optimizers", 5, {0, 6, 10, 16, 20, 26, 30}, manual=True),
    Setup("bfloat16", 2, set(range(0, 16, 2)), options={"precision": "bf16-mixed"}),
    Setup("validation in mid-epoch", 2, set(range(0, 16, 2)), options={"val_check_interval": 0.25}),
    Setup("sanity check", 2, set(range(0, 16, 2)), options={"num_sanity_val_steps": 2}),
    Setup("clipping", 4, {0, 4, 8, 12}, options={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}),
    Setup("no inference mode", 8, {0, 8}, options={"inference_mode": False, "num_sanity_val_steps": 1}),
]
