"""Terminal: a report as a table by site, in colour on a terminal and in clean text everywhere else."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from neuronscope.report.report import Report
from neuronscope.writers import findings, wording
from neuronscope.writers.console import Page

__all__ = ["render"]

#: Columns: heading, field of ``SiteWords``, justification, narrowest text that shows it.
COLUMNS = (
    ("activation", "activation", "left", 100),
    ("neurons", "neurons", "right", 0),
    ("axis", "axis", "left", 100),
    ("dead", "dead", "left", 0),
    ("%", "dead_share", "right", 0),
    ("dor-\nmant", "dormant", "right", 0),
    ("cut\noff", "cut_off", "right", 0),
    ("lin-\near", "linear", "right", 90),
    ("worst neurons", "worst", "left", 80),
    ("examples", "examples", "right", 0),
    ("fires in", "bound", "right", 0),
)

_SAID_ABOVE = ("examples", "bound")

LOUD = "bold white on red"
STYLES = {"alarm": "bold red", "bad": "red", "warn": "yellow", "unknown": "magenta", "calm": ""}


def render(report: Report) -> str:
    """The report as text, as wide as the terminal, or 120 columns without colour codes where there is none.

    Args:
        report: What to draw.

    Returns:
        Lines of text, without a line end at the end. What the terminal's encoding lacks is replaced by ``?``.
    """
    page = Page()
    if report.fault:
        page.line(f"!! {wording.visible(report.fault)}", style=LOUD)
    page.line("Neuronscope · " + findings.title(report), style="bold")
    page.line(findings.span(report))
    page.line()
    for index, sentence in enumerate(findings.finding(report)):
        loud = index == 0 and report.not_finite > 0
        page.line(f"!! {sentence}" if loud else sentence, style=LOUD if loud else "")
    if report.layers:
        page.line()
        _table(page, report)
    page.list("Not measured", [f"{item.name}: {item.reason}" for item in report.not_measured])
    page.list("Notes", list(report.other_notes))
    page.line()
    page.line(findings.LEGEND, style="dim")
    return page.text()


def _table(page: Page, report: Report) -> None:
    width = page.width
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("site", overflow="fold")
    # Where all sites have the same examples behind them, the heading has said so, and names get the room.
    alike = len({site.examples for site in report.layers if not wording.is_unseen(site)}) < 2
    columns = [column for column in COLUMNS if width >= column[3] and not (alike and column[1] in _SAID_ABOVE)]
    if report.not_finite:
        columns.insert(-1, ("not\nfinite", "not_finite", "right", 0))
    for heading, field, justify, _ in columns:
        right = justify == "right"
        whole = right or field == "activation"  # these keep their width; the others fold
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=whole)
    shown, folded = wording.fold(report.layers)
    for site in shown:
        words = wording.site_words(site, report.policy["confidence"])
        cells = [Text(words.name), *(Text(getattr(words, field)) for _, field, _, _ in columns)]
        table.add_row(*cells, style=STYLES[words.tone])
    page.console.print(table)
    if folded:
        page.line(f"… {wording.plural(folded, 'more site')} with nothing to report", style="dim")
    left_out = [heading.replace("-\n", "") for heading, _, _, narrowest in COLUMNS if width < narrowest]
    if left_out:
        page.line(f"Too narrow to show: {', '.join(left_out)}.", style="dim")
