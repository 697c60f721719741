"""Write a post-mortem as text for a terminal: sentences, a table of layers, causes and evidence."""

from __future__ import annotations

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.writers import postmortem_wording as wording
from neuronscope.checkpoints.writers import timeline_wording
from neuronscope.writers.console import Column, Page
from neuronscope.writers.formatting import plural

__all__ = ["render"]

COLUMNS = (
    Column("neurons", "neurons", narrowest=70),
    Column("dead", "dead"),
    Column("%", "dead_share"),
    Column("how sure", "sure", right=False, narrowest=60, wraps=True),
    Column("woken", "woken", narrowest=80, optional=True),
    Column("since", "since", right=False, wraps=True),
    Column("suspected", "suspected", narrowest=100, optional=True),
    Column("other", "other", right=False, narrowest=100, wraps=True, optional=True),
    Column("contested", "contested", narrowest=110, optional=True),
    Column("unknown", "unknown", narrowest=120, optional=True),
)
CHECKPOINT_COLUMNS = (
    Column("dead", "dead"),
    Column("died", "died"),
    Column("revived", "revived", optional=True),
    Column("unknown", "unknown", narrowest=70, optional=True),
    Column("died in", "where", right=False, narrowest=60, wraps=True),
    Column("file", "file", right=False, narrowest=100, wraps=True),
)
TIMELINE_COLUMNS = (
    Column("neurons", "neurons", narrowest=100),
    Column("dead at\nfirst", "first"),
    Column("died", "died"),
    Column("revived", "revived", optional=True),
    Column("dead at\nlast", "last"),
    Column("died when", "when", right=False, wraps=True),
    Column("revived when", "back", right=False, narrowest=80, wraps=True, optional=True),
    Column("how sure", "basis", right=False, narrowest=110, wraps=True),
)
#: Most lines of a list (disagreements, layers with woken neurons, reasons), and neurons that each names.
LISTED, NAMED = 10, 8


def render(report: PostmortemReport, top: int = 20) -> str:
    """Write a post-mortem as text, as wide as the terminal, or 120 columns without colour codes outside of one.

    Args:
        report: The post-mortem.
        top: Most layers that get a row: of more, the worst.

    Returns:
        Lines of text, without a line end at the end.
    """
    page = Page()
    title, sentences = f"Neuronscope post-mortem · {wording.title(report)}", wording.findings(report)
    page.summary(title, wording.based_on(report), sentences, alarm=wording.is_alarm(report))
    if report.layers:
        shown, left_out = wording.fold(report, top, top)
        page.table(COLUMNS, [wording.layer_cells(layer) for layer in shown], left_out)
    if report.timeline is not None and len(report.timeline.checkpoints) > 1:
        page.heading("Between the checkpoints")
        checkpoints, without = timeline_wording.checkpoint_rows(report.timeline)
        page.table(CHECKPOINT_COLUMNS, checkpoints, filter(None, [without]), first="checkpoint")
        layers, without = timeline_wording.layer_rows(report.timeline)
        if layers:
            page.table(TIMELINE_COLUMNS, layers, filter(None, [without]))
        page.line(timeline_wording.explanation(), "dim")
    page.causes(report.diagnoses)
    page.list("Evidence", [_ground(row) for row in wording.grounds(report)])
    page.list("Confirmed by measuring", wording.confirmations(report))
    page.list("Woken by an input of the box", wording.woken(report, LISTED, NAMED))
    page.list("Contested", wording.contested(report, LISTED, NAMED))
    page.list("Not known, and why", [f"{what}: {why}" for what, why in wording.abstentions(report, LISTED)])
    page.list("Notes", report.notes)
    page.line()
    page.line(wording.LEGEND, "dim")
    page.end(title, sentences[0], alarm=wording.is_alarm(report))
    return page.text()


def _ground(row: wording.Ground) -> str:
    where = f"{plural(row.neurons, 'neuron')} in {plural(row.layers, 'layer')}"
    return f"{row.claim}, {row.basis} ({row.source}; {where}): {row.text}"
