"""Words: what a post-mortem amounts to, in plain sentences and in cells of tables, the same in every drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.checkpoints.postmortem_report import LEVELS, PostmortemReport
from neuronscope.checkpoints.verdict.disagreements import Disagreement, find_disagreements
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Evidence
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.judge.diagnosis import Diagnosis
from neuronscope.judge.symptoms import UNDATED, last_deaths
from neuronscope.writers.wording import NONE, UNKNOWN, count, percent, plural, visible

__all__ = [
    "GLOSSARY",
    "LEGEND",
    "Ground",
    "LayerWords",
    "abstained",
    "contested",
    "diagnosis",
    "finding",
    "fold",
    "grounds",
    "held",
    "is_alarm",
    "layer_words",
    "name",
    "since",
    "span",
    "title",
]

#: The words of a table in one line.
LEGEND = (
    "dead: dead, never trained or no gradient, on firm ground · suspected: likely, in no total · "
    f"other: on any ground · {UNKNOWN}: not known"
)

#: Each word and what it means here.
GLOSSARY = (
    ("dead", "its output is zero, always or at every position that was seen"),
    ("never trained", "none of its incoming weights ever got a gradient; counted with the dead"),
    ("no gradient", "its incoming weights got none lately; counted with the dead"),
    ("idle", "gets no gradient, and neither does the rest of its layer: frozen, or cut off; not counted with the dead"),
    ("zero row", "all of its incoming weights are zero"),
    ("unread", "its output cannot reach the network's output"),
    ("quiet", "it fires, but seldom at most"),
    ("alive", "it fires, or gets a gradient"),
    ("unknown", "no source can tell: not the same as alive"),
    ("proved", "holds for every input, or for every input of the box that is named"),
    ("measured", "counted exactly on data that was seen, in training or now"),
    ("inferred", "follows from what the optimizer or the weights hold"),
    ("suspected", "likely under an assumption that is named; in no total and no share"),
    ("contested", "one source says that it is dead or gets no gradient, another that it is alive"),
)


def title(report: PostmortemReport) -> str:
    """The checkpoint's name, what it is and, where it says so, how far training had come."""
    steps = "" if report.global_step is None else f" · {plural(report.global_step, 'optimizer step')}"
    return f"{name(report)} · {visible(report.format)}{steps}"


def name(report: PostmortemReport) -> str:
    """The checkpoint's name, without the folders before it."""
    return visible(report.path.replace("\\", "/").rstrip("/").rpartition("/")[2] or report.path)


def span(report: PostmortemReport) -> str:
    """What the verdicts are drawn from, and what more there could be."""
    model = f" ({visible(report.model)})" if report.model else ""
    more = {
        "file": " A model (--model) adds proofs, data (--data) exact counts.",
        "model": " Data (--data) would confirm or refute what is not proved.",
        "data": "",
    }[report.level]
    return f"Verdicts are drawn from {LEVELS[report.level]}{model}.{more}"


