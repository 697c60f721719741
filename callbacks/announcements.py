"""Decides what a run says at once on the console: a collapse, a first mass death, NaN, each once."""

from __future__ import annotations

from collections.abc import Iterator

from neuronscope.judge.diagnosis import diagnose, remedy_of
from neuronscope.judge.symptoms import COLLAPSED, GROUP_LEAST, GROUPED, NOT_FINITE, RunFacts, died_after
from neuronscope.report.report import Report
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
        if not (report.not_finite or report.dead):
            return []
        facts = facts_from_report(report)
        return [f"Neuronscope at step {report.global_step:,}: {text}" for text in self._findings(report, facts)]

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
        if died is None or died.neurons < max(GROUP_LEAST, MASS_SHARE * report.observed_neurons):
            return
        if self._is_new(GROUPED) and not {*died.layers} <= {*collapsed}:
            yield f"{died.evidence} {remedy_of(GROUPED, died, facts)}"

    def _is_new(self, *names: str) -> bool:
        """Whether any of some names was not said before; from now on all of them were."""
        new = not self._said.issuperset(names)
        self._said.update(names)
        return new
