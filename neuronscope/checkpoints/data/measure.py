"""Confirming: what the network's neurons really do over data, and which claims that contradicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.judge.verdicts import Policy, rate_bound
from neuronscope.report.report import Report, SiteReport
from neuronscope.scanning import scan

__all__ = [
    "blocked_by_next_layer",
    "contradictions",
    "independent_examples",
    "measure",
    "measured_evidence",
    "zero_count_basis",
]

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
    policy, cut_off = Policy(**report.policy), blocked_by_next_layer(report.layers)
    evidence = tuple(
        one for site in report.layers for one in measured_evidence(site, policy, whole_layer=site.name in cut_off)
    )
    abstentions = tuple(Abstention(_SOURCE, item.name, f"Not measured: {item.reason}.") for item in report.not_measured)
    return evidence, abstentions, report


def independent_examples(site: SiteReport, positions: int | None = None) -> int:
    """Count the independent examples behind a site's silence: no more than the positions that were seen.

    Args:
        site: The site.
        positions: Positions behind the claim; those at which the output was seen where it is left out.
    """
    return min(site.examples, site.positions if positions is None else positions)


def zero_count_basis(examples: int, policy: Policy, what: str = "Silent") -> tuple[str, str]:
    """Return the basis of a claim that rests on silence, and a sentence on it where the examples are too few.

    One example shows that a neuron fires; only many show that it does not.

    Args:
        examples: Independent examples.
        policy: Says how many are enough.
        what: What the neurons are on them, to begin the sentence with.
    """
    if examples >= policy.min_examples:
        return "measured", ""
    seen = f"{examples:,} example{'' if examples == 1 else 's'}"
    return (
        "suspected",
        (
            f" {what} on {seen} only: fewer than the {policy.min_examples:,} that it takes to say that this is so in "
            f"all but {100 * policy.max_rate:g} % of examples."
        ),
    )


def blocked_by_next_layer(sites: Sequence[SiteReport]) -> set[str]:
    """Find the sites that get no gradient as a whole because the next one passes none back.

    Of several such sites in a row the last is where the gradient stops; those before it may be as healthy as any.

    Args:
        sites: In the order in which they run.

    Returns:
        Names of sites.
    """
    stopped = []
    for site in sites:
        judged = site.judgement
        stopped.append(bool(site.gradient_positions) and bool((judged.dead | judged.cut_off).all()))
    return {site.name for site, here, after in zip(sites, stopped, stopped[1:], strict=False) if here and after}


def measured_evidence(site: SiteReport, policy: Policy, *, whole_layer: bool = False) -> list[Evidence]:
    """What a scan says of the neurons of one site.

    Args:
        site: The site, as the scan reports it.
        policy: How many examples are enough, and the confidence of the bound on how often a silent neuron may yet fire.
        whole_layer: Whether the site gets no gradient only because of the next; see :func:`blocked_by_next_layer`.

    Returns:
        At most one piece of evidence for each of *not finite*, *dead*, *no gradient* and *alive*; a neuron that was
        not seen is in none. What rests on silence on too few examples is only suspected.
    """
    judged = site.judgement
    examples = independent_examples(site)
    bound = rate_bound(examples, policy.confidence) if examples else np.nan
    fires = 1.0 - site.zero_output_fraction
    where = f"over {site.examples:,} examples, {site.positions:,} positions"
    gradients = f" and its gradient at all {site.gradient_positions:,}" if site.gradient_positions else ""
    alive = ~(judged.dead | judged.not_finite | judged.unseen | judged.cut_off)
    silent, few = zero_count_basis(examples, policy)
    stopped, few_gradients = zero_count_basis(
        independent_examples(site, site.gradient_positions), policy, "Without gradient"
    )
    stops = " The next layer passes none back, which says nothing of these neurons themselves." if whole_layer else ""
    said: tuple[tuple[str, str, npt.NDArray[np.bool_], npt.NDArray[np.float64], str, str], ...] = (
        ("not finite", "measured", judged.not_finite, fires * np.nan, "", f"It gave NaN or infinite outputs {where}."),
        (
            "dead",
            silent,
            judged.dead,
            np.full(site.neurons, bound),
            f"share of examples in which it may yet fire, at most, at {100 * policy.confidence:g} % confidence",
            f"Its output was exactly zero at every position{gradients}, {where}.{few}",
        ),
        (
            "no gradient",
            stopped,
            judged.cut_off,
            fires,
            "share of positions at which it fires",
            f"It fires, and its gradient was exactly zero at every position, {where}.{few_gradients}{stops}",
        ),
        ("alive", "measured", alive, fires, "share of positions at which it fires", f"Counted {where}."),
    )
    evidence = []
    for claim, basis, mask, numbers, unit, text in said:
        at = np.flatnonzero(mask).astype(np.int64)
        if at.size:
            whole = whole_layer and claim == "no gradient"
            evidence.append(
                Evidence(site.name, site.neurons, _SOURCE, claim, basis, at, numbers[at], unit, text, whole_layer=whole)
            )
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
