"""Examine a checkpoint alone, with neither model nor data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.compare_checkpoints import GradientsBetween, compare_with_earlier
from neuronscope.checkpoints.file.layer_clocks import ClockReader, LayerClock
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer, find_layers
from neuronscope.checkpoints.file.merged_weights import merged_weights
from neuronscope.checkpoints.file.monitor_record import examine_records
from neuronscope.checkpoints.file.parameter_matching import match_parameters
from neuronscope.checkpoints.file.weights import examine_weights, hint_evidence
from neuronscope.checkpoints.file.zero_gradient_rows import LayerGradients, find_no_gradient_causes
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.errors import CheckpointError

__all__ = ["examine_file"]

#: Of fewer running means, none may be negative by chance.
_MANY_MEANS = 8


def examine_file(
    checkpoint: Checkpoint,
    *,
    parameter_names: Sequence[str] | None = None,
    earlier: Checkpoint | None = None,
    on_compared: Callable[[GradientsBetween], None] | None = None,
    linear: Collection[str] = (),
) -> tuple[list[Evidence], list[Abstention]]:
    """Examine a checkpoint's records, weights and optimizers; return the evidence, and what could not be examined.

    Args:
        checkpoint: The opened checkpoint.
        parameter_names: Names of ``model.named_parameters()`` in order, if the model is known. With them, more entries
            of the optimizer's state can be matched to parameters.
        earlier: An earlier checkpoint of the same run.
        on_compared: Called for each layer that could be compared with the earlier checkpoint.
        linear: Paths of layers that no activation follows, if the model is known.
    """
    layers = find_layers(checkpoint.tensors)
    tensors = dict(checkpoint.tensors)
    with contextlib.suppress(CheckpointError):  # of adapters that are not understood, the stored weights are examined
        for one in merged_weights(checkpoint):
            if one.stored.endswith(("_orig", "weight")):  # else only a positive factor differs from row to row
                tensors[one.stored] = one.tensor
    found: list[Evidence | Abstention] = [*examine_records(checkpoint), *examine_weights(tensors, layers)]
    if checkpoint.optimizers:
        found += _examine_optimizers(checkpoint, layers, parameter_names, earlier, on_compared, linear)
    else:
        reason = "The file holds no optimizer state, so past gradients are not known."
        found.append(Abstention("optimizer state", "", reason))
        if not checkpoint.records:
            found += hint_evidence(checkpoint, layers)
    evidence = [one for one in found if isinstance(one, Evidence)]
    return evidence, [one for one in found if isinstance(one, Abstention)]


def _examine_optimizers(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    parameter_names: Sequence[str] | None,
    earlier: Checkpoint | None,
    on_compared: Callable[[GradientsBetween], None] | None,
    linear: Collection[str],
) -> Iterator[Evidence | Abstention]:
    """Yield which neurons got no gradient, by the state of the optimizers."""
    states, abstentions = match_parameters(checkpoint, parameter_names)
    yield from abstentions
    readings = list(ClockReader(checkpoint, states).read(layers))
    clocks = {reading.layer.path: reading for reading in readings if isinstance(reading, LayerClock)}
    causes = find_no_gradient_causes(layers, clocks, linear, dict(_behind_activation(checkpoint, layers)))
    compared: dict[str, GradientsBetween] = {}
    if earlier is not None:
        of_neurons = [clock for clock in clocks.values() if clock.layer.kind in NEURON_KINDS]
        for one in compare_with_earlier(earlier, checkpoint, layers, states, of_neurons, parameter_names):
            if not isinstance(one, GradientsBetween):
                yield one
                continue
            compared[one.layer] = one
            if on_compared is not None:
                on_compared(one)
    for reading in readings:
        if isinstance(reading, Abstention):
            yield reading
        elif reading.layer.kind in NEURON_KINDS:
            for found in LayerGradients(reading, causes.get(reading.layer.path)).evidence():
                left = _without_living(found, compared.get(reading.layer.path))
                if isinstance(left, Abstention) or left.neurons.size:
                    yield left


def _behind_activation(checkpoint: Checkpoint, layers: Sequence[Layer]) -> Iterator[tuple[str, bool]]:
    """Yield the path of each batch norm, and whether an activation lies before it, as its running means show.

    Behind a ReLU no mean is negative. Of a layer's own outputs some are, unless there are few.
    """
    for layer in layers:
        statistics = checkpoint.tensors.get(f"{layer.weight.removesuffix('weight')}running_mean")
        if layer.kind == "norm" and statistics is not None and layer.width >= _MANY_MEANS:
            means = statistics.read()
            if means.any():
                yield layer.path, bool((means >= 0).all())


def _without_living(found: Evidence | Abstention, compared: GradientsBetween | None) -> Evidence | Abstention:
    """Return a clock's claim without the neurons that are known to have got a gradient within a pause."""
    if isinstance(found, Abstention) or found.claim != "no gradient" or compared is None or not compared.short:
        return found
    kept = ~np.isin(found.neurons, np.flatnonzero(compared.some.numpy()))
    since = None if found.since is None else found.since[kept]
    return replace(found, neurons=found.neurons[kept], numbers=found.numbers[kept], since=since)
