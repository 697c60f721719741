"""Writes a report as one HTML page that needs no network, with a map of neurons over steps for each layer."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from neuronscope.judge.verdicts import LABELS
from neuronscope.report import report as levels
from neuronscope.report.report import Report, SiteReport
from neuronscope.writers import page, wording
from neuronscope.writers.formatting import NONE, UNKNOWN, count, percent, plural, visible
from neuronscope.writers.packing import Packed, pack, share_budget
from neuronscope.writers.page import Card, Cell, LayerRow

__all__ = ["ranges", "render"]

#: Most characters for the maps of all layers …
DATA_BUDGET = 200_000
#: … and the fewest that any layer gets.
LAYER_BUDGET = 2_000
#: Most entries (neurons or ranges of neurons) that are listed of one layer.
LISTED = 40

#: Columns after the layer's name, and how they are sorted (``""`` = they are not).
COLUMNS = (
    *((heading, "number") for heading in ("Neurons", "Dead", "Dead %", "Born", "Died")),
    *((heading, "number") for heading in ("Silent", "Dormant", "Cut off", "Linear", "Not finite")),
    ("Worst neurons", ""),
    ("Activation", "text"),
    ("Axis", "text"),
    ("Examples", "number"),
    ("Fires in", "number"),
)
LEGEND = (
    ("dead", "dead"),
    ("silent", "silent"),
    ("cut", "cut off"),
    ("warn", "dormant"),
    ("alarm", "not finite"),
    ("unknown", "unseen"),
    ("scale", "never zero to always zero"),
)


def render(report: Report) -> str:
    """Write a report as one HTML page.

    Args:
        report: The report.

    Returns:
        A page below 300 KB for 12 layers of 4096 neurons, whatever their history. If resolution was lost for that,
        the page says what and where.
    """
    home = files("neuronscope.writers")
    maps = share_budget(
        {index: site for index, site in enumerate(report.layers) if _has_map(site)},
        lambda site, budget: pack(site, budget, report.window.last_step),
        DATA_BUDGET,
        LAYER_BUDGET,
    )
    sentences = wording.findings(report)
    banners = [report.fault] if report.fault else []
    banners += [sentences.pop(0)] if report.not_finite else []
    return page.fill(
        home / "report.html.j2",
        styles=[],
        scripts=[home / "assets" / "report.js"],
        data=_payload(report, maps),
        report=report,
        brand="Neuronscope",
        title=wording.title(report),
        name=report.model,
        kind=report.phase,
        basis=wording.based_on(report),
        banners=banners,
        sentences=sentences,
        cards=_cards(report),
        columns=COLUMNS,
        rows=[_row(report, site, maps.get(index)) for index, site in enumerate(report.layers)],
        legend=LEGEND,
        deaths=[entry for site in report.layers if (entry := _deaths(site))],
        reasons=[(item.name, item.reason) for item in report.not_measured],
        notes=report.other_notes,
        glossary=wording.glossary(report),
    )


def _cards(report: Report) -> list[Card]:
    seen = [site for site in report.headline_layers if not wording.is_unseen(site)]
    gradients = any(site.gradient_positions for site in seen)
    judged = report.judged_neurons
    among = f"of {count(judged)} {'with finite outputs' if report.not_finite else 'observed'}"

    def card(name: str, number: int, below: str, tone: str, measured: bool = judged > 0) -> Card:
        return Card(name, count(number) if measured else UNKNOWN, below, tone if number and measured else "calm")

    born = f"{count(report.born_dead)} born dead, {count(report.dead - report.born_dead)} died"
    where = f"in {plural(len(report.headline_layers), 'layer')}"
    if excluded := len(report.layers) - len(report.headline_layers):
        where += f", {count(excluded)} not in the totals"
    unseen = report.neurons - report.observed_neurons
    share = UNKNOWN if report.not_finite and not report.dead else percent(report.dead_percent)
    return [
        card("Neurons", report.neurons, f"{where}, {count(unseen)} unseen" if unseen else where, "calm", True),
        card("Dead", report.dead, born if report.dead else among, "bad"),
        Card("Dead share", share, among, "bad" if report.dead else "calm"),
        *([card("Silent", report.silent, "zero, but gradient arrives", "silent")] if report.silent else []),
        card("Dormant", report.dormant, "almost no output", "warn"),
        card("Cut off", report.cut_off, "no gradient" if gradients else "gradients unseen", "cut", gradients),
        card("Not finite", report.not_finite, "NaN or infinite outputs", "alarm", wording.anything_seen(report)),
    ]


def _has_map(site: SiteReport) -> bool:
    return site.neurons > 0 and (not wording.is_unseen(site) or site.history.steps.size > 0)


def _row(report: Report, site: SiteReport, packed: Packed | None) -> LayerRow:
    cells = wording.site_cells(site, report.policy["confidence"])
    unseen, judged = wording.is_unseen(site), wording.judged(site)
    nothing = UNKNOWN if unseen or cells.tone == "alarm" else NONE
    share = 100.0 * site.dead / judged if judged else None
    silent, cut_off = (site.silent, site.cut_off) if site.gradient_positions else ("", "")

    def number(text: str, key: float | str, css: str = "") -> Cell:
        return Cell(text, "" if unseen else key, f"n {css}".strip())

    dead = cells.dead if unseen or not site.dead else count(site.dead)
    return LayerRow(
        name=cells.name,
        tone=cells.tone,
        cells=[
            Cell(cells.neurons, site.neurons, "n"),
            number(dead, site.dead, "dead"),
            Cell(cells.dead_share, "" if share is None else share, "n share", page.bar(share or 0)),
            number(count(site.born_dead) if site.born_dead else nothing, site.born_dead),
            number(count(site.died) if site.died else nothing, site.died),
            number(cells.silent, silent),
            number(cells.dormant, site.dormant),
            number(cells.cut_off, cut_off),
            number(cells.linear, site.linear),
            number(cells.not_finite, site.not_finite),
            Cell(cells.worst, css="worst"),
            Cell(cells.activation),
            Cell(cells.axis),
            Cell(cells.examples, site.examples or "", "n"),
            number(cells.bound, -site.examples if site.examples else ""),
        ],
        meta=_meta(site, unseen),
        drawn=packed is not None,
        lost="; ".join(_lost(site, packed)) if packed else "",
        mark=cells.mark,
    )


def _meta(site: SiteReport, unseen: bool) -> list[tuple[str, bool]]:
    deaths, revivals = int(site.history.deaths.sum()), int(site.history.revivals.sum())
    watched = f"{plural(deaths, 'death')} and {plural(revivals, 'revival')} while watched"
    pieces = [
        (visible(site.activation), False, True),
        (plural(site.neurons, "neuron"), False, True),
        (wording.not_in_totals(site), True, not site.in_headlines),
        ("unseen", True, unseen),
        (f"{plural(site.not_finite, 'output')} not finite", True, site.not_finite > 0),
        (f"{count(site.dead)} dead", True, site.dead > 0),
        (f"{count(site.silent)} silent", False, site.silent > 0),
        (f"{count(site.dormant)} dormant", False, site.dormant > 0),
        (f"{count(site.cut_off)} cut off", False, site.cut_off > 0),
        (f"{count(site.linear)} linear", False, site.linear > 0),
        ("gradients unseen", False, not unseen and not site.gradient_positions),
        (watched, False, deaths + revivals > 0),
    ]
    return [(text, bold) for text, bold, shown in pieces if shown]


def _lost(site: SiteReport, packed: Packed) -> list[str]:
    """Say what the page leaves out of a layer's history."""
    resolution = packed.resolution
    lost = []
    if len(packed.steps) < packed.windows:
        lost.append(f"{len(packed.steps)} of {count(packed.windows)} windows are drawn")
    if packed.rows < site.neurons:
        lost.append(f"about {round(site.neurons / packed.rows)} neurons share a row")
    if resolution.greys < levels.LEVEL_MAX:
        lost.append(f"fractions are rounded to {resolution.greys} steps")
    if not resolution.steps:
        lost.append("the steps of single deaths are left out")
    if not resolution.neurons:
        lost.append("single neurons are left out")
    return lost


