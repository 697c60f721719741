"""Alarms: what to do about a network that loses too many of its neurons."""

from __future__ import annotations

from neuronscope.errors import UsageError
from neuronscope.report.report import Report

__all__ = ["DeadThreshold"]

_ACTIONS = ("log", "warn", "stop")


class DeadThreshold:
    """Tells when a threshold is crossed.

    Args:
        action: ``log``, ``warn`` or ``stop``; carried out by the callback.
        threshold: Percent of the observed neurons that are dead or give NaN.

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
        self._beyond = False

    def hear(self, report: Report) -> str | None:
        """What there is to say of a report: a sentence when it is the first one beyond the threshold, else ``None``.

        A report whose window is too short to be sure of anything changes nothing.
        """
        observed = report.observed_neurons
        if not observed or report.provisional:
            return None
        broken = sum(int(site.judgement.not_finite.sum()) for site in report.layers)
        beyond = 100.0 * (report.dead + broken) / observed >= self.threshold
        new, self._beyond = beyond and not self._beyond, beyond
        if not new:
            return None
        nan = f" and {broken} give NaN or infinite outputs" if broken else ""
        worst = max(report.layers, key=lambda site: (site.dead + int(site.judgement.not_finite.sum())) / site.neurons)
        return (
            f"{report.dead} of {observed} neurons are dead ({report.dead_percent:.1f} %){nan} "
            f"at step {report.global_step}; the threshold is {self.threshold:g} %. "
            f"Worst is {worst.name}: {worst.dead} of {worst.neurons} dead."
        )
