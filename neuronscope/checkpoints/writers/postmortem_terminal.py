"""Terminal: a post-mortem as a table by layer, with what it rests on, in colour on a terminal and clean elsewhere."""

from __future__ import annotations

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.writers import postmortem_wording
from neuronscope.writers import wording
from neuronscope.writers.console import Page

__all__ = ["render"]

#: Columns: heading, field of ``LayerWords``, justification, narrowest text that shows it.
COLUMNS = (
    ("neurons", "neurons", "right", 70),
    ("dead", "dead", "right", 0),
    ("%", "dead_share", "right", 0),
    ("how sure", "sure", "left", 60),
    ("since", "since", "left", 0),
    ("suspected", "suspected", "right", 100),
    ("other", "other", "left", 100),
    ("contested", "contested", "right", 110),
    ("unknown", "unknown", "right", 120),
)

STYLES = {"alarm": "bold red", "bad": "red", "warn": "yellow", "unknown": "magenta", "calm": ""}
#: Contests that are listed, and neurons that each names.
LISTED, NAMED = 10, 8


def render(report: PostmortemReport) -> str:
    """The post-mortem as text, as wide as the terminal, or 120 columns without colour codes where there is none.

    Args:
        report: What to draw.

    Returns:
        Lines of text, without a line end at the end.
    """
    page = Page()
    page.line("Neuronscope post-mortem · " + postmortem_wording.title(report), style="bold")
    page.line(postmortem_wording.span(report))
    page.line()
    for index, sentence in enumerate(postmortem_wording.finding(report)):
        loud = index == 0 and postmortem_wording.is_alarm(report)
        page.line(f"!! {sentence}" if loud else sentence, style="bold white on red" if loud else "")
    if report.layers:
        page.line()
        _table(page, report)
    _diagnoses(page, report)
    page.list("What this rests on", [_ground(row) for row in postmortem_wording.grounds(report)])
    page.list("What measuring said of it", postmortem_wording.held(report))
    page.list("Contested", postmortem_wording.contested(report, LISTED, NAMED))
    page.list("Not known, and why", [f"{what}: {why}" for what, why in postmortem_wording.abstained(report)])
    page.list("Notes", list(report.notes))
    page.line()
    page.line(postmortem_wording.LEGEND, style="dim")
    return page.text()


def _ground(row: postmortem_wording.Ground) -> str:
    where = f"{wording.plural(row.neurons, 'neuron')} in {wording.plural(row.layers, 'layer')}"
    return f"{row.claim}, {row.basis} ({row.source}; {where}): {row.text}"


def _diagnoses(page: Page, report: PostmortemReport) -> None:
    if not report.diagnoses:
        return
    page.line()
    page.line("Why, and what to do", style="bold")
    for one in report.diagnoses:
        page.console.print(Padding(Text("- " + wording.visible(one.sign), style="bold"), (0, 0, 0, 2)))
        for what, text in postmortem_wording.diagnosis(one):
            page.console.print(Padding(Text(f"{what}: {wording.visible(text)}"), (0, 0, 0, 4)))


def _table(page: Page, report: PostmortemReport) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer", overflow="fold")
    shown, left_out = postmortem_wording.fold(report)
    rows = [postmortem_wording.layer_words(layer) for layer in shown]
    # What no layer has takes no room, but for the columns that answer the first questions.
    empty = {
        field
        for _, field, _, narrowest in COLUMNS[5:]
        if all(getattr(row, field) in (wording.NONE, wording.UNKNOWN) for row in rows)
    }
    columns = [column for column in COLUMNS if page.width >= column[3] and column[1] not in empty]
    for heading, _, justify, _ in columns:
        right = justify == "right"
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        cells = [Text(row.name), *(Text(getattr(row, field)) for _, field, _, _ in columns)]
        table.add_row(*cells, style=STYLES[row.tone])
    page.console.print(table)
    for sentence in left_out:
        page.line(sentence, style="dim")
    narrow = [heading for heading, field, _, narrowest in COLUMNS if page.width < narrowest and field not in empty]
    if narrow:
        page.line(f"Too narrow to show: {', '.join(narrow)}.", style="dim")
