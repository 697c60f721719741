"""Wording: how numbers and the cells of a table are phrased, the same in every writer.

Not seen is ``–``, none is ``·``; the two are never mixed up. Nothing that is not zero is ever rounded to zero, and an
upper bound is only ever rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neuronscope.judge.verdicts import rate_bound
from neuronscope.report.report import Report, SiteReport

__all__ = [
    "NONE",
    "UNKNOWN",
    "SiteWords",
    "at_most",
    "confidence",
    "count",
    "fold",
    "is_unseen",
    "judged",
    "percent",
    "plural",
    "share",
    "site_words",
    "up_to",
    "visible",
]

#: What stands where there is nothing to report.
NONE = "·"
#: What stands where nothing was measured.
UNKNOWN = "–"


def visible(text: str) -> str:
    r"""``text`` with every character that does not print (control, bidi, lone surrogate) written as an escape.

    >>> visible("relu\x1b[31m")
    'relu\\x1b[31m'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def count(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """``1 neuron``, ``2 neurons``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def percent(value: float) -> str:
    """``value`` percent, such that only a true 0 or 100 reads 0 % or 100 %, and NaN reads as unknown.

    >>> percent(0.0), percent(0.02), percent(18.75), percent(99.99), percent(100.0)
    ('0 %', '< 0.1 %', '18.8 %', '> 99.9 %', '100 %')
    """
    if math.isnan(value):
        return UNKNOWN
    if 0.0 < value < 0.1:
        return "< 0.1 %"
    if 99.9 < value < 100.0:
        return "> 99.9 %"
    return f"{value:.0f} %" if value in (0.0, 100.0) else f"{value:.1f} %"


def share(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent; unknown where the whole is empty."""
    return percent(100.0 * part / whole) if whole else UNKNOWN


def at_most(samples: int, level: float) -> str:
    """How often a neuron that fired in none of ``samples`` examples may still fire; rounded up to two digits.

    >>> at_most(1000, 0.95), at_most(0, 0.95)
    ('< 0.3 %', '–')
    """
    return f"< {up_to(samples, level)}" if samples > 0 else UNKNOWN


def up_to(samples: int, level: float) -> str:
    """The same as a number: the greatest share of examples in which such a neuron may still fire.

    >>> up_to(256, 0.95), up_to(0, 0.95)
    ('1.2 %', '100 %')
    """
    value = 100.0 * rate_bound(samples, level)
    digits = 1 - math.floor(math.log10(value))
    scale = 10.0**digits
    text = f"{math.ceil(value * scale - 1e-9) / scale:.{max(digits, 0)}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def confidence(report: Report) -> str:
    """The level that bounds are given at: ``95 %``."""
    return f"{100.0 * report.policy['confidence']:g} %"


def is_unseen(site: SiteReport) -> bool:
    """Whether no neuron of the site was observed in the window."""
    return site.positions == 0 or site.unseen == site.neurons


def judged(site: SiteReport) -> int:
    """Neurons of the site that were observed and gave finite outputs alone: those that dead ones are a share of."""
    return 0 if is_unseen(site) else site.neurons - site.unseen - int(site.judgement.not_finite.sum())


@dataclass(frozen=True)
class SiteWords:
    """One site in words: what stands in the columns of a table.

    Attributes:
        tone: ``alarm`` (not finite), ``bad`` (dead neurons), ``warn`` (dormant or cut off), ``unknown`` (unseen) or
            ``calm``.
    """

    name: str
    activation: str
    neurons: str
    axis: str
    dead: str
    dead_share: str
    dormant: str
    cut_off: str
    linear: str
    not_finite: str
    worst: str
    examples: str
    bound: str
    tone: str


def site_words(site: SiteReport, level: float, worst: int = 4) -> SiteWords:
    """Phrase one site.

    Args:
        site: The site.
        level: Confidence of the bound.
        worst: How many of the worst neurons to name.
    """
    unseen = is_unseen(site)
    indices = site.worst(worst + 1)
    some = UNKNOWN if unseen else (", ".join(str(index) for index in indices[:worst]) or NONE)
    neurons = count(site.neurons) if unseen or not site.unseen else f"{count(site.neurons)} ({site.unseen} unseen)"
    tone = _tone(site, unseen)
    nothing = UNKNOWN if tone == "alarm" else NONE  # beside a NaN, a calm dot would look healthy

    def number(value: int, known: bool = True) -> str:
        if unseen or not known:
            return UNKNOWN
        return count(value) if value else nothing

    return SiteWords(
        name=visible(site.name),
        activation=visible(site.activation),
        neurons=neurons,
        axis=_axis(site),
        dead="unseen" if unseen else _dead(site),
        dead_share=UNKNOWN if tone == "alarm" and not site.dead else share(site.dead, judged(site)),
        dormant=number(site.dormant),
        cut_off=number(site.cut_off, known=site.gradient_positions > 0),
        linear=number(site.linear),
        not_finite=number(site.not_finite),
        worst=f"{some} …" if len(indices) > worst and not unseen else some,
        examples=count(site.examples) if site.examples else UNKNOWN,
        bound=at_most(0 if unseen else site.examples, level),
        tone=tone,
    )


def _dead(site: SiteReport) -> str:
    if not site.dead:
        return "not finite" if site.not_finite else NONE
    if site.born_dead == site.dead:
        return f"{count(site.dead)} (born)" if site.dead == 1 else f"{count(site.dead)} (all born)"
    if not site.born_dead:
        return f"{count(site.dead)} (died)" if site.dead == 1 else f"{count(site.dead)} (all died)"
    return f"{count(site.dead)} ({count(site.born_dead)} born)"


def _axis(site: SiteReport) -> str:
    source = visible(site.axis_source)
    if source.startswith("producer (") and source.endswith(")"):
        source = source[len("producer (") : -1]
    return f"{site.axis} · assumed ?" if source.startswith("assumed") else f"{site.axis} · {source}"


def _tone(site: SiteReport, unseen: bool) -> str:
    if site.not_finite or site.judgement.not_finite.any():
        return "alarm"
    if site.dead:
        return "bad"
    if unseen or site.unseen:
        return "unknown"
    return "warn" if site.dormant or site.cut_off else "calm"


def fold(sites: Sequence[SiteReport], limit: int = 40) -> tuple[list[SiteReport], int]:
    """The sites worth a row, and how many wholly alive ones were left out; none is while ``limit`` holds them all."""
    if len(sites) <= limit:
        return list(sites), 0
    shown = [site for site in sites if _tone(site, is_unseen(site)) != "calm" or site.linear]
    return shown, len(sites) - len(shown)
