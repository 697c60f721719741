"""Say what a post-mortem found: the sentences and the table cells that every writer shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import FloatArray, IntArray
from neuronscope.checkpoints.postmortem_report import LEVELS, PostmortemReport
from neuronscope.checkpoints.verdict.combine import Disagreement, find_disagreements
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Evidence
from neuronscope.checkpoints.verdict.join_units import LEFT_OUT
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.checkpoints.writers import timeline_wording
from neuronscope.judge.symptoms import last_deaths
from neuronscope.writers.console import Column
from neuronscope.writers.formatting import (
    NONE,
    UNKNOWN,
    bounded,
    count,
    is_are,
    listed,
    percent,
    plural,
    share,
    visible,
    when,
)

__all__ = [
    "COLUMNS",
    "GLOSSARY",
    "LEGEND",
    "Ground",
    "LayerCells",
    "abstentions",
    "based_on",
    "findings",
    "fold",
    "grounds",
    "is_alarm",
    "layer_cells",
    "lists",
    "name",
    "title",
]

#: The columns of the table of layers after the name, fields of :class:`LayerCells`.
COLUMNS = (
    Column("neurons", "neurons", narrowest=70),
    Column("dead", "dead"),
    Column("%", "dead_share"),
    Column("how sure", "sure", right=False, narrowest=60, wraps=True),
    Column("woken", "woken", narrowest=80, optional=True),
    Column("since", "since", right=False, wraps=True),
    Column("suspected", "suspected", narrowest=100, optional=True),
    Column("other", "other", right=False, narrowest=100, wraps=True, optional=True),
    Column("contested", "contested", narrowest=110, optional=True),
    Column("unknown", "unknown", narrowest=120, optional=True),
)
#: Collapsed layers that have a sentence each.
COLLAPSES = 5

#: The words of the table in one line.
LEGEND = (
    "dead: dead, never trained or no gradient; proved, measured or inferred · suspected: likely, not in the totals · "
    f"{UNKNOWN}: not known"
)

#: Each word and what it means here.
GLOSSARY = (
    ("dead", "its output is zero, always or at every position that was seen"),
    ("silent", "its output was zero at every position that was seen, but it got a gradient; not counted as dead"),
    ("never trained", "none of its incoming weights ever got a gradient; counted as dead"),
    ("no gradient", "its incoming weights got no gradient lately; counted as dead"),
    ("idle", "gets no gradient because its whole layer gets none (frozen, or cut off); not counted as dead"),
    ("zero row", "all of its incoming weights are zero"),
    ("unread", "its output cannot reach the network's output"),
    ("quiet", "it fires, but seldom at most"),
    ("alive", "it fires, or gets a gradient"),
    ("unknown", "no source can tell; this does not mean alive"),
    ("proved", "holds for every input, or for every input in the stated range"),
    ("measured", "counted exactly on data that was seen, in training or now"),
    ("inferred", "follows from the optimizer's state or the weights"),
    ("suspected", "likely under an assumption that is stated; not included in totals and shares"),
    ("contested", "one source says that it is dead or gets no gradient, another that it is alive"),
    ("woken", "silent on the data or without gradient, but an input of the box makes it fire"),
)


def title(report: PostmortemReport) -> str:
    """Return the checkpoint's name, its format and, if it says so, the number of optimizer steps."""
    steps = "" if report.global_step is None else f" · {plural(report.global_step, 'optimizer step')}"
    return f"{name(report)} · {visible(report.format)}{steps}"


def name(report: PostmortemReport) -> str:
    """Return the checkpoint's name, without the folders before it."""
    return visible(report.path.replace("\\", "/").rstrip("/").rpartition("/")[2] or report.path)