def finding(report: PostmortemReport) -> list[str]:
    """What was found, in plain sentences, gravest first."""
    said = []
    if report.not_finite:
        where = [layer.name for layer in report.layers if layer.count("not finite")]
        said.append(
            f"NOT FINITE: {plural(report.not_finite, 'neuron')} NaN or infinite, in {_layers(where)}. "
            "This network is not healthy, whatever the rest says."
        )
    said += _collapses(report)
    if not report.neurons:
        return [*said, "No layer could be examined, so nothing can be said of any neuron."]
    said.append(_deaths(report))
    if report.dead:
        dated = since([layer.since[layer.dead_mask] for layer in report.layers])
        early = ", at the earliest, by the optimizer's clock" if any(one.is_clocked for one in report.layers) else ""
        said.append(f"Since when{early}: {dated}.")
    if report.suspected:
        said.append(f"{_are(report.suspected, 'more')} only suspected, and in no total.")
    others = [(claim, report.count(claim)) for claim in ("zero row", "unread", "quiet")]
    if any(number for _, number in others):
        said.append(
            "Beside these: " + ", ".join(f"{count(number)} {claim}" for claim, number in others if number) + "."
        )
    if report.idle:
        layers = [layer.name for layer in report.layers if layer.idle.any()]
        follows = "that collapse" if report.collapsed else "what follows"
        said.append(
            f"{plural(report.idle, 'neuron')} in {_layers(layers)} get no gradient as a whole layer: frozen, or "
            f"cut off by {follows}; in no total."
        )
    if report.contested:
        said.append(f"{_are(report.contested)} contested: one source says dead, another alive; the surer one counts.")
    silent = sum(contest.neurons.size for contest in find_disagreements(report.layers) if contest.silent_on_data)
    if silent:
        said.append(
            f"{count(silent)} of the dead got a gradient lately, by the optimizer's state: most likely "
            f"{'it is' if silent == 1 else 'they are'} silent on this data only."
        )
    if report.unknown:
        said.append(f"Nothing is known of {count(report.unknown)} ({percent(_share(report.unknown, report))}).")
    return said


def is_alarm(report: PostmortemReport) -> bool:
    """Whether the first sentence of :func:`finding` says that the network does not work at all."""
    return bool(report.not_finite or report.collapsed)


def _collapses(report: PostmortemReport) -> list[str]:
    """What is said of layers that have collapsed, or may have."""
    firm, suspected = (
        [(layer, f"none of its {count(layer.neurons)} neurons") for layer in report.layers if layer.collapse == how]
        for how in ("firm", "suspected")
    )
    tell = "" if report.level == "data" else " Data (--data) would tell."
    return [
        *(
            f"COLLAPSED: layer {visible(layer.name)}: {none} is left{_collapsed_since(layer)}. No signal passes it, "
            "and what lies before it learns nothing through it."
            for layer, none in firm
        ),
        *(
            f"Layer {visible(layer.name)} may have collapsed: {none} gets a gradient{_collapsed_since(layer)}.{tell}"
            for layer, none in suspected
        ),
    ]


def _collapsed_since(layer: LayerReport) -> str:
    step = last_deaths(layer.dead_or_suspected, layer.since)
    if step is None:
        return ""
    return " since the beginning" if step < 0 else f", since step {count(step)}{' at the earliest' * layer.is_clocked}"


def _deaths(report: PostmortemReport) -> str:
    if not report.dead:
        return f"No neuron of {count(report.neurons)} is found dead on firm ground."
    sure = ", ".join(f"{count(number)} {basis}" for basis, number in report.dead_by_basis().items() if number)
    worst = max(report.layers, key=lambda layer: layer.dead / max(layer.neurons, 1))
    what = "dead" if report.count("dead") == report.dead else "dead or without gradient"
    at_least = "at least " if report.unknown else ""
    return (
        f"{count(report.dead)} of {plural(report.neurons, 'neuron')} ({at_least}{percent(report.dead_percent)}) "
        f"{'is' if report.dead == 1 else 'are'} {what}: {sure}. "
        f"Hardest hit is layer {visible(worst.name)}, with {count(worst.dead)} of {count(worst.neurons)}."
    )


