"""``import neuronscope``: seconds in a fresh interpreter, beside one that imports nothing, and whether torch came."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.tables import Table, milliseconds
from benchmarks.turns import take_turns

__all__ = ["tables"]

LOADED = "import neuronscope, sys; print(*sorted(set(sys.modules) & {'torch', 'numpy', 'lightning', 'tensorboard'}))"
INSIDE = "import time; t = time.perf_counter(); import neuronscope; print(time.perf_counter() - t)"


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table."""
    times = take_turns(
        {"bare": lambda: _python("pass"), "ours": lambda: _python("import neuronscope")},
        rounds=2 if quick else 15,
        warm=1,
    )
    inside = sorted(float(_python(INSIDE)) for _ in range(1 if quick else 15))
    table = Table("Importing", ("what", "median", "minimum"))
    table.rows += [
        ("a bare interpreter", milliseconds(times["bare"].median), milliseconds(times["bare"].minimum)),
        ("one that imports neuronscope", milliseconds(times["ours"].median), milliseconds(times["ours"].minimum)),
        ("`import neuronscope` itself", milliseconds(inside[len(inside) // 2]), milliseconds(inside[0])),
    ]
    table.note = f"Loaded with it, of torch, numpy, lightning and tensorboard: {_python(LOADED).strip() or 'none'}."
    yield table


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