def based_on(report: PostmortemReport) -> str:
    """Say what the verdicts are based on, and what would add to it."""
    model = f" ({visible(report.model)})" if report.model else ""
    more = {
        "file": " A model (--model) adds proofs, data (--data) adds exact counts.",
        "model": " Data (--data) would confirm or refute what is not proved.",
        "data": "",
    }[report.level]
    several = report.timeline is not None and len(report.timeline.checkpoints) > 1
    compared = " The verdicts are on the last checkpoint." if several else ""
    return f"Based on {LEVELS[report.level]}{model}.{compared}{more}"


def findings(report: PostmortemReport) -> list[str]:
    """Return what was found as plain sentences, worst first."""
    sentences = []
    if report.not_finite:
        where = [layer.name for layer in report.layers if layer.count("not finite")]
        sentences.append(
            f"NOT FINITE: {plural(report.not_finite, 'neuron')} {is_are(report.not_finite)} NaN or infinite, in "
            f"{_layers(where)}. This network is not healthy, whatever the rest says."
        )
    sentences += _collapses(report)
    if not report.neurons:
        nothing = "No layer could be examined, so there is no verdict on any neuron."
        return [*sentences, *(_left_out(report) or [nothing])]
    sentences += _deaths(report)
    if report.permanent:
        which = f"{count(report.permanent)} of {plural(report.dead, 'dead neuron')} {is_are(report.permanent)}"
        sentences.append(f"{which} permanent on this data, proved: no training on the same examples revives them.")
    if report.timeline is not None:
        sentences += timeline_wording.findings(report.timeline)
    if (box := report.in_box) is not None and box.dead:
        sentences.append(
            f"Of {plural(box.dead, 'dead neuron')}: {count(box.proved)} proved dead for every input of the box, "
            f"{count(box.woken)} woken by an input of the box, {count(box.open)} open."
        )
    if report.suspected:
        they = "it is" if report.suspected == 1 else "they are"
        sentences.append(f"{count(report.suspected)} more may be dead; {they} not included in the totals.")
    labels = ("silent", "zero row", "unread", "quiet")
    if others := [f"{count(number)} {label}" for label in labels if (number := report.count(label))]:
        sentences.append(f"Also found: {', '.join(others)}.")
    if report.idle:
        sentences.append(_idle(report))
    if report.contested:
        them = "it" if report.contested == 1 else "them"
        sentences.append(
            f"{count(report.contested)} {is_are(report.contested)} contested: one source calls {them} dead, another "
            "alive. The surer source decides."
        )
    if silent := [contest for contest in find_disagreements(report.headline_layers) if contest.silent_on_data]:
        number = sum(contest.neurons.size for contest in silent)
        sources = listed(sorted({source for contest in silent for source in contest.alive_in_training}))
        were, they = ("was", "it is") if number == 1 else ("were", "they are")
        sentences.append(
            f"{count(number)} of the dead {were} alive lately in training ({sources}): most likely {they} silent on "
            "this data only."
        )
    if report.unknown:
        sentences.append(f"Nothing is known of {count(report.unknown)} ({share(report.unknown, report.neurons)}).")
    return [*sentences, *_left_out(report)]


def _left_out(report: PostmortemReport) -> list[str]:
    """Say which layers are not in the totals."""
    sentences = []
    for reason, why in LEFT_OUT.items():
        if names := [layer.name for layer in report.layers if layer.left_out == reason]:
            who = f"{_layers(names, 'Layer')} {'is' if len(names) == 1 else 'are'}"
            sentences.append(f"{who} not in the totals: {why}.")
    return sentences


def is_alarm(report: PostmortemReport) -> bool:
    """Whether the first sentence of :func:`findings` says that the network does not work at all."""
    return bool(report.not_finite or report.collapsed)


