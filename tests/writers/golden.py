"""Goldens: texts that were looked at once and must stay so, until they are rewritten on purpose."""

from __future__ import annotations

import os
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"


def check(name: str, text: str, folder: Path = GOLDENS) -> None:
    """Compare ``text`` with the golden ``name``; with NEURONSCOPE_REWRITE_GOLDENS=1 write it anew instead."""
    path = folder / name
    if os.environ.get("NEURONSCOPE_REWRITE_GOLDENS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    assert text == path.read_text(encoding="utf-8"), f"{name} differs; NEURONSCOPE_REWRITE_GOLDENS=1 writes it anew"
