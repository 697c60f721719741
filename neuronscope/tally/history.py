"""Record deaths and revivals by optimizer step, window after window, in bounded memory.

Each phase has one :class:`History`. Each closed window is judged once and stored as one byte per neuron. When there are
too many windows, every second one is dropped, and from then on only every second new one is kept. So a run of any
length keeps evenly spaced windows and always the newest one. The steps at which neurons died and revived are stored
separately and are exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from neuronscope.arrays import ByteArray, IntArray
from neuronscope.count.counter_tensors import NEVER
from neuronscope.judge.verdicts import Judgement, Policy, judge
from neuronscope.report.report import LEVEL_MAX, LEVELS, SiteHistory
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.check_state import array, integer, integers, mapping, reading

__all__ = ["History"]

#: Maximum number of windows, and maximum bytes of levels (one per neuron and window).
MAX_WINDOWS = 256
MAX_BYTES = 64 << 20
_MIN_WINDOWS = 16


def levels(tally: Tally, judgement: Judgement) -> ByteArray:
    """Return one byte per neuron: its zero-output fraction, or its verdict if it has one; uint8 ``(N,)``.

    Args:
        tally: The counts of a window.
        judgement: The verdicts on it.
    """
    zeros, positions = tally.zero_outputs, max(tally.positions, 1)
    shades = np.rint(zeros * LEVEL_MAX / positions)
    # 0 is for exactly 0, and LEVEL_MAX is a verdict.
    codes: ByteArray = np.minimum(np.maximum(shades, 1), LEVEL_MAX - 1).astype(np.uint8)
    codes[zeros == 0] = 0
    for label, level in LEVELS.items():
        codes[getattr(judgement, label.replace(" ", "_"))] = level
    return codes


class _Trail:
    """Record the history of one site with ``N`` neurons."""

    _OF_WINDOWS = ("indices", "steps", "levels")
    _STEPS = ("died_step", "revived_step", "deaths", "revivals")

    def __init__(self, neurons: int) -> None:
        self.indices: list[int] = []
        self.steps: list[int] = []
        self.levels: list[ByteArray] = []
        self.died_step = np.full(neurons, -1, dtype=np.int64)
        self.revived_step = np.full(neurons, -1, dtype=np.int64)
        self.deaths = np.zeros(neurons, dtype=np.int64)
        self.revivals = np.zeros(neurons, dtype=np.int64)
        self.is_dead = np.zeros(neurons, dtype=np.bool_)

    def note_changes(
        self, step: int, tally: Tally, judgement: Judgement, last_active: IntArray, observed: Sequence[int]
    ) -> None:
        """Record which neurons died and which revived in a closed window.

        ``last_active`` is the last step at which each neuron fired, int64 ``(N,)``; ``observed`` are the steps observed
        in this window and the one before it, ascending.
        """
        died = judgement.dead & ~self.is_dead & (last_active >= 0)
        if died.any():
            after = np.searchsorted(np.asarray(observed, dtype=np.int64), last_active[died], side="right")
            steps = np.append(np.asarray(observed, dtype=np.int64), step)
            self.died_step[died] = steps[np.minimum(after, len(observed))]
            self.deaths[died] += 1
        revived = self.is_dead & (tally.first_active_step < NEVER)
        self.revived_step[revived] = tally.first_active_step[revived]
        self.revivals[revived] += 1
        self.is_dead = (self.is_dead & ~revived) | judgement.dead

    def add_window(self, index: int, stride: int, step: int, tally: Tally, judgement: Judgement) -> None:
        """Store the levels of a closed window, of which ``index`` were closed before.

        The previous window was stored as the newest; it is dropped now unless its index is a multiple of the stride.
        """
        if self.indices and self.indices[-1] % stride:
            self._keep([*range(len(self.indices) - 1)])
        self.indices.append(index)
        self.steps.append(step)
        self.levels.append(levels(tally, judgement))

    def thin(self, stride: int) -> None:
        """Drop the windows whose index is not a multiple of the stride, except the newest one."""
        newest = len(self.indices) - 1
        self._keep([place for place, index in enumerate(self.indices) if index % stride == 0 or place == newest])

    def _keep(self, places: Sequence[int]) -> None:
        for name in self._OF_WINDOWS:
            kept = getattr(self, name)
            setattr(self, name, [kept[place] for place in places])

    def snapshot(self) -> SiteHistory:
        """Return the history as plain arrays."""
        return SiteHistory(
            steps=np.array(self.steps, dtype=np.int64),
            levels=np.array(self.levels, dtype=np.uint8).reshape(len(self.steps), len(self.died_step)),
            **{name: getattr(self, name).copy() for name in self._STEPS},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the history as tensors and primitives."""
        snapshot = self.snapshot()
        state = {name: torch.from_numpy(getattr(snapshot, name)) for name in snapshot.__dataclass_fields__}
        indices = torch.tensor(self.indices, dtype=torch.int64)
        return {**state, "indices": indices, "is_dead": torch.from_numpy(self.is_dead.copy())}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Trail:
        """Return the history that :meth:`state_dict` saved; raise ValueError if a part of it is not what it can be."""
        neurons = len(state["died_step"])
        trail = cls(neurons)
        trail.indices = integers(state, "indices")
        if any(one >= later for one, later in itertools.pairwise(trail.indices)):
            raise ValueError("indices do not ascend")
        trail.steps = integers(state, "steps")
        if len(trail.steps) != len(trail.indices):
            raise ValueError(f"steps has {len(trail.steps)} windows and not {len(trail.indices)}")
        for name in cls._STEPS:
            setattr(trail, name, array(state, name, torch.int64, (neurons,), -1 if name.endswith("_step") else 0))
        trail.is_dead = array(state, "is_dead", torch.bool, (neurons,))
        trail.levels = [*array(state, "levels", torch.uint8, (len(trail.indices), neurons))]
        return trail