def _collapses(report: PostmortemReport) -> list[str]:
    """Return a sentence for each layer that has collapsed or may have."""
    tell = "" if report.level == "data" else " Data (--data) would tell."
    firm, suspected = [], []
    for layer in report.headline_layers:
        where, none, since = visible(layer.name), f"none of its {count(layer.neurons)} neurons", _collapsed_since(layer)
        if layer.collapse == "firm":
            firm.append(
                f"COLLAPSED: layer {where}: {none} is left{since}. No signal passes through it, and the layers before "
                "it learn nothing through it."
            )
        elif layer.collapse == "suspected":
            suspected.append(f"Layer {where} may have collapsed: {none} gets a gradient{since}.{tell}")
    return [*_first(firm, COLLAPSES), *_first(suspected, COLLAPSES)]


def _first(lines: list[str], most: int) -> list[str]:
    """Return the first lines, and one that says how many layers were left out."""
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"The same holds for {plural(more, 'more layer')}."]


def _collapsed_since(layer: LayerReport) -> str:
    step = last_deaths(layer.dead_or_suspected, layer.since)
    if step is None:
        return ""
    clock = ", about" if layer.is_estimated else " at the earliest" if layer.is_clocked else ""
    return " since the beginning" if step < 0 else f", since step {count(step)}{clock}"


def _deaths(report: PostmortemReport) -> list[str]:
    if not report.dead:
        return [f"No dead neuron was found among {count(report.neurons)}."]
    sure = ", ".join(f"{count(number)} {basis}" for basis, number in report.dead_by_basis().items() if number)
    worst = max(report.headline_layers, key=lambda layer: layer.dead / max(layer.neurons, 1))
    what = "" if report.count("dead") == report.dead else f" or get{'s' * (report.dead == 1)} no gradient"
    at_least = "at least " if report.unknown else ""
    clock = ""
    if any(layer.is_estimated for layer in report.headline_layers):
        clock = " (estimated by a clock, some too early and some too late)"
    elif any(layer.is_clocked for layer in report.headline_layers):
        clock = " (earliest possible step, by the optimizer clock)"
    steps = when(np.concatenate([layer.since[layer.dead_mask] for layer in report.headline_layers]))
    how_many = f"{count(report.dead)} of {plural(report.neurons, 'neuron')} {is_are(report.dead)} dead{what}"
    return [
        f"{how_many} ({at_least}{percent(report.dead_percent)}): {sure}.",
        f"Worst layer: `{visible(worst.name)}`, with {count(worst.dead)} of {count(worst.neurons)}.",
        f"When they died{clock}: {steps}.",
    ]


def _idle(report: PostmortemReport) -> str:
    names = [layer.name for layer in report.headline_layers if layer.idle.any()]
    one = len(names) == 1
    cut_off = "a layer that collapsed" if report.collapsed else "what follows"
    return (
        f"{_layers(names, 'Layer')} get{'s' * one} no gradient at all: frozen, or cut off by "
        f"{cut_off}. {'Its' if one else 'Their'} {plural(report.idle, 'neuron')} "
        f"{is_are(report.idle)} not included in the totals."
    )


@dataclass(frozen=True)
class LayerCells:
    """The table cells of one layer."""

    name: str
    neurons: str
    dead: str
    woken: str
    dead_share: str
    sure: str
    since: str
    suspected: str
    other: str
    contested: str
    unknown: str
    tone: str  # ``alarm`` (not finite), ``bad`` (dead), ``warn`` (suspected, quiet, unread …), ``unknown`` or ``calm``


def layer_cells(layer: LayerReport) -> LayerCells:
    """Return the table cells of one layer."""
    unknown = layer.count("unknown")
    blank, broken = unknown + int(layer.idle.sum()) == layer.neurons, layer.count("not finite") > 0
    at_least = "≥ " if unknown else ""
    by_basis = [f"{count(some)} {basis}" for basis, some in layer.dead_by_basis().items() if some]
    others = [
        f"{count(some)} {label}"
        for label in ("not finite", "silent", "zero row", "unread", "quiet")
        if (some := int((layer.labels == CLAIMS.index(label)).sum()))
    ]
    others += [f"{count(int(layer.idle.sum()))} idle"] if layer.idle.any() else []

    def number(value: int) -> str:
        return count(value) if value else (UNKNOWN if blank or broken else NONE)  # no calm dot beside a NaN

    return LayerCells(
        name=visible(layer.name) + (" (not in the totals)" if not layer.in_headlines else ""),
        neurons=count(layer.neurons),
        dead=number(layer.dead),
        woken=number(layer.in_box.woken) if layer.in_box else NONE,
        dead_share=UNKNOWN if blank or (broken and not layer.dead) else at_least + percent(layer.dead_percent),
        sure=", ".join(by_basis) or number(0),
        since=when(layer.since[layer.dead_mask]) or number(0),
        suspected=number(layer.suspected),
        other=", ".join(others) or number(0),
        contested=number(int(layer.contested.sum())),
        unknown=count(unknown) if unknown else NONE,
        tone=_tone(layer),
    )


