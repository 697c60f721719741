"""Draw sentences, tables and lists as text, in colour on a terminal and without control codes everywhere else."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.containers import Lines
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from neuronscope.judge.diagnosis import GUESS, Diagnosis
from neuronscope.writers.formatting import NONE, UNKNOWN, visible

__all__ = ["PIPE_WIDTH", "Column", "Page"]

#: Lines of a usual screen.
SCREEN = 24
#: Width of the text where standard output is not a terminal.
PIPE_WIDTH = 120

#: What a line ends with: spaces, and codes of colours.
_TRAILING = re.compile(r"(?: |\x1b\[[\d;]*m)+$")
_LOUD = "bold white on red"
_STYLES = {"alarm": "bold red", "bad": "red", "warn": "yellow", "unknown": "magenta", "calm": ""}


class Column(NamedTuple):
    """One column of a table."""

    heading: str  # what stands above it
    field: str  # the attribute of a row that it shows
    right: bool = True  # whether it is aligned to the right, as numbers are
    narrowest: int = 0  # width of the narrowest page that shows it
    wraps: bool = False  # whether its text may continue on a further line
    optional: bool = False  # whether it is left out if no row has anything to show in it


class _Name(Text):
    """A layer's name, which is broken before its last part if it does not fit on one line."""

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        """Return its lines."""
        end = max(self.plain.rfind(mark, 0, width) for mark in "/.") + 1
        if self.cell_len <= width or not end:
            return super().wrap(console, width, **options)
        first, rest = self.divide([end])
        return Lines([first, *_Name(rest.plain, style=self.style).wrap(console, width, **options)])


class Page:
    """A page of text, as wide as the terminal.

    Attributes:
        width: Columns: those of the terminal (40 at least), or :data:`PIPE_WIDTH` where standard output is no terminal.
    """

    def __init__(self) -> None:
        tty = bool(getattr(sys.stdout, "isatty", lambda: False)())
        self.width = max(shutil.get_terminal_size((PIPE_WIDTH, 24)).columns, 40) if tty else PIPE_WIDTH
        self._file = io.StringIO()
        self._console = Console(
            file=self._file,
            width=self.width,
            force_terminal=tty,
            force_jupyter=False,
            color_system="auto" if tty else None,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
        )

    def line(self, text: str = "", style: str = "") -> None:
        """Write a line; wrap it if it is too long.

        Args:
            text: The line.
            style: A style of rich.
        """
        self._console.print(Text(text, style=style))

    def alarm(self, text: str) -> None:
        """Write a line in white on red."""
        self.line(f"!! {visible(text)}", _LOUD)

    def heading(self, text: str) -> None:
        """Write a heading below an empty line."""
        self.line()
        self.line(text, "bold")

    def item(self, text: str, style: str = "", indent: int = 2) -> None:
        """Write an indented line.

        Args:
            text: The line.
            style: A style of rich.
            indent: Spaces before it.
        """
        self._console.print(Padding(Text(visible(text), style=style, overflow="fold"), (0, 0, 0, indent)))

    def list(self, heading: str, lines: Iterable[str]) -> None:
        """Write lines as a list below a heading; write nothing if there are no lines.

        Args:
            heading: The heading.
            lines: The lines.
        """
        for index, line in enumerate(lines):
            if not index:
                self.heading(heading)
            self.item(f"- {line}")

    def causes(self, found: Sequence[Diagnosis], *, provisional: bool = False) -> None:
        """Write what was diagnosed: what is sure in plain letters, what is a guess in italics.

        Args:
            found: The diagnoses; nothing is written if there are none.
            provisional: Whether they rest on too few examples.
        """
        for index, one in enumerate(found):
            if not index:
                self.heading(f"Why, and what to do{' (provisional)' if provisional else ''}")
            self.item(f"- {one.sign}", "bold")
            for what, text in one.parts():
                self.item(f"{what}: {text}", "italic" if what == GUESS else "", indent=4)

    def end(self, title: str, sentence: str, provisional: bool = False, *, alarm: bool = False) -> None:
        """Write the first sentence of a report again below one that has scrolled it off a screen.

        Args:
            title: The report's title.
            sentence: What was found first.
            provisional: Whether it rests on too few examples.
            alarm: Whether it is an alarm.
        """
        if self._file.getvalue().count("\n") < SCREEN:
            return
        self.line()
        self.line(f"{title}{' · provisional' if provisional else ''}", "bold")
        if alarm:
            self.alarm(sentence)
        else:
            self.line(sentence)

    def summary(
        self, title: str, basis: str, sentences: Sequence[str], *, alarm: bool, provisional: bool = False
    ) -> None:
        """Write the beginning of a report.

        Args:
            title: Its title.
            basis: What its verdicts are based on.
            sentences: What was found.
            alarm: Whether the first sentence is an alarm.
            provisional: Whether they rest on too few examples.
        """
        self.line(title, "bold")
        self.line(basis, _STYLES["warn"] if provisional else "")
        self.line()
        if alarm:
            self.alarm(sentences[0])
        for sentence in sentences[alarm:]:
            self.line(sentence)

    def table(
        self, columns: Sequence[Column], rows: Sequence[Any], left_out: Iterable[str] = (), first: str = "layer"
    ) -> None:
        """Write a table below an empty line, and name the columns that the page is too narrow for.

        Args:
            columns: Its columns after the first, which holds the name of a layer or another thing.
            rows: Objects with a ``name``, a ``tone`` and the fields of the columns.
            left_out: Sentences about rows that were left out.
            first: The heading of the first column.
        """
        self.line()
        columns = [one for one in columns if not (one.optional and _is_empty(one, rows))]
        shown = [one for one in columns if self.width >= one.narrowest]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column(first, overflow="fold")
        for one in shown:
            table.add_column(
                one.heading, justify="right" if one.right else "left", overflow="fold", no_wrap=not one.wraps
            )
        for row in rows:
            table.add_row(_Name(row.name), *(Text(getattr(row, one.field)) for one in shown), style=_STYLES[row.tone])
        self._console.print(table)
        for sentence in left_out:
            self.line(sentence, "dim")
        narrow = [one.heading.replace("-\n", "").replace("\n", " ") for one in columns if self.width < one.narrowest]
        if narrow:
            self.line(f"Too narrow to show: {', '.join(narrow)}.", "dim")

    def text(self) -> str:
        """Return what was drawn, without a line end at the end.

        A character that the terminal's encoding lacks becomes ``?``: a report must not end a run on a console that is
        not UTF-8.
        """
        lines = self._file.getvalue().splitlines()
        text = "\n".join(_TRAILING.sub(lambda found: found[0].replace(" ", ""), line) for line in lines)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return text.encode(encoding, errors="replace").decode(encoding)


def _is_empty(column: Column, rows: Sequence[Any]) -> bool:
    return all(getattr(row, column.field) in (NONE, UNKNOWN) for row in rows)
