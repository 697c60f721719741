"""Terminal: a report as a table by site, in colour on a terminal and in clean text everywhere else."""

from __future__ import annotations

import io
import shutil
import sys

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from neuronscope.report import Report
from neuronscope.writers import findings, wording

__all__ = ["render"]

#: Width of the text where standard output is no terminal.
PIPE_WIDTH = 120

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

STYLES = {"alarm": "bold red", "bad": "red", "warn": "yellow", "unknown": "magenta", "calm": ""}


def render(report: Report) -> str:
    """The report as text, as wide as the terminal, or 120 columns without colour codes where there is none.

    Args:
        report: What to draw.

    Returns:
        Lines of text, without a line end at the end. What the terminal's encoding lacks is replaced by ``?``.
    """
    tty = bool(getattr(sys.stdout, "isatty", lambda: False)())
    width = max(shutil.get_terminal_size((PIPE_WIDTH, 24)).columns, 40) if tty else PIPE_WIDTH
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=tty,
        force_jupyter=False,
        color_system="auto" if tty else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(Text("Neuronscope · " + findings.title(report), style="bold"))
    console.print(Text(findings.span(report)))
    console.print()
    for index, sentence in enumerate(findings.finding(report)):
        loud = index == 0 and report.not_finite > 0
        console.print(Text(f"!! {sentence}" if loud else sentence, style="bold white on red" if loud else ""))
    if report.sites:
        console.print()
        _table(console, report, width)
    _list(console, "Not measured", [f"{item.name}: {item.reason}" for item in report.not_measured])
    _list(console, "Notes", list(report.notes))
    console.print()
    console.print(Text(findings.LEGEND, style="dim"))
    return _encodable("\n".join(line.rstrip() for line in file.getvalue().splitlines()))


def _table(console: Console, report: Report, width: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("site", overflow="fold")
    # Where all sites have the same examples behind them, the heading has said so, and names get the room.
    alike = len({site.examples for site in report.sites if not wording.is_unseen(site)}) < 2
    columns = [column for column in COLUMNS if width >= column[3] and not (alike and column[1] in _SAID_ABOVE)]
    if report.not_finite:
        columns.insert(-1, ("not\nfinite", "not_finite", "right", 0))
    for heading, field, justify, _ in columns:
        right = justify == "right"
        whole = right or field == "activation"  # these keep their width; the others fold
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=whole)
    shown, folded = wording.fold(report.sites)
    for site in shown:
        words = wording.site_words(site, report.policy["confidence"])
        cells = [Text(words.name), *(Text(getattr(words, field)) for _, field, _, _ in columns)]
        table.add_row(*cells, style=STYLES[words.tone])
    console.print(table)
    if folded:
        console.print(Text(f"… {wording.plural(folded, 'more site')} with nothing to report", style="dim"))
    left_out = [heading.replace("-\n", "") for heading, _, _, narrowest in COLUMNS if width < narrowest]
    if left_out:
        console.print(Text(f"Too narrow to show: {', '.join(left_out)}.", style="dim"))


def _list(console: Console, heading: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print()
    console.print(Text(heading, style="bold"))
    for line in lines:
        console.print(Padding(Text("- " + wording.visible(line), overflow="fold"), (0, 0, 0, 2)))


def _encodable(text: str) -> str:
    """``text`` such that printing it cannot fail: a report must not end a run on a console that is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)
