"""Write the diagnosis as markdown: which layers have dead neurons, since when, how sure that is, and why."""

from __future__ import annotations

from neuronscope.report.report import Report
from neuronscope.report.run_facts import death_steps
from neuronscope.writers import wording
from neuronscope.writers.formatting import count, when
from neuronscope.writers.markdown_text import SITE_COLUMNS, bullets, code, diagnosis_parts, plain, prose, table
from neuronscope.writers.page_headline import headline

__all__ = ["diagnosis"]

#: Most rows of the table, and most layers of which the weights are named.
MOST_ROWS, MOST_WEIGHTS = 40, 10

COLUMNS = [each for each in SITE_COLUMNS if each[1] not in ("axis", "linear", "worst", "examples")]


def diagnosis(report: Report) -> str:
    """Write what is wrong with a network as markdown: what happened, why, and what to do come before the numbers.

    It ends with a line end; every name in it is inert.
    """
    blocks = [f"**{plain(report.fault)}**"] if report.fault else []
    sentences = wording.findings(report)
    first = [*(sentences[:1] if report.not_finite else []), *headline(report)]
    rest = " ".join(prose(text) for text in sentences if text not in first)
    basis = plain(wording.based_on(report))
    blocks += [f"**{prose(' '.join(first))}** {rest}".rstrip()]
    for index, one in enumerate(wording.causes(report)):
        blocks += [f"**Why, and what to do**{' (provisional)' if report.provisional else ''}"] if not index else []
        blocks += [f"**{plain(one.sign)}**", diagnosis_parts(one)]
    blocks += [f"### {plain(wording.title(report))}", f"**{basis}**" if report.provisional else basis]
    blocks += [bullets(map(plain, report.other_notes))] if report.other_notes else []
    blocks += _layers(report)
    if report.not_measured:
        reasons = [f"{code(item.name)}: {plain(item.reason)}" for item in report.not_measured]
        blocks += ["**Not measured** (this is not zero):", bullets(reasons)]
    return "\n\n".join(blocks) + "\n"


def _layers(report: Report) -> list[str]:
    """Return the table of the layers that have something to report, worst first; those not in the totals come last."""
    ill = wording.worst_first(site for site in report.layers if any(wording.severity(site)))
    if not ill:
        none = "No layer has dead, silent, dormant, cut-off or non-finite neurons."
        return [none] if report.observed_neurons else []
    rows = []
    for site in ill[:MOST_ROWS]:
        cells = wording.site_cells(site, report)
        name = f"{code(cells.name)} {plain(cells.mark)}".rstrip()
        since = when(death_steps(site)[site.judgement.dead])
        rows.append([name, *(plain(getattr(cells, field)) for _, field, _ in COLUMNS), since])
    headings = [("layer", False), *((heading, right) for heading, _, right in COLUMNS), ("since step", False)]
    blocks = [table(headings, rows)]
    if len(ill) > MOST_ROWS:
        left_out = count(len(ill) - MOST_ROWS)
        blocks.append(f"{left_out} more layers have such neurons, but a smaller share of them than these.")
    if report.dead:
        sure = f"{wording.confidence(report)} confidence"
        blocks.append(f"*Fires in*: a neuron called dead may still fire in up to this share of examples ({sure}).")
    if found := wording.weights(ill)[:MOST_WEIGHTS]:
        blocks += ["**Weights of layers with idle neurons**, worst first:", bullets(map(plain, found))]
    return blocks
