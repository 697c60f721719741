"""Write a report as text for a terminal: sentences and a table of layers."""

from __future__ import annotations

from dataclasses import replace

from neuronscope.report.report import Report
from neuronscope.writers import wording
from neuronscope.writers.console import Column, Page

__all__ = ["render"]

COLUMNS = (
    Column("activation", "activation", right=False, narrowest=100),
    Column("neurons", "neurons"),
    Column("axis", "axis", right=False, narrowest=100, wraps=True),
    Column("dead", "dead", right=False, wraps=True),
    Column("%", "dead_share"),
    Column("si-\nlent", "silent", optional=True),
    Column("dor-\nmant", "dormant"),
    Column("cut\noff", "cut_off"),
    Column("lin-\near", "linear", narrowest=90, optional=True),
    Column("not\nfinite", "not_finite", optional=True),
    Column("worst neurons", "worst", right=False, narrowest=80, wraps=True),
)
#: These follow if the layers have different numbers of examples; else the sentence above the table says it all.
EXAMPLES = (Column("examples", "examples"), Column("fires in", "bound"))


def render(report: Report, top: int = 20) -> str:
    """Write a report as text, as wide as the terminal, or 120 columns without colour codes outside of one.

    Args:
        report: The report.
        top: Most layers that get a row: of more, the worst.
    """
    page = Page()
    if report.fault:
        page.alarm(report.fault)
    title, sentences = f"Neuronscope · {wording.title(report)}", wording.findings(report)
    page.summary(
        title, wording.based_on(report), sentences, alarm=report.not_finite > 0, provisional=report.provisional
    )
    if report.layers:
        shown, left_out = wording.fold(report.layers, top, top)
        alike = len({site.examples for site in report.layers if not site.is_unseen}) < 2
        cells = [wording.site_cells(site, report) for site in shown]
        cells = [replace(one, name=one.marked_name) for one in cells]
        hidden = "dormant" if wording.all_sparse(report) else ""
        columns = [column for column in (COLUMNS if alike else COLUMNS + EXAMPLES) if column.field != hidden]
        page.table(columns, cells, left_out)
    page.causes(wording.causes(report), provisional=report.provisional)
    for heading, lines in wording.lists(report, wording.fold(report.layers, top, top)[0], top):
        page.list(heading, lines)
    page.list("Not measured", [f"{item.name}: {item.reason}" for item in report.not_measured])
    page.list("Notes", report.other_notes)
    page.line()
    page.line(wording.legend(report), "dim")
    page.end(title, sentences[0], report.provisional, alarm=report.not_finite > 0)
    return page.text()
