"""Findings: what a report amounts to, in plain sentences, the same in every writer."""

from __future__ import annotations

import math

from neuronscope.report.report import Report
from neuronscope.writers.wording import (
    NONE,
    UNKNOWN,
    at_most,
    confidence,
    count,
    is_unseen,
    judged,
    percent,
    plural,
    visible,
)

__all__ = ["LEGEND", "finding", "glossary", "span", "title"]

#: The words of a table in one line; :func:`glossary` says them in full.
LEGEND = (
    "dead: silent (born: always) · dormant: next to no output · cut off: no gradient · linear: never off · "
    f"{UNKNOWN}: not seen"
)


def title(report: Report) -> str:
    """Model, phase and, where there were any, steps."""
    steps = f" · {plural(report.step, 'optimizer step')}" if report.step else ""
    return f"{visible(report.model)} · {visible(report.phase)}{steps}"


def _examples(report: Report) -> str:
    """How many examples stand behind the verdicts, over all observed sites."""
    numbers = sorted({site.examples for site in report.sites if not is_unseen(site)})
    if not numbers:
        return "no examples"
    if len(numbers) == 1:
        return plural(numbers[0], "example")
    return f"{count(numbers[0])} to {count(numbers[-1])} examples"


def span(report: Report) -> str:
    """Which window the verdicts are of, how many examples it holds, and how sure that makes a dead verdict."""
    window = report.window
    names = {"last": "the last closed window", "all": "everything since watching began", "open": "the open window"}
    name = names.get(window.name, f"window {visible(window.name)}")
    if not report.observed_neurons:
        return f"Verdicts are of {name}: nothing was observed."
    if window.last_step < 0 or not report.step:
        reach = ""  # seen outside any optimizer step: a scan
    elif window.first_step == window.last_step:
        reach = f"step {count(window.last_step)}, "
    else:
        reach = f"steps {count(window.first_step)} to {count(window.last_step)} ({count(window.steps)} observed), "
    fewest = min((site.examples for site in report.sites if not is_unseen(site)), default=0)
    sure = f"a dead neuron may still fire in {at_most(fewest, report.policy['confidence'])} of examples"
    short = "" if window.long_enough else " Too short for the confidence that the policy asks for: provisional."
    return f"Verdicts are of {name}: {reach}{_examples(report)}; {sure} (at {confidence(report)}).{short}"


def finding(report: Report) -> list[str]:
    """What was found, in plain sentences, gravest first."""
    seen = [site for site in report.sites if not is_unseen(site)]
    said: list[str] = []
    broken = [site for site in report.sites if site.not_finite]
    if broken:
        where = ", ".join(visible(site.name) for site in broken[:3]) + (" …" if len(broken) > 3 else "")
        said.append(
            f"NOT FINITE: {plural(report.not_finite, 'output')} NaN or infinite, at {plural(len(broken), 'site')} "
            f"({where}). This network is not healthy, whatever the rest says."
        )
    if not report.observed_neurons:
        return [*said, "No neuron was observed, so nothing can be said of any."]
    said.append(_deaths(report))
    if report.dormant:
        said.append(f"{plural(report.dormant, 'neuron')} {_be(report.dormant)} dormant: next to no output.")
    if report.cut_off:
        said.append(f"{plural(report.cut_off, 'neuron')} {_be(report.cut_off)} cut off: output, but no gradient.")
    blind = sum(site.gradient_positions == 0 for site in seen)
    if blind:
        where = ", so" if blind == len(seen) else f" at {count(blind)} of {count(len(seen))} sites: there,"
        said.append(f"Gradients were not seen{where} dead means zero output alone, and cut off is not known.")
    if len(seen) < len(report.sites):
        said.append(f"{plural(len(report.sites) - len(seen), 'site')} never ran in this window (unseen).")
    return said


def _deaths(report: Report) -> str:
    if not report.judged_neurons:
        return "No neuron gave finite outputs alone, so none can be called dead or alive."
    if not report.dead:
        what = "with finite outputs" if report.not_finite else "that were observed"
        return f"No dead neuron among the {count(report.judged_neurons)} {what}."
    died = report.dead - report.born_dead
    parts = [f"{count(report.born_dead)} never fired since watching began (born dead)"] if report.born_dead else []
    parts += [f"{count(died)} fired once and then stopped (died)"] if died else []
    worst = max(report.sites, key=lambda site: site.dead / max(judged(site), 1))
    return (
        f"{count(report.dead)} of {plural(report.judged_neurons, 'neuron')} ({percent(report.dead_percent)}) "
        f"{_be(report.dead)} dead: {' and '.join(parts)}. "
        f"Hardest hit is {visible(worst.name)}, with {count(worst.dead)} of {count(judged(worst))} dead."
    )


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


def glossary(report: Report) -> list[tuple[str, str]]:
    """Each word and what it means here, short enough for a legend."""
    tau = f"{report.policy.get('dormant_tau', math.nan):g}"
    return [
        ("dead", "zero output at every position of the window and, where gradients were seen, zero gradient too"),
        ("born", "dead, and never fired since watching began"),
        ("died", "dead, but fired once"),
        ("dormant", f"mean |y| at most {tau} of the site's mean, and not dead"),
        ("cut off", "fires, but its gradient is zero at every position"),
        ("linear", "never off, so it adds no non-linearity"),
        ("fires in", "the share of examples in which a neuron called dead may still fire"),
        (UNKNOWN, "not seen (never zero)"),
        (NONE, "none"),
    ]
