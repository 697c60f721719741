"""Write the TensorBoard logs of the demo: one run per variant, so that charts show ReLU, GELU and SiLU together.

Each run shows the network of the first seed like any watched network, and the means over all seeds in a group of their
own. Its layers are called ``layer1``, ``layer2``, …: their own names have the activation in them, so that the charts of
the variants would not lie over each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from neuronscope.demo.results import Epoch, Run
from neuronscope.report.report import Report
from neuronscope.writers.tensorboard import EVENT_FOLDER, Dashboard

__all__ = ["VariantLog", "remove_earlier_logs"]

#: Pictures and text are written every this many epochs; they show all earlier epochs anyway.
_PICTURES_EVERY = 5


class VariantLog:
    """Write the log of one variant. A context manager that closes the file."""

    def __init__(self, folder: Path, neurons: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

        self._writer = SummaryWriter(str(folder))
        self._dashboard = Dashboard(self._writer)
        self._neurons = neurons
        self._epochs = 0

    def __enter__(self) -> VariantLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def epoch(self, epoch: Epoch, report: Report) -> None:
        """Write an epoch of the first seed.

        Args:
            epoch: The numbers of the epoch.
            report: The report at its end.
        """
        self._epochs += 1
        pictures = self._epochs % _PICTURES_EVERY == 0
        layers = (replace(site, name=f"layer{number}") for number, site in enumerate(report.layers, 1))
        self._dashboard.write(replace(report, layers=tuple(layers)), epoch.step, images=pictures, text=pictures)
        self._writer.add_scalar("training/loss", epoch.loss, epoch.step)
        self._writer.add_scalar("training/test_accuracy", epoch.accuracy, epoch.step)

    def means(self, runs: Sequence[Run]) -> None:
        """Write the means over a variant's runs, one per seed, from the scans before the first and after each epoch."""
        group = f"mean_of_{len(runs)}_seeds" if len(runs) > 1 else "one_seed"
        for moments in zip(*(run.scans for run in runs), strict=True):
            for name in ("dead", "dormant"):
                counts = statistics.fmean(sum(getattr(moment, name)) for moment in moments)
                self._writer.add_scalar(f"{group}/{name}_pct", 100 * counts / self._neurons, moments[0].step)
        for epochs in zip(*(run.epochs for run in runs), strict=True):
            accuracy = statistics.fmean(epoch.accuracy for epoch in epochs)
            self._writer.add_scalar(f"{group}/test_accuracy", accuracy, epochs[0].step)


def remove_earlier_logs(folder: Path, variants: Sequence[str]) -> int:
    """Remove the event files of an earlier demo and nothing else; return how many.

    Args:
        folder: Folder of all runs.
        variants: Names of all variants, including those that will not be trained now.
    """
    folders = [place for name in variants for place in (folder / name / EVENT_FOLDER, folder / name)]
    found = [path for place in folders for path in place.glob("events.out.tfevents.*") if path.is_file()]
    for path in found:
        path.unlink()
    for place in folders:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    return len(found)
