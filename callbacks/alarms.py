"""Decide what the console says at once (a collapse, a first mass death, NaN), and when too many neurons are dead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from neuronscope.errors import UsageError
from neuronscope.judge import symptoms
from neuronscope.judge.diagnosis import remedy_of
from neuronscope.judge.symptoms import RunFacts, Support
from neuronscope.report.report import LEVEL_DEAD, Report
from neuronscope.report.run_facts import facts_from_report
from neuronscope.writers.formatting import listed, percent

__all__ = ["Announcements", "DeadThreshold"]

#: Deaths are a mass death if this share of the observed neurons died in the two newest windows.
MASS_SHARE = 0.1
_ACTIONS = ("log", "warn", "stop")


class Announcements:
    """Finds what is new and urgent in the reports of one run.

    That is NaN in any phase; in training, if the window is long enough for certain verdicts, each layer that has
    collapsed, and the first time that many neurons of other layers died together.

    >>> from neuronscope.report.report import Report, WindowSpan
    >>> window = WindowSpan("all", -1, -1, 0, long_enough=False)
    >>> Announcements().new(Report("Net", "train", 0, window, {}, ()))
    []
    """

    def __init__(self) -> None:
        self._said: set[str] = set()  # the symptoms that were announced
        self._collapsed: set[str] = set()  # the layers whose collapse was announced

    def new(self, report: Report) -> list[str]:
        """Return some sentences for each finding that no earlier report had: where, since when, and what to do."""
        if not self._may_have_news(report):
            return []
        facts = facts_from_report(report)
        return [f"Neuronscope at step {report.global_step:,}: {text}" for text in self._findings(report, facts)]

    def _may_have_news(self, report: Report) -> bool:
        """Whether a look at each layer's counts leaves open that something is new; the diagnosis takes much longer."""
        if report.not_finite and symptoms.NOT_FINITE not in self._said:
            return True
        if report.phase != "train" or report.provisional:
            return False
        grown = 0
        for site in report.headline_layers:
            if site.neurons > 1 and site.dead >= symptoms.COLLAPSED_SHARE * site.neurons:
                if site.name not in self._collapsed:
                    return True
                continue
            before = site.history.levels[-3:-1]
            if len(before):
                grown += int((site.judgement.dead & (before[0] != LEVEL_DEAD)).sum())
        return symptoms.GROUPED not in self._said and grown >= self._mass(report)

    @staticmethod
    def _mass(report: Report) -> float:
        return max(symptoms.GROUP_LEAST, MASS_SHARE * report.observed_neurons)

    def _findings(self, report: Report, facts: RunFacts) -> Iterator[str]:
        if report.not_finite and symptoms.NOT_FINITE not in self._said:
            yield self._say(symptoms.NOT_FINITE, symptoms.not_finite(facts) or _not_finite_outside(report), facts)
        if report.phase != "train" or report.provisional:
            return
        new = replace(facts, layers=tuple(layer for layer in facts.layers if layer.name not in self._collapsed))
        fallen = symptoms.collapsed(new)
        if fallen is not None:
            yield self._say(symptoms.COLLAPSED, fallen, new)
            self._collapsed.update(fallen.layers)
            new = replace(facts, layers=tuple(layer for layer in new.layers if layer.name not in fallen.layers))
        before = report.totals.steps()[-3:-2]
        died = symptoms.died_after(new, int(before[0]) if before.size else -1)
        if died is not None and died.neurons >= self._mass(report) and symptoms.GROUPED not in self._said:
            yield self._say(symptoms.GROUPED, died, new)

    def _say(self, sign: str, found: Support, facts: RunFacts) -> str:
        self._said.add(sign)
        return f"{found.evidence} {remedy_of(sign, found, facts)}"


def _not_finite_outside(report: Report) -> Support:
    """Return the evidence of NaN at layers that are not in the totals, which no diagnosis looks at."""
    sites = [site for site in report.layers if site.not_finite]
    names = tuple(site.name for site in sites)
    numbers = sum(site.not_finite_neurons for site in sites)
    return Support(f"Outputs that are not in the totals are NaN or infinite: {listed(names)}.", numbers, names)


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
