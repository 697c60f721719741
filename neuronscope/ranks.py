"""Census of all ranks: what every process of a distributed run counted, together, exactly.

Only what is called by every rank may come here: see :meth:`neuronscope.scope.Scope.step`. Counts are gathered as they
are and merged in the order of the ranks, so that every rank ends with the same census.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from neuronscope.census import Census, Tally

__all__ = ["join", "world_size"]

_ARRAYS = ("zero_outputs", "zero_gradients", "not_finite_outputs", "abs_sum", "last_active_step", "first_active_step")
_NUMBERS = ("positions", "gradient_positions", "examples")


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join(census: Census) -> Census:
    """What all ranks counted. Every rank must call this at the same point; alone, a census is returned as it is.

    Args:
        census: What this rank counted.

    Returns:
        The same census on every rank. Steps are this rank's own.
    """
    if world_size() == 1:
        return census
    if _agree(census):
        parts = _gather_flat(census)
    else:  # some rank saw other sites, or none: say all of it
        states: list[Any] = [None] * world_size()
        dist.all_gather_object(states, census.state_dict())
        parts = [Census.from_state(state) for state in states]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return Census(dict(merged), first_step=census.first_step, last_step=census.last_step, steps=census.steps)


def _device() -> torch.device:
    """Where this process group's tensors must live."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")


def _agree(census: Census) -> bool:
    """Whether all ranks have the same sites of the same size."""
    layout = repr([(name, tally.neurons) for name, tally in census.items()])
    number = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:7], "big")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])


def _gather_flat(census: Census) -> list[Census]:
    """Every rank's census, in one collective: int64 throughout, with float64 carried bit by bit."""
    pieces = [np.zeros(0, dtype=np.int64)]
    for tally in census.values():
        pieces += [getattr(tally, name).view(np.int64) for name in _ARRAYS]
        pieces.append(np.array([getattr(tally, name) for name in _NUMBERS], dtype=np.int64))
    flat = torch.from_numpy(np.concatenate(pieces)).to(_device())
    gathered = [torch.empty_like(flat) for _ in range(world_size())]
    if flat.numel():
        dist.all_gather(gathered, flat)
    return [_from_flat(census, each.cpu().numpy()) for each in gathered]


def _from_flat(like: Census, flat: np.ndarray[Any, np.dtype[np.int64]]) -> Census:
    tallies, place = {}, 0
    for name, tally in like.items():
        arrays: dict[str, Any] = {}
        for field in _ARRAYS:
            piece = flat[place : place + tally.neurons].copy()
            arrays[field] = piece.view(np.float64) if field == "abs_sum" else piece
            place += tally.neurons
        numbers = dict(zip(_NUMBERS, flat[place : place + len(_NUMBERS)].tolist(), strict=True))
        place += len(_NUMBERS)
        tallies[name] = Tally(info=tally.info, **arrays, **numbers)
    return Census(tallies)
