"""Copy running counters to the host and return them as tallies, with one copy per device and dtype.

A site has seven small tensors of counters, so a network of 200 sites has 1400. Copied one by one, each would wait for
the device. They are concatenated on the device first, so that two copies are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuronscope.count.counters import Counters, Meter
from neuronscope.count.counting import Scratch
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Tally

__all__ = ["most_examples", "read_tallies"]

AnyArray = npt.NDArray[np.generic]


def read_tallies(sites: Sequence[tuple[SiteInfo, Meter]]) -> list[Tally]:
    """Return a tally for each site, copied from its running counters. Synchronizes with their devices.

    Args:
        sites: Description and counters of each site.
    """
    meters = {id(each): each for _, meter in sites for each in (meter, meter.gate) if each is not None}
    scratch = Scratch()
    counters = (counter for meter in meters.values() for counter in meter.settle(scratch))
    copies = iter(_copied(counters))
    counted = {which: [next(copies) for _ in meter.counters] for which, meter in meters.items()}
    return [_tally(info, meter, counted) for info, meter in sites]


def most_examples(meters: Iterable[Meter]) -> int:
    """Return the largest number of examples counted at any site. Synchronizes with the devices of the counters."""
    meters = list(meters)
    traced = _copied(meter.counters.traced for meter in meters)
    return max((meter.totals(each.tolist())[2] for meter, each in zip(meters, traced, strict=True)), default=0)


def _tally(info: SiteInfo, meter: Meter, counted: dict[int, list[AnyArray]]) -> Tally:
    # The pre-activation of a gated product is its gate's, so the gate has the gradients.
    gate_meter = meter if meter.gate is None else meter.gate
    own, gate = (dict(zip(Counters._fields, counted[id(each)], strict=True)) for each in (meter, gate_meter))
    positions, _, examples = meter.totals(own["traced"].tolist())
    return Tally(
        info=info,
        zero_outputs=own["zero_outputs"].astype(np.int64, copy=False),
        zero_gradients=gate["zero_gradients"].astype(np.int64, copy=False),
        not_finite_outputs=own["not_finite"].astype(np.int64, copy=False),
        abs_sum=own["abs_sum"].astype(np.float64, copy=False),
        last_active_step=own["last_active"].astype(np.int64, copy=False),
        first_active_step=own["first_active"].astype(np.int64, copy=False),
        positions=positions,
        gradient_positions=gate_meter.totals(gate["traced"].tolist())[1],
        examples=examples,
    )


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
