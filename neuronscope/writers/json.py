"""Write a report's plain data as strict JSON; the schemas are in the ``assets`` folders."""

from __future__ import annotations

import json
from typing import Any, Protocol

__all__ = ["Plain", "render"]


class Plain(Protocol):
    """A report of any kind."""

    def to_dict(self) -> dict[str, Any]:
        """Return its plain data."""
        ...


def render(report: Plain) -> str:
    """Write a report as JSON (RFC 8259: no NaN, no infinity).

    Keys are sorted, so that equal reports give the same bytes. ``schema_version`` names the schema.

    Args:
        report: The report.

    Returns:
        One line of ASCII and a line end.

    Raises:
        ValueError: A number is NaN or infinite that must not be.
    """
    plain = report.to_dict()
    return json.dumps(plain, allow_nan=False, sort_keys=True, ensure_ascii=True, separators=(",", ":")) + "\n"
