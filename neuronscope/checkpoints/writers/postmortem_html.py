"""HTML: a post-mortem as one page that needs no network: what is dead, since when, how sure, why, and every neuron."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.evidence import BASES
from neuronscope.checkpoints.verdict.layer_verdicts import LABELS, LayerReport
from neuronscope.checkpoints.writers import postmortem_wording
from neuronscope.checkpoints.writers.neuron_map import MOST_EVIDENCE, Field, pack
from neuronscope.checkpoints.writers.timeline import timeline
from neuronscope.writers import page, wording

__all__ = ["render"]

#: Most characters that the fields of all layers take in the page …
DATA_BUDGET = 180_000
#: … yet no layer has to make do with fewer than this.
LAYER_BUDGET = 600
#: Contests that are listed, and neurons that each names.
LISTED, NAMED = 40, 64


def render(report: PostmortemReport) -> str:
    """The post-mortem as one HTML page.

    Args:
        report: What to draw.

    Returns:
        A page below 300 KB for 12 layers of 4096 neurons. Where detail was lost for that, the page says what.
    """
    ours, shared = files("neuronscope.checkpoints.writers"), files("neuronscope.writers") / "assets"
    sentences = postmortem_wording.finding(report)
    banner = sentences.pop(0) if postmortem_wording.is_alarm(report) else None
    layers = _layers(report)
    return page.fill(
        ours / "postmortem.html.j2",
        styles=[shared / "page.css", ours / "assets" / "postmortem.css"],
        scripts=[shared / "page.js", ours / "assets" / "postmortem.js"],
        data=_payload(layers),
        report=report,
        title=postmortem_wording.title(report),
        name=postmortem_wording.name(report),
        span=postmortem_wording.span(report),
        banner=banner,
        lead=sentences[0],
        sentences=sentences[1:],
        cards=_cards(report),
        diagnoses=[(one, postmortem_wording.diagnosis(one)) for one in report.diagnoses],
        timeline=timeline(report),
        layers=layers,
        grounds=postmortem_wording.grounds(report),
        held=postmortem_wording.held(report),
        contested=postmortem_wording.contested(report, LISTED, NAMED),
        abstained=postmortem_wording.abstained(report),
        glossary=postmortem_wording.GLOSSARY,
    )


def _cards(report: PostmortemReport) -> list[dict[str, str]]:
    """The headline numbers; each with its name, value, a line below it, and a tone."""
    by_basis = report.dead_by_basis()
    dated = [layer.since[layer.dead_mask] for layer in report.layers]
    every = np.concatenate([*dated, np.zeros(0, dtype=np.int64)])
    half, below = wording.NONE, "no death is dated"
    if (every >= 0).any():
        half = f"{wording.count(int(np.sort(every[every >= 0])[((every >= 0).sum() - 1) // 2]))}"
        below = f"half of {wording.count(int((every >= 0).sum()))} dated deaths by then"
    elif (every == -1).any():
        half, below = "start", "before training"
    sure = next((basis for basis, number in by_basis.items() if number), wording.NONE)
    top = f"{wording.count(by_basis[sure])} {sure}" if report.dead else wording.NONE
    rest = ", ".join(f"{wording.count(n)} {basis}" for basis, n in by_basis.items() if n and basis != sure)
    share = (
        wording.UNKNOWN
        if report.not_finite and not report.dead
        else ("≥ " if report.unknown else "") + wording.percent(report.dead_percent)
    )

    def card(name: str, value: str, below: str, tone: str) -> dict[str, str]:
        return {"name": name, "value": value, "below": below, "tone": tone}

    bad = "bad" if report.dead else "calm"
    return [
        card("Dead", wording.count(report.dead), f"of {wording.count(report.neurons)} neurons", bad),
        card("Dead share", share, "of all, unknown ones too", bad),
        card("Since step", half, below, "calm"),
        card("How sure", top, rest or ("all of them" if report.dead else "nothing to be sure of"), "calm"),
        card("Suspected", wording.count(report.suspected), "in no total", "warn" if report.suspected else "calm"),
        card("Unknown", wording.count(report.unknown), "no source can tell", "unknown" if report.unknown else "calm"),
    ]


def _layers(report: PostmortemReport) -> list[dict[str, Any]]:
    """One entry a layer: its words, what its columns sort by, and its packed field."""
    fields: dict[int, Field] = {}
    left = DATA_BUDGET
    smallest_first = sorted(range(len(report.layers)), key=lambda index: report.layers[index].neurons)
    for turn, index in enumerate(smallest_first):
        if report.layers[index].neurons:
            fields[index] = pack(report.layers[index], max(left // (len(report.layers) - turn), LAYER_BUDGET))
            left -= len(fields[index].data)
    return [
        {
            "id": index,
            "layer": layer,
            "words": postmortem_wording.layer_words(layer),
            "since_key": _since_key(layer),
            "field": fields.get(index),
        }
        for index, layer in enumerate(report.layers)
    ]


def _since_key(layer: LayerReport) -> int | str:
    """What the column of steps is sorted by: the middle one of those known; ``""`` where none is."""
    known = np.sort(layer.since[layer.dead_mask & (layer.since >= -1)])
    return int(known[(known.size - 1) // 2]) if known.size else ""


def _payload(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script reads."""
    return {
        "labels": [*LABELS, "idle"],
        "bases": BASES,
        "layers": [
            {
                "id": entry["id"],
                "neurons": entry["layer"].neurons,
                "runs": entry["field"].runs,
                "told": entry["field"].told,
                "hasNeurons": entry["field"].detail.neurons,
                "stepUnit": entry["field"].detail.steps,
                "hasNumbers": entry["field"].detail.numbers,
                "evidence": [
                    [wording.visible(text) for text in (one.claim, one.basis, one.source_label, one.measure)]
                    for one in entry["layer"].evidence[:MOST_EVIDENCE]
                ],
                "data": entry["field"].data,
            }
            for entry in layers
            if entry["field"]
        ],
    }