class History:
    """Record the deaths and revivals at every site in one phase."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._trails: dict[str, _Trail] = {}
        self._windows = 0
        self._stride = 1

    def __len__(self) -> int:
        """Return the number of windows closed so far, including dropped ones."""
        return self._windows

    def close(self, window: Census, total: Census, observed: Sequence[int]) -> None:
        """Judge a closed window and record it. A site that did not run in it, but did before, is recorded as unseen.

        Args:
            window: The closed window.
            total: Everything since watching began, including this window.
            observed: Optimizer steps observed in this window and the one before it, ascending.
        """
        for name, so_far in total.items():
            tally = window.get(name) or Tally.empty(so_far.info, so_far.neurons)
            trail = self._trails.get(name)
            if trail is None:
                if tally.positions == 0:
                    continue
                trail = self._trails[name] = _Trail(tally.neurons)
            judgement = judge(tally, self._policy)
            trail.note_changes(window.last_step, tally, judgement, so_far.last_active_step, observed)
            trail.add_window(self._windows, self._stride, window.last_step, tally, judgement)
        self._windows += 1
        neurons = sum(len(trail.died_step) for trail in self._trails.values())
        room = min(MAX_WINDOWS, max(_MIN_WINDOWS, MAX_BYTES // max(neurons, 1)))
        if max((len(trail.steps) for trail in self._trails.values()), default=0) > room:
            self._stride *= 2
            for trail in self._trails.values():
                trail.thin(self._stride)

    def forget(self, name: str) -> None:
        """Remove the history of one site."""
        self._trails.pop(name, None)

    def for_site(self, name: str, neurons: int) -> SiteHistory:
        """Return the history of one site; empty if no window with it was closed.

        Args:
            name: Name of the site.
            neurons: ``N``.
        """
        return (self._trails.get(name) or _Trail(neurons)).snapshot()

    def state_dict(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the history as tensors and primitives, without the named sites."""
        return {
            "windows": self._windows,
            "stride": self._stride,
            "trails": {name: trail.state_dict() for name, trail in self._trails.items() if name not in without},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved history.

        Raises:
            StateError: The state is not that of a history.
        """
        with reading("state of a history", state):
            windows, stride = integer(state, "windows"), integer(state, "stride", 1)
            trails = {name: _Trail.from_state(trail) for name, trail in mapping(state, "trails").items()}
            if any(trail.indices[-1:] >= [windows] for trail in trails.values()):
                raise ValueError("a window has a higher number than there are windows")
        self._windows, self._stride, self._trails = windows, stride, trails

    @property
    def widths(self) -> dict[str, int]:
        """Number of neurons of each site."""
        return {name: len(trail.died_step) for name, trail in self._trails.items()}

    @property
    def newest_step(self) -> int:
        """The newest step of any window, death or revival; −1 before the first."""
        steps = (
            max([-1, *trail.steps, *(int(each.max()) for each in (trail.died_step, trail.revived_step) if each.size)])
            for trail in self._trails.values()
        )
        return max(steps, default=-1)
