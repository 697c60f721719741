"""Console: where a report is drawn as text, in colour on a terminal and clean everywhere else."""

from __future__ import annotations

import io
import shutil
import sys

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from neuronscope.writers import wording

__all__ = ["PIPE_WIDTH", "Page"]

#: Width of the text where standard output is no terminal.
PIPE_WIDTH = 120


class Page:
    """A page of text that is drawn on a :class:`rich.console.Console`, as wide as the terminal.

    Attributes:
        width: Columns: those of the terminal (40 at least), or :data:`PIPE_WIDTH` where there is none.
        console: What to draw on.
    """

    def __init__(self) -> None:
        tty = bool(getattr(sys.stdout, "isatty", lambda: False)())
        self.width = max(shutil.get_terminal_size((PIPE_WIDTH, 24)).columns, 40) if tty else PIPE_WIDTH
        self._file = io.StringIO()
        self.console = Console(
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
        """Write a line; it is folded where it is too long."""
        self.console.print(Text(text, style=style))

    def list(self, heading: str, lines: list[str]) -> None:
        """Write lines as a list below a heading; nothing where there are none."""
        if not lines:
            return
        self.line()
        self.line(heading, style="bold")
        for line in lines:
            self.console.print(Padding(Text("- " + wording.visible(line), overflow="fold"), (0, 0, 0, 2)))

    def text(self) -> str:
        """What was drawn, without a line end at the end; what the terminal's encoding lacks is replaced by ``?``.

        A report must not end a run on a console that is not UTF-8.
        """
        text = "\n".join(line.rstrip() for line in self._file.getvalue().splitlines())
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return text.encode(encoding, errors="replace").decode(encoding)
