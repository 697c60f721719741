"""Decides when a network has lost too many of its neurons."""

from __future__ import annotations

from dataclasses import replace

from neuronscope.errors import UsageError
from neuronscope.report.report import Report
from neuronscope.writers.formatting import percent

__all__ = ["DeadThreshold"]

_ACTIONS = ("log", "warn", "stop")


class DeadThreshold:
    """Detects the report at which the share of dead neurons crosses a threshold.

    Args:
        action: ``log``, ``warn`` or ``stop``. The callback carries it out.
        threshold: Percent of the observed neurons that are dead or give NaN or infinite outputs.

    Raises:
        UsageError: An argument is not what is expected.
    """

    def __init__(self, action: str, threshold: float) -> None:
        if action not in _ACTIONS:
            raise UsageError(f"Expected argument `on_dead` to be one of {', '.join(_ACTIONS)}, but got {action!r}.")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 100:
            raise UsageError(
                f"Expected argument `threshold` to be a percentage above 0 and up to 100, but got {threshold!r}."
            )
        self.action = action
        self.threshold = float(threshold)
        self._crossed = False

    def check(self, report: Report) -> str | None:
        """Return a sentence if this report is the first at or above the threshold, otherwise ``None``.

        After a report below the threshold, the next one above it counts as the first again. A report whose window is
        too short for certain verdicts, or that is on another phase than training, changes nothing. A layer that has too
        few examples in a window that is long enough is left out.
        """
        if report.phase != "train" or report.provisional:
            return None
        needed = report.examples_needed
        report = replace(report, layers=tuple(layer for layer in report.layers if layer.examples >= needed))
        observed = report.observed_neurons
        if not observed:
            return None
        broken = report.not_finite_neurons
        crossed = 100.0 * (report.dead + broken) / observed >= self.threshold
        is_first, self._crossed = crossed and not self._crossed, crossed
        if not is_first:
            return None
        nan = f" and {broken} give NaN or infinite outputs" if broken else ""
        worst = max(
            report.totals.sites_with(lambda layer: layer.judgement.dead | layer.judgement.not_finite),
            key=lambda layer: (layer.dead + layer.not_finite_neurons) / layer.neurons,
        )
        return (
            f"{report.dead} of {observed} neurons are dead ({percent(report.dead_percent)}){nan} "
            f"at step {report.global_step}; the threshold is {self.threshold:g} %. "
            f"Worst is {worst.name}: {worst.dead} of {worst.neurons} dead."
        )
