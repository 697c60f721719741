"""Write a post-mortem as text for a terminal: sentences, a table of layers, causes and evidence."""

from __future__ import annotations

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.writers import postmortem_wording as wording
from neuronscope.checkpoints.writers import timeline_wording
from neuronscope.writers.console import Page
from neuronscope.writers.formatting import plural

__all__ = ["render"]

#: Most lines of a list (disagreements, layers with woken neurons, reasons), and neurons that each names.
LISTED, NAMED = 10, 8


def render(report: PostmortemReport, top: int = 20) -> str:
    """Write a post-mortem as text, as wide as the terminal, or 120 columns without colour codes outside of one.

    Args:
        report: The post-mortem.
        top: Most layers that get a row: of more, the worst.
    """
    page = Page()
    title, sentences = f"Neuronscope post-mortem · {wording.title(report)}", wording.findings(report)
    page.summary(title, wording.based_on(report), sentences, alarm=wording.is_alarm(report))
    if report.layers:
        shown, left_out = wording.fold(report, top, top)
        page.table(wording.COLUMNS, [wording.layer_cells(layer) for layer in shown], left_out)
    if report.timeline is not None and len(report.timeline.checkpoints) > 1:
        page.heading("Between the checkpoints")
        checkpoints, without = timeline_wording.checkpoint_rows(report.timeline)
        page.table(timeline_wording.CHECKPOINT_COLUMNS, checkpoints, filter(None, [without]), first="checkpoint")
        layers, without = timeline_wording.layer_rows(report.timeline)
        if layers:
            page.table(timeline_wording.TIMELINE_COLUMNS, layers, filter(None, [without]))
        page.line(timeline_wording.EXPLANATION, "dim")
    page.causes(report.diagnoses)
    page.list("Evidence", [_ground(row) for row in wording.grounds(report)])
    for heading, lines in wording.lists(report, LISTED, NAMED).items():
        page.list(heading, lines)
    page.list("Not known, and why", [f"{what}: {why}" for what, why in wording.abstentions(report, LISTED)])
    page.list("Notes", report.notes)
    page.line()
    page.line(wording.LEGEND, "dim")
    page.end(title, sentences[0], alarm=wording.is_alarm(report))
    return page.text()


def _ground(row: wording.Ground) -> str:
    where = f"{plural(row.neurons, 'neuron')} in {plural(row.layers, 'layer')}"
    return f"{row.claim}, {row.basis} ({row.source}; {where}): {row.text}"
