"""Drawn: the public face that every report has: printed, or as HTML, JSON and markdown.

A report knows its writers by name alone and looks them up when it is drawn, so that no import leads from what is known
up to what shows it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from neuronscope.output import write_file

__all__ = ["Renderable"]


class Renderable:
    """Base of what can be drawn; a subclass names the module of each of its writers, whose ``render`` draws it."""

    WRITERS: ClassVar[Mapping[str, str]]

    def __str__(self) -> str:
        """A table, for a terminal."""
        return self._draw("terminal")

    def to_markdown(self) -> str:
        """The report as markdown."""
        return self._draw("markdown")

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text; written to ``path`` too when one is given, whole or not at all."""
        return _write(self._draw("json"), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one HTML page that needs no network; written to ``path`` too when one is given, as JSON is."""
        return _write(self._draw("html"), path)

    def _draw(self, writer: str) -> str:
        text: str = importlib.import_module(self.WRITERS[writer]).render(self)
        return text


def _write(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_file(path, text)
    return text
