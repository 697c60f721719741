"""Format numbers, steps and names as text, the same way in every writer.

``–`` stands for what was not measured and ``·`` for none: a reader must never take one for the other. A number that is
not zero is never rounded to zero, and an upper bound is only ever rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context

import numpy as np

from neuronscope.arrays import IntArray
from neuronscope.judge.symptoms import UNDATED
from neuronscope.judge.verdicts import rate_bound

__all__ = [
    "NONE",
    "UNKNOWN",
    "at_most",
    "bounded",
    "count",
    "is_are",
    "listed",
    "percent",
    "plural",
    "share",
    "visible",
    "when",
]

#: Shown where there is nothing to report.
NONE = "·"
#: Shown where nothing was measured.
UNKNOWN = "–"


def visible(text: str) -> str:
    r"""Escape every character of ``text`` that does not print (control, bidi, lone surrogate).

    >>> visible("relu\x1b[31m")
    'relu\\x1b[31m'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def count(number: int) -> str:
    """Format a whole number with commas between the thousands."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 neuron``, ``2 neurons``.

    Args:
        number: The number.
        noun: The noun in the singular.
    """
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def is_are(number: int) -> str:
    """Return ``is`` for 1 and ``are`` for every other number."""
    return "is" if number == 1 else "are"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Join names with commas, and say how many were left out.

    Args:
        names: The names.
        most: How many to show.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {count(len(names) - most)} more" if len(names) > most else ""
    return ", ".join(visible(name) for name in names[:most]) + more


def percent(value: float) -> str:
    """Format a percentage: 0 % and 100 % are shown only for exactly 0 and 100; NaN is shown as unknown.

    >>> percent(0.0), percent(0.02), percent(4.13), percent(43.4), percent(99.99), percent(100.0)
    ('0 %', '< 0.1 %', '4.1 %', '43 %', '> 99.9 %', '100 %')
    """
    if math.isnan(value):
        return UNKNOWN
    if 0.0 < value < 0.1:
        return "< 0.1 %"
    if 99.9 < value < 100.0:
        return "> 99.9 %"
    return f"{value:.1f} %" if 0.0 < value < 9.95 or 99.5 <= value < 100.0 else f"{value:.0f} %"


def share(part: int, whole: int) -> str:
    """Format ``part`` of ``whole`` as a percentage; unknown if ``whole`` is 0.

    Args:
        part: How many.
        whole: Out of how many.
    """
    return percent(100.0 * part / whole) if whole else UNKNOWN


def bounded(value: float, measure: str) -> str:
    """Format a number with four digits: an upper bound is rounded up, a lower bound down.

    Args:
        value: The number.
        measure: Its meaning, in which ``at most`` marks an upper bound and ``at least`` a lower one.

    >>> bounded(0.0016692, "share of examples, at most"), bounded(1000, "steps, at most"), bounded(2 / 3, "share")
    ('0.00167', '1000', '0.6667')
    """
    toward = ROUND_CEILING if "at most" in measure else ROUND_FLOOR if "at least" in measure else ROUND_HALF_EVEN
    return f"{float(Context(prec=4, rounding=toward).create_decimal(repr(float(value)))):.4g}"


def at_most(samples: int, level: float) -> str:
    """Format the highest rate at which a neuron may still fire, rounded up to two digits.

    Args:
        samples: Examples in none of which the neuron fired.
        level: Confidence of the bound, in (0, 1).

    >>> at_most(256, 0.95), at_most(1000, 0.95), at_most(0, 0.95)
    ('1.2 %', '0.3 %', '100 %')
    """
    value = 100.0 * rate_bound(samples, level)
    digits = 1 - math.floor(math.log10(value))
    scale = 10.0**digits
    text = f"{math.ceil(value * scale - 1e-9) / scale:.{max(digits, 0)}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def when(steps: IntArray) -> str:
    """Say when neurons died, given the step of each, int64 ``(D,)``: −1 = since the beginning, ``UNDATED`` = not known.

    >>> when(np.array([-1, 300, 340, 900, -2]))
    '1 since the beginning; 3 at steps 300–900, half by 340; 1 not dated'
    """
    born, undated = int((steps == -1).sum()), int((steps == UNDATED).sum())
    dated = np.sort(steps[steps >= 0])
    parts = [f"{count(born)} since the beginning"] if born else []
    if dated.size:
        first, middle, last = (count(int(dated[at])) for at in (0, (dated.size - 1) // 2, -1))
        half = f", half by {middle}" if dated.size > 2 else ""
        parts.append(f"{count(dated.size)} at " + (f"step {first}" if first == last else f"steps {first}–{last}{half}"))
    return "; ".join([*parts, f"{count(undated)} not dated"] if undated else parts)
