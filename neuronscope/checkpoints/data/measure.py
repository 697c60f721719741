"""Measure a network's neurons and its inputs on data, and check which claims the measurement contradicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuronscope.arrays import BoolArray, IntArray
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence, evidence_on_site
from neuronscope.judge.verdicts import Policy, rate_bound
from neuronscope.report.report import Report, SiteReport
from neuronscope.scanning import scan
from neuronscope.writers.formatting import plural

__all__ = ["InputMoments", "blocked_by_next_layer", "contradictions", "counted_evidence", "example_count", "measure"]

_SOURCE = "scan"


def measure(
    model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None = None
) -> tuple[tuple[Evidence, ...], tuple[Abstention, ...], Report]:
    """Run a network on data; return the measured evidence, what could not be measured, and the scan's own report.

    Args:
        model: The network, with the checkpoint's weights.
        data: Batches, as :func:`neuronscope.scan` takes them.
        loss: ``loss(output, batch)`` → scalar tensor; with it, gradients are counted too.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> _ = net[0].bias.data.copy_(torch.tensor([-9.0, 9.0]))
    >>> [(one.claim, one.neurons.tolist()) for one in measure(net, torch.rand(300, 2))[0]]
    [('dead', [0]), ('alive', [1])]
    """
    report = scan(model, data, loss)
    policy, blocked = Policy(**report.policy), blocked_by_next_layer(report.layers)
    evidence: list[Evidence] = []
    for site, judged in zip(report.layers, report.totals.stand_ins, strict=True):
        where = f"over {example_count(site.examples)}, {site.positions:,} positions"
        evidence += counted_evidence(
            site, policy, source=_SOURCE, where=where, judged=judged, blocked=site.name in blocked
        )
    abstentions = tuple(Abstention(_SOURCE, item.name, f"Not measured: {item.reason}.") for item in report.not_measured)
    return tuple(evidence), abstentions, report


def blocked_by_next_layer(sites: Sequence[SiteReport]) -> set[str]:
    """Return the names of sites, in order, that get no gradient because the next one passes none back.

    In a row of such sites the gradient stops at the last one; the neurons of those before it may be healthy.
    """
    stopped = []
    for site in sites:
        judged = site.judgement
        stopped.append(bool(site.gradient_positions) and bool((judged.dead | judged.cut_off).all()))
    return {site.name for site, here, next_ in zip(sites, stopped, stopped[1:], strict=False) if here and next_}


def counted_evidence(
    site: SiteReport,
    policy: Policy,
    *,
    source: str,
    where: str,
    judged: BoolArray | None = None,
    blocked: bool = False,
    since: IntArray | None = None,
) -> Iterator[Evidence]:
    """Yield what exact counts show about the ``N`` neurons of one site; a claim on too few examples is only suspected.

    Each of *not finite*, *dead*, *silent*, *no gradient* and *alive* comes once at most, for neurons that were seen.

    Args:
        site: The counts, with the judgement on each neuron.
        policy: How many examples are enough, and the confidence of the bound on how often a dead neuron may still fire.
        source: Who counted.
        where: What was counted, to end a sentence with: ``over 300 examples``.
        judged: The neurons to judge, bool ``(N,)``; ``None`` = all.
        blocked: Whether the site gets no gradient only because of the next one; see :func:`blocked_by_next_layer`.
        since: The step at which each neuron died, int64 ``(N,)``; ``None`` = not known.
    """
    judgement = site.judgement
    examples = min(site.examples, site.positions)  # no more examples are independent than positions were seen
    bound = rate_bound(examples, policy.confidence) if examples else np.nan
    may_fire = f"share of examples in which it may still fire, at most, at {100 * policy.confidence:g} % confidence"
    fires = 1.0 - site.zero_output_fraction
    gradients = f" and its gradient at all {site.gradient_positions:,}" if site.gradient_positions else ""
    alive = ~(judgement.dead | judgement.silent | judgement.not_finite | judgement.unseen | judgement.cut_off)
    dead_basis, few = _basis_of_zeros(examples, policy, "Silent")
    gradient_examples = min(site.examples, site.gradient_positions)
    gradient_basis, few_gradients = _basis_of_zeros(gradient_examples, policy, "Without gradient")
    reason = " The next layer passes none back, which says nothing about these neurons themselves." if blocked else ""
    fires_at = "share of positions at which it fires"
    evidence = partial(evidence_on_site, site.name, source=source)
    zeros: dict[str, Any] = {"numbers": np.full(site.neurons, bound), "basis": dead_basis, "measure": may_fire}
    every = np.ones(site.neurons, dtype=np.bool_) if judged is None else judged
    text = f"Its output was NaN or infinite, {where}."
    yield from evidence(judgement.not_finite & every, claim="not finite", basis="measured", text=text)
    text = f"Its output was exactly zero at every position{gradients}, {where}.{few}"
    yield from evidence(judgement.dead & every, claim="dead", text=text, since=since, **zeros)
    text = f"Its output was exactly zero at every position, but it got a gradient at some of them, {where}.{few}"
    yield from evidence(judgement.silent & every, claim="silent", text=text, **zeros)
    yield from evidence(
        judgement.cut_off & every,
        fires,
        claim="no gradient",
        basis=gradient_basis,
        measure=fires_at,
        text=f"It fires, and its gradient was exactly zero at every position, {where}.{few_gradients}{reason}",
        whole_layer=blocked,
    )
    text = f"It fired, or got a gradient, {where}."
    yield from evidence(alive & every, fires, claim="alive", basis="measured", measure=fires_at, text=text)


def example_count(examples: int) -> str:
    """Say how many examples there were.

    >>> example_count(1200), example_count(0)
    ('1,200 examples', 'an unknown number of examples')
    """
    return f"{examples:,} examples" if examples else "an unknown number of examples"


def _basis_of_zeros(examples: int, policy: Policy, observed: str) -> tuple[str, str]:
    """Return the basis of a claim that rests on zeros alone, and a sentence if there are too few examples.

    One example shows that a neuron fires; only many show that it does not. ``observed`` begins the sentence.
    """
    if examples >= policy.min_examples:
        return "measured", ""
    if not examples:
        return "suspected", " The number of independent examples is not known, so no bound is claimed."
    few = (
        f" {observed} on {plural(examples, 'example')} only: fewer than the {policy.min_examples:,} that are needed to "
        f"conclude this for all but {100 * policy.max_rate:g} % of examples."
    )
    return "suspected", few


def contradictions(evidence: Sequence[Evidence]) -> tuple[str, ...]:
    """Return a sentence for each proof of death that data refutes: a fault of Neuronscope, or data outside the box."""
    fired: dict[str, set[int]] = {}
    for one in evidence:
        # What a monitor recorded is older: a neuron that fired then may have died in the last steps.
        if one.source == _SOURCE and one.basis == "measured" and one.claim in ("alive", "no gradient", "not finite"):
            moving = one.neurons[(one.numbers > 0) | np.isnan(one.numbers)]
            fired.setdefault(one.layer, set()).update(moving.tolist())
    faults = []
    for one in evidence:
        if one.basis != "proved" or one.claim != "dead":
            continue
        wrong = sorted(fired.get(one.layer, set()).intersection(one.neurons.tolist()))
        if wrong:
            faults.append(
                f"FAULT OF NEURONSCOPE: {one.source} called {plural(len(wrong), 'neuron')} of {one.layer} proved dead "
                f"that fired on the data (first {wrong[0]}). Either the data lies outside what the proof covers "
                f"({one.text}) or the proof is wrong: please report it with this network."
            )
    return tuple(faults)


class InputMoments:
    """Mean and standard deviation of each feature of the first tensor ``(B, …)`` in each batch, over all examples.

    >>> moments = InputMoments()
    >>> moments.add(torch.tensor([[3.0, 9.0], [5.0, 11.0]]))
    >>> moments.offset()  # means 4 and 10, deviations 1 and 1: √116 / √2
    7.61577310586390...
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None
        self._count = 0

    def add(self, batch: Any) -> None:
        """Add a batch: a tensor ``(B, …)``, a tuple or list that begins with one, or a mapping that contains one.

        Skip it if its input is not floating-point or has another shape than the first batch's.
        """
        tensor = batch
        if isinstance(batch, Mapping):
            tensor = next((value for value in batch.values() if isinstance(value, Tensor)), None)
        elif isinstance(batch, (tuple, list)):
            tensor = batch[0] if batch else None
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
            return
        values = tensor.detach().to("cpu", torch.float64)
        if self._sum is None or self._squares is None:
            self._sum, self._squares = torch.zeros_like(values[0]), torch.zeros_like(values[0])
        if values.shape[1:] != self._sum.shape:
            return
        self._sum += values.sum(dim=0)
        self._squares += (values * values).sum(dim=0)
        self._count += len(values)

    def offset(self) -> float | None:
        """Return ‖mean‖ / ‖standard deviation‖ over the features; ``None`` without batches, or if it is not finite."""
        if self._sum is None or self._squares is None or not self._count:
            return None
        mean = self._sum / self._count
        spread = (self._squares / self._count - mean * mean).clamp(min=0.0).sum().sqrt()
        offset = float(mean.norm() / spread)
        return offset if math.isfinite(offset) else None
