"""Decides what a run says at once on the console: a collapse, a first mass death, NaN, each once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from neuronscope.judge.diagnosis import remedy_of
from neuronscope.judge.symptoms import (
    COLLAPSED,
    COLLAPSED_SHARE,
    GROUP_LEAST,
    GROUPED,
    NOT_FINITE,
    RunFacts,
    Support,
    collapsed,
    died_after,
    not_finite,
)
from neuronscope.report.report import LEVEL_DEAD, Report
from neuronscope.report.run_facts import facts_from_report
from neuronscope.writers.formatting import listed

__all__ = ["Announcements"]

#: Deaths are a mass death if this share of the observed neurons died in the two newest windows.
MASS_SHARE = 0.1


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
            if site.neurons > 1 and site.dead >= COLLAPSED_SHARE * site.neurons:
                if _layer(site.name) not in self._said:
                    return True
                continue
            before = site.history.levels[-3:-1]
            if len(before):
                grown += int((site.judgement.dead & (before[0] != LEVEL_DEAD)).sum())
        return GROUPED not in self._said and grown >= self._mass(report)

    @staticmethod
    def _mass(report: Report) -> float:
        return max(GROUP_LEAST, MASS_SHARE * report.observed_neurons)

    def _findings(self, report: Report, facts: RunFacts) -> Iterator[str]:
        if report.not_finite and NOT_FINITE not in self._said:
            yield self._say(NOT_FINITE, not_finite(facts) or _not_finite_outside(report), facts)
        if report.phase != "train" or report.provisional:
            return
        new = replace(facts, layers=tuple(layer for layer in facts.layers if _layer(layer.name) not in self._said))
        fallen = collapsed(new)
        if fallen is not None:
            yield self._say(COLLAPSED, fallen, new)
            self._said.update(map(_layer, fallen.layers))
            new = replace(facts, layers=tuple(layer for layer in new.layers if layer.name not in fallen.layers))
        before = report.totals.steps()[-3:-2]
        died = died_after(new, int(before[0]) if before.size else -1)
        if died is not None and died.neurons >= self._mass(report) and GROUPED not in self._said:
            yield self._say(GROUPED, died, new)

    def _say(self, sign: str, found: Support, facts: RunFacts) -> str:
        self._said.add(sign)
        return f"{found.evidence} {remedy_of(sign, found, facts)}"


def _not_finite_outside(report: Report) -> Support:
    """Return the evidence of NaN at layers that are not in the totals, which no diagnosis looks at."""
    sites = [site for site in report.layers if site.not_finite]
    names = tuple(site.name for site in sites)
    numbers = sum(site.not_finite_neurons for site in sites)
    return Support(f"Outputs that are not in the totals are NaN or infinite: {listed(names)}.", numbers, names)


def _layer(name: str) -> str:
    """Return what stands for the collapse of a layer among what was said."""
    return f"layer {name}"
