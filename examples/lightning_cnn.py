"""Watch a Lightning run: one callback, and TensorBoard shows which channels of a CNN die.

A small CNN learns scikit-learn's digits (8 × 8 pixels), with a learning rate that is too high on purpose. The callback
is the only line that a Trainer needs: scalars, pictures and a diagnosis go to its TensorBoard logger, totals to its
metrics.

Output (shortened; numbers differ a little between machines)::

    47 of 112 neurons are dead (42 %). 10 never fired since watching began (born dead); 37 worked before and stopped ...
    Worst layer: `features.2/relu`, with 17 of 32 dead.

    layer            activation  neurons  axis  dead             %  dormant  cut off  worst neurons
    features.0/relu  relu             16  1     1 (born)     6.2 %        ·        ·  9
    features.2/relu  relu             32  1     17 (1 born)   53 %        ·        ·  0, 1, 2, 6 …
    hidden/relu      relu             64  1     29 (8 born)   45 %        2        ·  0, 1, 3, 4 …

    val_accuracy = 0.98
    neuronscope/dead_pct = 41.96
    ...

A layer is named by what holds its weights, whether its ReLU is a module or, as that of ``hidden``, a function call. Run
it with::

    python examples/lightning_cnn.py [--out DIR]
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from neuronscope.callbacks import DeadNeuronMonitor


class DigitsCNN(pl.LightningModule):
    """Two convolutions, each with a ReLU that is a module, and a hidden layer whose ReLU is a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 1, 8, 8)`` → scores ``(B, 10)``."""
        return self.head(F.relu(self.hidden(self.features(images).flatten(1))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, too fast."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning_cnn"), help="folder for the logs")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # for images this small, more threads only wait for each other
    pl.seed_everything(0)

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train_set, val_set = random_split(TensorDataset(images, torch.tensor(labels)), [0.8, 0.2])

    monitor = DeadNeuronMonitor(every_n_steps=5)  # a run as short as this can afford to look often
    trainer = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        callbacks=[monitor],
        log_every_n_steps=20,
        logger=TensorBoardLogger(out, name=None),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsCNN(), DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=256))

    print(monitor.report())
    for name, value in trainer.callback_metrics.items():
        print(f"{name} = {float(value):.2f}")
    print(f"\nNow look at it: tensorboard --logdir {out}")


if __name__ == "__main__":
    main()
