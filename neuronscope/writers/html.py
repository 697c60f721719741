"""HTML: a report as one page that needs no network, with a map of neurons over steps for each site."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from neuronscope.judge.verdicts import LABELS
from neuronscope.report import report as levels
from neuronscope.report.report import Report, SiteReport
from neuronscope.writers import findings, page, wording
from neuronscope.writers.packing import Packed, pack

__all__ = ["ranges", "render"]

#: Most characters that the maps of all sites take in the page …
DATA_BUDGET = 200_000
#: … yet no site has to make do with fewer than this.
SITE_BUDGET = 2_000
#: Most entries (neurons or runs of neurons) that are listed of one site.
LISTED = 40

#: Columns of the sites' table that hold a count: heading, field of ``SiteWords``, attribute of ``SiteReport``.
COUNTS = (
    ("Dormant", "dormant", "dormant"),
    ("Cut off", "cut_off", "cut_off"),
    ("Linear", "linear", "linear"),
    ("Not finite", "not_finite", "not_finite"),
)


def render(report: Report) -> str:
    """The report as one HTML page.

    Args:
        report: What to draw.

    Returns:
        A page below 300 KB for 12 sites of 4096 neurons, whatever their history. Where resolution was lost for that,
        the page says what and where.
    """
    package = files("neuronscope.writers")
    sites = _sites(report)
    sentences = findings.finding(report)
    banners = [report.fault] if report.fault else []
    banners += [sentences.pop(0)] if report.not_finite else []
    return page.fill(
        package / "report.html.j2",
        styles=[package / "assets" / "page.css"],
        scripts=[package / "assets" / "page.js", package / "assets" / "report.js"],
        data=_payload(sites),
        report=report,
        title=findings.title(report),
        span=findings.span(report),
        banners=banners,
        sentences=sentences,
        cards=_cards(report),
        counts=COUNTS,
        sites=sites,
        deaths=[entry for site in report.layers if (entry := _deaths(site))],
        glossary=findings.glossary(report),
        confidence=wording.confidence(report),
    )


def _cards(report: Report) -> list[dict[str, str]]:
    """The headline numbers; each with its name, value, a line below it, and a tone."""
    seen = [site for site in report.layers if not wording.is_unseen(site)]
    gradients = any(site.gradient_positions for site in seen)
    judged = report.judged_neurons
    among = f"of {wording.count(judged)} {'with finite outputs' if report.not_finite else 'observed'}"

    def card(name: str, number: int, below: str, tone: str, measured: bool = judged > 0) -> dict[str, str]:
        value = wording.count(number) if measured else wording.UNKNOWN
        return {"name": name, "value": value, "below": below, "tone": tone if number and measured else "calm"}

    born = f"{wording.count(report.born_dead)} born dead, {wording.count(report.dead - report.born_dead)} died"
    where = f"at {wording.plural(len(report.layers), 'site')}"
    unseen = report.neurons - report.observed_neurons
    share = wording.UNKNOWN if report.not_finite and not report.dead else wording.percent(report.dead_percent)
    return [
        card("Neurons", report.neurons, f"{where}, {wording.count(unseen)} unseen" if unseen else where, "calm", True),
        card("Dead", report.dead, born if report.dead else among, "bad"),
        {
            "name": "Dead share",
            "value": share,
            "below": among,
            "tone": "bad" if report.dead else "calm",
        },
        card("Dormant", report.dormant, "next to no output", "warn"),
        card("Cut off", report.cut_off, "no gradient" if gradients else "gradients unseen", "cut", gradients),
        card("Not finite", report.not_finite, "NaN or infinite outputs", "alarm", bool(report.observed_neurons)),
    ]


def _sites(report: Report) -> list[dict[str, Any]]:
    """One entry a site: its words, the keys its columns sort by, and its packed map."""
    entries = []
    left = DATA_BUDGET
    smallest_first = sorted(range(len(report.layers)), key=lambda index: report.layers[index].neurons)
    packed: dict[int, Packed] = {}
    for turn, index in enumerate(smallest_first):
        site = report.layers[index]
        if site.neurons and not (wording.is_unseen(site) and not site.history.steps.size):
            packed[index] = pack(site, max(left // (len(report.layers) - turn), SITE_BUDGET), report.window.last_step)
            left -= len(packed[index].data)
    for index, site in enumerate(report.layers):
        unseen = wording.is_unseen(site)
        judged = wording.judged(site)
        percent = 100.0 * site.dead / judged if judged else None
        counts = {field: None if unseen else getattr(site, attribute) for _, field, attribute in COUNTS}
        if not site.gradient_positions:
            counts["cut_off"] = None
        entries.append(
            {
                "id": index,
                "site": site,
                "words": wording.site_words(site, report.policy["confidence"]),
                "unseen": unseen,
                "percent": percent,
                "counts": counts,
                "packed": packed.get(index),
                "kept": _kept(site, packed[index]) if index in packed else [],
                "meta": _meta(site, unseen),
            }
        )
    return entries


def _meta(site: SiteReport, unseen: bool) -> list[tuple[str, bool]]:
    """What stands below a site's name: pieces of text, and whether each is grave."""
    deaths, revivals = int(site.history.deaths.sum()), int(site.history.revivals.sum())
    watched = f"{wording.plural(deaths, 'death')} and {wording.plural(revivals, 'revival')} while watched"
    pieces = [
        (wording.visible(site.activation), False, True),
        (wording.plural(site.neurons, "neuron"), False, True),
        ("unseen", True, unseen),
        (f"{wording.plural(site.not_finite, 'output')} not finite", True, site.not_finite > 0),
        (f"{wording.count(site.dead)} dead", True, site.dead > 0),
        (f"{wording.count(site.dormant)} dormant", False, site.dormant > 0),
        (f"{wording.count(site.cut_off)} cut off", False, site.cut_off > 0),
        (f"{wording.count(site.linear)} linear", False, site.linear > 0),
        ("gradients unseen", False, not unseen and not site.gradient_positions),
        (watched, False, deaths + revivals > 0),
    ]
    return [(text, grave) for text, grave, said in pieces if said]


