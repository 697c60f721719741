"""Conclude from the γ and β of batch norms how often, and how strongly, the neurons behind them fire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from neuronscope.arrays import BoolArray
from neuronscope.checkpoints.model.batchnorm_step import read_batch_norm, step_before_copies
from neuronscope.checkpoints.model.bounds.batchnorm import (
    firing_share_bound,
    normal_firing_share,
    threshold,
    training_maximum,
)
from neuronscope.checkpoints.model.bounds.propagate import SiteBounds, is_zero_below_zero
from neuronscope.checkpoints.model.traced_graph import Graph, Site
from neuronscope.checkpoints.verdict.evidence import Evidence, evidence_on_site

__all__ = ["batch_norm_parameters", "negligible_neurons"]

_SOURCE = "batch norm"
#: A neuron after a batch norm that fires only above this many standard deviations is quiet; above the second, it is
#: suspected to be dead.
_QUIET, _SUSPECTED = 3.0, 4.0
#: A channel whose output is at most this fraction of its layer's usual scale is negligible, for batches of at most so
#: many values per channel.
_NEGLIGIBLE, _MANY_VALUES = 1e-3, 1_000_000


def batch_norm_parameters(graph: Graph) -> Iterator[Evidence]:
    """Yield what γ and β of batch norms say about the sites behind them that are zero for inputs up to zero."""
    for site in graph.first_calls():
        parameters = _parameters_before(graph, site)
        if parameters is not None and is_zero_below_zero(graph, site):
            yield from _on_site(site, *parameters)


def _on_site(site: Site, scale: Tensor, shift: Tensor) -> Iterator[Evidence]:
    c = threshold(scale, shift)
    evidence = partial(evidence_on_site, site.name, source=_SOURCE)
    yield from evidence(
        c >= _QUIET,
        firing_share_bound(scale, shift),
        claim="quiet",
        basis="inferred",
        measure="share of a training batch in which it fires, at most",
        text=(
            "In training, it fires for at most this share of any batch's values, whatever their distribution "
            "(Cantelli); in evaluation, this holds as far as the running statistics match the data."
        ),
    )
    most = training_maximum(scale, shift.abs(), _MANY_VALUES)
    usual = _usual_scale(scale, shift)
    yield from evidence(
        (most <= _NEGLIGIBLE * usual) & (most > 0),
        most,
        claim="quiet",
        basis="inferred",
        measure="output in training, at most",
        text=(
            f"Negligible: whatever its input is, no value of a training batch of up to {_MANY_VALUES:,} "
            f"values is larger than this, which is less than {_NEGLIGIBLE:g} of the layer's median |γ| + |β| "
            f"({usual:.3g}). In evaluation, this holds as far as the running statistics match the data."
        ),
    )
    yield from evidence(
        c >= _SUSPECTED,
        normal_firing_share(scale, shift),
        claim="dead",
        basis="suspected",
        measure="share of values that fire, if they are normal",
        text=(
            "If its values were normally distributed, it would fire for this share of them, Φ(β/|γ|); this is "
            "inaccurate in the tails."
        ),
    )


def negligible_neurons(
    graph: Graph, bounds: Mapping[str, SiteBounds], scope: str, judged: Mapping[str, BoolArray]
) -> Iterator[Evidence]:
    """Yield the neurons after a batch norm whose output is next to nothing for every input.

    Args:
        graph: A traced forward in evaluation mode.
        bounds: The bounds of its sites.
        scope: The inputs that they hold for, to end a clause with.
        judged: The neurons of each site that are judged there, bool ``(N,)``.
    """
    for site in graph.first_calls():
        parameters, found = _parameters_before(graph, site), bounds.get(site.name)
        if parameters is None or found is None:
            continue
        usual = _usual_scale(*parameters)
        yield from evidence_on_site(
            site.name,
            (found.output <= _NEGLIGIBLE * usual) & ~found.dead & judged[site.name],
            found.output,
            source=_SOURCE,
            claim="quiet",
            basis="proved",
            measure="output, at most",
            text=(
                f"Negligible: in evaluation mode its output is never larger than this, {scope}. It is less than "
                f"{_NEGLIGIBLE:g} of the layer's median |γ| + |β| ({usual:.3g})."
            ),
        )


def _parameters_before(graph: Graph, site: Site) -> tuple[Tensor, Tensor] | None:
    """Return γ and β of the one batch norm that is right before every call of a site, both ``(N,)``, or ``None``."""
    found = []
    for call in graph.calls[site.name]:
        norm = read_batch_norm(graph, step_before_copies(graph, call.before))
        if norm is None or norm.scale is None or norm.shift is None or norm.scale.shape != (site.neurons,):
            return None
        found.append((norm.scale, norm.shift))
    same = all(torch.equal(one, first) for pair in found for one, first in zip(pair, found[0], strict=True))
    return found[0] if same else None


def _usual_scale(scale: Tensor, shift: Tensor) -> float:
    """Return the median size of a layer's outputs, by the γ and β of the batch norm before the activation."""
    return float((scale.double().abs() + shift.double().abs()).median())