def _tone(layer: LayerReport) -> str:
    if layer.count("not finite"):
        return "alarm"
    if layer.dead:
        return "bad"
    if layer.listed.any():
        return "warn"
    return "unknown" if layer.count("unknown") else "calm"


def fold(report: PostmortemReport, limit: int = 40, most: int = 400) -> tuple[list[LayerReport], list[str]]:
    """Return the layers that get a row of the table, and sentences about those that were left out.

    Args:
        report: The post-mortem.
        limit: Up to this many layers, each gets a row; of more, only those with something to report.
        most: Most rows. If more layers have something to report, those with the most dead neurons get a row.
    """
    if len(report.layers) <= limit:
        return list(report.layers), []
    tones = [_tone(layer) for layer in report.layers]
    found = [number for number, tone in enumerate(tones) if tone not in ("calm", "unknown")]
    worst = sorted(found, key=lambda number: (tones[number] != "alarm", -report.layers[number].dead))[:most]
    left_out = []
    if len(found) > most:
        left_out.append(f"… {plural(len(found) - most, 'more layer')} with no more dead than these")
    if len(report.layers) > len(found):
        left_out.append(f"… {plural(len(report.layers) - len(found), 'more layer')} with nothing to report")
    if left_out:
        left_out.append("All layers are in the JSON report (--json, to_json)")
    return [report.layers[number] for number in sorted(worst)], left_out


@dataclass(frozen=True)
class Ground:
    """One claim of one source, in all layers together."""

    source: str
    claim: str
    basis: str
    neurons: int
    layers: int
    text: str


def grounds(report: PostmortemReport) -> list[Ground]:
    """Return what each source claimed: the surest basis first, then the most serious claim; *alive* comes last."""
    found: dict[tuple[str, str, str, str], list[tuple[str, Evidence]]] = {}
    for layer in report.layers:
        for one in layer.evidence:
            if one.neurons.size:
                found.setdefault((one.source_label, one.claim, one.basis, one.measure), []).append((layer.name, one))
    rows = []
    for (source, claim, basis, measure), pieces in found.items():
        layer_name, first = pieces[0]
        alike = all(one.text == first.text for _, one in pieces)
        measured = _measured(measure, np.concatenate([one.numbers for _, one in pieces]))
        numbers = f"{measured[0].upper()}{measured[1:]}." if measured else ""
        rows.append(
            Ground(
                source=source,
                claim=claim,
                basis=basis,
                neurons=sum(one.neurons.size for _, one in pieces),
                layers=len({layer for layer, _ in pieces}),
                text=" ".join(filter(None, [first.text if alike else f"{first.text} (In {layer_name}.)", numbers])),
            )
        )
    return sorted(
        rows, key=lambda row: (row.claim == "alive", BASES.index(row.basis), CLAIMS.index(row.claim), row.source)
    )


def lists(report: PostmortemReport, most: int, named: int) -> dict[str, list[str]]:
    """Return the lines of each list by its heading.

    Args:
        report: The post-mortem.
        most: Most lines of a list; one more says how much was left out.
        named: Most neurons that a line names.
    """
    return {
        "Confirmed by measuring": _confirmations(report),
        "Woken by an input of the box": _woken(report, most, named),
        "Contested": _contested(report, most, named),
    }


