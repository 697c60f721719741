"""Give every report the same output methods: printing, HTML, JSON and markdown.

A report names the modules of its writers and imports them only when it is shown, so that reports do not depend on
writers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from neuronscope.output import write_file

__all__ = ["Renderable"]


class Renderable:
    """Base class of reports. A subclass names the module of each of its writers, which has a function ``render``.

    Attributes:
        WRITERS: Names of the writers' modules, by format.
    """

    WRITERS: ClassVar[Mapping[str, str]]

    def __str__(self) -> str:
        """Return the report as a table for a terminal."""
        return self._render("terminal")

    def to_markdown(self) -> str:
        """Return the report as markdown."""
        return self._render("markdown")

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, and write it to ``path`` if given.

        Raises:
            OSError: The file cannot be written; an existing file is then unchanged.
        """
        return _write(self._render("json"), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one HTML page without external resources, and write it to ``path`` if given.

        Raises:
            OSError: The file cannot be written; an existing file is then unchanged.
        """
        return _write(self._render("html"), path)

    def _render(self, writer: str) -> str:
        text: str = importlib.import_module(self.WRITERS[writer]).render(self)
        return text


def _write(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_file(path, text)
    return text
