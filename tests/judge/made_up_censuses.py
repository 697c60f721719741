"""Reports made from censuses that were never counted: any units, any labels, any windows.

And the totals of such reports by a slow way of their own: a dict from each unit of a layer to its places, and loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neuronscope.build_report import make_report
from neuronscope.count.counter_tensors import NEVER
from neuronscope.judge.verdicts import LABELS, Policy
from neuronscope.report.report import Report, SiteReport
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.sync import Exchanges
from neuronscope.tally.phase_record import PhaseRecord

POSITIONS = 400
FATES = ("alive", "dead", "silent", "cut off", "dormant", "linear", "not finite")
Units = tuple[tuple[str, int, int, int], ...]


def info(
    *units: tuple[str, int, int, int], kind: str = "relu-like", assumed: bool = False, output: bool = False
) -> SiteInfo:
    """The description of a site."""
    source = "assumed (rank)" if assumed else "layer (fc)"
    layer = "+".join(dict.fromkeys(layer for layer, *_ in units))
    return SiteInfo(
        activation="relu",
        kind=kind,
        linear_when_on=kind == "relu-like",
        axis=1,
        axis_source=source,
        layer=layer,
        units=units,
        output=output,
    )


def tally(about: SiteInfo, fates: Sequence[str], step: int, *, gradients: bool = True) -> Tally:
    """Counts from which each neuron gets the label that its fate names."""
    positions = POSITIONS
    fires = np.array([fate not in ("dead", "silent", "not finite") for fate in fates], dtype=np.bool_)
    whole, half = positions, positions // 2
    zeros = {"dead": whole, "silent": whole, "linear": 0, "not finite": 0}
    sums = {"dead": 0.0, "silent": 0.0, "dormant": 1e-6, "not finite": 0.0}
    blocked = {"dead": whole, "cut off": whole}
    return Tally(
        **vars(about),
        zero_outputs=np.array([zeros.get(fate, half) for fate in fates], dtype=np.int64),
        zero_gradients=np.array([blocked.get(fate, 0) if gradients else 0 for fate in fates], dtype=np.int64),
        not_finite_outputs=np.array([int(fate == "not finite") for fate in fates], dtype=np.int64),
        abs_sum=np.array([sums.get(fate, 1.0) * positions for fate in fates], dtype=np.float64),
        last_active_step=np.where(fires, step, -1),
        first_active_step=np.where(fires, step, NEVER),
        positions=positions,
        gradient_positions=positions if gradients else 0,
        examples=positions,
    )


def report_of(*windows: Mapping[str, Tally]) -> Report:
    """The report after some windows, of the tallies by site; window ``i`` is step ``10 · i``."""
    record = PhaseRecord(Policy())
    for index, tallies in enumerate(windows):
        record.add_joined(Census(tallies, first_step=10 * index, last_step=10 * index, steps=1))
        record.close()
    return make_report(
        record,
        model="MadeUp",
        phase="train",
        step=10 * (len(windows) - 1),
        policy=Policy(),
        unseen={},
        exchanges=Exchanges(1, 0, 0, 0, 0.0),
    )


@dataclass(frozen=True)
class Neuron:
    """A neuron of the slow twin: its label, and where it has it."""

    label: str
    site: str
    neuron: int
    in_headlines: bool


Place = tuple[int, SiteReport, int]


def places(sites: Sequence[SiteReport]) -> list[list[Place]]:
    """The places of each neuron: (index of the site, site, neuron). The units of the site decide which are one."""
    found: dict[object, list[Place]] = {}
    for index, site in enumerate(sites):
        units: list[object] = []
        for layer, start, stop, step in site.units:
            units += [(layer, unit) for unit in range(start, stop, step)]
        if len(units) != site.neurons:
            units = [(index, neuron) for neuron in range(site.neurons)]
        for neuron, unit in enumerate(units):
            found.setdefault(unit, []).append((index, site, neuron))
    return list(found.values())


def decide(candidates: list[Place], label_of: Mapping[str, Sequence[str]]) -> Neuron:
    """The label of one neuron, from those of its places."""
    inside = [place for place in candidates if place[1].in_headlines]
    best = inside or candidates
    seen = [place for place in best if label_of[place[1].name][place[2]] != "unseen"]
    best = seen or best
    products = [place for place in best if place[1].kind == "gated"] if seen else []
    best = products or best
    first: Place | None = None
    for place in best:
        rank = LABELS.index(label_of[place[1].name][place[2]])
        if first is None or rank < LABELS.index(label_of[first[1].name][first[2]]):
            first = place
    assert first is not None
    _, site, neuron = first
    return Neuron(label_of[site.name][neuron], site.name, neuron, bool(inside))


def twin(sites: Sequence[SiteReport]) -> list[Neuron]:
    """Every neuron of some sites, in the report's window."""
    label_of = {site.name: [LABELS[code] for code in site.judgement.labels()] for site in sites}
    return [decide(candidates, label_of) for candidates in places(sites)]


def twin_turnover(
    sites: Sequence[SiteReport], windows: Sequence[Mapping[str, Sequence[str]]], since: int | None
) -> tuple[int, int]:
    """Deaths and revivals in the windows after a step (``None``: in the last one).

    Args:
        sites: The sites.
        windows: Labels by site, for each window; a site that did not run is missing.
        since: The step.
    """
    deaths = revivals = 0
    for candidates in places(sites):
        if not any(site.in_headlines for _, site, _ in candidates):
            continue
        was_dead: bool | None = None
        for index, ran in enumerate(windows):
            labels = {site.name: ran.get(site.name, ["unseen"] * site.neurons) for _, site, _ in candidates}
            label = decide(candidates, labels).label
            if label in ("unseen", "not finite", "silent"):  # silence is no event: the neuron keeps its state
                continue
            counted = 10 * index > since if since is not None else index == len(windows) - 1
            if counted and was_dead is not None:
                deaths += label == "dead" and not was_dead
                revivals += label != "dead" and was_dead
            was_dead = label == "dead"
    return deaths, revivals


def twin_deaths(sites: Sequence[SiteReport], windows: Sequence[Mapping[str, Sequence[str]]]) -> int:
    """Deaths since the start, place by place: of a neuron, those of the place with the most, products first."""
    total = 0
    for candidates in places(sites):
        inside = [place for place in candidates if place[1].in_headlines]
        products = [place for place in inside if place[1].kind == "gated"]
        total += max((_deaths_at(site.name, at, windows) for _, site, at in products or inside), default=0)
    return total


def _deaths_at(name: str, neuron: int, windows: Sequence[Mapping[str, Sequence[str]]]) -> int:
    """How often one neuron of a site was dead in a window after it had fired since its last death."""
    deaths, fired, dead = 0, False, False
    for ran in windows:
        label = ran[name][neuron] if name in ran else "unseen"
        if label in ("alive", "linear", "dormant", "cut off"):
            fired, dead = True, False
        elif label == "dead" and not dead:
            deaths, dead = deaths + fired, True
    return deaths
