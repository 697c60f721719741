"""Write a post-mortem as one HTML page that needs no network: what died, when, how sure that is, and why."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup

from neuronscope.arrays import IntArray
from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.evidence import BASES
from neuronscope.checkpoints.verdict.layer_verdicts import LABELS, LayerReport
from neuronscope.checkpoints.writers import postmortem_wording as wording
from neuronscope.checkpoints.writers import timeline_wording
from neuronscope.checkpoints.writers.neuron_map import MOST_EVIDENCE, NeuronMap, network_map, pack
from neuronscope.writers import page
from neuronscope.writers.formatting import NONE, UNKNOWN, count, percent, plural, visible
from neuronscope.writers.packing import NetworkMap, share_budget
from neuronscope.writers.page import Card, Cell, LayerRow
from neuronscope.writers.page_timeline import BINS, bars, timeline

__all__ = ["render"]

#: Most characters for the map of the network, and for the neurons of all layers …
OVERVIEW_BUDGET, DATA_BUDGET = 40_000, 180_000
#: … and the fewest that any layer gets.
LAYER_BUDGET = 600
#: Layers that get a row and a drawing; of more, those with the most dead neurons.
LAYERS = 400
#: Most lines of a list (disagreements, layers with woken neurons, reasons), and neurons that each names.
LISTED, NAMED = 40, 64
#: Layers in the table of deaths between checkpoints.
MOST_LAYERS = 100

#: Columns after the layer's name, and how they are sorted (``""`` = they are not).
COLUMNS = (
    ("Neurons", "number"),
    ("Dead", "number"),
    ("Dead %", "number"),
    ("How sure", ""),
    ("Since", "number"),
    ("Suspected", "number"),
    ("Other", ""),
    ("Contested", "number"),
    ("Unknown", "number"),
)
OVERVIEW_HINT = (
    "In the map, each row is a layer, and the optimizer step runs from left to right: the more of a layer had died by "
    "a step, the more it has the colour of the dead. Who is not dead now is not known before the checkpoint. Click a "
    "row, or focus the map and use the arrow keys and Enter."
)
LEGEND = (
    ("proved", "dead, proved"),
    ("measured", "measured"),
    ("inferred", "inferred"),
    ("suspected", "suspected"),
    ("silent", "silent"),
    ("cut", "zero row, unread, idle"),
    ("warn", "quiet"),
    ("alarm", "not finite"),
    ("alive", "alive"),
    ("unknown", "unknown"),
)


def render(report: PostmortemReport) -> str:
    """Write a post-mortem as one HTML page.

    Returns:
        A page below 300 KB for 12 layers of 4096 neurons, and below 2 MB for any number of layers. If detail or
        layers were left out for that, the page says what.
    """
    home = files("neuronscope.checkpoints.writers")
    shown, left_out = wording.fold(report, limit=LAYERS, most=LAYERS)
    maps = share_budget(
        {index: layer for index, layer in enumerate(shown) if layer.neurons}, pack, DATA_BUDGET, LAYER_BUDGET
    )
    died = np.concatenate([np.zeros(0, dtype=np.int64), *map(_dated, report.layers)])
    last = max([report.global_step or 0, *died.tolist()])
    overview = network_map(report.layers, last, OVERVIEW_BUDGET)
    sentences = wording.findings(report)
    confirmations, woken, contested = wording.lists(report, LISTED, NAMED).values()
    return page.fill(
        home / "postmortem.html.j2",
        styles=[home / "assets" / "postmortem.css"],
        scripts=[files("neuronscope.writers") / "assets" / "maps.js", home / "assets" / "postmortem.js"],
        data=_payload(report, shown, maps, overview),
        report=report,
        brand="Neuronscope post-mortem",
        title=wording.title(report),
        name=wording.name(report),
        kind=report.format,
        basis=wording.based_on(report),
        banners=[sentences.pop(0)] if wording.is_alarm(report) else [],
        sentences=sentences,
        cards=_cards(report) if report.neurons else [],
        diagnoses=page.causes(report.diagnoses),
        timeline=timeline(died, np.zeros(0, dtype=np.int64), last, {}),
        checkpoints=_checkpoints(report),
        columns=COLUMNS,
        rows=[_row(index, layer, last) for index, layer in enumerate(shown)],
        overview=overview is not None,
        overview_hint=OVERVIEW_HINT,
        left_out=left_out,
        legend=LEGEND,
        grounds=wording.grounds(report),
        confirmations=confirmations,
        woken=woken,
        contested=contested,
        reasons=wording.abstentions(report, LISTED),
        notes=report.notes,
        glossary=wording.GLOSSARY,
    )


def _checkpoints(report: PostmortemReport) -> dict[str, Any] | None:
    """Return what the page shows of several checkpoints; ``None`` if there is one only."""
    if report.timeline is None or (drawing := timeline_wording.chart(report.timeline)) is None:
        return None
    points, more_points = timeline_wording.checkpoint_rows(report.timeline)
    layers, more_layers = timeline_wording.layer_rows(report.timeline, MOST_LAYERS)
    return {
        "chart": drawing,
        "points": points,
        "more_points": more_points,
        "layers": layers,
        "more_layers": more_layers,
        "explanation": timeline_wording.EXPLANATION,
        "last": report.timeline.checkpoints[-1].step,
    }


def _cards(report: PostmortemReport) -> list[Card]:
    by_basis = report.dead_by_basis()
    since = np.concatenate([layer.since[layer.dead_mask] for layer in report.headline_layers])
    dated = np.sort(since[since >= 0])
    half, below = NONE, "no death is dated"
    if dated.size:
        half = count(int(dated[(dated.size - 1) // 2]))
        below = f"half of {count(dated.size)} dated deaths by then"
    elif (since == -1).any():
        half, below = "start", "before training"
    sure = next((basis for basis, number in by_basis.items() if number), NONE)
    top = f"{count(by_basis[sure])} {sure}" if report.dead else NONE
    rest = ", ".join(f"{count(n)} {basis}" for basis, n in by_basis.items() if n and basis != sure)
    share = ("≥ " if report.unknown else "") + percent(report.dead_percent)
    bad = "bad" if report.dead else "calm"
    return [
        Card("Dead", count(report.dead), f"of {plural(report.neurons, 'neuron')}", bad),
        Card("Dead share", UNKNOWN if report.not_finite and not report.dead else share, "of all neurons", bad),
        Card("Since step", half, below),
        Card("How sure", top, rest or ("all of them" if report.dead else "nothing is dead")),
        Card("Suspected", count(report.suspected), "not in the totals", "warn" if report.suspected else "calm"),
        Card("Unknown", count(report.unknown), "no source can tell", "unknown" if report.unknown else "calm"),
    ]


def _row(number: int, layer: LayerReport, last: int) -> LayerRow:
    cells = wording.layer_cells(layer)
    share = layer.dead_percent if layer.neurons else ""
    return LayerRow(
        number=number,
        name=cells.name,
        tone=cells.tone,
        cells=[
            Cell(cells.neurons, layer.neurons),
            Cell(cells.dead, layer.dead, "dead"),
            Cell(cells.dead_share, share, "share"),
            Cell(cells.sure, css="words"),
            Cell(cells.since, _middle_step(layer), "words since", _bars(layer, last)),
            Cell(cells.suspected, layer.suspected),
            Cell(cells.other, css="words"),
            Cell(cells.contested, int(layer.contested.sum())),
            Cell(cells.unknown, layer.count("unknown")),
        ],
    )


def _meta(layer: LayerReport) -> list[tuple[str, bool]]:
    cells = wording.layer_cells(layer)
    idle, unknown = int(layer.idle.sum()), layer.count("unknown")
    meta = [
        (plural(layer.neurons, "neuron"), False, True),
        (f"{cells.dead} dead", True, layer.dead > 0),
        (f"{cells.suspected} suspected", False, layer.suspected > 0),
        (f"{cells.contested} contested", False, bool(layer.contested.any())),
        (f"{count(idle)} idle", False, idle > 0),
        (f"{cells.unknown} unknown", False, unknown > 0),
    ]
    return [(text, bold) for text, bold, shown in meta if shown]


def _middle_step(layer: LayerReport) -> int | str:
    """Return the median of the known steps of deaths, by which the column is sorted; empty if none is known."""
    known = np.sort(layer.since[layer.dead_mask & (layer.since >= -1)])
    return int(known[(known.size - 1) // 2]) if known.size else ""


def _dated(layer: LayerReport) -> IntArray:
    """Return the known steps at which neurons of a layer died, int64 ``(K,)``."""
    return layer.since[layer.dead_mask & (layer.since >= 0)]


def _bars(layer: LayerReport, last: int) -> Markup:
    """Draw when the neurons of a layer died, on a scale of its own."""
    found = _dated(layer)
    if not found.size:
        return Markup("")
    bins = min(BINS, last + 1)
    shape = '<svg viewBox="0 0 {} 100" preserveAspectRatio="none" aria-hidden="true"><path d="{}"/></svg>'
    counts = np.histogram(found, bins=bins, range=(0, last + 1))[0]
    return Markup(shape).format(bins, bars(counts))  # noqa: S704 - our own text


def _payload(
    report: PostmortemReport, layers: Sequence[LayerReport], maps: dict[int, NeuronMap], overview: NetworkMap | None
) -> dict[str, Any]:
    """Return what the page's script reads: the layers that the page shows, and the map of all."""
    places = {id(layer): index for index, layer in enumerate(layers)}
    return {
        "labels": [*LABELS, "idle"],
        "bases": BASES,
        "levels": page.levels(),
        "words": {"alive": "alive", "dormant": "quiet", "cut_off": "zero row, unread or idle", "unseen": "not known"},
        "worst": max(maps, key=lambda index: layers[index].dead, default=-1),
        "overview": page.overview_data(overview, [places.get(id(layer), -1) for layer in report.layers]),
        "layers": [
            page.layer_data(
                index, _meta(layer), maps[index].detail.lost if index in maps else "", _drawing(layer, maps.get(index))
            )
            for index, layer in enumerate(layers)
        ],
    }


def _drawing(layer: LayerReport, neurons: NeuronMap | None) -> dict[str, Any] | None:
    if neurons is None:
        return None
    return {
        "neurons": layer.neurons,
        "runs": neurons.runs,
        "marked": neurons.marked,
        "hasNeurons": neurons.detail.neurons,
        "stepUnit": neurons.detail.steps,
        "hasNumbers": neurons.detail.numbers,
        "evidence": [
            [visible(text) for text in (one.claim, one.basis, one.source_label, one.measure)]
            for one in layer.evidence[:MOST_EVIDENCE]
        ],
        "data": neurons.data,
    }