def since(steps: Sequence[npt.NDArray[np.int64]]) -> str:
    """Since when, of neurons by layer: from the start, dated, not dated.

    >>> since([np.array([-1, 300, 340, 900]), np.array([-2])])
    '1 from the start; 3 from step 300 to 900, half by 340; 1 not dated'
    """
    every = np.sort(np.concatenate([*steps, np.zeros(0, dtype=np.int64)]))
    born, dated, undated = int((every == -1).sum()), every[every >= 0], int((every == UNDATED).sum())
    parts = [f"{count(born)} from the start"] if born else []
    if dated.size:
        first, middle, last = int(dated[0]), int(dated[(dated.size - 1) // 2]), int(dated[-1])
        if first == last:
            parts.append(f"{count(dated.size)} from step {count(first)}")
        else:
            half = f", half by {count(middle)}" if dated.size > 2 else ""
            parts.append(f"{count(dated.size)} from step {count(first)} to {count(last)}{half}")
    if undated:
        parts.append(f"{count(undated)} not dated")
    return "; ".join(parts)


@dataclass(frozen=True)
class LayerWords:
    """One layer in words: what stands in the columns of a table.

    Attributes:
        tone: ``alarm`` (not finite), ``bad`` (dead), ``warn`` (suspected, quiet, unread …), ``unknown`` or ``calm``.
    """

    name: str
    neurons: str
    dead: str
    dead_share: str
    sure: str
    since: str
    suspected: str
    other: str
    contested: str
    unknown: str
    tone: str


def layer_words(layer: LayerReport) -> LayerWords:
    """Phrase one layer."""
    unknown = layer.count("unknown")
    blank, broken = unknown + int(layer.idle.sum()) == layer.neurons, layer.count("not finite") > 0
    at_least = "≥ " if unknown else ""
    by_basis = [f"{count(some)} {basis}" for basis, some in layer.dead_by_basis().items() if some]
    others = [
        f"{count(some)} {label}"
        for label in ("not finite", "zero row", "unread", "quiet")
        if (some := int((layer.labels == CLAIMS.index(label)).sum()))
    ]
    others += [f"{count(int(layer.idle.sum()))} idle"] if layer.idle.any() else []

    def number(value: int) -> str:
        return count(value) if value else (UNKNOWN if blank or broken else NONE)  # no calm dot beside a NaN

    return LayerWords(
        name=visible(layer.name),
        neurons=count(layer.neurons),
        dead=number(layer.dead),
        dead_share=UNKNOWN if blank or (broken and not layer.dead) else at_least + percent(layer.dead_percent),
        sure=", ".join(by_basis) or number(0),
        since=since([layer.since[layer.dead_mask]]) or number(0),
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
    if layer.contested.any() or (layer.labels < CLAIMS.index("alive")).any():
        return "warn"
    return "unknown" if layer.count("unknown") else "calm"


def fold(report: PostmortemReport, limit: int = 40, most: int = 400) -> tuple[list[LayerReport], list[str]]:
    """The layers worth a row, and sentences on those left out.

    Args:
        report: The post-mortem.
        limit: Up to so many layers all have a row; of more, those with a finding.
        most: Most rows; where more layers have a finding, those with the most dead neurons, then the first, have one.
    """
    if len(report.layers) <= limit:
        return list(report.layers), []
    found = [layer for layer in report.layers if _tone(layer) not in ("calm", "unknown")]
    worst = {id(layer) for layer in sorted(found, key=lambda layer: -layer.dead)[:most]}
    shown = [layer for layer in found if id(layer) in worst]
    left_out = []
    if len(found) > len(shown):
        left_out.append(f"… {plural(len(found) - len(shown), 'more layer')} with no more dead than these")
    if len(report.layers) > len(found):
        left_out.append(f"… {plural(len(report.layers) - len(found), 'more layer')} with nothing to report")
    return shown, left_out


def diagnosis(one: Diagnosis) -> list[tuple[str, str]]:
    """A diagnosis, in parts: what each is, and its text."""
    parts = [("What is seen", one.evidence), ("Likely cause", one.cause), ("What to do", one.remedy)]
    return [*parts, ("Source", one.source)] if one.source else parts


@dataclass(frozen=True)
class Ground:
    """What one source said, all layers together."""

    source: str
    claim: str
    basis: str
    neurons: int
    layers: int
    text: str


def grounds(report: PostmortemReport) -> list[Ground]:
    """What was said, by source, claim, basis and measure: surest first, and of those the most serious first."""
    found: dict[tuple[str, str, str, str], list[tuple[str, Evidence]]] = {}
    for layer in report.layers:
        for one in layer.evidence:
            if one.neurons.size:
                found.setdefault((one.source_label, one.claim, one.basis, one.measure), []).append((layer.name, one))
    rows = []
    for (source, claim, basis, measure), said in found.items():
        name, first = said[0]
        alike = all(one.text == first.text for _, one in said)
        measured = _measured(measure, np.concatenate([one.numbers for _, one in said]))
        numbers = f"{measured[0].upper()}{measured[1:]}." if measured else ""
        rows.append(
            Ground(
                source=source,
                claim=claim,
                basis=basis,
                neurons=sum(one.neurons.size for _, one in said),
                layers=len({layer for layer, _ in said}),
                text=" ".join(filter(None, [first.text if alike else f"{first.text} (As said of {name}.)", numbers])),
            )
        )
    return sorted(
        rows, key=lambda row: (row.claim == "alive", BASES.index(row.basis), CLAIMS.index(row.claim), row.source)
    )


def held(report: PostmortemReport) -> list[str]:
    """How what was not measured fared where it was, a sentence for each source and claim."""
    said = []
    for one in report.confirmations:
        total = one.held + one.refuted + one.untested
        parts = [f"{count(one.held)} of {count(total)} held", f"{count(one.refuted)} refuted"]
        parts += [f"{count(one.untested)} not tested"] if one.untested else []
        said.append(f"{one.claim}, {one.basis} from {visible(one.source)}: {', '.join(parts)}.")
    return said


def contested(report: PostmortemReport, lines: int, neurons: int) -> list[str]:
    """What is contested: a line for the neurons of one layer over which the same sources differ in the same way.

    Args:
        report: The post-mortem.
        lines: Most lines; a last one says of how many neurons there would be more.
        neurons: Most neurons that a line names.
    """
    found = find_disagreements(report.layers)
    more = sum(contest.neurons.size for contest in found[lines:])
    return [_contest(one, neurons) for one in found[:lines]] + ([f"and {plural(more, 'more neuron')}"] if more else [])


def _contest(one: Disagreement, most: int) -> str:
    """A contest in one line: which neurons, the verdict with its number, what speaks against it, what that means."""
    named = ", ".join(map(str, one.neurons[:most].tolist()))
    which = f"neuron{'s' if one.neurons.size > 1 else ''} {named}"
    which += f" … ({count(one.neurons.size)})" if one.neurons.size > most else ""
    parts = [_said(one.verdict)]
    measured = _measured(one.verdict.measure, one.numbers)
    parts += [visible(measured)] if measured else []
    parts.append(f"against it: {', '.join(dict.fromkeys(map(_said, one.against)))}")
    if one.silent_on_data:
        parts.append("as they got a gradient lately, most likely silent on this data only")
    return f"{visible(one.layer)}, {which}: {'; '.join(parts)}"


def _measured(measure: str, numbers: npt.NDArray[np.float64]) -> str:
    """What numbers are, and the least and the largest of those that are known; ``""`` where there is none."""
    known = numbers[np.isfinite(numbers)]
    if not known.size or not measure:
        return ""
    ends = dict.fromkeys(f"{end:.4g}" for end in (known.min(), known.max()))
    return f"{measure}: {' to '.join(ends)}"


def _said(one: Evidence) -> str:
    return f"{one.claim}, {one.basis} ({visible(one.source_label)})"


def abstained(report: PostmortemReport) -> list[tuple[str, str]]:
    """What could not be told: of which source and layers, and why; layers with the same reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in report.abstentions:
        found.setdefault((one.source, one.reason), []).append(one.layer)
    return [
        (
            visible(source) + (f", {_some(named)}" if (named := [layer for layer in layers if layer]) else ""),
            visible(reason),
        )
        for (source, reason), layers in found.items()
    ]


def _layers(names: Sequence[str]) -> str:
    return f"layer{'s' if len(names) > 1 else ''} {_some(names)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(visible(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _share(part: int, report: PostmortemReport) -> float:
    return 100.0 * part / report.neurons


def _are(number: int, more: str = "") -> str:
    return f"{count(number)}{f' {more}' if more else ''} {'is' if number == 1 else 'are'}"
