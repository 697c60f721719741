"""Record: what the run's own monitor counted, where the run was watched. It knows when each neuron died."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.errors import NeuronscopeError
from neuronscope.judge.verdicts import rate_bound
from neuronscope.report.report import Report, SiteReport
from neuronscope.scope import Scope

__all__ = ["examine_records", "recorded_report"]

_SOURCE = "monitor record"


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
    scope = Scope(nn.ReLU(), every_n_steps=1)  # what it watches does not matter: it reads its own state back
    scope.detach(join=False)
    scope.load_state_dict(inner)
    phases = scope.phases
    if not phases:
        return None
    return scope.report("train" if "train" in phases else phases[0])


def examine_records(checkpoint: Checkpoint) -> Iterator[Evidence | Abstention]:
    """What the monitors' records in a checkpoint say.

    Args:
        checkpoint: What the file holds.
    """
    for key, state in checkpoint.records.items():
        try:
            report = recorded_report(state)
            found = [] if report is None else [piece for site in report.sites for piece in _site(site, report)]
        except (
            NeuronscopeError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split())[:300]
            yield Abstention(_SOURCE, "", f"The record {key!r} is damaged, or of another version: {reason}")
            continue
        if report is None:
            yield Abstention(
                _SOURCE, "", f"The record {key!r} is empty: nothing was counted before the file was written."
            )
        elif report.fault:
            yield Abstention(_SOURCE, "", f"The record {key!r} is not of the whole run: {report.fault}")
        yield from found


def _site(site: SiteReport, report: Report) -> Iterator[Evidence]:
    judged = site.judgement
    bound = rate_bound(site.examples, report.policy["confidence"])
    born = site.last_active_step < 0
    when = (
        f"over {site.examples} examples of phase {report.phase}, steps {report.window.first_step} to "
        f"{report.window.last_step}"
    )
    short = "" if report.window.long_enough else " These are too few examples to be sure."
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
        yield _of(
            site,
            "dead",
            judged.dead,
            np.full(site.neurons, bound),
            f"share of examples it may still fire in, at {report.policy['confidence']:.0%} confidence",
            f"Zero output{' and zero gradient' if site.gradient_positions else ''} at every one of {site.positions} "
            f"positions, counted {when}.{short}",
            np.where(born, -1, site.history.died_step),
        )
    if judged.cut_off.any():
        yield _of(
            site,
            "no gradient",
            judged.cut_off,
            np.full(site.neurons, float(site.gradient_positions)),
            "positions at which its gradient was zero",
            f"It fires, and its gradient was zero at every position, counted {when}.{short}",
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
    since: npt.NDArray[np.int64] | None = None,
) -> Evidence:
    neurons = np.flatnonzero(mask).astype(np.int64)
    return Evidence(
        layer=site.name,
        width=site.neurons,
        source=_SOURCE,
        claim=claim,
        basis="measured",
        neurons=neurons,
        numbers=numbers[neurons],
        measure=measure,
        text=text,
        since=None if since is None else since[neurons],
    )
