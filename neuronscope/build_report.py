"""From a phase's record to a report: which window is judged, what each site earned, and what a reader should know."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import torch

import neuronscope
from neuronscope.judge.verdicts import Policy, judge
from neuronscope.report.fault import Fault
from neuronscope.report.report import NotMeasured, Report, SiteReport, WindowSpan
from neuronscope.sites import SiteKey
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.sync import Exchanges
from neuronscope.tally.phase_record import PhaseRecord

__all__ = ["make_report", "not_measured"]


def make_report(
    record: PhaseRecord,
    *,
    model: str,
    phase: str,
    step: int,
    policy: Policy,
    unseen: Mapping[str, str],
    exchanges: Exchanges,
    fault: Fault | None = None,
) -> Report:
    """Judge a phase.

    Args:
        record: What was counted.
        model: Class name of the watched model.
        phase: The phase's name.
        step: Optimizer steps taken.
        policy: The thresholds.
        unseen: What could not be seen, name → reason.
        exchanges: What joining the counts of several ranks has cost.
        fault: What ended the watch, if a fault of ours did.

    Returns:
        The report, of the newest closed window, as things stood when it closed; of everything where none has closed.
    """
    everything = record.census("all")
    closed = len(record.closed) > 0
    judged, until_then = (record.last, record.closed) if closed else (everything, everything)
    window = WindowSpan(
        name="last" if closed else "all",
        first_step=judged.first_step,
        last_step=judged.last_step,
        steps=judged.steps,
        long_enough=judged.examples >= policy.min_examples,
    )
    said = "" if fault is None else str(fault)
    nothing = {name: Tally.empty(tally.info, tally.neurons) for name, tally in everything.items()}
    seen = {**nothing, **until_then}  # a site may have run since, or not in the window that is judged
    sites = tuple(_site(name, judged.get(name), seen[name], record, policy) for name in everything)
    broken_since = [name for name, tally in everything.items() if tally.not_finite > seen[name].not_finite]
    return Report(
        model=model,
        phase=phase,
        global_step=step,
        window=window,
        policy=policy.to_dict(),
        layers=sites,
        not_measured=tuple(NotMeasured(name, reason) for name, reason in unseen.items()),
        notes=(*([said] if said else []), *_notes(judged, broken_since), *_joining(exchanges)),
        fault=said,
        versions={
            "neuronscope": neuronscope.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )


def not_measured(
    unseen: Mapping[str, str], modules: Iterable[str], record: PhaseRecord, wants: Callable[[str], bool]
) -> dict[str, str]:
    """Return what could not be seen with the reasons, activation modules of which nothing was heard included.

    Args:
        unseen: What is known not to be seen, name → reason.
        modules: Paths of the activation modules that are watched.
        record: What was counted.
        wants: Says whether the site of a name is to be counted.
    """
    found = dict(unseen)
    ran = {key.path for key in record.site_keys() if not key.function}
    for path in modules:
        name = SiteKey(path, "", 0, False).name
        if path not in ran and name not in found and wants(name):
            found[name] = "this module did not run while it was watched"
    return found


def _site(name: str, tally: Tally | None, until_then: Tally, record: PhaseRecord, policy: Policy) -> SiteReport:
    if tally is None:
        tally = Tally.empty(until_then.info, until_then.neurons)
    return SiteReport(
        name=name,
        activation=tally.activation,
        kind=tally.kind,
        neurons=tally.neurons,
        axis=tally.axis,
        axis_source=tally.axis_source,
        positions=tally.positions,
        gradient_positions=tally.gradient_positions,
        examples=tally.examples,
        not_finite=tally.not_finite,
        zero_output_fraction=tally.zero_output_fraction,
        zero_gradient_fraction=tally.zero_gradient_fraction,
        mean_abs_output=tally.mean_abs_output,
        last_active_step=until_then.last_active_step,
        judgement=judge(tally, policy),
        history=record.history.of(name, tally.neurons),
    )


def _notes(census: Census, broken_since: Collection[str]) -> tuple[str, ...]:
    """What a reader should know.

    Args:
        census: The window that is judged.
        broken_since: Sites that gave NaN or infinity after it closed.
    """
    notes = []
    if not census:
        notes.append("Nothing was observed: no activation was measured in this phase.")
        return tuple(notes)
    broken = [name for name, tally in census.items() if tally.not_finite]
    if broken:
        notes.append(
            f"The network gave NaN or infinite outputs at {len(broken)} of {len(census)} sites, first at {broken[0]}: "
            "it is broken, whatever its share of dead neurons."
        )
    if broken_since:
        notes.append(
            f"After step {census.last_step} the network gave NaN or infinite outputs at {len(broken_since)} of its "
            f"sites, first at {next(iter(broken_since))}: it is broken now, whatever it was until then."
        )
    blind = [name for name, tally in census.items() if tally.positions and not tally.gradient_positions]
    if len(blind) == len(census):
        notes.append("No gradients were seen: neurons are judged by their outputs alone.")
    elif blind:
        notes.append(f"No gradients were seen at {len(blind)} of {len(census)} sites, {blind[0]} among them.")
    return tuple(notes)


def _joining(exchanges: Exchanges) -> tuple[str, ...]:
    if not exchanges.times:
        return ()
    ranks, times, collectives, size, seconds = exchanges
    often = "once" if times == 1 else f"{times} times"
    cost = f"{size / 1e6:.2g} MB each, {collectives} collectives, {seconds:.2g} s in all"
    return (f"Counts of {ranks} ranks were joined {often}: {cost}.",)
