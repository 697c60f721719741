"""Watch a model: connects attach → count → tally → judge → report. Nothing else knows all of them."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.compiling import hidden, skip_frames
from neuronscope.attach.copies import WeightDigest
from neuronscope.attach.forward import INFERENCE
from neuronscope.attach.hooks import HookManager
from neuronscope.attach.layer_names import lacking_layers
from neuronscope.attach.module_paths import model_name
from neuronscope.attach.named_tensors import NamedTensor
from neuronscope.attach.optimizer_steps import Optimizers, OptimizerSteps
from neuronscope.attach.site_finder import Names
from neuronscope.attach.site_patterns import SitePatterns
from neuronscope.build_report import INFERENCE_APART, MASK_IGNORED, ONLY_INFERENCE, make_report, not_measured
from neuronscope.count.counters import SiteCounters
from neuronscope.errors import DetachedError, NothingToWatchError, UsageError, warn_user
from neuronscope.judge.verdicts import Policy
from neuronscope.options import Examples, Mask, Patterns, ProcessGroup, WatchOptions
from neuronscope.report.acts import Act
from neuronscope.report.fault import Fault
from neuronscope.report.report import Report
from neuronscope.sites import ReaderColumns, SiteInfo, SiteKey
from neuronscope.tally.act_record import ActRecord
from neuronscope.tally.census import Census
from neuronscope.tally.distributed.sync import RankSync
from neuronscope.tally.phase_record import PhaseRecord, is_outdated, scope_state, split_scope_state
from neuronscope.tally.series import SERIES, Series

__all__ = ["Scope", "watch"]

#: Maximal number of phases whose counts are kept, without `train` and `inference`, and of those that keep the buffers
#: that they count with. The phases that ended last are kept.
_MOST_PHASES, _MOST_COUNTING = 64, 8
#: Of more checkpoints, every second one of the older is forgotten.
_MOST_CHECKPOINTS = 1000
#: After so many observed steps in which the model was not seen to run, a warning says so.
_STEPS_WITHOUT_MODEL = 3


class Scope:
    """Watch one model. :func:`watch` makes a scope.

    A scope is a context manager that detaches itself on exit. Its counts stay readable afterwards.

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
        self._weights = WeightDigest(model)
        self._ranks = RankSync(
            together=options.join_ranks, process_group=options.process_group, digest=self._weights.digest
        )
        self._patterns = SitePatterns(options.sites, options.exclude, options.axes)
        self._records: dict[str, PhaseRecord] = {}
        self._ended: dict[str, bool] = {}  # phases, the one that ended last is the last; whether each has its buffers
        self._checkpoints: list[int] = []  # steps at which checkpoints were saved
        self._series = Series()
        self._forgotten = 0  # number of phases whose counts are no longer kept
        self._home = threading.get_ident()  # its phase is that of all threads that have none of their own
        self._phases: dict[int, str] = {}  # by thread
        self._pauses: Counter[int] = Counter()  # by thread
        self._applied: tuple[str, int, bool] | None = None  # phase, step, and whether they are observed
        self._lock = threading.RLock()  # of the records, for threads that step and read
        self._step = 0
        self._decided = 0, True  # the step, and whether training is observed in it
        self._quiet_until = 0  # before this step nothing is observed and no window is due; 0 if that is not known
        self._detached = False
        self._retired = False
        self._fault: Fault | None = None
        self._checked = False
        self._steps_without_model = 0
        self._model_name = model_name(model)
        self._model = weakref.ref(model)
        self.act_record = ActRecord()
        self.acting = False  # whether every rank calls `agrees()` whenever a step closes a window
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
        self._hooks.note_weights = self._note_weights
        self._optimizer_steps.attach(self._count_step, fail=self._hooks.fail)
        self._observe()

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
        if unknown := values.keys() - set(SERIES):
            raise UsageError(f"Expected {', '.join(f'`{name}`' for name in SERIES)}, but got `{min(unknown)}`.")
        self._series.note(self._step, values)

    @property
    def observing(self) -> bool:
        """Whether the current step is observed."""
        return self._hooks.observing

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
        self._require_attached("step")
        if self._optimizer_steps:
            raise UsageError(
                "Expected no call of `step()`, because the steps of the optimizer given as `optimizer=` are counted: "
                "leave out one of the two, or each step counts twice."
            )
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise UsageError(f"Expected argument `step` to be the number of optimizer steps taken, but got {step!r}.")
        return self._count_step(step)

    def _count_step(self, step: int | None = None) -> bool:
        with self._lock:
            now = self._step + 1 if step is None else step
            if now < self._quiet_until and not (self._phases or self._pauses):
                self._step = now
                return False
            return self._count_one_step(now)

    def _count_one_step(self, step: int) -> bool:
        hooks, record, inference = self._hooks, self._record("train"), self._records.get(INFERENCE)
        if hooks.observing:
            if hooks.note_weights is not None:
                self._end_first_step()
            if self._counted_phase() == "train":
                record.note_step(self._step)
                if inference is not None:
                    inference.note_step(self._step)
                hooks.recorder.sites.note_missed_sites(hooks.recorder.step)
                if not self._checked:
                    self._check_patterns()
        self._step = step
        waited = step - record.checked_step >= self.window_steps
        closed = waited and self._close_if_due(record, inference)
        self._observe()
        if not hooks.observing and self._ranks.alone and (inference is None or not record.empty):
            due = record.checked_step + (self.window_steps << self._ranks.missed)
            if due <= step:  # the window has too few examples, and gets no more until a step is observed
                due = sys.maxsize
            self._quiet_until = min(self._next_observed(), due)
        return closed

    @hidden
    def _close_if_due(self, record: PhaseRecord, inference: PhaseRecord | None) -> bool:
        """Flush and close the open windows, if they are due, and return whether this closed one."""
        window_steps = self.window_steps << self._ranks.missed
        due = record.is_due(self._step, window_steps, lambda: self._ranks.alone)
        if not due and inference is not None and record.empty and self._ranks.alone:
            due = inference.is_due(self._step, window_steps, lambda: True)
        if not due or not self._ranks.ready():
            return False
        self._flush("train", acting=self.acting)
        return self._close_windows()

    def _note_weights(self) -> None:
        """Note the weights with which training begins: ranks of which none is the same hold no copies."""
        if self._counted_phase() == "train" and not self._ranks.alone:
            self._weights.note()

    def _end_first_step(self) -> None:
        if not self._weights.noted:  # only parts of the model ran, or a compiled one
            self._note_weights()
        self._hooks.note_weights = None

    @property
    def model(self) -> nn.Module | None:
        """The watched model; ``None`` if it was collected."""
        return self._model()

    @property
    def acts(self) -> tuple[Act, ...]:
        """What was done to neurons by :func:`neuronscope.revive`, oldest first."""
        return tuple(self.act_record.acts)

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
        self._require_attached("close_window")
        with self._lock:
            record = self._flush("train", acting=acting)
            if record.census("open").last_step >= 0 and self._close_windows(final=True):
                record.begin_at(self._step)
            self._observe()
            return self.closed_window

    @property
    def closed_window(self) -> Census:
        """The newest closed window of training; empty if none was closed so far."""
        return self._record("train").census("last")

    @property
    def closed_windows(self) -> Census:
        """The sum of all closed windows of training."""
        return self._record("train").closed

    def note_act(self, act: Act) -> None:
        """Record an act. For :func:`neuronscope.revive`.

        Args:
            act: What was done.
        """
        with self._lock:
            self.act_record.note(act, self.closed_windows[act.site])

    def agrees(self, number: int) -> bool:
        """Whether all ranks bring the same number. For acts, which all ranks must do alike.

        Args:
            number: From 0 to 2**31.
        """
        return self._ranks.agree(number)

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
        here = threading.get_ident()
        before, own = self._phase_in(here), self._phases.get(here)
        self._phases[here] = name
        self._hooks.put_back()
        self._observe()
        try:
            yield self
        finally:
            if own is None:
                self._phases.pop(here, None)
            else:
                self._phases[here] = own
            if not self._detached and name != "train" and name != before:
                self._end_phase(name, here, join, keep, ends)
            self._observe()

    @hidden
    def _end_phase(
        self, name: str, thread: int, join: bool, keep: Callable[[], bool], ends: Callable[[], bool]
    ) -> None:
        """End a pass of a phase, unless it was one of a thread beside the one that is counted."""
        if not (join or thread == self._home or thread == self._counted_thread()):
            return
        with self._lock:
            if keep():
                record = self._record(name)
                record.note_step(self._step)
                if not ends():
                    return
                self._flush(name, join=join)
                record.close()
            else:
                self._record(name).discard_running()
            self._forget_old_phases(name)

    def _forget_old_phases(self, *ended: str) -> None:
        """Forget the phases that ended first, if there are too many, so that memory does not grow with their number.

        Args:
            ended: Phases that have just ended.
        """
        for name in ended:
            self._ended.pop(name, None)
            self._ended[name] = True
        closed = [name for name in self._ended if name not in self._phases.values()]
        for name in closed[:-_MOST_COUNTING]:
            if self._ended[name]:
                self._ended[name] = False
                self._record(name).release(self._hooks.recorder.forget_phase(name))
        for name in closed[:-_MOST_PHASES]:
            del self._ended[name], self._records[name]
            self._hooks.recorder.unmeasured.forget_ran(name)
            self._forgotten += 1
            if self._forgotten == 1:
                warn_user(
                    f"More than {_MOST_PHASES} phases were counted: from now on the counts of the oldest are "
                    f"forgotten, {name!r} first. Use one name, such as 'val', for all passes of a kind: each pass is "
                    "a window of its own."
                )

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

    @contextlib.contextmanager
    def paused(self) -> Iterator[Scope]:
        """Count nothing that runs inside: a context manager for forward passes that are not training.

        Callbacks use it too, around calls of the model that belong to no phase.
        """
        here = threading.get_ident()
        self._pauses[here] += 1
        self._observe()
        try:
            yield self
        finally:
            self._pauses[here] -= 1
            if not self._pauses[here]:
                del self._pauses[here]
            self._observe()

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

    def restart_at_parts(self) -> None:
        """Take a part of the model that runs again for the begin of a new pass, as the model's own forward is.

        For agents, which call the parts of their networks one by one. Otherwise a layer that two passes call between
        two steps is taken for one that is used twice in a pass. Not for a model whose user calls one part several times
        in a pass.
        """
        self._hooks.recorder.forward.restarts_at_parts = True

    @hidden
    def share_examples(self, examples: int | None) -> None:
        """Say that the forwards of training until the next call are given the same independent examples.

        They count once at each site. For training loops that run several networks, or one several times, on one batch.

        Args:
            examples: Their number; ``None`` = each forward has its own, as the option ``examples`` counts them.
        """
        with self._lock:
            if not self.detached:
                self._hooks.recorder.forward.share_examples(examples)

    @hidden
    def detach(self, *, join: bool = True) -> None:
        """Remove every hook from the model. Counts stay readable; a second call does nothing.

        The open window of training is closed if it has enough examples for the policy; otherwise it stays open.

        Args:
            join: In a distributed run, add up the open counts of all ranks. Every rank must then detach, and each waits
                for the ranks that have more batches. ``False`` if only this rank stops, for example after an exception.
        """
        with self._lock:
            self._end(join)

    def _end(self, join: bool) -> None:
        if self._detached:
            return
        self._hooks.detach()
        self._optimizer_steps.remove()
        self._detached = True
        joining = True
        while joining:  # also on a rank that saw nothing, since the others wait for it
            self._flush("train", join=join, done=True)
            joining = join and not self._ranks.all_done
            self._close_windows(final=not joining)
        for phase, census in self._ranks.pop_late().items():
            self._record(phase).add_joined(census)
            self._record(phase).close()

    def retire(self, fault: Exception | None = None) -> None:
        """Stop counting for good, but stay usable. For callbacks, after an error inside Neuronscope or in the callback.

        The callback must still call :meth:`step` and :meth:`detach`, so that no other rank waits for this one.

        Args:
            fault: The error; every later report shows it.
        """
        if fault is not None and (self._fault is None or self._fault.earlier):
            self._fault = Fault.from_error(fault, self._step)
        self._hooks.detach()
        self._retired = True

    def not_neurons(self) -> dict[str, str]:
        """Return where an activation function was applied to what are no neurons, each with the reason.

        Examples are a loss, attention scores, a learned threshold: nothing is counted there.
        """
        return dict(self._hooks.recorder.unmeasured.not_neurons)

    @hidden
    def _flush(self, phase: str, *, join: bool = True, done: bool = False, acting: bool = False) -> PhaseRecord:
        """Flush a phase, and inference with training, in which it ran.

        Where any rank has counts of inference, all ranks join them, also those that have none or are in another phase.
        """
        record, inference = self._record(phase), self._records.get(INFERENCE)
        record.describe_sites(self._hooks.recorder.sites.current_info)
        self._ranks.duplicate = self._hooks.recorder.forward.flow.duplicate
        self._ranks.acting = acting
        more = phase == "train" and inference is not None and not inference.empty
        record.flush(partial(self._ranks.join, phase=phase, done=done, more=more) if join else None)
        if self._ranks.more if join else more:
            self._record(INFERENCE).flush(partial(self._ranks.join, phase=INFERENCE, done=done) if join else None)
        return record

    def _close_windows(self, *, final: bool = False) -> bool:
        """Close the window of training if it has enough examples, and that of inference with it.

        If nothing of training was ever seen, inference has windows by the same rule.

        Args:
            final: Whether no rank will see more.

        Returns:
            Whether a window was closed.
        """
        train, inference = self._record("train"), self._records.get(INFERENCE)
        closed = train.has_enough_examples(final=final) and train.close()
        if inference is None:
            return closed
        if closed or (not train.counted and inference.has_enough_examples(final=final)):
            closed = inference.close() or closed
        return closed

    def _observe(self) -> None:
        """Decide whether the next forward passes are counted, and in which phase and step."""
        with self._lock:
            self._quiet_until = 0
            if not self.detached:
                self._decided = self._step, self._is_due()
                self._hooks.change()

    def _apply(self) -> None:
        """Set the phase and the step of the counted thread, and whether they are observed."""
        if self.detached:
            return
        hooks, phase, paused = self._hooks, self._counted_phase(), False
        if self._pauses:
            thread = self._counted_thread()
            paused = thread in self._pauses or (self._home in self._pauses and self._is_guided(thread))
        step, due = self._decided  # not as they are: another thread may be in the middle of a step
        observing = not paused and (phase != "train" or due)
        if (phase, step, observing) == self._applied or not (observing or hooks.observing):
            return
        self._applied = phase, step, observing
        hooks.recorder.set_phase(phase, step)
        hooks.set_observing(observing)
        if not observing and not paused and not self._phases:
            hooks.pause(self.every_n_steps - step % self.every_n_steps)

    def _counted_thread(self) -> int:
        return self._hooks.thread.elsewhere() or threading.get_ident()

    def _counted_phase(self) -> str:
        """Return the phase of the counted thread."""
        return self._phase_in(self._counted_thread()) if self._phases else "train"

    def _phase_in(self, thread: int) -> str:
        """Return the phase of a thread: its own, or that of the thread in which the watch began."""
        guide = self._home if self._is_guided(thread) else thread
        return self._phases.get(thread) or self._phases.get(guide, "train")

    def _is_guided(self, thread: int) -> bool:
        """Whether phases and pauses of the thread in which the watch began are also those of another one.

        One that trains has its own.
        """
        trains = thread == self._hooks.thread.thread and self._hooks.recorder.got_gradients
        return thread != self._home and not trains

    def _is_due(self) -> bool:
        """Whether a multiple of ``every_n_steps`` was reached since the last observed step.

        The step count may jump over the multiple itself, if the caller counts the steps.
        """
        return self._step >= self._next_observed()

    def _next_observed(self) -> int:
        """Return the first step that is to be observed after the last one that was."""
        record = self._records.get("train")
        last = -1 if record is None else record.last_observed_step
        return 0 if last < 0 else (last // self.every_n_steps + 1) * self.every_n_steps

    def _require_attached(self, method: str) -> None:
        if self._detached:
            raise DetachedError(
                f"Expected a scope that is attached for `{method}()`, but this one was detached. "
                "Call `neuronscope.watch(model)` again."
            )

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases in which anything was observed."""
        return tuple(name for name, record in list(self._records.items()) if not record.empty)

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
            return self._observed_record(phase).census(window)

    @hidden
    def layer_readers(self, layer: str) -> tuple[tuple[ReaderColumns, ...], tuple[str, ...]]:
        """Return which columns read a layer's units before any activation, and how else they are read.

        Args:
            layer: Path of the layer.
        """
        return self._hooks.recorder.sites.layer_readers(layer)

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

    def _report(self, phase: str) -> Report:
        record, inference = self._observed_record(phase), self._records.get(INFERENCE)
        note = ""
        if phase == "train" and inference is not None and not inference.empty:
            note = ONLY_INFERENCE if record.empty else INFERENCE_APART
            if record.empty:
                phase, record = INFERENCE, inference
        unmeasured = self._hooks.recorder.unmeasured
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
            notes=(note, self._ranks.note, MASK_IGNORED if self._hooks.recorder.ignored_mask else ""),
            exchanges=self._ranks.exchanges,
            fault=self._current_fault(),
            acts=self.act_record.acts,
            checkpoints=self._checkpoints,
            series=self._series.points(),
            claims_bounds=self._claims_bounds,
        )

    def _observed_record(self, phase: str) -> PhaseRecord:
        if phase not in self._records and phase not in ("train", "val", "test", INFERENCE):
            known = ", ".join(self._records) or "none"
            gone = f" The counts of {self._forgotten} older phases are no longer kept." if self._forgotten else ""
            raise UsageError(
                f"Expected argument `phase` to be one that was observed ({known}), but got {phase!r}.{gone}"
            )
        record = self._records.get(phase) or PhaseRecord(self.policy)
        record.describe_sites(self._hooks.recorder.sites.current_info)
        return record

    def _current_fault(self) -> Fault | None:
        failure = self._hooks.failure
        return self._fault if failure is None else Fault.from_error(failure, self._hooks.recorder.step)

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
            state = scope_state(self._step, self._records, self._current_fault(), checkpoints, acts)
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

    def _load(self, state: Mapping[str, Any]) -> None:
        self._step, phases, self._fault, self._checkpoints, self.act_record = split_scope_state(state, self.policy)
        self._series = Series.from_state(state.get("series"))
        if is_outdated(state):
            self._record("train").begin_at(self._step)
            warn_user(
                "The saved counts are from an earlier version of Neuronscope, in which a neuron was an index of one "
                f"call; now it is a unit of a layer. The counts begin anew at step {self._step}."
            )
        for name, saved in phases.items():
            self._record(name).load_state_dict(saved, self._lacking_layers)
        self._forget_old_phases(*(name for name in self._records if name not in ("train", INFERENCE)))
        self._applied = None
        self._observe()

    def _lacking_layers(self, layers: Iterable[str]) -> Collection[str]:
        model = self._model()
        return () if model is None or self._detached else lacking_layers(model, layers)

    def _record(self, phase: str) -> PhaseRecord:
        if phase not in self._records:
            self._records[phase] = PhaseRecord(self.policy, self._hooks.recorder.lock)
        return self._records[phase]

    def _new_counters(
        self, phase: str, key: SiteKey, info: SiteInfo, names: Names, neurons: int, device: torch.device
    ) -> SiteCounters | None:
        if not self._patterns.register(*names):
            return None
        return self._record(phase).add_site(key, info, neurons, device)

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
    )
    return Scope(model, options, optimizer=optimizer)


# Every module that a hook can call is loaded by now.
skip_frames(module for name, module in list(sys.modules.items()) if name.startswith("neuronscope."))
