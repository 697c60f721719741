"""Decides what a run says at once on the console: a collapse, a first mass death, NaN, each once."""

from __future__ import annotations

from collections.abc import Iterator

from neuronscope.judge.diagnosis import diagnose, remedy_of
from neuronscope.judge.symptoms import (
    COLLAPSED,
    COLLAPSED_SHARE,
    GROUP_LEAST,
    GROUPED,
    NOT_FINITE,
    RunFacts,
    died_after,
)
from neuronscope.report.report import LEVEL_DEAD, Report
from neuronscope.report.run_facts import facts_from_report

__all__ = ["Announcements"]

#: Deaths are a mass death if this share of the observed neurons died in the two newest windows.
MASS_SHARE = 0.1


class Announcements:
    """Finds what is new and urgent in the reports of one run.

    That is NaN in any phase; in training, if the window is long enough for certain verdicts, each layer that has
    collapsed, and the first time that many neurons died together.

    >>> from neuronscope.report.report import Report, WindowSpan
    >>> window = WindowSpan("all", -1, -1, 0, long_enough=False)
    >>> Announcements().new(Report("Net", "train", 0, window, {}, ()))
    []
    """

    def __init__(self) -> None:
        self._said: set[str] = set()  # NaN, a mass death, and the layers that have collapsed

    def new(self, report: Report) -> list[str]:
        """Return some sentences for each finding that no earlier report had: where, since when, and what to do."""
        if not self._may_have_news(report):
            return []
        facts = facts_from_report(report)
        return [f"Neuronscope at step {report.global_step:,}: {text}" for text in self._findings(report, facts)]

    def _may_have_news(self, report: Report) -> bool:
        """Whether a look at each layer's counts leaves open that something is new; the diagnosis takes much longer."""
        if report.not_finite and NOT_FINITE not in self._said:
            return True
        if report.phase != "train" or report.provisional:
            return False
        grown = 0
        for site in report.headline_layers:
            if (
                site.neurons > 1
                and site.dead >= COLLAPSED_SHARE * site.neurons
                and f"layer {site.name}" not in self._said
            ):
                return True
            before = site.history.levels[-3:-1]
            if len(before):
                grown += int((site.judgement.dead & (before[0] != LEVEL_DEAD)).sum())
        return GROUPED not in self._said and grown >= self._mass(report)

    @staticmethod
    def _mass(report: Report) -> float:
        return max(GROUP_LEAST, MASS_SHARE * report.observed_neurons)

    def _findings(self, report: Report, facts: RunFacts) -> Iterator[str]:
        certain = report.phase == "train" and not report.provisional
        collapsed: tuple[str, ...] = ()
        for one in diagnose(facts):
            if one.sign == NOT_FINITE and self._is_new(NOT_FINITE):
                yield f"{one.evidence} {one.remedy}"
            if one.sign == COLLAPSED and certain:
                collapsed = one.layers
                if self._is_new(*(f"layer {name}" for name in one.layers)):
                    yield f"{one.evidence} {one.remedy}"
        if not certain:
            return
        before = report.totals.steps()[-3:-2]
        died = died_after(facts, int(before[0]) if before.size else -1)
        if died is None or died.neurons < self._mass(report):
            return
        if self._is_new(GROUPED) and not {*died.layers} <= {*collapsed}:
            yield f"{died.evidence} {remedy_of(GROUPED, died, facts)}"

    def _is_new(self, *names: str) -> bool:
        """Whether any of some names was not said before; from now on all of them were."""
        new = not self._said.issuperset(names)
        self._said.update(names)
        return new
