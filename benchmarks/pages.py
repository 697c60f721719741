"""The page that keeps figures: below its mark stands one section a part, each with the day and the machine it is of.

A part that is measured anew replaces its own section and leaves the others, so that figures of two days or machines may
stand side by side, and each says which.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import Picture, Table, wrapped

__all__ = ["MARK", "check", "put_into", "section"]

#: The line of a page below which figures stand.
MARK = "<!-- below: python -m benchmarks --into docs/performance.md -->"

_HEADING = re.compile(r"^### (\S+)$", re.MULTILINE)


def section(part: str, measured: str, pieces: Sequence[Table | Picture]) -> str:
    """A part's section: its heading, what it was measured on, its tables and pictures."""
    return "\n".join([f"### {part}\n", f"{wrapped(measured)}\n", *(piece.markdown() for piece in pieces)])


def check(page: Path) -> None:
    """See that a page can take figures, before minutes of measuring.

    Raises:
        ValueError: It has no mark, or something other than sections below it.
    """
    _parse(page)


def put_into(page: Path, part: str, text: str, order: Sequence[str]) -> None:
    """Replace a part's section, or add it at its place.

    Args:
        page: The page.
        part: The part.
        text: Its section, as :func:`section` gives it.
        order: The parts there are, in the order in which they stand. The section of one that is no more goes.

    Raises:
        ValueError: The page has no mark, or something other than sections below it.
    """
    before, sections = _parse(page)
    sections[part] = text
    kept = [sections[each].strip() for each in order if each in sections]
    page.write_text("\n\n".join([before.rstrip(), MARK, *kept]) + "\n", encoding="utf-8")


def _parse(page: Path) -> tuple[str, dict[str, str]]:
    """What stands above the mark, and the sections below it by part."""
    before, mark, below = page.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise ValueError(f"Expected a page with the line {MARK!r}, but {page} has none.")
    stray, *rest = _HEADING.split(below)
    if stray.strip():
        raise ValueError(
            f"Expected nothing but sections of figures below the mark of {page}, but got {stray.strip()[:60]!r}: move "
            "it above the mark."
        )
    return before, {part: f"### {part}{text}" for part, text in zip(rest[::2], rest[1::2], strict=True)}
