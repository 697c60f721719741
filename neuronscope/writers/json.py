"""JSON: a report's plain data as strict, byte-stable text; the schemas lie beside the reports' other assets."""

from __future__ import annotations

import json
from typing import Any, Protocol

__all__ = ["Plain", "render"]


class Plain(Protocol):
    """A report of any kind."""

    def to_dict(self) -> dict[str, Any]:
        """Its plain data."""
        ...


def render(report: Plain) -> str:
    """The report as JSON text (RFC 8259: no NaN, no infinity).

    Keys are sorted, so that two equal reports give the same bytes. ``schema_version`` says which schema holds.

    Args:
        report: What to draw.

    Returns:
        One line of ASCII and a line end.

    Raises:
        ValueError: The report holds a number that is not finite where its contract allows none.
    """
    plain = report.to_dict()
    return json.dumps(plain, allow_nan=False, sort_keys=True, ensure_ascii=True, separators=(",", ":")) + "\n"
