"""What a trainer's step runs without gradients is phase ``inference``: target networks, references, generation."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neuronscope.callbacks import DeadNeuronMonitor

WIDTH, ROWS, BATCHES = 4, 6, 5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 2))


def learner(framework: str) -> Any:
    base: Any = importlib.import_module(framework).LightningModule

    class Learner(base):  # type: ignore[misc]
        """Learns from a target network, in a step that is not its forward."""

        def __init__(self) -> None:
            super().__init__()
            self.policy, self.target = branch(), branch().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.policy(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (x,) = batch
            with torch.no_grad():
                value = self.target(x) + self(x[:2]).mean() + F.relu(self.policy[0](x[:1])).mean()
            return (self.policy(x) - value).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.target(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.policy.parameters(), lr=0.1)

    return Learner()


@pytest.mark.parametrize("framework", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_what_a_lightning_step_runs_without_gradients_is_inference(
    framework: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DDP too, where Lightning runs the step in place of the module's forward."""
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what Lightning sets is taken back
        monkeypatch.delenv(name)
    loader = DataLoader(TensorDataset(torch.randn(ROWS * BATCHES, WIDTH)), batch_size=ROWS)
    monitor = DeadNeuronMonitor(every_n_steps=1)
    module = learner(framework)
    trainer = importlib.import_module(framework).Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    try:
        trainer.fit(module, loader, loader)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    seen = {
        phase: sum(tally.positions for tally in monitor.census(phase).values())
        for phase in ("train", "val", "inference")
    }
    # A step's policy trains on the whole batch; its target sees the batch, its policy two rows and one row more.
    assert seen == {"train": ROWS * BATCHES, "val": ROWS * BATCHES, "inference": (ROWS + 2 + 1) * BATCHES}
    assert monitor.census("train").examples == ROWS * BATCHES


@pytest.mark.parametrize("generating", [True, False], ids=["generation", "a reference model"])
def test_what_a_hugging_face_step_runs_without_gradients_is_inference(generating: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from neuronscope.callbacks.transformers import DeadNeuronCallback
    from tests.callbacks.hugging import ACTS, LENGTH, arguments, gpt2, texts

    class Referring(transformers.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if generating:
                model.generate(inputs["input_ids"][:, :2], max_new_tokens=3, do_sample=False, use_cache=False)
            else:
                with torch.no_grad():
                    model(**inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    counted = []
    for trainer in (transformers.Trainer, Referring):
        callback = DeadNeuronCallback(every_n_steps=1)
        trainer(gpt2(), arguments(tmp_path), train_dataset=texts(8), callbacks=[callback]).train()
        counted.append({act: callback.census("train")[act].positions for act in ACTS})
    steps = callback.scope.global_step  # type: ignore[union-attr]
    assert counted[0] == counted[1]
    rows = counted[0][ACTS[0]] // LENGTH
    inference = callback.census("inference")
    # Generation runs the model on 2, 3 and 4 tokens of each row.
    assert {inference[act].positions for act in ACTS} == {rows * (2 + 3 + 4 if generating else LENGTH)}
    assert callback.census("train").steps == inference.steps == steps
