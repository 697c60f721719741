"""The TensorBoard logs of the demo: one run a variant, so that its charts lay ReLU, GELU and SiLU over each other.

A run shows the network of the first seed as any watched network is shown, and, in a group of its own that comes first,
the means over all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from neuronscope.demo.results import Epoch, Run
from neuronscope.report.report import Report
from neuronscope.writers.tensorboard import EVENT_FOLDER, Dashboard

__all__ = ["VariantLog", "remove_earlier_logs"]

#: Pictures and text are written every so many epochs: they show all epochs before them anyway.
_PICTURES_EVERY = 5


class VariantLog:
    """The log of one variant; a context manager that closes its file.

    Args:
        folder: The folder of the run.
        neurons: Hidden neurons of a network.
    """

    def __init__(self, folder: Path, neurons: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second, and only needed here

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
        """Write an epoch of the first seed."""
        self._epochs += 1
        drawn = self._epochs % _PICTURES_EVERY == 0
        self._dashboard.write(report, epoch.step, images=drawn, text=drawn)
        self._writer.add_scalar("training/loss", epoch.loss, epoch.step)
        self._writer.add_scalar("training/test_accuracy", epoch.accuracy, epoch.step)

    def means(self, runs: Sequence[Run]) -> None:
        """Write the means over the seeds: what scans between the epochs saw, beginning before the first step.

        Args:
            runs: The variant's runs.
        """
        group = f"mean_of_{len(runs)}_seeds" if len(runs) > 1 else "one_seed"
        for moments in zip(*(run.scans for run in runs), strict=True):
            for name in ("dead", "dormant"):
                counts = statistics.fmean(sum(getattr(moment, name)) for moment in moments)
                self._writer.add_scalar(f"{group}/{name}_pct", 100 * counts / self._neurons, moments[0].step)
        for epochs in zip(*(run.epochs for run in runs), strict=True):
            accuracy = statistics.fmean(epoch.accuracy for epoch in epochs)
            self._writer.add_scalar(f"{group}/test_accuracy", accuracy, epochs[0].step)


def remove_earlier_logs(folder: Path, variants: Sequence[str]) -> int:
    """Remove the event files that an earlier demo left in its variants' folders, and nothing else.

    Args:
        folder: The folder of all runs.
        variants: Names of all variants, also of those that will not be trained now.

    Returns:
        How many files were removed.
    """
    folders = [place for name in variants for place in (folder / name / EVENT_FOLDER, folder / name)]
    found = [path for place in folders for path in place.glob("events.out.tfevents.*") if path.is_file()]
    for path in found:
        path.unlink()
    for place in folders:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    return len(found)
