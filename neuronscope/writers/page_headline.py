"""Say in a few words what happened to a watched network: what died, when, beside what, and how far to go back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neuronscope.arrays import IntArray
from neuronscope.judge.diagnosis import diagnose
from neuronscope.judge.symptoms import COLLAPSED, GROUPED
from neuronscope.report.report import Report
from neuronscope.report.run_facts import death_steps, facts_from_report
from neuronscope.writers import wording
from neuronscope.writers.formatting import count, plural, visible

__all__ = ["headline", "spike"]

#: A layer has died if this share of its neurons is dead.
DIED = 0.5
#: A series has a spike where it is at least this many times its median.
RISE = 3.0
#: Fewest points of a series whose median says what is usual.
_FEWEST = 8


def headline(report: Report) -> list[str]:
    """Return in sentences what a person should know first, each part only as far as it is known.

    Those that :func:`neuronscope.writers.wording.findings` has too are the same there.
    """
    found = [text for text in wording.findings(report) if not text.startswith("NOT FINITE")]
    if not report.judged_neurons or not report.dead:
        return found[:1]
    facts = facts_from_report(report)
    spikes = [one for one in diagnose(facts) if one.sign in (COLLAPSED, GROUPED) and one.steps]
    worst = max(report.headline_layers, key=lambda site: (site.dead / max(site.judged_neurons, 1), site.dead))
    if worst.dead >= DIED * worst.judged_neurons:
        later = worst.dead - worst.born_dead
        born = worst.born_dead > later
        many, rest = worst.dead, ""
        if born and not facts.in_training:  # never fired within a scan or a pass: this says nothing of the start
            how = "is dead"
        elif born:
            many, how, rest = worst.born_dead, "is dead from the start", f"{count(later)} more died later"
        else:
            how = f"died{_at(death_steps(worst)[worst.judgement.dead])}"
            many, rest = later, f"{count(worst.born_dead)} more never fired"
        rest = f"; {rest}" if many < worst.dead else ""
        whole = plural(worst.judged_neurons, "neuron")
        sentences = [f"Layer `{visible(worst.name)}` {how}: {count(many)} of {whole}{rest}."]
        spikes = [] if born else [one for one in spikes if worst.name in one.layers]
    else:
        sentences = found[:2]
    began = min((one.steps[0] for one in spikes if one.steps), default=None)
    if began is None:
        return sentences
    for name, words in (("learning_rate", "learning rate"), ("gradient_norm", "gradient norm")):
        if rise := spike(report.series.get(name, ()), began, facts.observed_every):
            times, start, end = rise
            when = f"step {count(start)}" if start == end else f"steps {count(start)}–{count(end)}"
            sentences.append(f"The {words} was {times:,.0f} × its median at {when}.")
            break
    healthy = facts.last_checkpoint(facts.healthy_before(began))
    if healthy is not None:
        sentences.append(f"Last healthy checkpoint: step {count(healthy)}.")
    elif report.checkpoints:
        sentences.append(f"No checkpoint before step {count(began)} is known.")
    return sentences


def _at(steps: IntArray) -> str:
    """Say when the neurons of a layer died; empty if not all deaths are dated."""
    dated = steps[steps != -1]
    if (dated < 0).any():
        return ""
    first, last = (int(step) for step in np.quantile(dated, (0.1, 0.9), method="nearest"))
    return f" at step {count(first)}" if first == last else f" at steps {count(first)}–{count(last)}"


def spike(points: Sequence[tuple[int, float]], step: int, late: int = 1) -> tuple[float, int, int] | None:
    """Return the rise of a series that may have led to what began at a step.

    Args:
        points: ``(step, value)``, steps rising.
        step: When it began.
        late: By how many steps it may have been seen too late.

    Returns:
        How many times its median the series was at most, and the first and last step of the rise; ``None`` if there was
        none then, or if too few points are known.

    >>> rate = [(at, 0.06 if 300 <= at <= 330 else 0.001) for at in range(0, 1000, 10)]
    >>> spike(rate, 305)
    (60.0, 300, 330)
    >>> spike(rate, 700) is None
    True
    """
    known = [(at, value) for at, value in points if np.isfinite(value)]
    median = float(np.median([value for _, value in known])) if len(known) >= _FEWEST else 0.0
    if median <= 0.0:
        return None
    steps, values = np.array([at for at, _ in known]), np.array([value for _, value in known])
    gap = max(int(np.median(np.diff(steps))), late)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], values >= RISE * median, [False]])))
    for start, end in edges.reshape(-1, 2):
        if steps[start] - gap <= step <= steps[end - 1] + gap:
            return float(values[start:end].max() / median), int(steps[start]), int(steps[end - 1])
    return None
