"""A standard output that is a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from neuronscope.report.rendering import Renderable


class Screen(io.StringIO):
    """A standard output that is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_screen(monkeypatch: pytest.MonkeyPatch, report: Renderable, columns: int) -> str:
    """Return what ``print(report)`` shows on a terminal with so many columns and with colours.

    Args:
        monkeypatch: For the environment of the terminal.
        report: Of a training or a checkpoint.
        columns: Its width.
    """
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Screen())
        return str(report)


def bare(text: str) -> str:
    """Return a text without its colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)
