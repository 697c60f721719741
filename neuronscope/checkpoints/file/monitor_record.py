"""Record: what the run's own monitor counted, where the run was watched. It knows when each neuron died."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.data.measure import blocked_by_next_layer, independent_examples, zero_count_basis
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.errors import NeuronscopeError
from neuronscope.judge.verdicts import Policy, rate_bound
from neuronscope.options import WatchOptions
from neuronscope.report.report import Report, SiteReport
from neuronscope.scope import Scope

__all__ = ["examine_records", "recorded_report", "recorded_reports"]

_SOURCE = "monitor record"
#: What reading a damaged record may raise.
_DAMAGED = (
    NeuronscopeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def recorded_report(state: Mapping[str, Any]) -> Report | None:
    """The report of what a monitor counted: of training, else of the first phase of which it counted anything.

    The thresholds are the default ones; a monitor does not save its own.

    Args:
        state: A monitor's state, or that of a :class:`neuronscope.Scope`.

    Returns:
        The report, or ``None`` where nothing was counted.

    Raises:
        StateError: The state is neither, or of a later version.
    """
    inner = state.get("scope", state) if isinstance(state, Mapping) else state
    scope = Scope(nn.ReLU(), WatchOptions())  # what it watches does not matter: it reads its own state back
    scope.detach(join=False)
    scope.load_state_dict(inner)
    phases = scope.phases
    if not phases:
        return None
    return scope.report("train" if "train" in phases else phases[0])


def recorded_reports(checkpoint: Checkpoint) -> Iterator[Report | Abstention]:
    """The reports of the monitors' records in a checkpoint, and why a record gives none.

    Args:
        checkpoint: What the file holds.
    """
    for key, state in checkpoint.records.items():
        try:
            report = recorded_report(state)
        except _DAMAGED as error:
            yield _damaged(key, error)
            continue
        if report is not None and report.fault:
            yield Abstention(_SOURCE, "", f"The record {key!r} is not of the whole run: {report.fault}")
        yield report or Abstention(
            _SOURCE, "", f"The record {key!r} is empty: nothing was counted before the file was written."
        )


def examine_records(checkpoint: Checkpoint) -> Iterator[Evidence | Abstention]:
    """What the monitors' records in a checkpoint say.

    Args:
        checkpoint: What the file holds.
    """
    for report in recorded_reports(checkpoint):
        if isinstance(report, Abstention):
            yield report
            continue
        cut_off = blocked_by_next_layer(report.layers)
        for site in report.layers:
            yield from _site(site, report, site.name in cut_off)


def _damaged(key: str, error: BaseException) -> Abstention:
    reason = " ".join(str(error).split())[:300]
    return Abstention(_SOURCE, "", f"The record {key!r} is damaged, or of another version: {reason}")


def _site(site: SiteReport, report: Report, cut_off: bool) -> Iterator[Evidence]:
    judged, policy = site.judgement, Policy(**report.policy)
    bound = rate_bound(independent_examples(site), policy.confidence)
    born = site.last_active_step < 0
    when = (
        f"over {site.examples} examples of phase {report.phase}, steps {report.window.first_step} to "
        f"{report.window.last_step}"
    )
    if judged.not_finite.any():
        yield _of(
            site,
            "not finite",
            judged.not_finite,
            np.full(site.neurons, np.nan),
            "",
            f"NaN or infinite outputs were counted {when}.",
        )
    if judged.dead.any():
        basis, few = zero_count_basis(independent_examples(site), policy)
        yield _of(
            site,
            "dead",
            judged.dead,
            np.full(site.neurons, bound),
            f"share of examples it may still fire in, at {policy.confidence:.0%} confidence",
            f"Zero output{' and zero gradient' if site.gradient_positions else ''} at every one of {site.positions} "
            f"positions, counted {when}.{few}",
            since=np.where(born, -1, site.history.died_step),
            basis=basis,
        )
    if judged.cut_off.any():
        basis, few = zero_count_basis(independent_examples(site, site.gradient_positions), policy, "Without gradient")
        stops = " The next layer passes none back, which says nothing of these neurons themselves." if cut_off else ""
        yield _of(
            site,
            "no gradient",
            judged.cut_off,
            np.full(site.neurons, float(site.gradient_positions)),
            "positions at which its gradient was zero",
            f"It fires, and its gradient was zero at every position, counted {when}.{few}{stops}",
            basis=basis,
            whole_layer=cut_off,
        )
    alive = ~(judged.dead | judged.not_finite | judged.unseen | judged.cut_off)
    if alive.any():
        yield _of(
            site,
            "alive",
            alive,
            1.0 - site.zero_output_fraction,
            "share of positions at which it fired",
            f"It fired, or got a gradient, counted {when}.",
        )


def _of(
    site: SiteReport,
    claim: str,
    mask: npt.NDArray[np.bool_],
    numbers: npt.NDArray[np.float64],
    measure: str,
    text: str,
    *,
    since: npt.NDArray[np.int64] | None = None,
    basis: str = "measured",
    whole_layer: bool = False,
) -> Evidence:
    neurons = np.flatnonzero(mask).astype(np.int64)
    return Evidence(
        layer=site.name,
        width=site.neurons,
        source=_SOURCE,
        claim=claim,
        basis=basis,
        neurons=neurons,
        numbers=numbers[neurons],
        measure=measure,
        text=text,
        since=None if since is None else since[neurons],
        whole_layer=whole_layer,
    )
