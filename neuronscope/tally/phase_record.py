"""Windows of one phase: what is being counted now, what was closed last, and everything together.

A window of training is a run of optimizer steps. Its verdicts are only as sure as its examples are many, so a window
that has run its steps stays open until it has enough of them. A pass of another phase (validation, test) is one window,
however few its examples are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from neuronscope.count.counters import SiteCounters
from neuronscope.errors import StateError, UsageError
from neuronscope.judge.verdicts import Policy
from neuronscope.report.fault import Fault
from neuronscope.sites import SiteInfo, SiteKey
from neuronscope.tally.census import Census
from neuronscope.tally.collect import most_examples, read
from neuronscope.tally.history import History

__all__ = ["WINDOWS", "PhaseRecord", "saved_phases", "state_of_phases"]

#: Windows that a census can be asked for.
WINDOWS = ("all", "last", "open")

_STATE_VERSION = 1

Join = Callable[[Census], Census]


class PhaseRecord:
    """All that is known of one phase.

    Args:
        policy: The thresholds.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._counters: dict[SiteKey, tuple[SiteInfo, SiteCounters]] = {}
        self._flushed = Census()
        self._steps: list[int] = []
        self._steps_flushed = 0
        self._steps_before: list[int] = []
        self._looked_at_step = 0
        self._wanting_at = -1
        self.closed = Census()
        self.last = Census()
        self.history = History(policy)

    def add_site(self, key: SiteKey, info: SiteInfo, neurons: int, device: torch.device) -> SiteCounters:
        """A new meter for a site of this phase."""
        self._forget_other_width(key.name, {neurons, info.whole or neurons})
        counters = SiteCounters(neurons, device)
        self._counters[key] = (info, counters)
        return counters

    def _forget_other_width(self, name: str, widths: Collection[int]) -> None:
        """A saved site of another width is no longer the same site: the model was changed since, and it starts anew."""
        for window in ("_flushed", "closed", "last"):
            census: Census = getattr(self, window)
            if name in census and census[name].neurons not in widths:
                setattr(self, window, census.without(name))
                self.history.forget(name)

    def keys_met(self) -> Iterator[SiteKey]:
        """The sites that were met in this phase since it was last loaded."""
        return iter(self._counters)

    @property
    def empty(self) -> bool:
        """Whether nothing was ever met in this phase; waits for no device."""
        return not (self.closed or self._flushed or self._counters)

    def note_step(self, step: int) -> None:
        """An optimizer step was observed."""
        if not self._steps or step > self._steps[-1]:
            self._steps.append(step)

    @property
    def open_steps(self) -> int:
        """Optimizer steps observed in the open window."""
        return len(self._steps)

    @property
    def last_observed_step(self) -> int:
        """The newest optimizer step that was observed; −1 where none was."""
        steps = self._steps or self._steps_before
        return steps[-1] if steps else -1

    def _span(self, flushed: int = 0) -> dict[str, int]:
        """Which steps the open window is of, without some that were flushed."""
        steps = self._steps[flushed:]
        return {"first_step": steps[0] if steps else -1, "last_step": steps[-1] if steps else -1, "steps": len(steps)}

    def open(self) -> Census:
        """The running window so far: what was joined of it, and what this rank counted since.

        Where ranks share a layer's neurons, this rank's part is not laid beside what was joined of all of them.
        """
        return Census(dict(_together(self._flushed, self._running())), **self._span())

    def _running(self) -> Census:
        """What the meters hold, of the steps since they were last flushed."""
        tallies = zip((key.name for key in self._counters), read(list(self._counters.values())), strict=True)
        return Census(dict(tallies), **self._span(self._steps_flushed))

    def flush(self, join: Join | None = None) -> None:
        """Move what the meters hold into the open window's census, joined over ranks by ``join``."""
        running = self._running()
        for _, counters in self._counters.values():
            counters.reset()
        self.take(running if join is None else join(running))

    def take(self, joined: Census) -> None:
        """Add what was joined to the open window."""
        self._flushed = _together(self._flushed, joined)
        if joined.last_step > self.last_observed_step:  # other ranks went on
            self._steps.append(joined.last_step)
        self._steps_flushed = len(self._steps)

    def is_due(self, step: int, window_steps: int, alone: Callable[[], bool]) -> bool:
        """Whether the open window is to be flushed, ``step`` steps into the run.

        Args:
            step: Optimizer steps taken.
            window_steps: Steps of a window at least.
            alone: Says whether no other rank counts along. Otherwise all must answer alike, whatever each has seen:
                then a window that is not sure yet is looked at again after as many steps.
        """
        if step - self._looked_at_step < window_steps or (alone() and not self._has_enough()):
            return False
        self._looked_at_step = step
        return True

    def _has_enough(self) -> bool:
        """Whether the open window has the examples it needs; asked anew only after another step was observed."""
        if self._wanting_at == len(self._steps):
            return False
        wanting = self._policy.min_examples - self._flushed.examples
        enough = wanting <= 0 or any(counters.examples >= wanting for _, counters in self._counters.values())
        enough = enough or most_examples(counters for _, counters in self._counters.values()) >= wanting
        self._wanting_at = -1 if enough else len(self._steps)
        return enough

    def is_sure(self) -> bool:
        """Whether the flushed part of the open window has the examples that the policy asks for."""
        return self._flushed.examples >= self._policy.min_examples

    def close(self) -> bool:
        """Close the open window, flushed before; says whether there was anything in it."""
        if not any(tally.positions for tally in self._flushed.values()):
            return False
        self.last = Census(dict(self._flushed), **self._span())
        self.closed = _together(self.closed, self.last)
        self.history.close(self.last, self.closed, [*self._steps_before, *self._steps])
        self._flushed = Census()
        self._steps_before, self._steps = self._steps, []
        self._steps_flushed = 0
        self._wanting_at = -1
        return True

    def forget(self) -> None:
        """Forget what the meters hold: it was no pass of this phase. No other rank is waited for."""
        for _, counters in self._counters.values():
            if not counters.untouched:
                counters.reset()

    def census(self, window: str) -> Census:
        """The census of a window: ``all``, ``last`` or ``open``.

        Raises:
            UsageError: There is no such window.
        """
        if window == "all":
            return _together(self.closed, self.open())
        if window == "last":
            return self.last
        if window == "open":
            return self.open()
        raise UsageError(f"Expected `window` to be one of {', '.join(WINDOWS)}, but got {window!r}.")

    def state_dict(self) -> dict[str, Any]:
        """The record as tensors and primitives; the open window goes on when it is loaded."""
        shared = [name for name, tally in self.open().items() if tally.info.whole > tally.neurons]
        return {
            "open": self.open().without(*shared).state_dict(),  # one rank's part of a layer is no part of the layer
            "open_steps": list(self._steps),
            "steps_before": list(self._steps_before),
            "looked_at_step": self._looked_at_step,
            "closed": self.closed.state_dict(),
            "last": self.last.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved record.

        Raises:
            StateError: The state is not one of a record.
        """
        names = ("open", "closed", "last")
        history = History(self._policy)
        try:  # all of it is understood before any of it counts
            flushed, closed, last = (Census.from_state(state[name]) for name in names)
            steps, before = ([int(step) for step in state[name]] for name in ("open_steps", "steps_before"))
            looked_at_step = int(state["looked_at_step"])
            history.load_state_dict(state["history"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(
                f"Expected the saved state of a phase, but got {type(state).__name__}: {error}."
            ) from error
        for _, counters in self._counters.values():
            counters.reset()
        self._flushed, self.closed, self.last = flushed, closed, last
        self._steps, self._steps_before, self.history = steps, before, history
        self._steps_flushed = len(steps)
        self._looked_at_step = looked_at_step
        self._wanting_at = -1


def _together(census: Census, later: Census) -> Census:
    """Both together; of a site that only one of them has whole, and the other one rank's part of, what is whole."""
    parts = [name for name in census if name in later and census[name].neurons != later[name].neurons]
    wider = [name for name in parts if later[name].neurons > census[name].neurons]
    return census.without(*wider).merge(later.without(*(name for name in parts if name not in wider)))


def state_of_phases(step: int, records: Mapping[str, PhaseRecord], fault: Fault | None) -> dict[str, Any]:
    """All phases of a watch, ``step`` optimizer steps into the run, and what ended it, as tensors and primitives."""
    phases = {name: record.state_dict() for name, record in records.items()}
    state = {"version": _STATE_VERSION, "step": step, "phases": phases}
    return state if fault is None else {**state, "fault": fault.state_dict()}


def saved_phases(state: Mapping[str, Any], policy: Policy) -> tuple[int, dict[str, Any], Fault | None]:
    """What :func:`state_of_phases` gave: the step, each phase's state and the fault, all of it understood.

    Raises:
        StateError: The state is not one of a scope, or of a later version.
    """
    try:
        version, step, phases = state["version"], int(state["step"]), dict(state["phases"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"Expected the saved state of a scope, but got {type(state).__name__}: {error}.") from error
    if version != _STATE_VERSION:
        raise StateError(f"Expected scope state of version {_STATE_VERSION}, but got version {version}.")
    for saved in phases.values():
        PhaseRecord(policy).load_state_dict(saved)  # all of it is understood before any of it counts
    return step, phases, Fault.from_state(state.get("fault"))
