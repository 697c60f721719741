"""Scope and watch(): the one place that wires attach → count → tally → judge → report."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.hooks import HookManager
from neuronscope.attach.module_paths import model_name
from neuronscope.attach.site_patterns import SitePatterns
from neuronscope.build_report import make_report, not_measured
from neuronscope.count.counters import SiteCounters
from neuronscope.errors import DetachedError, NeuronscopeWarning, NothingToWatchError, UsageError
from neuronscope.judge.verdicts import Policy
from neuronscope.options import Patterns, WatchOptions
from neuronscope.report.fault import Fault
from neuronscope.report.report import Report
from neuronscope.sites import SiteInfo, SiteKey
from neuronscope.tally.census import Census
from neuronscope.tally.distributed.sync import RankSync
from neuronscope.tally.phase_record import PhaseRecord, saved_phases, state_of_phases

__all__ = ["Scope", "watch"]


class Scope:
    """A model that is being watched. Made by :func:`watch`.

    A scope is a context manager: leaving it detaches it. What was counted stays readable afterwards.
    """

    def __init__(self, model: nn.Module, options: WatchOptions) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"Expected argument `model` to be a torch.nn.Module, but got {type(model).__name__}.")
        self.every_n_steps = options.every_n_steps
        self.window_steps = options.window_steps
        self.policy = options.thresholds
        self._ranks = RankSync(together=options.join_ranks)
        self._selection = SitePatterns(options.sites, options.exclude, options.axes)
        self._records: dict[str, PhaseRecord] = {}
        self._phase = "train"
        self._step = 0
        self._detached = False
        self._retired = False
        self._fault: Fault | None = None
        self._pauses = 0
        self._checked = False
        self._model_name = model_name(model)
        registry = Registry(options.activations)
        if registry.finds_nothing(model, options.functional):
            raise NothingToWatchError(
                f"Expected a model with at least one activation, but found none in {self._model_name}: "
                f"{len(list(model.modules()))} modules, none of a known activation class. Register your own classes "
                "with `activations={MyActivation: 'relu-like'}`."
            )
        self._hooks = HookManager(
            model,
            registry=registry,
            new_counters=self._new_counters,
            declared_axis=self._selection.axis,
            functional=options.functional,
            tolerance=self.policy.tolerance,
        )
        self._observe()

    # --- the loop --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Scope:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach(join=error is None)

    @property
    def global_step(self) -> int:
        """Optimizer steps taken since watching began."""
        return self._step

    @property
    def observing(self) -> bool:
        """Whether the step that is running is observed."""
        return self._hooks.observing

    @property
    def detached(self) -> bool:
        """Whether the hooks are off the model, by :meth:`detach` or by a fault of ours."""
        return self._detached or self._retired or self._hooks.failure is not None

    def step(self, step: int | None = None) -> bool:
        """One optimizer step is over.

        Args:
            step: Optimizer steps taken so far, where the caller counts them; by default one more than before.

        Returns:
            Whether that closed a window.

        Raises:
            DetachedError: The scope was detached.
            UsageError: ``step`` is no number of steps.
        """
        self._require_attached("step")
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise UsageError(f"Expected argument `step` to be the number of optimizer steps taken, but got {step!r}.")
        closed = False
        record = self._record("train")
        if self._hooks.observing and self._phase == "train":
            record.note_step(self._step)
            self._hooks.recorder.note_missed_sites()
            self._check_patterns()
        self._step = self._step + 1 if step is None else step
        due = record.is_due(self._step, self.window_steps, lambda: self._ranks.alone)
        if due and (self._ranks.alone or not self._hooks.uneven_inputs.expected):
            self._flush("train")
            closed = record.is_sure() and record.close()
        self._observe()
        return closed

    @contextlib.contextmanager
    def phase(self, name: str, *, join: bool = False, keep: Callable[[], bool] = lambda: True) -> Iterator[Scope]:
        """Count what runs inside as another phase, such as ``val`` or ``test``; each pass is one window of it.

        Args:
            name: The phase's name.
            join: Every rank of a distributed run is here, and each with its own part of the data: count them together.
            keep: Asked at the end: whether this was a pass of that phase at all. If not, it is forgotten.

        Raises:
            DetachedError: The scope was detached.
        """
        self._require_attached("phase")
        if not isinstance(name, str) or not name:
            raise UsageError(f"Expected argument `name` of a phase to be a non-empty string, but got {name!r}.")
        before = self._phase
        self._phase = name
        self._observe()
        try:
            yield self
        finally:
            if not self._detached and name != "train" and name != before:
                if keep():
                    record = self._record(name)
                    record.note_step(self._step)
                    self._flush(name, join=join)
                    record.close()
                else:
                    self._record(name).forget()
            self._phase = before
            self._observe()

    @contextlib.contextmanager
    def paused(self) -> Iterator[Scope]:
        """Count nothing that runs inside."""
        self._pauses += 1
        self._observe()
        try:
            yield self
        finally:
            self._pauses -= 1
            self._observe()

    def open_step(self) -> None:
        """A training step that is no module's forward begins (Lightning's): watch its own functional calls too."""
        if not self.detached:
            self._hooks.open_step()

    def close_step(self) -> None:
        """That training step is over."""
        self._hooks.close_step()

    def detach(self, *, join: bool = True) -> None:
        """Take every hook off the model. Counts stay readable; doing it twice is harmless.

        A window of training that is long enough for the policy by now is closed; a shorter one stays open.

        Args:
            join: In a distributed run, count what is still open together with the other ranks: every rank must detach,
                and waits for those that have more batches. ``False`` where this rank alone stops, after an exception.
        """
        if self._detached:
            return
        self._hooks.detach()
        self._detached = True
        going_on = True
        while going_on:  # of a rank that saw nothing too: the others wait for it
            record = self._flush("train", join=join, done=True)
            if record.is_sure():
                record.close()
            going_on = join and not self._ranks.all_done
        for phase, census in self._ranks.pop_late().items():
            self._record(phase).take(census)
            self._record(phase).close()

    def retire(self, fault: Exception | None = None) -> None:
        """Count no more, after a fault of ours; ``step`` and ``detach`` are still due, so that no other rank waits."""
        if fault is not None and (self._fault is None or self._fault.earlier):
            self._fault = Fault.of(fault, self._step)
        self._hooks.detach()
        self._retired = True

    def _flush(self, phase: str, *, join: bool = True, done: bool = False) -> PhaseRecord:
        record = self._record(phase)
        self._ranks.duplicate = self._hooks.recorder.forward.flow.duplicate
        record.flush(partial(self._ranks.join, phase=phase, done=done) if join else None)
        return record

    def _observe(self) -> None:
        """Decide whether what runs next is counted, and where."""
        if self.detached:
            return
        observing = not self._pauses and (self._phase != "train" or self._is_due())
        hooks = self._hooks
        if not observing and not hooks.observing:
            return
        hooks.recorder.set_phase(self._phase, self._step)
        hooks.set_observing(observing)
        if not observing and not self._pauses:
            hooks.pause(self.every_n_steps - self._step % self.every_n_steps)

    def _is_due(self) -> bool:
        """Whether a multiple of ``every_n_steps`` was reached since a step was last observed; steps may move by two."""
        record = self._records.get("train")
        last = -1 if record is None else record.last_observed_step
        return last < 0 or self._step // self.every_n_steps > last // self.every_n_steps

    def _require_attached(self, what: str) -> None:
        if self._detached:
            raise DetachedError(
                f"Expected a scope that is attached for `{what}()`, but this one was detached. "
                "Call `neuronscope.watch(model)` again."
            )

    # --- what was seen ---------------------------------------------------------------------------------------------

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases of which anything was observed."""
        return tuple(name for name, record in self._records.items() if not record.empty)

    def census(self, phase: str = "train", window: str = "all") -> Census:
        """The exact counts of one phase over one window.

        Args:
            phase: ``train``, or a name given to :meth:`phase`.
            window: ``all`` (everything since watching began), ``last`` (the last closed window) or ``open``.

        In a distributed run, what was not joined yet (of ``all`` and ``open``) is this rank's own. Where ranks share a
        layer's neurons, such a part stands alone, in a tally as narrow as it, or is left out beside what was joined.

        Returns:
            A mapping from site names to tallies, in the order in which the sites ran; empty where nothing was seen.
        """
        return self._seen(phase).census(window)

    def report(self, phase: str = "train") -> Report:
        """What is known of one phase, judged by its newest closed window; print it, or draw it by ``to_…`` methods."""
        record = self._seen(phase)
        return make_report(
            record,
            model=self._model_name,
            phase=phase,
            step=self._step,
            policy=self.policy,
            unseen=not_measured(
                self._hooks.recorder.all_not_measured(), self._hooks.module_sites, record, self._selection.wants
            ),
            exchanges=self._ranks.exchanges,
            fault=self._fault_met(),
        )

    def _seen(self, phase: str) -> PhaseRecord:
        if phase not in self._records and phase not in ("train", "val", "test"):
            known = ", ".join(self._records) or "none"
            raise UsageError(f"Expected `phase` to be one that was observed ({known}), but got {phase!r}.")
        return self._records.get(phase) or PhaseRecord(self.policy)

    def _fault_met(self) -> Fault | None:
        failure = self._hooks.failure
        return self._fault if failure is None else Fault.of(failure, self._hooks.recorder.step)

    # --- saving ----------------------------------------------------------------------------------------------------

    def state_dict(self, *, join: bool = False) -> dict[str, Any]:
        """Everything counted so far, as tensors and primitives, fit for any checkpoint.

        Args:
            join: Every rank of a distributed run is here: count what is open together first, so that any number of
                ranks can go on from any rank's state. Otherwise what is open is this rank's own.
        """
        if join:
            self._flush("train")
        return state_of_phases(self._step, self._records, self._fault_met())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the counts and the history of a saved scope; the model may have changed.

        Raises:
            StateError: The state is not one of a scope, or of a later version.
        """
        self._step, phases, self._fault = saved_phases(state, self.policy)
        for name, saved in phases.items():
            self._record(name).load_state_dict(saved)
        self._observe()

    # --- wiring ----------------------------------------------------------------------------------------------------

    def _record(self, phase: str) -> PhaseRecord:
        if phase not in self._records:
            self._records[phase] = PhaseRecord(self.policy)
        return self._records[phase]

    def _new_counters(
        self, phase: str, key: SiteKey, info: SiteInfo, neurons: int, device: torch.device
    ) -> SiteCounters | None:
        if not self._selection.register(key.name):
            return None
        return self._record(phase).add_site(key, info, neurons, device)

    def _check_patterns(self) -> None:
        """After the first observed step: patterns that matched nothing, or a model in which nothing was seen."""
        if self._checked:
            return
        self._checked = True
        for message in self._selection.unmatched_warnings(self._model_name):
            warnings.warn(message, NeuronscopeWarning, stacklevel=3)


def watch(
    model: nn.Module,
    *,
    every_n_steps: int = 1,
    sites: Patterns = None,
    exclude: Patterns = None,
    functional: bool = True,
    axes: Mapping[str, int] | None = None,
    policy: Policy | None = None,
    activations: Mapping[Any, Activation | str] | None = None,
    window_steps: int = 100,
    join_ranks: bool = True,
) -> Scope:
    """Watch a model while it trains, in any PyTorch loop.

    Args:
        model: The model; wrapped (DDP, ``torch.compile``) or not.
        every_n_steps: Observe every n-th optimizer step; the others cost nothing.
        sites: Glob patterns on site names: only these are counted.
        exclude: Glob patterns on site names: these are not.
        functional: Watch functional activations (``F.relu``) and gated products (``silu(g) * u``) too.
        axes: Glob patterns on site names → the dimension of the neurons, where it is not what was inferred.
        policy: The thresholds; see :class:`neuronscope.Policy`.
        activations: Activation classes or functions of your own → their :class:`neuronscope.Activation` or kind. A
            function of plain Python is decorated with ``@torch.overrides.wrap_torch_function(lambda x: (x,))``, so
            that its calls are seen.
        window_steps: Optimizer steps of a window of training at least; it stays open until its examples suffice for the
            policy.
        join_ranks: In a distributed run, count all ranks together: at the end of each window and when the scope is
            left, with collectives in which every rank takes part. Reading a census or a report never waits for others.
            In torch's ``Join``, where ranks run out of data one after another, only when the scope is left.

    Returns:
        A :class:`Scope`. Call :meth:`Scope.step` after each optimizer step; leave it (``with``) or
        :meth:`Scope.detach` it when done.

    Raises:
        UsageError: An argument is not what is expected.
        NothingToWatchError: The model has no activation.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> _ = model[0].bias.data.copy_(torch.tensor([-100.0, 100.0, 100.0]))
    >>> with watch(model) as scope:
    ...     model(torch.ones(8, 4)).sum().backward()
    ...     _ = scope.step()
    >>> scope.census("train")["1"].zero_output_fraction.tolist()
    [1.0, 0.0, 0.0]
    """
    options = WatchOptions(
        every_n_steps=every_n_steps,
        sites=sites,
        exclude=exclude,
        functional=functional,
        axes=axes,
        policy=policy,
        activations=activations,
        window_steps=window_steps,
        join_ranks=join_ranks,
    )
    return Scope(model, options)
