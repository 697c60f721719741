"""Copy running counters to the host and return them as tallies, with one copy per device and dtype.

A site has some small tensors of counters, so a network of 200 sites has more than a thousand. Copied one by one, each
would wait for the device. They are concatenated on the device first, so that a copy for each dtype is enough. On the
host the counts of a window and those that are kept in 64 bits are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuronscope.count.counter_tensors import NEVER, CounterTensors
from neuronscope.count.counters import SiteCounters
from neuronscope.count.cpu_kernels import ScratchBuffers
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Tally

__all__ = ["observed", "read_tallies"]

AnyArray = npt.NDArray[Any]

#: Those of the counters that have a number for each neuron, in their order: how two of them are joined, and what it is
#: of a neuron of which nothing was counted.
_PER_NEURON: dict[str, tuple[Callable[[AnyArray, AnyArray], AnyArray], float]] = {
    "zero_outputs": (np.add, 0),
    "zero_gradients": (np.add, 0),
    "not_finite": (np.add, 0),
    "abs_sum": (np.add, 0.0),
    "last_active": (np.maximum, -1),
    "first_active": (np.minimum, NEVER),
}


def read_tallies(sites: Sequence[tuple[SiteInfo, SiteCounters]]) -> list[Tally]:
    """Return a tally for each site, copied from its running counters. Synchronizes with their devices."""
    all_counters = {id(each): each for _, counters in sites for each in (counters, counters.gate) if each is not None}
    scratch = ScratchBuffers()
    for counters in all_counters.values():
        counters.add_waiting(scratch)
    copies = iter(_copied(tensor for counters in all_counters.values() for tensor in _held_by(counters)))
    counted = {which: _read(counters, copies) for which, counters in all_counters.items()}
    return [_tally(info, counters, counted) for info, counters in sites]


def _held_by(counters: SiteCounters) -> Iterator[Tensor]:
    """Yield the tensors that :func:`_read` needs copies of, in its order."""
    yield counters.traced
    yield counters.traced_gradients
    for tensors in _parts(counters):
        yield from tensors[: len(_PER_NEURON)]


def _parts(counters: SiteCounters) -> list[CounterTensors]:
    window = counters.window
    return [each for each in (counters.wide, None if window is None else window.tensors) if each is not None]


def _read(counters: SiteCounters, copies: Iterator[AnyArray]) -> dict[str, AnyArray]:
    """Return everything that was counted, as int64 and float64, by the names of :class:`CounterTensors`.

    ``copies`` are of what :func:`_held_by` yields.
    """
    counts: dict[str, AnyArray] = {"traced": next(copies), "traced_gradients": next(copies)}
    parts = [dict(zip(_PER_NEURON, copies, strict=False)) for _ in _parts(counters)]
    if counters.window is not None:
        newest = parts[-1]
        newest["last_active"], newest["first_active"] = counters.window.in_run(
            newest["last_active"], newest["first_active"]
        )
    for name, (reduce, blank) in _PER_NEURON.items():
        found = [part[name] for part in parts if len(part[name])]
        counts[name] = functools.reduce(reduce, found) if found else np.full(counters.neurons, blank)
    return counts


def observed(all_counters: Sequence[SiteCounters]) -> list[tuple[int, int]]:
    """Return the positions and the examples of each site so far.

    Synchronizes with the devices of counters in which positions are counted, and with no others.
    """
    found = [(counters.positions, counters.examples) for counters in all_counters]
    on_device = [number for number, counters in enumerate(all_counters) if counters.in_graph or counters.shared]
    if on_device:
        for number, traced in zip(on_device, _copied(all_counters[each].traced for each in on_device), strict=True):
            positions, _, examples = all_counters[number].totals((*traced.tolist(), 0))
            found[number] = positions, examples
    return found


def _tally(info: SiteInfo, counters: SiteCounters, counted: Mapping[int, dict[str, AnyArray]]) -> Tally:
    # A gated product has the pre-activation of its gate.
    gradients = counters if counters.gate is None else counters.gate
    own, gate = dict(counted[id(counters)]), dict(counted[id(gradients)])
    positions, _, examples = counters.totals((*own["traced"].tolist(), 0))
    gradient_positions = gradients.totals((0, 0, *gate["traced_gradients"].tolist()))[1]
    if gradients.unreadable:
        gate["zero_gradients"], gradient_positions = np.zeros_like(gate["zero_gradients"]), 0
    sparse = info.kind == "sparse"
    return Tally(
        **vars(info),
        step_positions=counters.positions_by_step() if sparse else (),
        idle_positions=np.zeros(counters.neurons, dtype=np.int64) if sparse else None,
        zero_outputs=own["zero_outputs"],
        zero_gradients=gate["zero_gradients"],
        not_finite_outputs=own["not_finite"],
        abs_sum=own["abs_sum"],
        last_active_step=own["last_active"],
        first_active_step=own["first_active"],
        positions=positions,
        gradient_positions=gradient_positions,
        examples=examples,
    ).with_idle()


def _copied(tensors: Iterable[Tensor]) -> list[AnyArray]:
    """Return copies of vectors of any length in host memory, in the same order, as int64 and float64."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    count = 0
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append((index, tensor))
        count += 1
    copies: list[AnyArray] = [np.empty(0)] * count
    for (_, dtype), group in groups.items():
        joined = torch.cat([tensor for _, tensor in group]).to("cpu").numpy()
        joined = joined.astype(np.float64 if dtype.is_floating_point else np.int64, copy=False)
        end = 0
        for index, tensor in group:
            start, end = end, end + len(tensor)
            copies[index] = joined[start:end]
    return copies
