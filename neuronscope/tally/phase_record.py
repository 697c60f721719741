"""Record the windows of one phase: the open window, the newest closed one, and the sum of all closed ones.

A window of training is a number of consecutive optimizer steps. Its verdicts are more certain the more examples it has,
so after its steps a window stays open until each site that ran in it has enough examples. It does not wait for ever for
a branch that seldom runs: see :data:`PATIENCE`. One pass of another phase (validation, test) is one window, even if it
has few examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from neuronscope.count.counters import SiteCounters
from neuronscope.errors import StateError, UsageError
from neuronscope.judge.verdicts import Policy
from neuronscope.report.fault import Fault
from neuronscope.sites import NAMED_TENSOR, SiteInfo, SiteKey
from neuronscope.tally.act_record import ActRecord
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.check_state import integer, integers, mapping, reading
from neuronscope.tally.collect import observed, read_tallies
from neuronscope.tally.history import History

__all__ = ["PATIENCE", "WINDOWS", "PhaseRecord", "is_outdated", "scope_state", "split_scope_state"]

#: Names of the windows that a census can cover.
WINDOWS = ("all", "last", "open")

#: A window of training no longer waits for sites with too few examples once a site has this many times as many as the
#: policy needs. A site that runs in a quarter of the forwards gets enough; one that never runs is not waited for.
PATIENCE = 4

#: Since version 2 a neuron is a unit of a layer. Before, it was an index of one call of an activation.
_STATE_VERSION = 2
_OUTDATED_VERSIONS = (1,)

Join = Callable[[Census], Census]
#: Returns those of some layers, or places of activations, that the model does not have.
Lacking = Callable[[Iterable[str]], Collection[str]]


class PhaseRecord:
    """Hold the counters, censuses and history of one phase.

    ``closed`` is the sum of all closed windows, ``last`` the newest of them. The lock is held while counts are read and
    set back, because another thread may be counting.
    """

    def __init__(self, policy: Policy, lock: AbstractContextManager[Any] | None = None) -> None:
        self._policy = policy
        self._lock = nullcontext() if lock is None else lock
        self._counters: dict[SiteKey, tuple[SiteInfo, SiteCounters]] = {}
        self._sparse: list[SiteCounters] = []  # of sites of which it is kept how long each neuron has not fired
        self._flushed = Census()  # the flushed part of the open window
        self._steps: list[int] = []  # observed steps of the open window
        self._steps_flushed = 0  # how many of them were flushed
        self._steps_before: list[int] = []  # observed steps of the window before it
        self.checked_step = 0  # step at which the open window was last due
        self._short_at = -1  # number of observed steps when examples were last found too few; -1 = not known
        self._loaded: set[str] = set()  # sites of the saved counts
        self._lacking: set[str] = set()  # those of them whose layer the model does not have
        self._ran: set[str] = set()  # sites that any rank has run since
        self._renewed: dict[str, tuple[int, int]] = {}  # widths before and now, of sites that began anew
        self.closed = Census()
        self.last = Census()
        self.history = History(policy)

    def add_site(self, key: SiteKey, info: SiteInfo, neurons: int, device: torch.device) -> SiteCounters:
        """Create and return the counters of a site.

        Args:
            key: Identity of the site.
            info: Description of the site.
            neurons: ``N``.
            device: Device of the activation.
        """
        self._drop_other_width(key.name, {neurons, info.whole or neurons})
        self._ran.add(key.name)
        counters = SiteCounters(neurons, device)
        with self._lock:
            self._counters[key] = (info, counters)
            if info.kind == "sparse":
                self._sparse.append(counters)
        return counters

    def describe_sites(self, describe: Callable[[SiteKey, SiteInfo], SiteInfo]) -> None:
        """Replace what is known of each site by what a function returns, given its key and what was known before."""
        for key, (info, counters) in list(self._counters.items()):
            self._counters[key] = describe(key, info), counters

    def _drop_other_width(self, name: str, widths: Collection[int]) -> None:
        """Drop the loaded counts of a site that has another width now, because the model was changed."""
        for window in ("_flushed", "closed", "last"):
            census: Census = getattr(self, window)
            if name in census and census[name].neurons not in widths:
                self._renewed[name] = (census[name].neurons, max(widths))
                setattr(self, window, census.without(name))
                self.history.forget(name)

    @property
    def left(self) -> list[str]:
        """Names of loaded sites that the network has no more: the layer is gone, or another activation follows it.

        A site that runs is there again: a branch may run seldom.
        """
        new = {_place(name) for name in self._ran - self._loaded} - {""}
        absent = (name for name in self._loaded if name not in self._ran)
        return sorted(name for name in absent if name in self._lacking or _place(name) in new)

    def notes(self) -> list[str]:
        """Return sentences on loaded sites that the network has no more, or that began anew."""
        notes, left = [], self.left
        reasons = (
            ("the network has no such layer now", [name for name in left if name in self._lacking]),
            ("another activation follows the layer now", [name for name in left if name not in self._lacking]),
        )
        for reason, names in reasons:
            if names:
                notes.append(f"The saved counts of {_listed(names)} are left out: {reason}.")
        for name, (before, now) in self._renewed.items():
            notes.append(f"The counts of {name} began anew: it had {before} neurons when they were saved, now {now}.")
        return notes

    @property
    def empty(self) -> bool:
        """Whether nothing was ever observed in this phase. Does not synchronize."""
        return not (self.closed or self._flushed or self._counters)

    def begin_at(self, step: int) -> None:
        """Begin the open window at this optimizer step, because the steps before it were not counted here."""
        self.checked_step = step

    def note_step(self, step: int) -> None:
        """Record that an optimizer step was observed."""
        if not self._steps or step > self._steps[-1]:
            self._steps.append(step)
        for counters in self._sparse:
            counters.note_step(step)

    @property
    def newest_step(self) -> int:
        """The newest step that was observed, also on other ranks; −1 before the first."""
        censuses = (self.closed, self.last, self._flushed)
        active = (int(each.last_active_step.max()) for census in censuses for each in census.values() if each.neurons)
        observed_steps = (*self._steps[-1:], *self._steps_before[-1:], self.checked_step)
        return max(-1, *(census.last_step for census in censuses), *active, *observed_steps, self.history.newest_step)

    @property
    def last_observed_step(self) -> int:
        """The newest observed optimizer step; −1 if none was."""
        steps = self._steps or self._steps_before
        return steps[-1] if steps else -1

    def _span(self, flushed: int = 0) -> dict[str, int]:
        """Return the steps of the open window as arguments of :class:`Census`, without the first ``flushed`` ones."""
        steps = self._steps[flushed:]
        return {"first_step": steps[0] if steps else -1, "last_step": steps[-1] if steps else -1, "steps": len(steps)}

    def open(self) -> Census:
        """Return the open window: the part that was flushed, plus what this rank has counted since.

        If ranks share a layer's neurons and counts for the whole layer were flushed, this rank's counts since then are
        left out, because they cover only its own neurons.
        """
        return Census(dict(_together(self._flushed, self._running())), **self._span())

    def _running(self) -> Census:
        """Return what was counted since the last flush."""
        with self._lock:
            known = self._complete()
            tallies = read_tallies([*known.values()])
            names = [key.name for key in known]
            return Census(dict(zip(names, tallies, strict=True)), **self._span(self._steps_flushed))

    def _complete(self) -> dict[SiteKey, tuple[SiteInfo, SiteCounters]]:
        """Return the sites of which every call was counted."""
        return {key: site for key, site in self._counters.items() if not site[1].incomplete}

    def flush(self, join: Join | None = None) -> None:
        """Move the running counts, which ``join`` adds up over all ranks, into the census of the open window."""
        with self._lock:
            running = self._running()
            for _, counters in self._counters.values():
                counters.reset()
        self.add_joined(running if join is None else join(running))

    def add_joined(self, joined: Census) -> None:
        """Add counts of one or all ranks to the open window."""
        self._flushed = _together(self._flushed, joined)
        self._ran.update(name for name, tally in joined.items() if tally.positions)
        if joined.last_step > self.last_observed_step:  # other ranks took more steps
            self._steps.append(joined.last_step)
        self._steps_flushed = len(self._steps)

    def is_due(self, step: int, window_steps: int, alone: Callable[[], bool]) -> bool:
        """Whether the open window should be flushed now.

        Args:
            step: Number of optimizer steps taken.
            window_steps: Minimum number of steps in a window.
            alone: A function that returns whether this is the only rank. With several ranks, all must return the same
                here although each has seen different examples. A window without enough examples is then checked again
                only after another ``window_steps`` steps.
        """
        if step - self.checked_step < window_steps or (alone() and not self._can_close()):
            return False
        self.checked_step = step
        return True

    def _can_close(self) -> bool:
        """Whether the open window has enough examples; a "no" holds until another step is observed."""
        if self._short_at == len(self._steps):
            return False
        before = self._flushed_examples()
        with self._lock:
            sites = [(key, counters) for key, (_, counters) in self._counters.items() if not counters.incomplete]
            running = observed([counters for _, counters in sites])
        examples = []
        for (key, _), (positions, more) in zip(sites, running, strict=True):
            if positions:
                examples.append(more + (before.pop(key.name, 0) if before else 0))
        enough = self._is_enough([*examples, *before.values()])
        self._short_at = -1 if enough else len(self._steps)
        return enough

    def _flushed_examples(self) -> dict[str, int]:
        """Return the examples of each site that ran in the flushed part of the open window."""
        return {name: tally.examples for name, tally in self._flushed.items() if tally.positions}

    def _is_enough(self, examples: Collection[int]) -> bool:
        """Whether a window with so many examples, of each site that ran, need not wait for more.

        It does not wait where the number of examples is not known at any site, and 0 therefore.
        """
        needed = self._policy.min_examples
        if not any(examples):
            return bool(examples)
        return min(examples) >= needed or max(examples) >= PATIENCE * needed

    def has_enough_examples(self, *, final: bool = False) -> bool:
        """Whether the flushed part of the open window has enough examples for the policy at each site that ran in it.

        If the watch ends, no more examples will come: enough at one site are then enough. Every rank answers alike,
        because all have the same flushed counts.
        """
        examples = self._flushed_examples().values()
        if final:
            return max(examples, default=0) >= self._policy.min_examples or (bool(examples) and not any(examples))
        return self._is_enough(examples)

    @property
    def counted(self) -> bool:
        """Whether anything was flushed so far. The same on all ranks."""
        return bool(self.closed or self._flushed_examples())

    def close(self) -> bool:
        """Close the open window, which was flushed before. Return ``False`` if there was nothing in it."""
        if not any(tally.positions for tally in self._flushed.values()):
            return False
        self.last = Census(dict(self._flushed), **self._span())
        self.closed = _together(self.closed, self.last)
        self.history.close(self.last, self.closed.without(*self.left), [*self._steps_before, *self._steps])
        self._flushed = Census()
        self._steps_before, self._steps = self._steps, []
        self._steps_flushed = 0
        self._short_at = -1
        return True

    def discard_running(self) -> None:
        """Discard what was counted since the last flush, without waiting for other ranks."""
        with self._lock:
            for _, counters in self._counters.values():
                if not counters.untouched:
                    counters.reset()

    def release(self, sites: Collection[SiteKey]) -> None:
        """Let go of the counters of some sites, whose counts were flushed or discarded."""
        with self._lock:
            for key in sites:
                self._counters.pop(key, None)
            self._sparse = [counters for info, counters in self._counters.values() if info.kind == "sparse"]

    def census(self, window: str) -> Census:
        """Return the census of a window, ``all``, ``last`` or ``open``, without the sites in :attr:`left`."""
        left = self.left
        if window == "all":
            return _together(self.closed, self.open()).without(*left)
        if window == "last":
            return self.last.without(*left)
        if window == "open":
            return self.open().without(*left)
        raise UsageError(f"Expected `window` to be one of {', '.join(WINDOWS)}, but got {window!r}.")

    def state_dict(self) -> dict[str, Any]:
        """Return the record as tensors and primitives, including the open window, without sites that are left."""
        left, opened = self.left, self.open()
        shared = [name for name, tally in opened.items() if tally.whole > tally.neurons]
        return {
            "open": opened.without(*shared, *left).state_dict(),  # one rank's neurons are not the layer
            "open_steps": list(self._steps),
            "steps_before": list(self._steps_before),
            "looked_at_step": self.checked_step,
            "closed": self.closed.without(*left).state_dict(),
            "last": self.last.without(*left).state_dict(),
            "history": self.history.state_dict(without=left),
        }

    def load_state_dict(self, state: Mapping[str, Any], lacking: Lacking = lambda _: ()) -> None:
        """Continue a saved record.

        Args:
            state: What :meth:`state_dict` returned.
            lacking: A function that tells which layers the model does not have.

        Raises:
            StateError: The state is not that of a record.
        """
        names = ("open", "closed", "last")
        history = History(self._policy)
        with reading("state of a phase", state):  # everything before anything is changed
            flushed, closed, last = (Census.from_state(state[name]) for name in names)
            steps, before = (integers(state, name) for name in ("open_steps", "steps_before"))
            looked_at_step = integer(state, "looked_at_step")
            history.load_state_dict(mapping(state, "history"))
            _check_together(flushed, closed, last, history, [*before, *steps])
        with self._lock:
            for _, counters in self._counters.values():
                counters.reset()
        self._flushed, self.closed, self.last = flushed, closed, last
        self._steps, self._steps_before, self.history = steps, before, history
        self._steps_flushed = len(steps)
        self.checked_step = looked_at_step
        self._short_at = -1
        loaded = {name: _layer_of(name, tally) for name, tally in {**flushed, **closed, **last}.items()}
        missing = lacking(loaded.values())
        self._loaded = set(loaded)
        self._lacking = {name for name, layer in loaded.items() if layer in missing}
        self._ran = {key.name for key in self._counters}
        self._renewed = {}
        for key, (info, counters) in self._counters.items():  # of a scope that was counting
            self._drop_other_width(key.name, {counters.neurons, info.whole or counters.neurons})


def _together(census: Census, later: Census) -> Census:
    """Return the sum of both. For a site that only one of them has whole, return the whole one instead."""
    parts = [name for name in census if name in later and census[name].neurons != later[name].neurons]
    wider = [name for name in parts if later[name].neurons > census[name].neurons]
    return census.without(*wider).merge(later.without(*(name for name in parts if name not in wider)))


def _check_together(flushed: Census, closed: Census, last: Census, history: History, steps: Sequence[int]) -> None:
    """Raise ValueError if the parts of a saved record do not fit each other.

    ``steps`` are the observed ones of the newest closed window and of the open one.
    """
    if any(one >= later for one, later in itertools.pairwise(steps)):
        raise ValueError("the observed steps do not ascend")
    widths = {name: tally.neurons for name, tally in closed.items()}
    parts = [*history.widths.items(), *((name, tally.neurons) for name, tally in last.items())]
    unlike = [name for name, neurons in parts if widths.get(name) != neurons]
    unlike += [name for name, tally in flushed.items() if widths.get(name, tally.neurons) != tally.neurons]
    if unlike:
        raise ValueError(f"{unlike[0]} has different numbers of neurons, or is missing")


def _place(name: str) -> str:
    """Return the layer and units in a site's name; ``""`` if no layer is known."""
    return name.rpartition("/")[0]


