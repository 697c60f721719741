"""Read what Neuronscope's own monitor counted during training. It knows when each neuron died."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from neuronscope.arrays import BoolArray
from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.data.measure import blocked_by_next_layer, counted_evidence, example_count
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.errors import NeuronscopeError, StateError
from neuronscope.judge.symptoms import UNDATED
from neuronscope.judge.verdicts import Policy
from neuronscope.options import WatchOptions
from neuronscope.report.report import Report, SiteReport
from neuronscope.scope import Scope
from neuronscope.tally.phase_record import is_outdated

__all__ = ["examine_records", "recorded_report", "recorded_reports"]

_SOURCE = "monitor record"
#: Exceptions that a damaged record may cause.
_DAMAGED = (NeuronscopeError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def recorded_report(state: Mapping[str, Any]) -> Report | None:
    """Return the report on what a monitor (or a :class:`neuronscope.Scope`) counted in training; ``None`` if nothing.

    Without training it is on the first phase with any counts. The thresholds are the defaults, since none are saved.

    Raises:
        StateError: The state is of something else, or was written by another version.
    """
    inner = state.get("scope", state) if isinstance(state, Mapping) else state
    if is_outdated(inner):
        raise StateError(
            "it was written by an earlier version of Neuronscope, in which a neuron was an index of one call and not a "
            "unit of a layer."
        )
    scope = Scope(nn.ReLU(), WatchOptions())  # the model does not matter: only the state is read
    scope.detach(join=False)
    scope.load_state_dict(inner)
    phases = scope.phases
    if not phases:
        return None
    return scope.report("train" if "train" in phases else phases[0])


def recorded_reports(checkpoint: Checkpoint) -> Iterator[Report | Abstention]:
    """Yield the report of each monitor's record in a checkpoint, or why it has no report."""
    for key, state in checkpoint.records.items():
        try:
            report = recorded_report(state)
        except _DAMAGED as error:
            reason = " ".join(str(error).split())[:300]
            yield Abstention(_SOURCE, "", f"The record {key!r} is damaged, or of another version: {reason}")
            continue
        if report is not None and report.fault:
            yield Abstention(_SOURCE, "", f"The record {key!r} does not cover the whole run: {report.fault}")
        reason = f"The record {key!r} is empty: nothing was counted before the file was written."
        yield report or Abstention(_SOURCE, "", reason)


def examine_records(checkpoint: Checkpoint) -> Iterator[Evidence | Abstention]:
    """Yield the evidence in the monitors' records of a checkpoint."""
    for report in recorded_reports(checkpoint):
        if isinstance(report, Abstention):
            yield report
            continue
        blocked = blocked_by_next_layer(report.layers)
        for site, judged in zip(report.layers, report.totals.stand_ins, strict=True):
            yield from _examine_site(site, report, judged, site.name in blocked)


def _examine_site(site: SiteReport, report: Report, judged: BoolArray, blocked: bool) -> Iterator[Evidence]:
    where = (
        f"over {example_count(site.examples)} of phase {report.phase}, steps {report.window.first_step} to "
        f"{report.window.last_step}"
    )
    since = np.where(site.last_active_step < 0, -1, site.history.died_step)
    policy = Policy(**report.policy)
    for one in counted_evidence(site, policy, source=_SOURCE, where=where, judged=judged, blocked=blocked, since=since):
        if one.claim == "no gradient":
            positions = np.full(one.neurons.shape, float(site.gradient_positions))
            yield replace(one, numbers=positions, measure="positions at which its gradient was zero")
        elif one.claim == "alive":
            revived = site.history.revived_step[one.neurons]
            yield replace(one, since=np.where(revived < 0, UNDATED, revived))
        else:
            yield one