def _kept(site: SiteReport, packed: Packed) -> list[str]:
    """What of a site's history the page does not hold, in words; empty when it holds all."""
    resolution = packed.resolution
    said = []
    if len(packed.steps) < packed.windows:
        said.append(f"{len(packed.steps)} of {wording.count(packed.windows)} windows are drawn")
    if packed.rows < site.neurons:
        said.append(f"about {round(site.neurons / packed.rows)} neurons share a row")
    if resolution.greys < levels.LEVEL_MAX:
        said.append(f"fractions are rounded to {resolution.greys} steps")
    if not resolution.steps:
        said.append("steps of single deaths are left out")
    if not resolution.neurons:
        said.append("single neurons are left out")
    return said


def _payload(sites: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script reads."""
    return {
        "labels": LABELS,
        "levels": {
            name.removeprefix("LEVEL_").lower(): getattr(levels, name)
            for name in levels.__all__
            if name.startswith("LEVEL_")
        },
        "sites": [
            {
                "id": entry["id"],
                "neurons": entry["site"].neurons,
                "rows": entry["packed"].rows,
                "steps": entry["packed"].steps,
                "hasNeurons": entry["packed"].resolution.neurons,
                "hasSteps": entry["packed"].resolution.steps,
                "data": entry["packed"].data,
            }
            for entry in sites
            if entry["packed"]
        ],
    }


def _deaths(site: SiteReport) -> dict[str, Any] | None:
    """The dead neurons of a site: those born dead as ranges, those that died with their step; ``None`` if none."""
    if not site.dead:
        return None
    born = np.flatnonzero(site.judgement.dead & (site.last_active_step < 0))
    died = np.flatnonzero(site.judgement.dead & (site.last_active_step >= 0))
    died = died[np.argsort(site.history.died_step[died], kind="stable")]
    steps = [int(site.history.died_step[neuron]) for neuron in died[:LISTED]]
    return {
        "name": site.name,
        "dead": site.dead,
        "born": int(born.size),
        "died": int(died.size),
        "born_ranges": ranges(born, LISTED),
        "died_items": [
            f"{neuron} (step {wording.count(step)})" if step >= 0 else f"{neuron} (step not known)"
            for neuron, step in zip(died[:LISTED].tolist(), steps, strict=True)
        ],
        "died_more": max(int(died.size) - LISTED, 0),
    }


def ranges(indices: npt.NDArray[np.int64], limit: int) -> tuple[str, int]:
    """Rising indices as runs, and how many indices did not fit into ``limit`` runs.

    >>> ranges(np.array([0, 1, 2, 5, 7, 8]), 2)
    ('0–2, 5', 2)
    """
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if indices.size else []
    shown = [str(run[0]) if run.size == 1 else f"{run[0]}–{run[-1]}" for run in runs[:limit]]
    return ", ".join(shown), sum(int(run.size) for run in runs[limit:])
