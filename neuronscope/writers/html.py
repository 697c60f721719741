"""Write a report as one HTML page that needs no network, with a map of neurons over steps for each layer."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np

from neuronscope.arrays import IntArray
from neuronscope.judge.diagnosis import diagnose
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.comparison import ReportComparison, compare_reports
from neuronscope.report.report import LEVEL_MAX, Report, SiteReport
from neuronscope.report.run_facts import facts_from_report
from neuronscope.writers import page, wording
from neuronscope.writers.formatting import NONE, UNKNOWN, count, percent, plural, visible
from neuronscope.writers.packing import NetworkMap, Packed, pack, share_budget, summarise
from neuronscope.writers.page import Card, Cell, LayerRow
from neuronscope.writers.page_density import densities
from neuronscope.writers.page_experts import mixtures
from neuronscope.writers.page_headline import headline
from neuronscope.writers.page_timeline import timeline

__all__ = ["ranges", "render"]

#: Most characters for the map of the network, and for the maps of its layers …
OVERVIEW_BUDGET, DATA_BUDGET = 60_000, 180_000
#: … and the fewest that any layer gets.
LAYER_BUDGET = 300
#: Layers that get a row and a map of their own; of more, the worst ones.
LAYERS = 400
#: Most rows of a comparison, and entries (neurons or ranges of neurons) that are listed of one layer.
COMPARED, LISTED = 100, 20

#: Columns after the layer's name, and how they are sorted (``""`` = they are not).
COLUMNS = (
    *((heading, "number") for heading in ("Neurons", "Dead", "Dead %", "Born", "Died")),
    *((heading, "number") for heading in ("Silent", "Dormant", "Cut off", "Linear", "Not finite")),
    ("Worst neurons", ""),
    ("Fires in", "number"),
)
#: Columns that are left out if no layer has such neurons.
OPTIONAL = ("Born", "Died", "Silent", "Dormant", "Cut off", "Linear", "Not finite")
LEGEND = (
    ("dead", "dead"),
    ("silent", "silent"),
    ("cut", "cut off"),
    ("warn", "dormant"),
    ("alarm", "not finite"),
    ("unknown", "unseen"),
    ("scale", "never zero to always zero"),
)


def render(report: Report | ReportComparison, against: Report | None = None, against_name: str = "") -> str:
    """Write a report as one HTML page.

    Args:
        report: The report; of a comparison, the second report, compared with the first.
        against: Another report on the same network (another phase, an earlier one) to compare with, layer by layer.
        against_name: How the page names that report; ``""`` = by its phase and step.

    Returns:
        A page below 500 KB for 12 layers of 4096 neurons and for 300 layers, whatever their history, and not much more
        for any number of layers. If resolution or layers were left out for that, the page says what and where.
    """
    if isinstance(report, ReportComparison):
        against, report = report.before, report.after
    home = files("neuronscope.writers")
    shown, left_out = _fold(report)
    maps = share_budget(
        {index: report.layers[index] for index in shown if _has_map(report.layers[index])},
        lambda site, budget: pack(site, budget, report.window.last_step),
        DATA_BUDGET,
        LAYER_BUDGET,
    )
    overview = summarise(report.layers, OVERVIEW_BUDGET, report.window.last_step)
    columns, rows = _table([_row(report, index) for index in shown])
    sentences = wording.findings(report)
    banners = [report.fault] if report.fault else []
    banners += [sentences.pop(0)] if report.not_finite else []
    first = headline(report)
    rest = " ".join(text for text in sentences if text not in first)
    drawn, not_drawn = mixtures(report)
    return page.fill(
        home / "report.html.j2",
        styles=[],
        scripts=[home / "assets" / "maps.js", home / "assets" / "report.js"],
        data=_payload(report, shown, maps, overview),
        report=report,
        brand="Neuronscope",
        title=wording.title(report),
        name=report.model,
        kind=report.phase,
        basis=wording.based_on(report),
        banners=banners,
        sentences=[" ".join(first), rest],
        cards=_cards(report),
        timeline=_timeline(report),
        diagnoses=page.causes(diagnose(facts_from_report(report))),
        columns=columns,
        rows=rows,
        overview=overview is not None,
        overview_hint=_hint(overview) if overview else "",
        left_out=left_out,
        legend=LEGEND,
        densities=densities([report.layers[index] for index in shown]),
        against=None if against is None else _comparison(compare_reports(against, report), against_name),
        mixtures=drawn,
        mixtures_left_out=not_drawn,
        reasons=[(item.name, item.reason) for item in report.not_measured],
        notes=report.other_notes,
        glossary=wording.glossary(report),
    )


def _fold(report: Report) -> tuple[list[int], list[str]]:
    """Return which layers get a row, in their order, and sentences about those that were left out."""
    indices = range(len(report.layers))
    if len(indices) <= LAYERS:
        return list(indices), []

    def badness(index: int) -> tuple[bool, tuple[float, float]]:
        site = report.layers[index]
        return bool(site.not_finite or site.not_finite_neurons), wording.severity(site)

    worst = sorted(indices, key=badness)
    shown, hidden = worst[-LAYERS:], worst[:-LAYERS]
    ill = sum(any(wording.severity(report.layers[index])) for index in hidden)
    sentences = [f"{plural(ill, 'more layer')} with a smaller share of such neurons than these"] if ill else []
    sentences += [f"{plural(len(hidden) - ill, 'more layer')} with nothing to report"] if len(hidden) > ill else []
    return sorted(shown), [f"… {', '.join(sentences)}. The map shows all, and the JSON report holds all"]


def _table(rows: list[LayerRow]) -> tuple[list[tuple[str, str]], list[LayerRow]]:
    """Return the columns and rows without the columns that say nothing of any layer."""
    kept = [
        place
        for place, (heading, _) in enumerate(COLUMNS)
        if heading not in OPTIONAL or any(row.cells[place].text not in (NONE, UNKNOWN) for row in rows)
    ]
    columns = [COLUMNS[place] for place in kept]
    return columns, [replace(row, cells=[row.cells[place] for place in kept]) for row in rows]


def _hint(overview: NetworkMap) -> str:
    """Say how to read the map of the network, and what it leaves out."""
    text = (
        "Each row is a layer, in the order in which they ran; the optimizer step runs from left to right. The more of "
        "a layer are dead, the more it has the colour of the dead. Click a row, or focus the map and use the arrow "
        "keys and Enter."
    )
    if len(overview.steps) < overview.windows:
        text += f" {len(overview.steps)} of {count(overview.windows)} windows are drawn."
    return text


def _timeline(report: Report) -> Any:
    """Return the drawings of what happened by step; ``None`` if nothing is known."""
    died, revived = (
        np.concatenate([np.zeros(0, np.int64), *(steps[steps >= 0] for _, steps in report.totals.at_home(values))])
        for values in (
            [site.history.died_step for site in report.layers],
            [site.history.revived_step for site in report.layers],
        )
    )
    return timeline(died, revived, report.global_step, report.series, report.checkpoints)


def _comparison(found: ReportComparison, name: str) -> dict[str, Any]:
    """Return what the page shows of a comparison: the layers with the most changes, and how many more there are."""
    changed = sorted(
        (layer for layer in found.layers if layer.died.size or layer.revived.size),
        key=lambda layer: layer.died.size + layer.revived.size,
        reverse=True,
    )
    here, there = (f"{count(one.dead)} of {plural(one.neurons, 'neuron')}" for one in (found.after, found.before))
    sentence = f"Dead: {here} here, {there} there. "
    sentence += f"{plural(found.died, 'neuron')} dead only here and {plural(found.revived, 'neuron')} dead only there, "
    sentence += f"in {plural(len(found.layers), 'layer')} that both have. "
    sentence += "Neurons that one of the two did not observe are not counted."
    if len(changed) > COMPARED:
        sentence += f" The {COMPARED} layers with the most are listed, of {count(len(changed))}."
    if found.left_out:
        left_out = plural(len(found.left_out), "layer")
        sentence += f" Not compared: {left_out} that only one has, or whose size differs."
    return {
        "name": name or f"phase {found.before.phase} at step {count(found.before.global_step)}",
        "sentence": sentence,
        "rows": [
            {
                "name": visible(layer.name),
                "before": layer.dead_before,
                "after": layer.dead_after,
                "died": _listed(layer.died),
                "revived": _listed(layer.revived),
            }
            for layer in changed[:COMPARED]
        ],
    }


def _listed(indices: IntArray) -> str:
    """Return indices as ranges after their number."""
    if not indices.size:
        return NONE
    text, more = ranges(indices, LISTED)
    return f"{count(indices.size)}: {text}" + (f" and {count(more)} more" if more else "")


def _cards(report: Report) -> list[Card]:
    seen = [site for site in report.headline_layers if not site.is_unseen]
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
        card("Dead", report.dead, born if report.dead and wording.tells_born(report) else among, "bad"),
        Card("Dead share", share, among, "bad" if report.dead else "calm"),
        *([card("Silent", report.silent, "zero, but gradient arrives", "silent")] if report.silent else []),
        *([] if wording.all_sparse(report) else [card("Dormant", report.dormant, "almost no output", "warn")]),
        card("Cut off", report.cut_off, "no gradient" if gradients else "gradients unseen", "cut", gradients),
        card("Not finite", report.not_finite, "NaN or infinite outputs", "alarm", wording.anything_seen(report)),
    ]


def _has_map(site: SiteReport) -> bool:
    return site.neurons > 0 and (not site.is_unseen or site.history.steps.size > 0)


def _row(report: Report, index: int) -> LayerRow:
    site = report.layers[index]
    cells = wording.site_cells(site, report)
    unseen, born = site.is_unseen, wording.tells_born(report)
    nothing = UNKNOWN if unseen or cells.tone == "alarm" else NONE
    silent, cut_off = (site.silent, site.cut_off) if site.gradient_positions else ("", "")

    def number(text: str, key: float | str, css: str = "") -> Cell:
        return Cell(text, "" if unseen else key, css)

    dead = cells.dead if unseen or not site.dead else count(site.dead)
    return LayerRow(
        number=index,
        name=cells.name,
        tone=cells.tone,
        cells=[
            Cell(cells.neurons, site.neurons),
            number(dead, site.dead, "dead"),
            Cell(cells.dead_share, "" if np.isnan(site.dead_percent) else round(site.dead_percent, 4), "share"),
            number(count(site.born_dead) if born and site.born_dead else nothing, site.born_dead),
            number(count(site.died) if born and site.died else nothing, site.died),
            number(cells.silent, silent),
            number(cells.dormant, site.dormant),
            number(cells.cut_off, cut_off),
            number(cells.linear, site.linear),
            number(cells.not_finite, site.not_finite),
            Cell(cells.worst, css="worst"),
            number(cells.bound, -site.examples if site.examples else ""),
        ],
        mark=cells.mark,
    )


def _meta(site: SiteReport) -> list[tuple[str, bool]]:
    unseen = site.is_unseen
    deaths, revivals = int(site.history.deaths.sum()), int(site.history.revivals.sum())
    watched = f"{plural(deaths, 'death')} and {plural(revivals, 'revival')} while watched"
    pieces = [
        (visible(site.activation), False, True),
        (plural(site.neurons, "neuron"), False, True),
        (f"axis {site.axis}: {visible(site.axis_source)}", False, True),
        (plural(site.examples, "example"), False, site.examples > 0),
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


def _facts(report: Report, site: SiteReport) -> list[str]:
    """Say which weights lead into a layer's neurons and which read them, and which neurons were revived."""
    facts = [f"Weights: {wording.weights_of(site)}.".replace("`", "")] if site.incoming else []
    if acts := [act for act in report.acts if act.site == site.name]:
        newest, total = acts[-1], sum(len(act.neurons) for act in acts)
        which, more = ranges(np.array(newest.neurons), LISTED)
        facts.append(
            f"Revived: {plural(total, 'neuron')} at {plural(len(acts), 'step')}, last at step {count(newest.step)} by "
            f"{visible(newest.rule)}: {which}{f' and {count(more)} more' if more else ''}."
        )
    return facts


