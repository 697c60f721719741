"""Findings: what a report amounts to, in plain sentences, the same in every writer."""

from __future__ import annotations

import math

from neuronscope.report.report import Report
from neuronscope.writers.wording import (
    NONE,
    UNKNOWN,
    confidence,
    count,
    is_unseen,
    judged,
    percent,
    plural,
    up_to,
    visible,
)

__all__ = ["LEGEND", "caveat", "finding", "glossary", "span", "title"]

#: The words of a table in one line; :func:`glossary` says them in full.
LEGEND = (
    "dead: silent (born: always) · dormant: next to no output · cut off: no gradient · linear: never off · "
    f"{UNKNOWN}: not seen"
)


def title(report: Report) -> str:
    """Model, phase and, where there were any, steps."""
    steps = f" · {plural(report.global_step, 'optimizer step')}" if report.global_step else ""
    return f"{visible(report.model)} · {visible(report.phase)}{steps}"


def span(report: Report) -> str:
    """What the verdicts are based on: how many examples of which steps, and how sure that makes a dead verdict."""
    if not report.observed_neurons:
        return "Based on nothing: no neuron was observed."
    numbers = sorted({site.examples for site in report.layers if not is_unseen(site)})
    examples = count(numbers[0]) if len(numbers) == 1 else f"{count(numbers[0])} to {count(numbers[-1])}"
    phase = {"train": "training ", "val": "validation ", "scan": ""}.get(report.phase, f"{visible(report.phase)} ")
    on = f"on {examples} {phase}example{'' if numbers == [1] else 's'}{_steps(report)}"
    bound = up_to(report.examples, report.policy["confidence"])
    sure = f"A neuron called dead could still fire on up to {bound} of inputs ({confidence(report)} confidence)."
    if not report.provisional:
        return f"Based {on}. {sure}"
    needed = f"{count(report.examples_needed)} are needed for a bound of {100.0 * report.policy['max_rate']:g} %"
    return f"Provisional: based {on} ({needed}). {sure}"


def _steps(report: Report) -> str:
    window = report.window
    if window.last_step < 0 or not report.global_step:
        return ""  # seen outside any optimizer step: a scan
    if window.first_step == window.last_step:
        return f" at step {count(window.last_step)}"
    return f" from steps {count(window.first_step)}–{count(window.last_step)}"


def caveat(report: Report, examples: int) -> str:
    """What to write below a picture of a window that is too short for the policy; empty where it is long enough.

    Args:
        report: The report.
        examples: Examples behind what the picture shows.
    """
    if not report.provisional:
        return ""
    of = f"{count(examples)} of {count(report.examples_needed)} examples"
    return f"Provisional: {of}; dead ones may fire on up to {up_to(examples, report.policy['confidence'])}"


def finding(report: Report) -> list[str]:
    """What was found, in plain sentences, gravest first."""
    seen = [site for site in report.layers if not is_unseen(site)]
    said: list[str] = []
    broken = [site for site in report.layers if site.not_finite]
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
    if len(seen) < len(report.layers):
        said.append(f"{plural(len(report.layers) - len(seen), 'site')} never ran in this window (unseen).")
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
    worst = max(report.layers, key=lambda site: site.dead / max(judged(site), 1))
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
