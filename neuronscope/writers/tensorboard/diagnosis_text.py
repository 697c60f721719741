"""The diagnosis: a short text in markdown: which sites have dead neurons, since when, how sure that is, and why."""

from __future__ import annotations

import re

import numpy as np

from neuronscope.judge.diagnosis import diagnose
from neuronscope.report.report import Report, SiteReport
from neuronscope.report.run_facts import facts_from_report
from neuronscope.writers.findings import span
from neuronscope.writers.wording import up_to

__all__ = ["diagnosis", "escape"]

#: Rows of the table at most; what is left out is said below it.
MOST_ROWS = 40


def escape(text: str) -> str:
    """``text`` so that markdown and HTML show it as it is: every other character than plain ones as an entity.

    >>> escape("relu()|<b>")
    'relu()&#124;&#60;b&#62;'
    """
    return re.sub(r"[^A-Za-z0-9 .,:;()/%]", lambda found: f"&#{ord(found.group())};", _one_line(text))


def diagnosis(report: Report) -> str:
    """Say in markdown what is wrong with a network.

    Args:
        report: The report.

    Returns:
        Markdown; every name in it is escaped.
    """
    observed = report.observed_neurons
    gradients = any(site.gradient_positions for site in report.layers)
    lines = [f"**{escape(report.fault)}**", ""] if report.fault else []
    lines += [f"### {escape(report.model)}, {escape(report.phase)}, step {report.global_step:,}", ""]
    if observed:
        lines.append(
            f"**{report.dead:,} of {observed:,} observed neurons are dead ({_percent(report.dead, observed)})**; "
            f"{report.born_dead:,} of them never fired since watching began. {report.dormant:,} are dormant. "
            + (
                f"{report.cut_off:,} are cut off."
                if gradients
                else "No gradients were seen, so none can be called cut off."
            )
        )
        broken = sum(int(site.judgement.not_finite.sum()) for site in report.layers)
        if broken:
            lines += [
                "",
                f"**{broken:,} neurons give NaN or infinity ({_percent(broken, observed)}).** Mend that first.",
            ]
    else:
        lines.append("**No neuron was observed.** Nothing can be said.")
    based = escape(span(report))
    lines += ["", f"**{based}**" if report.provisional else based, ""]
    lines += [f"- {escape(note)}" for note in report.other_notes]
    if report.other_notes:
        lines.append("")
    ill = sorted((site for site in report.layers if _ill(site)), key=_severity)
    if ill:
        lines += _table(report, ill)
    elif observed:
        lines += ["No site has dead, dormant, cut-off or non-finite neurons.", ""]
    lines += _causes(report)
    if report.not_measured:
        lines += ["**Not measured** (this is not zero):", ""]
        lines += [f"- {escape(item.name)}: {escape(item.reason)}" for item in report.not_measured]
    return "\n".join(lines).rstrip() + "\n"


def _causes(report: Report) -> list[str]:
    found = diagnose(facts_from_report(report))
    said = [f"- **{escape(one.sign)}**: {escape(f'{one.evidence} {one.cause} {one.remedy}')}" for one in found]
    return ["**Why, and what to do**", "", *said, ""] if said else []


def _table(report: Report, ill: list[SiteReport]) -> list[str]:
    confidence = report.policy.get("confidence", 0.95)
    broken = any(site.judgement.not_finite.any() for site in ill)
    columns = ["site", "activation", "dead", "since step", "dormant", "cut off", "sample"]
    if broken:
        columns.insert(2, "NaN or inf")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for site in ill[:MOST_ROWS]:
        observed = site.neurons - site.unseen
        cells = [
            escape(site.name),
            escape(site.activation),
            f"{site.dead:,} of {observed:,} ({_percent(site.dead, observed)})",
            _since(site),
            f"{site.dormant:,}",
            f"{site.cut_off:,}" if site.gradient_positions else "no gradient seen",
            _sample(site, confidence),
        ]
        if broken:
            cells.insert(2, _percent(int(site.judgement.not_finite.sum()), observed))
        lines.append("| " + " | ".join(cells) + " |")
    if len(ill) > MOST_ROWS:
        lines += ["", f"{len(ill) - MOST_ROWS:,} more sites have such neurons, a smaller share of them than these."]
    if any(site.dead for site in ill):
        lines += ["", f"*Sample*: the most often that a neuron found dead may still fire, {100 * confidence:g} % sure."]
    return [*lines, ""]


def _sample(site: SiteReport, confidence: float) -> str:
    text = f"{site.examples:,} examples"
    return f"{text}, below {up_to(site.examples, confidence)} of them" if site.dead else text


def _since(site: SiteReport) -> str:
    """When the dead of a site died: those that never fired, then the steps of the rest."""
    steps = site.history.died_step[site.judgement.dead & (site.last_active_step >= 0)]
    steps = steps[steps >= 0]
    parts = [f"{site.born_dead:,} from the start"] if site.born_dead else []
    if len(steps):
        first, middle, last = int(steps.min()), int(np.median(steps)), int(steps.max())
        parts.append(
            f"{len(steps):,} at {first:,}" if first == last else f"{len(steps):,} from {first:,}, half by {middle:,}"
        )
    return "; ".join(parts)


def _percent(part: int, whole: int) -> str:
    """A share in percent; above none is never written as 0.0."""
    if not whole:
        return "n/a"
    return "<0.1 %" if 0 < part / whole < 0.0005 else f"{100 * part / whole:.1f} %"


def _ill(site: SiteReport) -> bool:
    return bool(site.dead or site.dormant or site.cut_off or site.judgement.not_finite.any())


def _severity(site: SiteReport) -> tuple[float, float, float]:
    seen = max(site.neurons - site.unseen, 1)
    return (-float(site.judgement.not_finite.sum()) / seen, -site.dead / seen, -(site.dormant + site.cut_off) / seen)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in re.sub(r"\s+", " ", text).strip())