def _lost(site: SiteReport, packed: Packed) -> list[str]:
    """Say what the page leaves out of a layer's history."""
    resolution = packed.resolution
    lost = []
    if len(packed.steps) < packed.windows:
        lost.append(f"{len(packed.steps)} of {count(packed.windows)} windows are drawn")
    if packed.rows < site.neurons:
        lost.append(f"about {round(site.neurons / packed.rows)} neurons share a row")
    if resolution.greys < LEVEL_MAX:
        lost.append(f"fractions are rounded to {resolution.greys} steps")
    if not resolution.steps:
        lost.append("the steps of single deaths are left out")
    if not resolution.neurons:
        lost.append("single neurons are left out")
    return lost


def _payload(report: Report, shown: list[int], maps: dict[int, Packed], overview: NetworkMap | None) -> dict[str, Any]:
    """Return what the page's script reads. What many layers share is in lists, and a layer has its place there."""
    lists: dict[str, list[Any]] = {"steps": [], "lost": []}

    def place(name: str, value: Any) -> int:
        if value not in lists[name]:
            lists[name].append(value)
        return lists[name].index(value)

    def layer(index: int) -> dict[str, Any]:
        site, packed = report.layers[index], maps.get(index)
        if packed is None:
            return page.layer_data(index, _meta(site), "", None, _facts(report, site))
        drawing = {
            "neurons": site.neurons,
            "rows": packed.rows,
            "steps": place("steps", packed.steps),
            "hasNeurons": packed.resolution.neurons,
            "hasSteps": packed.resolution.steps,
            "data": packed.data,
        }
        lost = "; ".join(_lost(site, packed))
        data = page.layer_data(index, _meta(site), lost, drawing, _facts(report, site))
        return {**data, "lost": place("lost", data["lost"])}

    layers, places = [layer(index) for index in shown], set(shown)
    return {
        "labels": LABELS,
        "levels": page.levels(),
        "words": {},
        "worst": max(maps, key=lambda index: wording.severity(report.layers[index]), default=-1),
        "overview": page.overview_data(overview, [at if at in places else -1 for at in range(len(report.layers))]),
        **lists,
        "layers": layers,
    }


def ranges(indices: IntArray, limit: int) -> tuple[str, int]:
    """Return indices as text, in ranges, and how many are not in it.

    Args:
        indices: Rising, int64 ``(K,)``.
        limit: Most ranges.

    >>> ranges(np.array([0, 1, 2, 5, 7, 8]), 2)
    ('0–2, 5', 2)
    """
    runs = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if indices.size else []
    shown = [str(run[0]) if run.size == 1 else f"{run[0]}–{run[-1]}" for run in runs[:limit]]
    return ", ".join(shown), sum(int(run.size) for run in runs[limit:])
