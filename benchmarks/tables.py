"""Tables: what a benchmark gives, and how it is printed, as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Table", "milliseconds", "ratio", "size"]


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
        lines = [f"### {self.title}", ""]
        lines += [self.note, ""] if self.note else []
        lines += [_line(self.columns), _line(["---"] * len(self.columns)), *(_line(row) for row in self.rows), ""]
        return "\n".join(lines)


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


def size(count: int) -> str:
    """A number of bytes.

    >>> size(600), size(10240), size(67108864), size(-4096)
    ('600 B', '10 kB', '64 MB', '-4 kB')
    """
    if abs(count) < 1 << 10:
        return f"{count} B"
    return f"{count / 2**10:.0f} kB" if abs(count) < 1 << 20 else f"{count / 2**20:.1f} MB".replace(".0 ", " ")
