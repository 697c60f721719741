"""The file alone: everything that a checkpoint says of its neurons with neither model nor data."""

from __future__ import annotations

from collections.abc import Sequence

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.collapse import find_no_gradient_causes
from neuronscope.checkpoints.file.compare_checkpoints import compare_with_earlier
from neuronscope.checkpoints.file.layer_clocks import LayerClock, read_clocks
from neuronscope.checkpoints.file.layers import NEURON_KINDS, find_layers
from neuronscope.checkpoints.file.monitor_record import examine_records
from neuronscope.checkpoints.file.parameter_matching import match_parameters
from neuronscope.checkpoints.file.weights import examine_weights
from neuronscope.checkpoints.file.zero_gradient_rows import zero_gradient_evidence
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence

__all__ = ["examine_file"]


def examine_file(
    checkpoint: Checkpoint, *, parameter_names: Sequence[str] | None = None, earlier: Checkpoint | None = None
) -> tuple[list[Evidence], list[Abstention]]:
    """Examine a checkpoint with what it holds itself: a monitor's record, the optimizer's state, the weights.

    Args:
        checkpoint: What the file holds.
        parameter_names: Names of ``model.named_parameters()``, in order, where the model is known: then the entries of
            an optimizer's state are tied to parameters more surely.
        earlier: An earlier checkpoint of the same run.

    Returns:
        The evidence, and what could not be said.
    """
    layers = find_layers(checkpoint.tensors)
    found: list[Evidence | Abstention] = [*examine_records(checkpoint), *examine_weights(checkpoint.tensors, layers)]
    if checkpoint.optimizers:
        owners = match_parameters(checkpoint.tensors, checkpoint.optimizers, parameter_names)
        found += owners.abstentions
        clocks = list(read_clocks(checkpoint, layers, owners.states))
        read = [clock for clock in clocks if isinstance(clock, LayerClock)]
        causes = find_no_gradient_causes(layers, read)
        for clock in clocks:
            if isinstance(clock, Abstention):
                found.append(clock)
            elif clock.layer.kind in NEURON_KINDS:
                found += zero_gradient_evidence(clock, causes.get(clock.layer.path))
        if earlier is not None:
            read = [clock for clock in read if clock.layer.kind in NEURON_KINDS]
            found += compare_with_earlier(earlier, checkpoint, layers, owners.states, read, parameter_names)
    else:
        found.append(
            Abstention("optimizer state", "", "The file holds no optimizer's state, hence nothing of past gradients.")
        )
    evidence = [piece for piece in found if isinstance(piece, Evidence)]
    return evidence, [piece for piece in found if isinstance(piece, Abstention)]
