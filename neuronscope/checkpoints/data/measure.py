"""Confirming: what the network's neurons really do over data, and which claims that contradicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.judge.verdicts import rate_bound
from neuronscope.report.report import Report, SiteReport
from neuronscope.scanning import scan

__all__ = ["contradictions", "measure", "measured_evidence"]

_SOURCE = "scan"


def measure(
    model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None = None, **options: Any
) -> tuple[tuple[Evidence, ...], tuple[Abstention, ...], Report]:
    """Run a network over data and say what each neuron did there.

    Args:
        model: The network, with the checkpoint's weights.
        data: Batches, as :func:`neuronscope.scan` takes them.
        loss: ``loss(output, batch)`` → scalar; with it, gradients are seen too.
        **options: As for :func:`neuronscope.scan`.

    Returns:
        Measured evidence, what could not be measured, and the scan's own report.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> _ = net[0].bias.data.copy_(torch.tensor([-9.0, 9.0]))
    >>> [(one.claim, one.neurons.tolist()) for one in measure(net, torch.rand(300, 2))[0]]
    [('dead', [0]), ('alive', [1])]
    """
    report = scan(model, data, loss, **options)
    evidence = tuple(one for site in report.sites for one in measured_evidence(site, report.policy["confidence"]))
    abstentions = tuple(Abstention(_SOURCE, item.name, f"Not measured: {item.reason}.") for item in report.not_measured)
    return evidence, abstentions, report


def measured_evidence(site: SiteReport, confidence: float) -> list[Evidence]:
    """What a scan says of the neurons of one site.

    Args:
        site: The site, as the scan reports it.
        confidence: Of the bound on how often a silent neuron may yet fire.

    Returns:
        At most one piece of evidence for each of *not finite*, *dead*, *no gradient* and *alive*; a neuron that was
        not seen is in none.
    """
    judged = site.judgement
    bound = rate_bound(site.examples, confidence) if site.examples else np.nan
    fires = 1.0 - site.zero_output_fraction
    where = f"over {site.examples:,} examples, {site.positions:,} positions"
    gradients = f" and its gradient at all {site.gradient_positions:,}" if site.gradient_positions else ""
    alive = ~(judged.dead | judged.not_finite | judged.unseen | judged.cut_off)
    said: tuple[tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.float64], str, str], ...] = (
        ("not finite", judged.not_finite, fires * np.nan, "", f"It gave NaN or infinite outputs {where}."),
        (
            "dead",
            judged.dead,
            np.full(site.neurons, bound),
            f"share of examples in which it may yet fire, at most, at {100 * confidence:g} % confidence",
            f"Its output was exactly zero at every position{gradients}, {where}.",
        ),
        (
            "no gradient",
            judged.cut_off,
            fires,
            "share of positions at which it fires",
            f"It fires, and its gradient was exactly zero at every position, {where}.",
        ),
        ("alive", alive, fires, "share of positions at which it fires", f"Counted {where}."),
    )
    evidence = []
    for claim, mask, numbers, unit, text in said:
        at = np.flatnonzero(mask).astype(np.int64)
        if at.size:
            evidence.append(Evidence(site.name, site.neurons, _SOURCE, claim, "measured", at, numbers[at], unit, text))
    return evidence


def contradictions(evidence: Sequence[Evidence]) -> tuple[str, ...]:
    """Claims of death that were called proved, of neurons that were measured alive: each is a fault of ours.

    Args:
        evidence: Of any sources, proved and measured among them.

    Returns:
        One sentence a source and layer; none, as it should be, where proofs hold.
    """
    fired: dict[str, set[int]] = {}
    for one in evidence:
        if one.basis == "measured" and one.claim in ("alive", "no gradient", "not finite"):
            moving = one.neurons[(one.numbers > 0) | np.isnan(one.numbers)]
            fired.setdefault(one.layer, set()).update(moving.tolist())
    faults = []
    for one in evidence:
        if one.basis != "proved" or one.claim != "dead":
            continue
        wrong = sorted(fired.get(one.layer, set()).intersection(one.neurons.tolist()))
        if wrong:
            faults.append(
                f"FAULT OF NEURONSCOPE: {one.source} called {len(wrong)} neurons of {one.layer} proved dead that fired "
                f"on the data (first {wrong[0]}). Either the data lies outside what the proof covers ({one.text}) or "
                "the proof is wrong: please report it with this network."
            )
    return tuple(faults)