def _payload(report: Report, maps: dict[int, Packed]) -> dict[str, Any]:
    """Return what the page's script reads."""
    return {
        "labels": LABELS,
        "levels": {
            name.removeprefix("LEVEL_").lower(): getattr(levels, name)
            for name in levels.__all__
            if name.startswith("LEVEL_")
        },
        "layers": [
            {
                "id": index,
                "neurons": report.layers[index].neurons,
                "rows": packed.rows,
                "steps": packed.steps,
                "hasNeurons": packed.resolution.neurons,
                "hasSteps": packed.resolution.steps,
                "data": packed.data,
            }
            for index, packed in maps.items()
        ],
    }


def _deaths(site: SiteReport) -> dict[str, Any] | None:
    """List a layer's dead neurons: those born dead as ranges, those that died with their step; ``None`` if none."""
    if not site.dead:
        return None
    born = np.flatnonzero(site.judgement.dead & (site.last_active_step < 0))
    died = np.flatnonzero(site.judgement.dead & (site.last_active_step >= 0))
    died = died[np.argsort(site.history.died_step[died], kind="stable")]
    steps = site.history.died_step[died[:LISTED]].tolist()
    return {
        "name": site.name,
        "mark": wording.mark(site),
        "dead": site.dead,
        "born": int(born.size),
        "died": int(died.size),
        "born_ranges": ranges(born, LISTED),
        "died_items": [
            f"{neuron} (step {count(step)})" if step >= 0 else f"{neuron} (step not known)"
            for neuron, step in zip(died[:LISTED].tolist(), steps, strict=True)
        ],
        "died_more": max(int(died.size) - LISTED, 0),
    }


def ranges(indices: npt.NDArray[np.int64], limit: int) -> tuple[str, int]:
    """Format indices as ranges.

    Args:
        indices: Rising, int64 ``(K,)``.
        limit: Most ranges.

    Returns:
        The text, and how many indices are not in it.

    >>> ranges(np.array([0, 1, 2, 5, 7, 8]), 2)
    ('0–2, 5', 2)
    """
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if indices.size else []
    shown = [str(run[0]) if run.size == 1 else f"{run[0]}–{run[-1]}" for run in runs[:limit]]
    return ", ".join(shown), sum(int(run.size) for run in runs[limit:])
