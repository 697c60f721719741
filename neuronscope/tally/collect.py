"""Reading: from running meters to tallies, with one copy a device and type of number.

A meter's counters are seven small tensors, and a network of 200 sites has 1400 of them. Copied one by one they cost a
wait for the device each; laid end to end on the device first, two copies bring them all.
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

__all__ = ["most_examples", "read"]

AnyArray = npt.NDArray[np.generic]


def read(sites: Sequence[tuple[SiteInfo, SiteCounters]]) -> list[Tally]:
    """The counts of running meters, copied. Waits for their devices.

    Args:
        sites: What each site is, and its meter.

    Returns:
        A tally each.
    """
    all_counters = {id(each): each for _, counters in sites for each in (counters, counters.gate) if each is not None}
    scratch = ScratchBuffers()
    tensors = (counter for counters in all_counters.values() for counter in counters.flush(scratch))
    copies = iter(_copied(tensors))
    counted = {which: [next(copies) for _ in counters.tensors] for which, counters in all_counters.items()}
    return [_tally(info, counters, counted) for info, counters in sites]


def most_examples(all_counters: Iterable[SiteCounters]) -> int:
    """Examples of the meter that has most of them. Waits for the meters' devices."""
    known = list(all_counters)
    traced = _copied(counters.tensors.traced for counters in known)
    return max((counters.totals(each.tolist())[2] for counters, each in zip(known, traced, strict=True)), default=0)


def _tally(info: SiteInfo, counters: SiteCounters, counted: dict[int, list[AnyArray]]) -> Tally:
    asked = counters if counters.gate is None else counters.gate  # whose pre-activation the gradients are of
    own, gate = (dict(zip(CounterTensors._fields, counted[id(each)], strict=True)) for each in (counters, asked))
    positions, _, examples = counters.totals(own["traced"].tolist())
    return Tally(
        info=info,
        zero_outputs=own["zero_outputs"].astype(np.int64, copy=False),
        zero_gradients=gate["zero_gradients"].astype(np.int64, copy=False),
        not_finite_outputs=own["not_finite"].astype(np.int64, copy=False),
        abs_sum=own["abs_sum"].astype(np.float64, copy=False),
        last_active_step=own["last_active"].astype(np.int64, copy=False),
        first_active_step=own["first_active"].astype(np.int64, copy=False),
        positions=positions,
        gradient_positions=asked.totals(gate["traced"].tolist())[1],
        examples=examples,
    )


def _copied(tensors: Iterable[Tensor]) -> list[AnyArray]:
    """Copies of vectors in main memory, in their order."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    count = 0
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append((place, tensor))
        count += 1
    copies: list[AnyArray] = [np.empty(0)] * count
    for group in groups.values():
        joined = torch.cat([tensor for _, tensor in group]).to("cpu").numpy()
        end = 0
        for place, tensor in group:
            start, end = end, end + len(tensor)
            copies[place] = joined[start:end]
    return copies