def _layer_of(name: str, tally: Tally) -> str:
    """Return the layer that a site needs to be in the model: none, the root, if the user names the tensor."""
    return tally.layer or ("" if tally.place == NAMED_TENSOR else name)


def _listed(names: Collection[str], most: int = 3) -> str:
    shown = ", ".join(list(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more layers"


def scope_state(
    step: int, records: Mapping[str, PhaseRecord], fault: Fault | None, checkpoints: Sequence[int], acts: ActRecord
) -> dict[str, Any]:
    """Return the state of a watch as tensors and primitives.

    Args:
        step: Number of optimizer steps taken. If another rank took more, its number is saved.
        records: Records by phase.
        fault: The error inside Neuronscope that ended the watch, if there was one.
        checkpoints: Steps at which checkpoints were saved, ascending.
        acts: What was done to neurons.
    """
    phases = {name: record.state_dict() for name, record in records.items()}
    step = max([step, *(record.newest_step for record in records.values())])
    state = {"version": _STATE_VERSION, "step": step, "phases": phases, "checkpoints": list(checkpoints)}
    if acts:
        state["acts"] = acts.state_dict()
    return state if fault is None else {**state, "fault": fault.state_dict()}


def is_outdated(state: Any) -> bool:
    """Whether a saved state is from an earlier version of Neuronscope, whose counts are of other neurons.

    >>> is_outdated({"version": 1, "step": 7, "phases": {}}), is_outdated({"version": 2, "step": 7, "phases": {}})
    (True, False)
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    return isinstance(version, int) and not isinstance(version, bool) and version in _OUTDATED_VERSIONS


def split_scope_state(
    state: Mapping[str, Any], policy: Policy
) -> tuple[int, dict[str, Any], Fault | None, list[int], ActRecord]:
    """Check and split what :func:`scope_state` returned.

    Args:
        state: The saved state.
        policy: The thresholds.

    Returns:
        Number of optimizer steps taken, the state of each phase's record, the fault, the steps of checkpoints, and the
        acts. Of a state from an earlier version only the number of steps is taken: see :func:`is_outdated`.

    Raises:
        StateError: The state is not that of a scope, or is from a later version.
    """
    with reading("state of a scope", state):
        version, step, phases = state["version"], integer(state, "step"), dict(mapping(state, "phases"))
        checkpoints = integers(state, "checkpoints") if "checkpoints" in state else []
    if is_outdated(state):
        return step, {}, None, [], ActRecord()
    if version != _STATE_VERSION:
        raise StateError(f"Expected scope state of version {_STATE_VERSION}, but got version {version}.")
    for name, saved in phases.items():
        record = PhaseRecord(policy)
        record.load_state_dict(saved)  # raises if it cannot be loaded
        if record.newest_step > step:
            raise StateError(
                f"Expected the saved state of a scope at step {step}, but its phase {name!r} is of step "
                f"{record.newest_step}."
            )
    acts = ActRecord.from_state(state.get("acts"))
    return step, phases, Fault.from_state(state.get("fault")), sorted(checkpoints), acts
