"""Copy running counters to the host and return them as tallies, with one copy per device and dtype.

A site has eight small tensors of counters, so a network of 200 sites has 1600. Copied one by one, each would wait for
the device. They are concatenated on the device first, so that two copies are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuronscope.count.counters import CounterTensors, SiteCounters
from neuronscope.count.counting import ScratchBuffers
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Tally

__all__ = ["observed", "read_tallies"]

AnyArray = npt.NDArray[np.generic]


def read_tallies(sites: Sequence[tuple[SiteInfo, SiteCounters]]) -> list[Tally]:
    """Return a tally for each site, copied from its running counters. Synchronizes with their devices.

    Args:
        sites: Description and counters of each site.
    """
    all_counters = {id(each): each for _, counters in sites for each in (counters, counters.gate) if each is not None}
    scratch = ScratchBuffers()
    tensors = (counter for counters in all_counters.values() for counter in counters.flush(scratch))
    copies = iter(_copied(tensors))
    counted = {which: [next(copies) for _ in counters.tensors] for which, counters in all_counters.items()}
    return [_tally(info, counters, counted) for info, counters in sites]


def observed(all_counters: Iterable[SiteCounters]) -> list[tuple[int, int]]:
    """Return the positions and the examples of each site so far.

    Synchronizes with the devices of counters in which positions are counted, and with no others.
    """
    all_counters = list(all_counters)
    traced = iter(_copied(counters.tensors.traced for counters in all_counters if counters.counts_on_device))
    totals = [
        counters.totals((*next(traced).tolist(), 0) if counters.counts_on_device else (0, 0, 0))
        for counters in all_counters
    ]
    return [(positions, examples) for positions, _, examples in totals]


def _tally(info: SiteInfo, counters: SiteCounters, counted: dict[int, list[AnyArray]]) -> Tally:
    # A gated product has the pre-activation of its gate.
    gradients = counters if counters.gate is None else counters.gate
    own, gate = (dict(zip(CounterTensors._fields, counted[id(each)], strict=True)) for each in (counters, gradients))
    positions, _, examples = counters.totals((*own["traced"].tolist(), 0))
    gradient_positions = gradients.totals((0, 0, *gate["traced_gradients"].tolist()))[1]
    if gradients.unreadable:
        gate["zero_gradients"], gradient_positions = np.zeros_like(gate["zero_gradients"]), 0
    sparse = info.kind == "sparse"
    return Tally(
        info=info,
        step_positions=counters.positions_by_step() if sparse else (),
        idle_positions=np.zeros(counters.neurons, dtype=np.int64) if sparse else None,
        zero_outputs=own["zero_outputs"].astype(np.int64, copy=False),
        zero_gradients=gate["zero_gradients"].astype(np.int64, copy=False),
        not_finite_outputs=own["not_finite"].astype(np.int64, copy=False),
        abs_sum=own["abs_sum"].astype(np.float64, copy=False),
        last_active_step=own["last_active"].astype(np.int64, copy=False),
        first_active_step=own["first_active"].astype(np.int64, copy=False),
        positions=positions,
        gradient_positions=gradient_positions,
        examples=examples,
    ).with_idle()


def _copied(tensors: Iterable[Tensor]) -> list[AnyArray]:
    """Return copies of vectors of any length in host memory, in the same order."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    count = 0
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append((index, tensor))
        count += 1
    copies: list[AnyArray] = [np.empty(0)] * count
    for group in groups.values():
        joined = torch.cat([tensor for _, tensor in group]).to("cpu").numpy()
        end = 0
        for index, tensor in group:
            start, end = end, end + len(tensor)
            copies[index] = joined[start:end]
    return copies
