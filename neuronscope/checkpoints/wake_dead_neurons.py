"""Search for inputs of the box that wake the dead neurons of a post-mortem, and note them in the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from neuronscope.arrays import BoolArray, IntArray
from neuronscope.checkpoints.model.bounds.propagate import Box
from neuronscope.checkpoints.model.examine_model import Examination
from neuronscope.checkpoints.model.example_inputs import batch_example
from neuronscope.checkpoints.model.wake_search import search_waking_inputs
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.checkpoints.verdict.waking_inputs import Places, WakingInput, neurons_to_wake, note_woken
from neuronscope.errors import UsageError
from neuronscope.writers.formatting import plural

__all__ = ["WakeOptions", "Woken", "wake_dead_neurons"]

_SOURCE = "wake search"
#: How long to search unless the user says otherwise.
_SECONDS = 10.0


class WakeOptions(NamedTuple):
    """How to search."""

    box: Box  # bounds of every element of the input
    seconds: float  # how long to search at most
    seed: int  # seed of the random inputs

    @classmethod
    def of(cls, box: Box | None, seconds: float | None, seed: int) -> WakeOptions | None:
        """Return the options, or ``None`` if there is nothing to search; raise a UsageError if one is wrong.

        Args:
            box: As in :class:`WakeOptions`.
            seconds: As in :class:`WakeOptions`; ``None`` for the default.
            seed: As in :class:`WakeOptions`.
        """
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 <= seconds < math.inf):
            raise UsageError(f"Expected argument `wake_seconds` to be a number of seconds ≥ 0, but got {seconds!r}.")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise UsageError(f"Expected argument `seed` to be an integer from 0 to 2⁶³ − 1, but got {seed!r}.")
        if box is None or seconds == 0:
            return None
        return cls(box, _SECONDS if seconds is None else seconds, seed)


class Woken(NamedTuple):
    """What a search found."""

    layers: tuple[LayerReport, ...]  # the verdicts, with the input that wakes each neuron
    inputs: tuple[WakingInput, ...] = ()  # the inputs
    abstentions: tuple[Abstention, ...] = ()  # what was not searched, and why
    notes: tuple[str, ...] = ()  # proofs that an input refutes: a fault of Neuronscope


def wake_dead_neurons(
    model: nn.Module,
    examination: Examination,
    layers: Sequence[LayerReport],
    places: Places,
    options: WakeOptions,
    *,
    batch: Any = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Woken:
    """Search for inputs of the box that make dead and silent neurons fire.

    Args:
        model: The network, with the checkpoint's weights.
        examination: What is known of it.
        layers: The verdicts.
        places: Which units of the layers the neurons of its sites are.
        options: How to search.
        batch: A batch of the user's data, to start from.
        progress: ``progress(what, done, total)``.
    """
    if examination.example is None:
        return Woken(tuple(layers))
    widths = {site.name: site.neurons for site in examination.sites}
    targets = neurons_to_wake(layers, places, widths)
    proved = _proved_dead(examination.evidence)
    result = search_waking_inputs(
        model,
        examination.example,
        options.box,
        targets,
        seconds=options.seconds,
        seed=options.seed,
        watched=proved,
        data=None if batch is None else batch_example(batch),
        progress=None if progress is None else lambda done, total: progress("searching", done, total),
    )
    abstentions = []
    if result.refused:
        how_far = " to the end" if result.inputs else ""
        abstentions.append(Abstention(_SOURCE, "", f"The box was not searched{how_far}: {result.refused}."))
        if not result.inputs:
            return Woken(tuple(layers), abstentions=tuple(abstentions))
    elif not result.complete:
        left = sum(int((mask & (result.found[name] < 0)).sum()) for name, mask in targets.items())
        reason = (
            f"The time of {options.seconds:g} s was up when inputs were still being tried for "
            f"{plural(left, 'neuron')}: `wake_seconds` (--wake) gives more."
        )
        abstentions.append(Abstention(_SOURCE, "", reason))
    return Woken(
        note_woken(layers, places, result.found),
        tuple({name: _array(tensor) for name, tensor in one.items()} for one in result.inputs),
        tuple(abstentions),
        tuple(_refuted(examination.evidence, result.found)),
    )


def _proved_dead(evidence: Sequence[Evidence]) -> dict[str, BoolArray]:
    """Return the neurons that are proved dead, bool ``(N,)`` by site."""
    proved: dict[str, BoolArray] = {}
    for one in evidence:
        if one.basis == "proved" and one.claim == "dead":
            proved.setdefault(one.site, np.zeros(one.width, dtype=np.bool_))[one.neurons] = True
    return proved


def _refuted(evidence: Sequence[Evidence], found: Mapping[str, IntArray]) -> list[str]:
    """Report proofs of death that an input of the box refutes."""
    faults = []
    for one in evidence:
        if one.basis == "proved" and one.claim == "dead" and one.site in found:
            wrong = one.neurons[found[one.site][one.neurons] >= 0]
            if wrong.size:
                faults.append(
                    f"FAULT OF NEURONSCOPE: {one.source} called {plural(wrong.size, 'neuron')} of {one.site} proved "
                    f"dead that an input of the box makes fire (first {wrong[0]}, by waking input "
                    f"{found[one.site][wrong[0]]}). The proof is wrong: please report it with this network."
                )
    return faults


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor's numbers; those of bfloat16, which numpy lacks, as float32."""
    values: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values
