"""Watch a model: connects attach → count → tally → judge → report. Nothing else knows all of them."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.compiling import hidden, skip_frames
from neuronscope.attach.copies import WeightDigest
from neuronscope.attach.hand_split import HandSplit
from neuronscope.attach.hooks import HookManager
from neuronscope.attach.layer_names import lacking_layers
from neuronscope.attach.module_paths import model_name
from neuronscope.attach.named_tensors import NamedTensor
from neuronscope.attach.optimizer_steps import Optimizers, OptimizerSteps
from neuronscope.attach.site_finder import Names
from neuronscope.attach.site_patterns import SitePatterns
from neuronscope.attach.thread_phases import ThreadPhases
from neuronscope.build_report import INFERENCE_APART, MASK_IGNORED, ONLY_INFERENCE, UNCALLED, make_report, not_measured
from neuronscope.count.backends import backend_notes
from neuronscope.count.counters import SiteCounters
from neuronscope.errors import DetachedError, NothingToWatchError, UsageError, warn_user
from neuronscope.judge.verdicts import Policy
from neuronscope.options import Examples, Mask, Patterns, ProcessGroup, Shards, WatchOptions
from neuronscope.report.acts import Act
from neuronscope.report.fault import Fault
from neuronscope.report.report import Report
from neuronscope.sites import INFERENCE, ReaderColumns, SiteInfo, SiteKey
from neuronscope.tally.act_record import ActRecord
from neuronscope.tally.census import Census
from neuronscope.tally.distributed.sync import RankSync
from neuronscope.tally.phase_record import PhaseRecord, is_outdated, scope_state, split_scope_state
from neuronscope.tally.recorded_phases import RecordedPhases
from neuronscope.tally.series import SERIES, Series

__all__ = ["Scope", "only_counted_by", "watch"]

#: Of more checkpoints, every second one of the older is forgotten.
_MOST_CHECKPOINTS = 1000
#: After so many observed steps in which the model was not seen to run, a warning says so.
_STEPS_WITHOUT_MODEL = 3


class Scope:
    """Watch one model; :func:`watch` makes a scope.

    A scope is a context manager that detaches itself on exit. Its counts stay readable afterwards.

    Attributes:
        every_n_steps: As of :func:`watch`; and so are the next two.
        window_steps: See there.
        policy: See there.
        act_record: What was done to neurons, and what was counted before.
        acting: Whether every rank calls :meth:`agrees` whenever a step closes a window. Callbacks that revive set it.
        before_phase: Called when a phase begins, before anything of it runs. Callbacks that pause training set it.

    Args:
        model: The model.
        options: The options, as of :func:`watch`.
        optimizer: The optimizer whose steps are counted, or several: see :func:`watch`. By default :meth:`step` is
            called.

    Raises:
        UsageError: ``model`` is not a module, or ``optimizer`` is no optimizer.
        NothingToWatchError: The model has no activation.
    """

    @hidden
    def __init__(self, model: nn.Module, options: WatchOptions, *, optimizer: Optimizers | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"Expected argument `model` to be a torch.nn.Module, but got {type(model).__name__}.")
        self.every_n_steps = options.every_n_steps
        self.window_steps = options.window_steps
        self.policy = options.thresholds
        self._claims_bounds = options.examples is not None
        self._split = HandSplit(options.shards)
        self._weights = WeightDigest(model, self._split.holds)
        self._ranks = RankSync(
            together=options.join_ranks, process_group=options.process_group, digest=self._weights.digest
        )
        self._patterns = SitePatterns(options.sites, options.exclude, options.axes)
        self._checkpoints: list[int] = []  # steps at which checkpoints were saved
        self._series = Series()
        self._applied: tuple[str, int, bool] | None = None  # phase, step, and whether they are observed
        self._lock = threading.RLock()  # of the records, for threads that step and read
        self._step = 0
        self._decided = 0, True  # the step, and whether training is observed in it
        self._quiet_until = 0  # before this step nothing is observed and no window is due; 0 if that is not known
        self._detached = False
        self._retired = False
        self._fault: Fault | None = None
        self._checked = False
        self._uncalled_steps = 0  # observed steps at which the model was not called
        self._steps_without_model = 0
        self._model_name = model_name(model)
        self._model = weakref.ref(model)
        self.act_record = ActRecord()
        self.acting = False
        self.before_phase: Callable[[], None] | None = None
        registry = Registry(options.activations)
        if registry.finds_nothing(model, options.functional):
            raise NothingToWatchError(
                f"Expected a model with at least one activation, but found none in {self._model_name}: "
                f"{len(list(model.modules()))} modules, none of a known activation class. Register your own classes "
                "with `activations={MyActivation: 'relu-like'}`."
            )
        self._optimizer_steps = OptimizerSteps(optimizer)
        self._hooks = HookManager(
            model,
            registry=registry,
            new_counters=self._new_counters,
            declared_axis=self._patterns.axis,
            functional=options.functional,
            tolerance=self.policy.tolerance,
            examples=options.examples,
            mask=options.mask,
            observe=self._apply,
        )
        recorder = self._hooks.recorder
        recorder.sites.split = self._split
        self._threads = ThreadPhases(self._hooks.thread, lambda: recorder.got_gradients)
        self._phases = RecordedPhases(
            self.policy,
            self._ranks,
            lock=recorder.lock,
            describe=recorder.sites.current_info,
            release=recorder.forget_phase,
            forget=recorder.unmeasured.forget_ran,
        )
        self._hooks.note_weights = self._note_weights
        self._counts_optimizer = bool(self._optimizer_steps)
        self._optimizer_steps.attach(self._count_step, fail=self._hooks.fail)
        self._observe()
        _scopes.add(self)

    def __enter__(self) -> Scope:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach(join=error is None)

    @property
    def model(self) -> nn.Module | None:
        """The watched model; ``None`` if it was collected."""
        return self._model()

    @property
    def global_step(self) -> int:
        """Optimizer steps taken since watching began."""
        return self._step

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases in which anything was observed."""
        return tuple(name for name, record in self._phases.items() if not record.empty)

    @property
    def acts(self) -> tuple[Act, ...]:
        """What was done to neurons by :func:`neuronscope.revive`, oldest first."""
        return tuple(self.act_record.acts)

    @property
    def observing(self) -> bool:
        """Whether the current step is observed."""
        return self._hooks.observing

    @property
    def quiet(self) -> bool:
        """Whether nothing is observed before the next step, as far as is known. Callbacks then save the work."""
        return self._step < self._quiet_until and not self._threads.running

    @property
    def detached(self) -> bool:
        """Whether the hooks are off the model, because of :meth:`detach` or after an error inside Neuronscope."""
        return self._detached or self._retired or self._hooks.failure is not None

    def step(self, step: int | None = None) -> bool:
        """Count one optimizer step; call this after each one.

        Args:
            step: Number of optimizer steps taken so far, if the caller counts them; by default one more than before.

        Returns:
            Whether this closed a window.

        Raises:
            DetachedError: The scope was detached.
            UsageError: ``step`` is not an integer of at least 0, or the steps of ``optimizer=`` are counted already.
        """
        if self._detached:
            self._require_attached("step")
        if self._counts_optimizer:
            raise UsageError(
                "Expected no call of `step()`, because the steps of the optimizer given as `optimizer=` are counted: "
                "leave out one of the two, or each step counts twice."
            )
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise UsageError(f"Expected argument `step` to be the number of optimizer steps taken, but got {step!r}.")
        return self._count_step(step)

    @contextlib.contextmanager
    def phase(
        self,
        name: str,
        *,
        join: bool = False,
        keep: Callable[[], bool] = lambda: True,
        ends: Callable[[], bool] = lambda: True,
    ) -> Iterator[Scope]:
        """Count what runs inside as another phase, such as ``val`` or ``test``; each pass is one window of that phase.

        Use one name for all passes of a kind: the counts of the 64 phases that ended last are kept.

        Args:
            name: The phase's name.
            join: Add up the counts of all ranks at the end. Every rank of the distributed run must then run this phase
                on its own part of the data. For callbacks that know this from their trainer.
            keep: Called at the end; if it returns ``False``, the counts of this pass are discarded. For callbacks that
                only know afterwards whether this was a complete pass, such as Lightning's sanity check.
            ends: Called at the end; if it returns ``False``, the pass is not over, and the next one continues its
                window. For passes that come in many small parts, such as rollouts between gradient steps.

        Raises:
            DetachedError: The scope was detached.
            UsageError: ``name`` is not a non-empty string.
        """
        self._require_attached("phase")
        if not isinstance(name, str) or not name:
            raise UsageError(f"Expected argument `name` of a phase to be a non-empty string, but got {name!r}.")
        if self.before_phase is not None:
            self.before_phase()
        is_pass = False
        try:
            with self._threads.inside(name) as is_pass:
                self._hooks.put_back(self._step)
                self._observe()
                yield self
        finally:
            if is_pass and not self._detached and (join or self._threads.is_counted()):
                self._end_phase(name, join, keep, ends)
            self._observe()

    @contextlib.contextmanager
    def paused(self) -> Iterator[Scope]:
        """Count nothing that runs inside: a context manager for forward passes that are not training.

        Callbacks use it too, around calls of the model that belong to no phase.
        """
        try:
            with self._threads.pause():
                self._observe_if_due()
                yield self
        finally:
            self._observe_if_due()

    def count(
        self, name: str, activations: Tensor, pre: Tensor | None = None, *, axis: int = -1, kind: str = "sparse"
    ) -> None:
        """Count a tensor as a site, wherever it was made: in a forward, in ``encode()``, in the training loop.

        It is counted like every other site: by phase and window, over ranks, in saved states, and in observed steps
        only. If it cannot be counted, a warning says so once, the report lists it, and the training goes on. After
        :meth:`detach` this does nothing.

        Args:
            name: Name of the site. It must not be that of a module or of another site.
            activations: What the next layer reads, such as the latents of a sparse autoencoder, ``(…, N)``. A neuron is
                an index of dimension ``axis``.
            pre: The pre-activation, of the same shape, at which zero gradients are counted; by default the tensor
                itself, if it requires a gradient.
            axis: The dimension that indexes the neurons.
            kind: The kind of activation: ``sparse`` for what is meant to be zero nearly always, so that no neuron is
                called dormant; or ``relu-like``, ``smooth``, ``leaky``, ``saturating`` or ``gated``.

        Raises:
            UsageError: ``name``, ``axis`` or ``kind`` has a wrong type or value.

        >>> import torch
        >>> sae = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with watch(sae) as scope:
        ...     scope.count("latents", torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 2.0]]))
        ...     _ = scope.step()
        >>> scope.census("train")["latents"].zero_outputs.tolist()
        [2, 0, 1]
        """
        self._hooks.named.count(NamedTensor(name, axis, kind), activations, pre)

    @hidden
    def report(self, phase: str = "train") -> Report:
        """Return a report on one phase, judged by its newest closed window; print it or use its ``to_…`` methods.

        If every forward of training began without gradients, the report on ``train`` is one on ``inference``, and says
        so.

        Raises:
            UsageError: No such phase was observed.
        """
        with self._lock:
            return self._report(phase)

    @hidden
    def census(self, phase: str = "train", window: str = "all") -> Census:
        """Return the exact counts of one phase over one window.

        In a distributed run, ``all`` and ``open`` contain counts that are not joined yet; these are of this rank only.
        If ranks share a layer's neurons, such counts cover this rank's neurons only. They are then left out, unless
        nothing was joined for that layer yet; in that case its tally has only this rank's neurons.

        Args:
            phase: ``train``; ``inference``, for forwards that began without gradients in that phase; or a name given to
                :meth:`phase`.
            window: ``all`` (everything since watching began), ``last`` (the newest closed window) or ``open`` (the
                window that is running).

        Returns:
            A mapping from site names to tallies, in the order in which the sites first ran; empty if nothing was
            observed.

        Raises:
            UsageError: No such phase was observed, or there is no such window.
        """
        with self._lock:
            return self._phases.observed(phase).census(window)

    def not_neurons(self) -> dict[str, str]:
        """Return where an activation function was applied to what are no neurons, each with the reason.

        Examples are a loss, attention scores, a learned threshold: nothing is counted there.
        """
        return self._hooks.recorder.unmeasured.not_neurons()

    @hidden
    def close_window(self, *, acting: bool = False) -> Census:
        """Close the open window of training now, if it has enough examples for the policy. Call it between two steps.

        In a distributed run every rank must call this, because the counts of all are added up.

        Args:
            acting: Whether :meth:`agrees` is called next. For :func:`neuronscope.revive`.

        Returns:
            The newest closed window, the same on every rank; empty if none was closed so far.

        Raises:
            DetachedError: The scope was detached.
        """
        self._require_attached("revive" if acting else "close_window")
        with self._lock:
            record = self._flush("train", acting=acting)
            if record.census("open").last_step >= 0 and self._phases.close_windows(final=True):
                record.begin_at(self._step)
            self._observe()
            return self.closed_window

    def note_checkpoint(self) -> None:
        """Note that a checkpoint is saved at the current step, so that reports name the last one before deaths.

        The callbacks do this.
        """
        if self._checkpoints[-1:] != [self._step]:
            self._checkpoints = [step for step in self._checkpoints if step < self._step] + [self._step]
        if len(self._checkpoints) > _MOST_CHECKPOINTS:
            del self._checkpoints[: _MOST_CHECKPOINTS // 2 : 2]

    def note_metrics(self, **values: float) -> None:
        """Note what training logged at the current step, so that reports show it beside the deaths.

        The callbacks do this.

        Args:
            **values: ``learning_rate``, ``loss`` and ``gradient_norm``, as far as they are known.

        Raises:
            UsageError: There is no such series.
        """
        if unknown := values.keys() - SERIES:
            raise UsageError(f"Expected {', '.join(f'`{name}`' for name in SERIES)}, but got `{min(unknown)}`.")
        self._series.note(self._step, values)

    @hidden
    def state_dict(self, *, join: bool = False) -> dict[str, Any]:
        """Return everything counted so far as tensors and primitives, which any checkpoint can hold.

        Args:
            join: First add up the open counts of all ranks of a distributed run, which all must call this. Then any
                number of ranks can resume from any rank's state. Otherwise the open counts are this rank's only.
        """
        with self._lock:
            if join:
                self._flush("train")
            checkpoints, acts = self._checkpoints, self.act_record
            state = scope_state(self._step, self._phases, self._current_fault(), checkpoints, acts)
            return {**state, "series": self._series.state_dict()}

    @hidden
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the counts and the history of a saved scope. Layers of the model may have changed since.

        Of a state that an earlier version of Neuronscope saved, only the number of steps is taken: the counts begin
        anew, and a warning says so.

        Raises:
            StateError: The state is not that of a scope, or is from a later version.
        """
        with self._lock:
            self._load(state)

    @hidden
    def detach(self, *, join: bool = True) -> None:
        """Remove every hook from the model. Counts stay readable; a second call does nothing.

        The open window of training is closed if it has enough examples for the policy; otherwise it stays open.

        Args:
            join: In a distributed run, add up the open counts of all ranks. Every rank must then detach, and each waits
                for the ranks that have more batches: behind torch's ``Join`` then, not inside it. ``False`` if only
                this rank stops, for example after an exception.
        """
        with self._lock:
            self._end(join)

    # The callback interface: for those who call a training step themselves.

    def open_step(self, *, in_forward: bool = False, inputs: tuple[Any, ...] = ()) -> None:
        """Start to watch functional activations that a training step calls outside any module's forward.

        For the Lightning callback: a ``LightningModule.training_step`` is not a forward, but may call ``F.relu``.

        Args:
            in_forward: Whether the step runs in place of the model's forward, as Lightning's does under DDP. Modules
                that the step calls without gradients are then inference.
            inputs: What the step is given, such as its batch. Its examples then count once at each site. Otherwise they
                are those of each module that the step calls.
        """
        if not self.detached:
            self._hooks.open_step(inputs, in_forward=in_forward)

    def close_step(self) -> None:
        """End the training step that :meth:`open_step` began. For the Lightning callback."""
        self._hooks.close_step()

    def pause_step(self) -> None:
        """Do not look at what the training step calls until :meth:`resume_step`: it runs no part of the model.

        Calling this is optional; it saves time. Setting the gradients to zero takes two calls for each weight.
        """
        self._hooks.entered.suspend()

    def resume_step(self) -> None:
        """Look at what the training step calls again, after :meth:`pause_step`."""
        self._hooks.entered.resume()

    @hidden
    def share_examples(self, examples: int | None) -> None:
        """Count the examples of all training forwards until the next call once at each site: all see the same ones.

        For training loops that run several networks on one batch, or one network several times. ``None`` = each forward
        has its own, as the option ``examples`` counts them.
        """
        with self._lock:
            if not self.detached:
                self._hooks.recorder.forward.share_examples(examples)

    def restart_at_parts(self) -> None:
        """Let a new pass begin whenever a part of the model runs again, as it does with the model's own forward.

        For agents, which call the parts of their networks one by one. Otherwise, two passes between two steps look like
        one pass that uses each layer twice. Do not call this for a model that uses one part several times in a pass.
        """
        self._hooks.recorder.forward.restarts_at_parts = True

    def retire(self, fault: Exception | None = None) -> None:
        """Stop counting for good, but stay usable. For callbacks, after an error inside Neuronscope or in the callback.

        The callback must still call :meth:`step` and :meth:`detach`, so that no other rank waits for this one. Every
        later report shows the error.
        """
        if fault is not None and (self._fault is None or self._fault.earlier):
            self._fault = Fault.from_error(fault, self._step)
        self._hooks.detach()
        self._retired = True

    # For those who act on neurons: `neuronscope.revive` and `neuronscope.shrink`.

    @property
    def closed_window(self) -> Census:
        """The newest closed window of training; empty if none was closed so far."""
        return self._phases.record("train").census("last")

    @property
    def closed_windows(self) -> Census:
        """The sum of all closed windows of training."""
        return self._phases.record("train").closed

    def note_act(self, act: Act) -> None:
        """Record an act. For :func:`neuronscope.revive`."""
        with self._lock:
            self.act_record.note(act, self.closed_windows[act.site])

    def agrees(self, number: int) -> bool:
        """Return whether the number, from 0 to 2**31, is the same on all ranks; all must call this."""
        return self._ranks.agree(number)

    @hidden
    def layer_readers(self, layer: str) -> tuple[tuple[ReaderColumns, ...], tuple[str, ...]]:
        """Return which columns read a layer's units before any activation, and how else they are read."""
        return self._hooks.recorder.sites.layer_readers(layer)

    def _count_step(self, step: int | None = None) -> bool:
        with self._lock:
            now = self._step + 1 if step is None else step
            quiet = now < self._quiet_until and not self._hooks.recorder.clock.captured
            if quiet and not self._threads.running:
                self._step = now
                return False
            return self._count_one_step(now)

    def _count_one_step(self, step: int) -> bool:
        hooks, record, inference = self._hooks, self._phases.record("train"), self._phases.inference
        if hooks.observing:
            if hooks.note_weights is not None:
                self._end_first_step()
            if self._threads.state()[0] == "train":
                self._uncalled_steps += hooks.recorder.was_not_called()
                record.note_step(self._step)
                if inference is not None:
                    inference.note_step(self._step)
                hooks.recorder.sites.note_missed_sites(hooks.recorder.step)
                if not self._checked:
                    self._check_patterns()
        self._step = step
        if hooks.recorder.clock.captured:
            hooks.recorder.clock.set(step)
        closed = step - record.checked_step >= self.window_steps and self._close_if_due()
        self._observe()
        if not hooks.observing and self._ranks.alone and (inference is None or not record.empty):
            due = record.checked_step + (self.window_steps << self._ranks.missed)
            if due <= step:  # the window has too few examples, and gets no more until a step is observed
                due = sys.maxsize
            self._quiet_until = min(self._phases.next_observed(self.every_n_steps), due)
        return closed

    @hidden
    def _close_if_due(self) -> bool:
        """Flush and close the open windows, if they are due, and return whether this closed one."""
        if not self._phases.are_windows_due(self._step, self.window_steps):
            return False
        self._flush("train", acting=self.acting)
        return self._phases.close_windows()

    @hidden
    def _end_phase(self, name: str, join: bool, keep: Callable[[], bool], ends: Callable[[], bool]) -> None:
        """End a pass of a phase."""
        with self._lock:
            record = self._phases.record(name)
            if keep():
                record.note_step(self._step)
                if not ends():
                    return
                self._flush(name, join=join)
                record.close()
            else:
                record.discard_running()
            self._phases.note_ended(name, running=self._threads.running)

    @hidden
    def _flush(self, phase: str, *, join: bool = True, acting: bool = False) -> PhaseRecord:
        """Flush a phase; see :meth:`neuronscope.tally.recorded_phases.RecordedPhases.flush`."""
        self._tell_ranks(acting=acting)
        return self._phases.flush(phase, join=join)

    def _tell_ranks(self, *, acting: bool = False) -> None:
        self._ranks.duplicate = self._hooks.recorder.forward.flow.duplicate or self._split.duplicate
        self._ranks.acting = acting

    def _observe(self) -> None:
        """Decide whether the next forward passes are counted, and in which phase and step."""
        with self._lock:
            self._quiet_until = 0
            self._decided = self._step, self._step >= self._phases.next_observed(self.every_n_steps)
            self._hooks.change()

    def _observe_if_due(self) -> None:
        """Decide it again, unless nothing is observed now and before a later step, paused or not."""
        if self._threads.running or self._step >= self._quiet_until:
            self._observe()

    def _apply(self) -> None:
        """Set the phase and the step of the counted thread, and whether they are observed."""
        hooks = self._hooks
        if self._detached or self._retired or hooks.failure is not None:
            return
        phase, paused = self._threads.state()
        step, due = self._decided  # not as they are: another thread may be in the middle of a step
        observing = not paused and (phase != "train" or due)
        if (phase, step, observing) != self._applied and (observing or hooks.observing):
            self._applied = phase, step, observing
            hooks.recorder.set_phase(phase, step)
            hooks.set_observing(observing)
        if not due and not self._threads.running:
            hooks.pause(step, self.every_n_steps - step % self.every_n_steps)

    def _end(self, join: bool) -> None:
        if self._detached:
            return
        self._hooks.detach()
        self._optimizer_steps.remove()
        self._detached = True
        self._phases.finish(join=join, before_flush=self._tell_ranks)

    def _report(self, phase: str) -> Report:
        record, inference = self._phases.observed(phase), self._phases.inference
        note = ""
        if phase == "train" and inference is not None and not inference.empty:
            note = ONLY_INFERENCE if record.empty else INFERENCE_APART
            if record.empty:
                phase, record = INFERENCE, inference
        unmeasured = self._hooks.recorder.unmeasured
        ignored_mask = MASK_IGNORED if self._hooks.recorder.ignored_mask else ""
        uncalled = UNCALLED.format(self._uncalled_steps) if self._uncalled_steps else ""
        return make_report(
            record,
            model=self._model_name,
            phase=phase,
            step=self._step,
            policy=self.policy,
            unseen=not_measured(
                self._hooks.recorder.sites.all_not_measured(compiled=self._hooks.recorder.compiled),
                phase,
                [path for path in self._hooks.module_sites if path not in unmeasured.idle_experts],
                unmeasured.phases_of_modules,
                self._patterns.wants,
            ),
            notes=(note, self._ranks.note, ignored_mask, uncalled, *backend_notes()),
            exchanges=self._ranks.exchanges,
            fault=self._current_fault(),
            acts=self.act_record.acts,
            checkpoints=self._checkpoints,
            series=self._series.points(),
            claims_bounds=self._claims_bounds,
        )

    def _current_fault(self) -> Fault | None:
        failure = self._hooks.failure
        return self._fault if failure is None else Fault.from_error(failure, self._hooks.recorder.step)

    def _load(self, state: Mapping[str, Any]) -> None:
        self._step, phases, self._fault, self._checkpoints, self.act_record = split_scope_state(state, self.policy)
        self._series = Series.from_state(state.get("series"))
        if is_outdated(state):
            self._phases.record("train").begin_at(self._step)
            warn_user(
                "The saved counts are from an earlier version of Neuronscope, in which a neuron was an index of one "
                f"call; now it is a unit of a layer. The counts begin anew at step {self._step}."
            )
        self._phases.load(phases, self._lacking_layers, self._threads.running)
        self._applied = None
        self._observe()

    def _lacking_layers(self, layers: Iterable[str]) -> Collection[str]:
        model = self._model()
        return () if model is None or self._detached else lacking_layers(model, layers)

    def _new_counters(
        self, phase: str, key: SiteKey, info: SiteInfo, names: Names, neurons: int, device: torch.device
    ) -> SiteCounters | None:
        if not self._patterns.register(*names):
            return None
        return self._phases.record(phase).add_site(key, info, neurons, device)

    def _note_weights(self) -> None:
        """Note the weights with which training begins: ranks of which none is the same hold no copies."""
        if self._threads.name == "train" and not self._ranks.alone:
            self._weights.note()

    def _end_first_step(self) -> None:
        if not self._weights.noted:  # only parts of the model ran, or a compiled one
            self._note_weights()
        self._hooks.note_weights = None

    def _check_patterns(self) -> None:
        """Warn about patterns that match no site: after the first observed step in which the model is seen to run."""
        recorder = self._hooks.recorder
        ran = recorder.forward.number > 0 or bool(recorder.unmeasured.phases_of_modules)
        if self._hooks.thread.elsewhere() is not None and (not ran or self._hooks.is_busy()):
            return  # the counted thread may be in the middle of its first forward, while this one steps
        self._steps_without_model += not ran
        if self._checked or (not ran and self._steps_without_model < _STEPS_WITHOUT_MODEL):
            return
        self._checked = True
        for message in self._patterns.unmatched_warnings(self._model_name, ran=ran):
            warn_user(message)

    def _require_attached(self, method: str) -> None:
        if self._detached:
            raise DetachedError(
                f"Expected a scope that is attached for `{method}()`, but this one was detached. "
                "Call it inside the `with` block of `neuronscope.watch(model)`."
            )


_scopes: weakref.WeakSet[Scope] = weakref.WeakSet()


@contextlib.contextmanager
def only_counted_by(scope: Scope, model: nn.Module) -> Iterator[None]:
    """Pause every other scope that watches a module of a model: a scan within a training is not a part of it.

    Args:
        scope: The scope that counts on.
        model: The model.
    """
    modules = set(model.modules())
    with contextlib.ExitStack() as pauses:
        for other in tuple(_scopes):
            watched = other._model()
            if other is not scope and watched is not None and not modules.isdisjoint(watched.modules()):
                pauses.enter_context(other.paused())
        yield


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
    examples: Examples = "auto",
    mask: Mask = None,
    window_steps: int = 100,
    join_ranks: bool = True,
    process_group: ProcessGroup = None,
    shards: Shards | None = None,
    optimizer: Optimizers | None = None,
) -> Scope:
    """Count zero outputs and zero gradients of a model's neurons while it trains, in any PyTorch loop.

    Args:
        model: The model, wrapped (DDP, ``torch.compile``) or not.
        every_n_steps: Observe every n-th optimizer step; the other steps cost nothing.
        sites: Glob patterns; only sites that match are counted. It matches a site's name (``"*/relu"``), the path
            of its layer, or the place of its activation: the path of the module, or ``block.relu()``.
        exclude: Glob patterns, as in ``sites``; matching sites are not counted.
        functional: Also watch functional activations (``F.relu``) and gated products (``silu(g) * u``).
        axes: A mapping from glob patterns, as in ``sites``, to the dimension that indexes the neurons, for sites whose
            neurons are not known or were found wrongly.
        policy: The thresholds; see :class:`neuronscope.Policy`.
        activations: A mapping from your own activation classes or functions to their :class:`neuronscope.Activation`
            or kind. Decorate a function written in Python with
            ``@torch.overrides.wrap_torch_function(lambda x: (x,))``, so that its calls are seen.
        examples: How many independent examples a forward is given, for the bound of every dead verdict. ``auto`` counts
            the rows (dimension 0) of the first tensor; an integer is the dimension to take instead; a function of the
            forward's ``(args, kwargs)`` returns the number. ``None`` claims no bound: for rows that depend on each
            other, such as the steps of one trajectory. See ``docs/definitions.md``.
        mask: Positions that are not counted, such as padding: the name of an argument of the model's forward
            (``"attention_mask"``), or a function of ``(args, kwargs)``, that gives a tensor ``(B, T)``, true or 1 for
            a position that counts. It applies at sites whose tensor begins with these dimensions, and not to the rows
            that experts are given.
        window_steps: Minimum number of optimizer steps in a window of training. The window then stays open until each
            layer that ran in it has enough examples for the policy, or one has four times as many.
        join_ranks: In a distributed run, add up the counts of all ranks that hold copies of the model, at the end of
            each window and when the scope detaches, with collectives that every rank takes part in. Ranks hold copies
            if their weights were the same, bit for bit, in the first step. If some rank is not ready at the end of a
            window (it skipped steps, or ran out of data), the counts are joined later. Reading a census or a report
            never waits for other ranks.
        process_group: The ranks that join their counts: a ``torch.distributed.ProcessGroup`` that is used for nothing
            else meanwhile, such as a new one, or a function that returns it, if it is made later. By default all ranks,
            on a group that the library makes.
        shards: Which layers ranks share by hand, in plain tensors; see :class:`neuronscope.Shards`. What distributed
            tensors share is known without it.
        optimizer: The optimizer whose steps are the steps of the training; then do not call :meth:`Scope.step`. Of
            several (a GAN) those of the first count. A step that ``GradScaler`` skips is none.

    Returns:
        A :class:`Scope`. Call :meth:`Scope.step` after each optimizer step, unless you gave the optimizer. When done,
        leave its ``with`` block or call :meth:`Scope.detach`.

    Raises:
        UsageError: An argument has a wrong type or value.
        NothingToWatchError: The model has no activation.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> _ = model[0].bias.data.copy_(torch.tensor([-100.0, 100.0, 100.0]))
    >>> with watch(model) as scope:
    ...     model(torch.ones(8, 4)).sum().backward()
    ...     _ = scope.step()
    >>> scope.census("train")["0/relu"].zero_output_fraction.tolist()
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
        examples=examples,
        mask=mask,
        window_steps=window_steps,
        join_ranks=join_ranks,
        process_group=process_group,
        shards=shards,
    )
    return Scope(model, options, optimizer=optimizer)


# Every module that a hook can call is loaded by now.
skip_frames(module for name, module in list(sys.modules.items()) if name.startswith("neuronscope."))
