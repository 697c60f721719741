"""Watch a PyTorch Ignite run: a callback for another trainer, written over the public `Monitor`.

`DeadNeuronHandler` is all that Ignite needs: it tells a `Monitor` when training begins, when a batch runs, when an
optimizer step is over, and when an evaluation begins and ends. Numbers go to a `SummaryWriter`, pictures and a
diagnosis to a folder beside its file. The network learns scikit-learn's digits with a learning rate that is too high
on purpose.

Output (shortened; numbers differ a little between machines)::

    epoch 1: accuracy 82.5%
    ...
    epoch 8: accuracy 94.7%

    65 of 128 neurons are dead (51 %). 13 never fired since watching began (born dead); 52 worked before and stopped ...
    Worst layer: `0/relu`, with 38 of 64 dead.

    layer   activation  neurons  axis  dead            %  dormant  cut off  worst neurons
    0/relu  relu             64  1     38 (6 born)  59 %        ·        ·  2, 3, 4, 5 …
    2/relu  relu             64  1     27 (7 born)  42 %        ·        ·  3, 4, 7, 10 …

Run it with::

    python examples/ignite_callback.py [--out DIR]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch.utils.tensorboard import SummaryWriter

from neuronscope.callbacks import Monitor, SummaryWriterLog


class DeadNeuronHandler:
    """Watches which neurons die while an Ignite trainer trains a model.

    Counts are in `monitor`, whose `state_dict` Ignite's `Checkpoint` can save: `to_save={"neurons": handler.monitor}`.

    Args:
        model: The model that the trainer trains.
        writer: Gets numbers, if given.
        options: As for `Monitor`, such as `every_n_steps=10` or `on_dead="stop"`.
    """

    def __init__(self, model: nn.Module, writer: SummaryWriter | None = None, **options: Any) -> None:
        self.model = model
        self.monitor = Monitor(**options)
        if writer is not None:
            self.monitor.logs = [SummaryWriterLog(writer)]

    def attach(self, trainer: Engine, evaluator: Engine) -> None:
        """Follow a trainer, whose every iteration is an optimizer step, and the evaluator that it runs."""
        trainer.add_event_handler(Events.STARTED, self.start)
        trainer.add_event_handler(Events.ITERATION_STARTED, self.monitor.begin_batch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.end_step)
        trainer.add_event_handler(Events.COMPLETED, self.monitor.finish)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self.fail)
        evaluator.add_event_handler(Events.STARTED, self.monitor.begin_evaluation, "val")
        evaluator.add_event_handler(Events.ITERATION_STARTED, self.monitor.begin_batch)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.monitor.end_batch)
        evaluator.add_event_handler(Events.COMPLETED, self.monitor.end_evaluation)

    def start(self, trainer: Engine) -> None:
        """Put hooks on the model; a trainer that was loaded from a checkpoint begins at its iteration."""
        self.monitor.attach(self.model, step=trainer.state.iteration)

    def end_step(self, trainer: Engine) -> None:
        """Count the optimizer step, and stop the training if too many neurons are dead (`on_dead="stop"`)."""
        self.monitor.step(trainer.state.iteration)
        if self.monitor.stop_reason is not None:
            trainer.terminate()

    def fail(self, error: BaseException) -> None:
        """Take the hooks off after an exception, and raise it again: Ignite leaves that to its handlers."""
        self.monitor.finish(failed=True)
        raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ignite_callback"), help="folder for the logs")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    torch.manual_seed(0)

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16
    train_set, val_set = random_split(TensorDataset(images, torch.tensor(labels)), [0.8, 0.2])
    train_loader, val_loader = DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=256)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip

    trainer = create_supervised_trainer(model, torch.optim.Adam(model.parameters(), lr=3e-2), nn.CrossEntropyLoss())
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()})

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(trainer: Engine) -> None:
        evaluator.run(val_loader)
        print(f"epoch {trainer.state.epoch}: accuracy {evaluator.state.metrics['accuracy']:.1%}")

    with SummaryWriter(out) as writer:
        handler = DeadNeuronHandler(model, writer, every_n_steps=5)
        handler.attach(trainer, evaluator)
        trainer.run(train_loader, max_epochs=8)

    print(f"\n{handler.monitor.report()}")
    print(f"\nNow look at it: tensorboard --logdir {out}")


if __name__ == "__main__":
    main()
