"""Census of all ranks: what every process of a distributed run counted, together, exactly.

Only what every rank calls may come here: see :meth:`neuronscope.scope.Scope.step`. Ranks that share a model's data add
their counts up; ranks that share a layer's neurons (tensor parallelism) lay theirs side by side. Both are one sum: each
rank puts its neurons where they belong in the whole layer, and nothing where others' are.
"""

from __future__ import annotations

import hashlib
import pickle
import time
import warnings
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from neuronscope.census import Census, SiteInfo, Tally
from neuronscope.errors import NeuronscopeWarning
from neuronscope.meters import NEVER

__all__ = ["Exchanges", "Ranks", "world_size"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_SUMMED = ("zero_outputs", "zero_gradients", "not_finite_outputs", "abs_sum")
_LATEST = ("last_active_step", "first_active_step")
_NUMBERS = ("positions", "gradient_positions", "examples")


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Exchanges(NamedTuple):
    """What joining has cost this rank so far.

    Attributes:
        ranks: Number of ranks.
        times: How often counts were joined.
        bytes: Bytes that this rank gave to the last one.
        seconds: Seconds that all of them took, waiting for the slowest rank included.
    """

    ranks: int
    times: int
    bytes: int
    seconds: float


class Ranks:
    """The ranks of a distributed run, as one of them meets the others; one instance a scope.

    Each exchange takes whatever each rank brings and puts it where it belongs: ranks with more batches than others, or
    none, keep nobody waiting for ever and lose no count. A rank that is done goes on answering until all are.

    Args:
        together: Whether counts are joined at all.
    """

    def __init__(self, *, together: bool = True) -> None:
        self._together = together
        self._met: dict[str, dict[str, tuple[SiteInfo, int]]] = {}  # by phase, sites of all ranks and their neurons
        self._kept: dict[str, Census] = {}  # by phase, what others brought while this rank was in another phase
        self.duplicate = False  # another rank holds the same data, and counts for both what is not split
        self.all_done = True  # whether, in the last exchange, every rank was done
        self.exchanges = Exchanges(1, 0, 0, 0.0)

    @property
    def alone(self) -> bool:
        """Whether no other rank counts along."""
        return not self._together or world_size() == 1

    def join(self, census: Census, *, phase: str, done: bool = False) -> Census:
        """What all ranks counted since they last joined. Every rank must call this equally often, or be done.

        Args:
            census: What this rank counted, and in which steps.
            phase: Of this rank.
            done: This rank will not call again, unless :attr:`all_done` stays false: then it must.

        Returns:
            The same counts on every rank in that phase; the steps are from the first of any rank to the last.
        """
        if self.alone:
            self.all_done = True
            return census
        began = time.perf_counter()
        given = self._completed(census, phase)
        agree, self.all_done = _greet(given, phase, done)
        joined, size = _reduce(given) if agree else self._gather(given, phase)
        joined = _merged(self._kept.pop(phase, Census()), joined)
        met = self._met.setdefault(phase, {})
        met.update((name, (tally.info, tally.neurons)) for name, tally in joined.items())
        before = self.exchanges
        seconds = before.seconds + time.perf_counter() - began
        self.exchanges = Exchanges(world_size(), before.times + 1, size, seconds)
        return joined

    def _completed(self, census: Census, phase: str) -> Census:
        """What this rank gives: its part of each site, and nothing of sites that only others met."""
        own = {name: contribution(tally, duplicate=self.duplicate) for name, tally in census.items()}
        met = self._met.get(phase, {})
        silent = {name: Tally.nothing(*site) for name, site in met.items() if name not in own}
        tallies = {name: own.get(name) or silent[name] for name in (*met, *(name for name in own if name not in met))}
        return Census(tallies, first_step=census.first_step, last_step=census.last_step)

    def _gather(self, census: Census, phase: str) -> tuple[Census, int]:
        """The same where ranks brought other sites, or are in other phases: all that each of them has, from all."""
        mine = (phase, census.state_dict())
        states: list[Any] = [None] * world_size()
        dist.all_gather_object(states, mine)
        for other in sorted({other for other, _ in states}):
            parts = [Census.from_state(state) for place, state in states if place == other]
            self._kept[other] = _merged(self._kept.get(other, Census()), *parts)
        return self._kept.pop(phase), len(pickle.dumps(mine))

    def late(self) -> dict[str, Census]:
        """By phase, what others brought after this rank had joined that phase for the last time; gone once told."""
        late, self._kept = self._kept, {}
        return late


def contribution(tally: Tally, *, duplicate: bool) -> Tally:
    """What one rank's tally adds to the sum over all ranks: its neurons in their places, nothing in the others'.

    Args:
        tally: What the rank counted.
        duplicate: Another rank holds the same data, and counts for both what is not split.
    """
    info = replace(tally.info, first=0, whole=0)
    first, whole = tally.info.first, tally.info.whole or tally.neurons
    if first < 0 or (duplicate and tally.info.whole == 0):
        return Tally.nothing(info, whole)
    if whole == tally.neurons:
        return replace(tally, info=info)
    placed = Tally.nothing(info, whole)
    for name in (*_SUMMED, *_LATEST):
        getattr(placed, name)[first : first + tally.neurons] = getattr(tally, name)
    # The rank of the first part speaks for the positions of all parts.
    speaks: dict[str, Any] = {} if first else {name: getattr(tally, name) for name in _NUMBERS}
    return replace(placed, **speaks)


def _greet(census: Census, phase: str, done: bool) -> tuple[bool, bool]:
    """Whether all ranks bring the same sites of the same size for the same phase, and whether all are done."""
    layout = repr((phase, sorted((name, tally.neurons) for name, tally in census.items())))
    number = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:7], "big")
    extremes = torch.tensor([number, -number, int(not done)], dtype=torch.int64, device=_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    most, least, any_goes_on = extremes.tolist()
    return most == -least, not any_goes_on


def _reduce(census: Census) -> tuple[Census, int]:
    """The sums and the latest steps of all ranks, in a flat collective each, and the bytes that this rank gave.

    Sites lie in the order of their names. Counts travel as float64, which holds integers up to 2**53 exactly; those of
    one window are far below.
    """
    sums = [np.zeros(0)]
    latest = [np.array([census.last_step, -census.first_step if census.first_step >= 0 else -NEVER])]
    for name in sorted(census):
        tally = census[name]
        sums += [getattr(tally, field).astype(np.float64) for field in _SUMMED]
        sums.append(np.array([getattr(tally, field) for field in _NUMBERS], dtype=np.float64))
        latest += [tally.last_active_step, -tally.first_active_step]
    flat = [torch.from_numpy(np.concatenate(parts)).to(_device()) for parts in (sums, latest)]
    dist.all_reduce(flat[0], op=dist.ReduceOp.SUM)
    dist.all_reduce(flat[1], op=dist.ReduceOp.MAX)
    size = sum(part.numel() * part.element_size() for part in flat)
    return _unpacked(census, *(part.cpu().numpy() for part in flat)), size


def _unpacked(like: Census, sums: FloatArray, latest: IntArray) -> Census:
    """A census of the sites of ``like``, of what :func:`_reduce` laid flat."""
    last_step, first_step = int(latest[0]), -int(latest[1])
    latest = latest[2:]
    tallies = dict(like)
    for name in sorted(like):
        tally, count = like[name], like[name].neurons
        values: dict[str, Any] = {}
        for field in _SUMMED:
            part, sums = sums[:count], sums[count:]
            values[field] = part.astype(getattr(tally, field).dtype)
        numbers, sums = sums[: len(_NUMBERS)], sums[len(_NUMBERS) :]
        values.update((field, int(number)) for field, number in zip(_NUMBERS, numbers, strict=True))
        values.update(last_active_step=latest[:count].copy(), first_active_step=-latest[count : 2 * count])
        tallies[name], latest = replace(tally, **values), latest[2 * count :]
    return Census(tallies, first_step=first_step if first_step < NEVER else -1, last_step=last_step)


def _merged(*parts: Census) -> Census:
    """All together, but for a site that is not of one width: it cannot be one layer, and nobody's counts."""
    widths: dict[str, set[int]] = {}
    for part in parts:
        for name, tally in part.items():
            widths.setdefault(name, set()).add(tally.neurons)
    strange = {name: sorted(found) for name, found in widths.items() if len(found) > 1}
    for name, found in strange.items():
        warnings.warn(
            f"Expected every rank to have as many neurons at site {name}, but got {found}: it is not counted. Exclude "
            "it with `exclude=`, or watch with `join_ranks=False`.",
            NeuronscopeWarning,
            stacklevel=2,
        )
    return reduce(Census.merge, (part.without(*strange) for part in parts), Census())


def _device() -> torch.device:
    """Where this process group's tensors must live."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
