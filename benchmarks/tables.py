"""What a benchmark gives: tables, printed as markdown, and pictures that stand beside a page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Picture", "Table", "microseconds", "milliseconds", "ratio", "size", "wrapped"]


@dataclass
class Table:
    """A table of figures.

    Attributes:
        title: What is compared.
        columns: Headings.
        rows: Cells.
        note: How to read it, printed above it.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """The table with its title and note."""
        lines = [f"#### {self.title}", ""]
        lines += [wrapped(self.note), ""] if self.note else []
        lines += [_line(self.columns), _line(["---"] * len(self.columns)), *(_line(row) for row in self.rows), ""]
        return "\n".join(lines)


@dataclass(frozen=True)
class Picture:
    """A picture of what stands in the tables before it.

    Attributes:
        name: Its file's name, in the folder ``images`` beside the page.
        says: What it shows, for who cannot see it.
        draw: Gives the file's content.
    """

    name: str
    says: str
    draw: Callable[[], bytes]

    def markdown(self) -> str:
        """The link that shows it on the page."""
        return f"![{self.says}](images/{self.name})\n"


def wrapped(text: str) -> str:
    """Return a paragraph in lines of at most 100 columns, as all pages have them."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def ratio(pair: tuple[float, float]) -> str:
    """Two ratios, of medians and of minima.

    >>> ratio((1.0512, 1.03))
    '1.051 (1.030)'
    """
    return f"{pair[0]:.3f} ({pair[1]:.3f})"


def milliseconds(seconds: float) -> str:
    """A time with three digits.

    >>> milliseconds(0.0123456), milliseconds(0.000012)
    ('12.3 ms', '0.012 ms')
    """
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.3f} ms"


def microseconds(seconds: float) -> str:
    """A time in whole microseconds.

    >>> microseconds(0.0123456)
    '12,346 µs'
    """
    return f"{1e6 * seconds:,.0f} µs"


def size(count: int) -> str:
    """A number of bytes.

    >>> size(600), size(10240), size(67108864), size(-4096)
    ('600 B', '10 kB', '64 MB', '-4 kB')
    """
    if abs(count) < 1 << 10:
        return f"{count} B"
    return f"{count / 2**10:.0f} kB" if abs(count) < 1 << 20 else f"{count / 2**20:.1f} MB".replace(".0 ", " ")
