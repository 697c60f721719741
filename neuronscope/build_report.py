"""Make a report from a phase's record: choose the window, judge each site, and write the notes for the reader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import torch

import neuronscope
from neuronscope.judge.verdicts import Policy, judge
from neuronscope.report.acts import Act, acts_note
from neuronscope.report.fault import Fault
from neuronscope.report.report import MEANS, POSITIONS, NotMeasured, Report, SiteReport, WindowSpan
from neuronscope.sites import INFERENCE
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.sync import Exchanges
from neuronscope.tally.phase_record import PhaseRecord

__all__ = ["INFERENCE_APART", "MASK_IGNORED", "ONLY_INFERENCE", "UNCALLED", "make_report", "not_measured"]

#: The note of a report on training if forwards without gradients were seen too.
INFERENCE_APART = "Forwards that began without gradients are not counted here, but in phase `inference`."
#: The note of a report that was asked for on training if no other forwards were seen.
ONLY_INFERENCE = "No forward with gradients was seen in training, so this report is on phase `inference`."
#: The note of a report if nobody called the model on observed steps, on a device where a graph may have run it.
UNCALLED = (
    "The model was not called at {} of the observed steps. If a CUDA graph ran it there, that was not counted: capture "
    "a step that is observed, as all are with every_n_steps=1."
)
#: The note of a report if rows of several experts were counted in a forward with a mask.
MASK_IGNORED = "The mask is not applied to the rows that experts are given: their counts include padding."
#: The note of a report that claims no bound because the user, or a callback, says so.
NO_BOUND = (
    "No bound is claimed (`examples=None`): rows that depend on each other, such as the steps of one trajectory, are "
    "no independent examples."
)


def make_report(
    record: PhaseRecord,
    *,
    model: str,
    phase: str,
    step: int,
    policy: Policy,
    unseen: Mapping[str, str],
    exchanges: Exchanges,
    notes: Sequence[str] = (),
    fault: Fault | None = None,
    acts: Sequence[Act] = (),
    checkpoints: Sequence[int] = (),
    series: Mapping[str, tuple[tuple[int, float], ...]] | None = None,
    claims_bounds: bool = True,
) -> Report:
    """Judge a phase and return its report.

    Args:
        record: The counts of the phase.
        model: Class name of the watched model.
        phase: The phase's name.
        step: Number of optimizer steps taken.
        policy: The thresholds.
        unseen: Reasons why something was not measured, by name.
        exchanges: The cost of joining the counts of several ranks.
        notes: What else the report must say; empty ones are left out.
        fault: The error inside Neuronscope that ended the watch, if there was one.
        acts: What was done to neurons, oldest first.
        checkpoints: Steps at which checkpoints were saved, ascending.
        series: What the training logged; see :attr:`neuronscope.report.report.Report.series`.
        claims_bounds: Whether the rows of a forward are independent examples, as far as nothing else is said.

    Returns:
        The report on the newest closed window, in the state at its end. If no window has closed, the report is on
        everything that was counted.
    """
    everything = record.census("all")
    total = record.closed.without(*record.left)
    closed = len(total) > 0
    judged, total = (record.census("last"), total) if closed else (everything, everything)
    window = WindowSpan(
        name="last" if closed else "all",
        first_step=judged.first_step,
        last_step=judged.last_step,
        steps=judged.steps,
        long_enough=judged.examples >= policy.min_examples,
    )
    fault_text = "" if fault is None else str(fault)
    empty = {name: Tally.empty(tally.info, tally.neurons) for name, tally in everything.items()}
    totals = {**empty, **total}  # a site may have run for the first time after the judged window
    sites = tuple(_site(name, judged.get(name), totals[name], record, policy) for name in everything)
    broken_since = [name for name, tally in everything.items() if tally.not_finite > totals[name].not_finite]
    return Report(
        model=model,
        phase=phase,
        global_step=step,
        window=window,
        policy=policy.to_dict(),
        layers=sites,
        not_measured=tuple(NotMeasured(name, reason) for name, reason in unseen.items()),
        notes=(
            *filter(None, (fault_text, *notes, acts_note(acts))),
            *record.notes(),
            *((NO_BOUND,) if judged and not (claims_bounds or judged.examples) else ()),
            *_notes(judged, broken_since),
            *_acting_linear(sites, policy),
            *_exchange_notes(exchanges),
        ),
        fault=fault_text,
        series=series or {},
        checkpoints=tuple(checkpoints),
        versions={each.__name__: each.__version__ for each in (neuronscope, np, torch)},
        acts=tuple(acts),
    )


def not_measured(
    unseen: Mapping[str, str],
    phase: str,
    modules: Iterable[str],
    phases: Mapping[str, Collection[str]],
    wanted: Callable[[str], bool],
) -> dict[str, str]:
    """Add the activation modules that did not run to what was not measured.

    Args:
        unseen: Reasons why something was not measured, by name.
        phase: The phase that the report is on.
        modules: Paths of the watched activation modules.
        phases: In which phases each of them ran, by path.
        wanted: A function that returns whether the site of a given name should be counted.

    Returns:
        All reasons, by name.
    """
    reasons = dict(unseen)
    for path in modules:
        name, ran = path or "(root)", phases.get(path, ())
        if phase in ran or name in reasons or not wanted(name):
            continue
        others = ", ".join(f"`{each}`" for each in ran)
        if not others:
            reasons[name] = (
                "no call of this module was seen in an observed step: the network does not use it, or calls its "
                "`forward` itself"
            )
        elif INFERENCE in ran and phase == "train":
            reasons[name] = f"this module ran without gradients only: see phase {others}"
        else:
            reasons[name] = f"no call of this module was seen in phase `{phase}`: see phase {others}"
    return reasons


def _site(name: str, tally: Tally | None, total: Tally, record: PhaseRecord, policy: Policy) -> SiteReport:
    if tally is None:  # the site did not run in the judged window
        tally = Tally.empty(total.info, total.neurons)
    return SiteReport(
        name=name,
        neurons=tally.neurons,
        not_finite=tally.not_finite,
        **{each: getattr(tally, each) for each in (*POSITIONS, *MEANS)},
        last_active_step=total.last_active_step,
        idle_positions=total.idle_positions,
        judgement=judge(tally, policy),
        history=record.history.for_site(name, tally.neurons),
        **tally.description(),
    )


def _notes(census: Census, broken_since: Collection[str]) -> tuple[str, ...]:
    """Return the notes on NaN, infinity, missing gradients, and several gradients of one output.

    ``broken_since`` names the sites that gave NaN or infinity after the window closed.
    """
    if not census:
        return ("Nothing was observed: no activation was measured in this phase.",)
    notes = []
    broken = [name for name, tally in census.items() if tally.not_finite]
    if broken:
        notes.append(
            f"The network gave NaN or infinite outputs at {len(broken)} of {len(census)} layers, first at {broken[0]}: "
            "it is broken, whatever its percentage of dead neurons is."
        )
    if broken_since:
        notes.append(
            f"After step {census.last_step} the network gave NaN or infinite outputs at {len(broken_since)} of its "
            f"layers, first at {next(iter(broken_since))}: it is broken now, even if it was healthy until then."
        )
    without_gradients = [name for name, tally in census.items() if tally.positions and not tally.gradient_positions]
    if len(without_gradients) == len(census):
        notes.append("No gradients were seen, so neurons are judged by their outputs only.")
    elif without_gradients:
        some = f"{len(without_gradients)} of {len(census)} layers, for example {without_gradients[0]}"
        notes.append(f"No gradients were seen at {some}.")
    again = [name for name, tally in census.items() if tally.gradient_positions > _positions_before(tally, census)]
    if again:
        tally, more = census[again[0]], f" (and {len(again) - 1} more)" if len(again) > 1 else ""
        notes.append(
            f"Gradients came more than once at {again[0]}{more}, in {tally.gradient_positions} positions for "
            f"{tally.positions} of outputs, as with `retain_graph` or a gradient penalty: zero-gradient fractions "
            "there are over all passes."
        )
    return tuple(notes)


def _positions_before(tally: Tally, census: Census) -> int:
    """Return at how many positions the pre-activation of a site was computed, as far as that is known.

    Gradients of a gated product or of a selection are those of the activation before it, and that may run more often:
    in the first step of a recurrent cell, a gate multiplies a state of zeros, which is no product of two layers.

    Args:
        tally: The site.
        census: All sites.
    """
    if tally.kind not in ("gated", "sparse") or not tally.units:
        return tally.positions
    return max(each.positions for each in census.values() if each.units == tally.units)


def _acting_linear(sites: Sequence[SiteReport], policy: Policy) -> tuple[str, ...]:
    """Return the note on layers whose activation bent nothing in the judged window, if there are any."""
    found = [
        site
        for site in sites
        if site.examples >= policy.min_examples
        and site.judgement.linear.any()
        and bool((site.judgement.linear | site.judgement.dead).all())
        and not site.output
    ]
    if not found:
        return ()
    names = ", ".join(site.name for site in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return (f"Every neuron of {names} was always on, or never: the activation bends nothing on this data.",)


def _exchange_notes(exchanges: Exchanges) -> tuple[str, ...]:
    """Return the note on how often the counts of several ranks were joined and what it cost, if they were."""
    if not exchanges.times:
        return ()
    ranks, times, collectives, size, seconds = exchanges
    often = "once" if times == 1 else f"{times} times"
    cost = f"{size / 1e6:.2g} MB each, {collectives} collectives, {seconds:.2g} s in total"
    return (f"Counts of {ranks} ranks were joined {often}: {cost}.",)
