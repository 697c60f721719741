"""Inputs that wake neurons: which neuron of which layer each one wakes, and how reports store them. No torch here."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neuronscope.arrays import BoolArray, IntArray
from neuronscope.checkpoints.verdict.evidence import CLAIMS
from neuronscope.checkpoints.verdict.join_units import JoinedLayers, NamedSite, places_but_gates
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport

__all__ = [
    "Places",
    "WakingInput",
    "are_embedded",
    "inputs_as_dicts",
    "inputs_as_npz",
    "neurons_to_wake",
    "note_woken",
    "places_of_sites",
]

#: The tensors of one input by the place of the argument: ``0`` is the first positional argument, and ``mask.1`` the
#: second tensor in the argument ``mask``.
WakingInput = Mapping[str, "npt.NDArray[Any]"]

_SILENT = CLAIMS.index("silent")
#: Most bytes of all inputs together that are stored inside a JSON report.
_MOST_BYTES = 2**20


class Place(NamedTuple):
    """Which units of a layer the neurons of a site are, both int64 ``(K,)``."""

    site: str
    units: IntArray
    neurons: IntArray


#: The places of sites by the layer's name.
Places = Mapping[str, Sequence[Place]]


def places_of_sites(sites: Sequence[NamedSite], joined: JoinedLayers) -> Places:
    """Return which units of layers the neurons of sites are; not those of gates that have a product.

    Args:
        sites: The sites of one source.
        joined: The layers to which they were joined.
    """
    judged = places_but_gates(sites)
    places: dict[str, list[Place]] = {}
    for site in sites:
        for layer, units in joined.units[site.name, site.neurons].items():
            neurons = np.flatnonzero(judged[site.name] & (units >= 0))
            places.setdefault(layer, []).append(Place(site.name, units[neurons], neurons))
    return places


def neurons_to_wake(layers: Iterable[LayerReport], places: Places, widths: Mapping[str, int]) -> dict[str, BoolArray]:
    """Return the neurons of each site whose unit is dead or silent and not proved dead, bool ``(N,)`` by site.

    Args:
        layers: The verdicts.
        places: What :func:`places_of_sites` returned.
        widths: Number of neurons of each site.
    """
    targets = {name: np.zeros(width, dtype=np.bool_) for name, width in widths.items()}
    for layer in layers:
        wanted = (layer.dead_or_suspected | (layer.labels == _SILENT)) & ~layer.proved_dead
        for place in places.get(layer.name, ()):
            targets[place.site][place.neurons[wanted[place.units]]] = True
    return {name: mask for name, mask in targets.items() if mask.any()}


def note_woken(layers: Iterable[LayerReport], places: Places, found: Mapping[str, IntArray]) -> tuple[LayerReport, ...]:
    """Return the layers with the input that wakes each unit; a unit of several sites must be woken at all of them.

    Args:
        layers: The verdicts.
        places: What :func:`places_of_sites` returned.
        found: Index of the input that makes each neuron of a site fire, int64 ``(N,)`` by site; −1 = none.
    """
    noted = []
    for layer in layers:
        woken = np.full(layer.neurons, -1, dtype=np.int64)
        missed = np.zeros(layer.neurons, dtype=np.bool_)
        for place in places.get(layer.name, ()):
            inputs = found[place.site][place.neurons] if place.site in found else np.full(place.units.size, -1)
            woken[place.units] = np.maximum(woken[place.units], inputs)
            missed[place.units] |= inputs < 0
        wanted = layer.dead_or_suspected | (layer.labels == _SILENT)
        noted.append(replace(layer, woken=np.where(missed | ~wanted, -1, woken)))
    return tuple(noted)


def inputs_as_dicts(inputs: Sequence[WakingInput]) -> list[dict[str, Any]]:
    """Return inputs as plain data, with their numbers only if all of them together are small.

    >>> inputs_as_dicts([{"0": np.zeros((1, 2), dtype=np.float32)}])
    [{'tensors': [{'name': '0', 'dtype': 'float32', 'shape': [1, 2], 'base64': 'AAAAAAAAAAA='}]}]
    """
    embedded = are_embedded(inputs)
    return [
        {
            "tensors": [
                {
                    "name": name,
                    "dtype": array.dtype.name,
                    "shape": list(array.shape),
                    "base64": base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
                    if embedded
                    else None,
                }
                for name, array in one.items()
            ]
        }
        for one in inputs
    ]


def are_embedded(inputs: Sequence[WakingInput]) -> bool:
    """Whether a JSON report holds the numbers of its inputs; otherwise they are in a file beside it."""
    return sum(array.nbytes for one in inputs for array in one.values()) <= _MOST_BYTES


def inputs_as_npz(inputs: Sequence[WakingInput]) -> bytes:
    """Return inputs as a file for :func:`numpy.load`; array ``3.mask`` is the argument ``mask`` of input 3."""
    target = io.BytesIO()
    arrays: dict[str, Any] = {
        f"{index}.{name}": array for index, one in enumerate(inputs) for name, array in one.items()
    }
    np.savez(target, **arrays)
    return target.getvalue()