def _confirmations(report: PostmortemReport) -> list[str]:
    """Say for each source and claim that was not measured how much of it a measurement confirmed."""
    sentences = []
    for one in report.confirmations:
        total = one.held + one.refuted + one.untested
        parts = [f"{count(one.held)} of {count(total)} confirmed", f"{count(one.refuted)} refuted"]
        parts += [f"{count(one.untested)} not tested"] if one.untested else []
        sentences.append(f"{one.claim}, {one.basis} from {visible(one.source)}: {', '.join(parts)}.")
    return sentences


def _woken(report: PostmortemReport, most: int, named: int) -> list[str]:
    """Say which neurons an input of the box makes fire, a line for each layer."""
    lines = []
    for layer in report.layers:
        if layer.woken is not None and (neurons := np.flatnonzero(layer.woken >= 0)).size:
            by = f"by {plural(np.unique(layer.woken[neurons]).size, 'input')}, stored in the JSON report"
            lines.append(f"{visible(layer.name)}, {_named(neurons, named)}: {by}")
    return _first(lines, most)


def _named(neurons: IntArray, most: int) -> str:
    """Return the numbers of neurons, up to ``most`` of them, as ``neurons 1, 2, 3 … (12)``."""
    named = ", ".join(map(str, neurons[:most].tolist()))
    return f"neuron{'s' if neurons.size > 1 else ''} {named}" + f" … ({count(neurons.size)})" * (neurons.size > most)


def _contested(report: PostmortemReport, most: int, named: int) -> list[str]:
    """Say where sources disagree: a line for the neurons of one layer over which the same sources disagree alike."""
    found = find_disagreements(report.layers)
    more = sum(contest.neurons.size for contest in found[most:])
    return [_contest(one, named) for one in found[:most]] + ([f"and {plural(more, 'more neuron')}"] if more else [])


def _contest(one: Disagreement, most: int) -> str:
    """Return a line: which neurons, the verdict with its number, what speaks against it, and what that means."""
    parts = [_claim(one.verdict)]
    measured = _measured(one.verdict.measure, one.numbers)
    parts += [visible(measured)] if measured else []
    parts.append(f"against it: {', '.join(dict.fromkeys(map(_claim, one.against)))}")
    if one.silent_on_data:
        parts.append("as they were alive in training lately, most likely silent on this data only")
    return f"{visible(one.layer)}, {_named(one.neurons, most)}: {'; '.join(parts)}"


def _measured(measure: str, numbers: FloatArray) -> str:
    """Say what numbers are, and the smallest and the largest that is known, not NaN; empty if none is known."""
    known = numbers[np.isfinite(numbers)]
    if not known.size or not measure:
        return ""
    ends = dict.fromkeys(bounded(float(end), measure) for end in (known.min(), known.max()))
    return f"{measure}: {' to '.join(ends)}"


def _claim(one: Evidence) -> str:
    return f"{one.claim}, {one.basis} ({visible(one.source_label)})"


def abstentions(report: PostmortemReport, most: int) -> list[tuple[str, str]]:
    """Return what is not known, by source and layers, and why; layers with the same reason share an entry.

    Args:
        report: The post-mortem.
        most: Most entries; one more says how many reasons were left out.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for one in report.abstentions:
        layers = found.setdefault((one.source, one.reason), [])
        layers += [one.layer] if one.layer else []
    entries = [
        (visible(source) + (f", {listed(layers)}" if layers else ""), visible(reason))
        for (source, reason), layers in found.items()
    ]
    more = len(entries) - most
    return entries if more <= 0 else [*entries[:most], ("and", f"{plural(more, 'more reason')}, in the JSON report")]


def _layers(names: Sequence[str], noun: str = "layer") -> str:
    return f"{noun}{'s' if len(names) > 1 else ''} {listed(names)}"
