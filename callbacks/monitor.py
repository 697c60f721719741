"""The part of a training callback that is the same in every framework: options, counts, logs and the alarm.

The callback for one framework only says when: training begins, a batch runs, an optimizer step is over, an evaluation
begins and ends, training is over. It is a subclass of :class:`Monitor`, or holds one, and needs none of its private
names.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from torch import nn
from torch.optim import Optimizer

from neuronscope.act.revival import revive_in
from neuronscope.act.rules import GraMa, Rule, as_rule
from neuronscope.callbacks.alarms import Announcements, DeadThreshold
from neuronscope.callbacks.logs import Log, series_of
from neuronscope.callbacks.phase_gate import PhaseGate
from neuronscope.callbacks.publishing import Publisher, check_published
from neuronscope.callbacks.runs import Runs
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.errors import NothingToWatchError, UsageError, warn_user
from neuronscope.options import Examples, Mask, WatchArguments, WatchOptions, positive_integer
from neuronscope.report.report import Report
from neuronscope.scope import Scope
from neuronscope.sites import INFERENCE
from neuronscope.tally.census import Census
from neuronscope.writers.formatting import visible

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["DEFAULT_EVERY_N_STEPS", "Monitor"]

MethodT = TypeVar("MethodT", bound=Callable[..., Any])

#: Optimizer steps from one observed step to the next, unless the user says otherwise. An observed step of an ordinary
#: network costs 3 to 4 % more and the others next to nothing (``benchmarks/steps.py``): under 1 % at every 20th. Where
#: a whole step takes a millisecond, the fixed cost of hooks shows: half as much again where observed.
DEFAULT_EVERY_N_STEPS = 20


def _while_attached(method: MethodT) -> MethodT:
    """Call a method only while the hooks are on a model, and keep an error inside it from ending the training."""

    @functools.wraps(method)
    def guarded(self: Monitor, *args: Any, **kwargs: Any) -> Any:
        if self.attached:
            with self.suppress_errors:
                return method(self, *args, **kwargs)
        return None

    return cast("MethodT", guarded)


class Monitor:
    """Watches the model of a training, writes what it finds to logs, and tells when too many neurons are dead.

    The base of every callback; it names no framework. A training calls, in this order::

        attach(model)                      # training begins, or is resumed
            begin_batch()                  # for each batch; outside of batches nothing is counted
            step(global_step)              #   the batch is over
            with evaluation("val"): ...    # a pass of validation, at any time between two batches
        finish()                           # training is over

    These methods raise no error of Neuronscope's own: the first such error gives a warning and takes the hooks off the
    model, and training goes on. Before :meth:`attach` and after :meth:`finish` they do nothing.

    Attributes:
        logs: Where numbers are written; empty at first, and on every rank but the first. Set it before the training
            begins, or whenever the run's loggers are known.
        folder: Where the page is written if no log has a folder of event files; ``None`` = nowhere, as on every rank
            but the first.
        optimizers: The optimizers of the model's weights, if ``revive`` is given. Set it before the first
            :meth:`step`; the callback of a framework does.
        hyperparameters: Hyperparameters of the training by name. If there are any, TensorBoard's HParams tab shows them
            beside the final numbers. Set it before :meth:`attach`; the callback of a framework does.
        options: What is watched, and how often.
        on_dead: What to do when ``threshold`` percent of the neurons are dead: ``log``, ``warn`` or ``stop``.
        stop_reason: Why the training should stop, set by :meth:`step` if ``on_dead`` is ``stop``; otherwise ``None``.
            The callback stops the training through its framework.
        prog_bar: Whether the trainer's progress bar shows the share of dead neurons.
        dead_percent: Dead neurons in percent, as of the newest report on training; ``None`` before the first.
        console: The Python logger that says at once, as a warning, that a layer has collapsed, that many neurons died
            together or that NaN was seen, each once a run; ``None`` on every rank but the first.
        suppress_errors: Context manager for a callback's own code: an error inside it gives a warning and takes the
            hooks off, as one in the methods here does.

    >>> import torch
    >>> from neuronscope.callbacks import Monitor
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = Monitor(every_n_steps=1)
    >>> monitor.attach(model)
    >>> for global_step in range(1, 4):
    ...     monitor.begin_batch()
    ...     model(torch.randn(16, 4)).mean().backward()
    ...     optimizer.step()
    ...     report = monitor.step(global_step)
    >>> with monitor.evaluation("val"), torch.no_grad():
    ...     prediction = model(torch.randn(32, 4))
    >>> report = monitor.finish()
    >>> monitor.census("train").examples, monitor.census("val").examples
    (48, 32)
    """

    #: Whether activation functions that a training step calls outside of any module are a part of the model.
    step_is_model: ClassVar[bool] = False
    #: Where the mask of a forward's positions is found, unless the user says otherwise.
    default_mask: ClassVar[Mask] = None
    #: How the independent examples of a forward are counted, unless the user says otherwise.
    default_examples: ClassVar[Examples] = "auto"
    #: How a user gives this callback to the framework, for an error message.
    how_to_use: ClassVar[str] = "call `attach(model)` and train a model that has activations"

    def __init__(
        self,
        *,
        on_dead: str = "log",
        threshold: float = 50.0,
        images: bool = True,
        text: bool = True,
        tab: bool = True,
        html: bool = True,
        drawing_share: float = 0.01,
        prog_bar: bool = False,
        revive: Rule | str | None = None,
        revive_every: int = 1,
        **options: Unpack[WatchArguments],
    ) -> None:
        """Set what is watched, and what is written and done.

        Args:
            on_dead: What to do when, in a window of training that is long enough for certain verdicts, ``threshold``
                percent of the neurons are dead or give NaN: ``log`` writes numbers as always, ``warn`` also gives a
                warning, ``stop`` also ends the training cleanly through the framework.
            threshold: Percent of all observed neurons.
            images: Whether TensorBoard gets pictures.
            text: Whether TensorBoard gets the diagnosis.
            tab: Whether TensorBoard gets the report, for Neuronscope's own tab.
            html: Whether the report is written as a page, into ``neuronscope/train.html`` (``val.html`` …) in the
                folder of the run's logs, or in :attr:`folder` if they have none; anew at each drawing.
            drawing_share: Largest share of the run's time that pictures, diagnosis, tab and page may take, in a
                thread of their own: by default the first come after some 40 seconds. 1 draws them whenever a window
                closes, and lets training wait where drawing cannot keep up. The end of a run is always drawn, and is on
                the disk before the run returns.
            prog_bar: Whether the trainer's progress bar shows the share of dead neurons, in percent, as of the newest
                report on training.
            revive: Which neurons get fresh weights: ``dead``, ``dormant`` or a rule of :mod:`neuronscope.act.rules`;
                see :func:`neuronscope.revive`. By default none: watching alone changes nothing.
            revive_every: Optimizer steps from one revival to the next at least. A revival comes with the end of a
                window of training.
            **options: As for :func:`neuronscope.watch`; here ``every_n_steps`` is 20 unless it is given. ``mask`` is
                :attr:`default_mask` unless it is given, ``examples`` :attr:`default_examples`.

        Raises:
            UsageError: An argument is not what is expected.
        """
        super().__init__()
        options.setdefault("every_n_steps", DEFAULT_EVERY_N_STEPS)
        options.setdefault("mask", type(self).default_mask)
        options.setdefault("examples", type(self).default_examples)
        self.options = WatchOptions(**options)
        self.on_dead = on_dead
        self.prog_bar = prog_bar
        self.console: logging.Logger | None = logging.getLogger("neuronscope")
        self.logs: Sequence[Log] = ()
        self.folder: str | None = None
        self.hyperparameters: Mapping[str, Any] = {}
        self.optimizers: Sequence[Optimizer] = ()
        self._rule = None if revive is None else as_rule(revive, self.options.thresholds)
        if isinstance(self._rule, GraMa):
            raise UsageError(
                "Expected argument `revive` to be a rule that goes by the counts of each window, but got GraMa, whose "
                "measure is out of date after one act: call `ns.revive` yourself, with a new one each time."
            )
        self._left: set[str] = set()  # sites of which it was said that their neurons are not revived
        self._revive_every = positive_integer("revive_every", revive_every)
        self.stop_reason: str | None = None
        self._threshold = DeadThreshold(on_dead, threshold)
        self._announcements = Announcements()
        self.dead_percent: float | None = None
        self._closed = False  # whether a window has closed since the last report on training
        self._runs = Runs(self.options, step_is_model=self.step_is_model)
        self._publisher = Publisher(images=images, text=text, tab=tab, html=html, drawing_share=drawing_share)
        self.suppress_errors = SuppressErrors("watch this run any longer", self._runs.give_up)
        self._finalizer: weakref.finalize[Any, Any] | None = None
        # Computed once: Lightning asks for it six times a step.
        self._state_key = (
            f"{type(self).__qualname__}({self.options}, on_dead={on_dead!r}, threshold={self._threshold.threshold})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is sent to another process, keeps the counts but neither hooks nor logs."""
        return {**vars(self), "logs": (), "optimizers": (), "hyperparameters": {}, "_finalizer": None}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def scope(self) -> Scope | None:
        """The scope that watches the model, or watched it last; ``None`` before the first run."""
        return self._runs.scope

    @property
    def _gate(self) -> PhaseGate:
        return cast("PhaseGate", self._runs.gate)  # it is there while the hooks are on a model

    @property
    def attached(self) -> bool:
        """Whether the hooks are on a model: a training or an evaluation runs, and no error of ours ended the watch."""
        return self._runs.gate is not None

    def report(self, phase: str = "train") -> Report:
        """Return what is known of one phase: ``train``, ``val``, ``test`` or ``inference``.

        Raises:
            UsageError: Nothing was watched yet.
        """
        return self._require_scope().report(phase)

    def census(self, phase: str = "train", window: str = "all") -> Census:
        """Return the exact counts of one phase over one window; see :meth:`neuronscope.Scope.census`.

        Args:
            phase: ``train``, ``val``, ``test`` or ``inference`` (what a training step runs without gradients).
            window: ``all``, ``last`` or ``open``.

        Raises:
            UsageError: Nothing was watched yet.
        """
        return self._require_scope().census(phase, window)

    def _require_scope(self) -> Scope:
        if self._runs.scope is None:
            raise UsageError(f"Expected a monitor that has watched a run, but this one has not: {self.how_to_use}.")
        return self._runs.scope

    def attach(self, model: nn.Module, step: int = 0) -> None:
        """Put hooks on the model, because training begins or is resumed.

        The counts of :meth:`load_state_dict` are continued, or else those of this monitor's last training, unless it
        was at a later step or of another model. A model without activations gives a warning.

        Args:
            model: The model.
            step: Optimizer steps taken before, where they are known by now; see :meth:`move_to`.
        """
        self.stop_reason, self._announcements, self.dead_percent = None, Announcements(), None
        self._closed = False
        if self._finalizer is None:  # a training that ended in an exception may have left the hooks on
            self._finalizer = weakref.finalize(self, self._runs.detach, join=False)
            self._finalizer.atexit = False
        self._publisher.begin()
        self._publisher.list_hyperparameters(self.logs, self.hyperparameters, at_start=True)
        with self._warn_if_nothing_to_watch():
            self._runs.begin_training(model, step)
        if self.scope is not None:
            self.scope.acting = self._rule is not None
        if self.scope is not None and self.scope.global_step < step:
            self.move_to(step)

    def attach_for_evaluation(self, model: nn.Module) -> None:
        """Put hooks on the model for evaluations outside of training; :meth:`detach` ends this.

        The counts of training stay as they are. A model without activations gives a warning.

        Args:
            model: The model.
        """
        with self._warn_if_nothing_to_watch():
            self._runs.begin_evaluation(model)

    @contextlib.contextmanager
    def _warn_if_nothing_to_watch(self) -> Iterator[None]:
        with self.suppress_errors:
            try:
                yield
            except NothingToWatchError as error:
                warn_user(str(error))

    @_while_attached
    def move_to(self, step: int) -> None:
        """Continue at the trainer's step, if it became known after :meth:`attach` only.

        Args:
            step: Optimizer steps taken so far.
        """
        if self._gate.scope.global_step != step:
            self._gate.end_training_batch(step)

    @_while_attached
    def begin_batch(self, *, step_in_forward: bool = False, inputs: tuple[Any, ...] = ()) -> None:
        """Count what the model runs from now on: a batch begins, of training or of the evaluation that runs.

        Args:
            step_in_forward: Whether the batch's step runs in place of the model's forward; see
                :meth:`neuronscope.Scope.open_step`.
            inputs: What the step is given, such as ``(batch,)``, if :attr:`step_is_model`; see there.
        """
        self._gate.open(step_in_forward=step_in_forward, inputs=inputs)

    @_while_attached
    def end_batch(self) -> None:
        """Count nothing until the next batch begins. At the end of a batch of training, :meth:`step` does this too."""
        self._gate.close()

    @_while_attached
    def begin_optimizer_step(self) -> None:
        """Say that the optimizer runs next, and that it does not run the model. Calling this is optional.

        It saves time if :attr:`step_is_model`: otherwise each function that the optimizer calls is checked, about
        twenty for each weight.
        """
        self._gate.scope.close_step()

    @_while_attached
    def note_step(self, step: int) -> None:
        """Count an optimizer step in the middle of a batch; the next :meth:`step` publishes what came of it.

        For trainers that take many optimizer steps before they call anybody, in the middle of which neither neurons may
        be revived nor numbers logged.

        Args:
            step: Optimizer steps taken so far.
        """
        self._closed |= self._gate.note_step(step)

    def step(self, step: int, *, log_step: int | None = None) -> Report | None:
        """End a batch of training: count the optimizer step, and publish a report if that closes a window.

        Neurons are revived then, if that was asked for.

        Args:
            step: Optimizer steps taken so far. It stays the same while gradients are accumulated.
            log_step: The step under which the trainer logs what it knows of this batch, so that the numbers of both
                stand in one row; by default ``step``.

        Returns:
            The report of training if a window closed, otherwise ``None``.
        """
        report = alarm = None
        if self.attached:
            with self.suppress_errors:
                self._closed |= self._gate.end_training_batch(step)
                if self._closed:
                    self._closed = False
                    self._revive(self._gate.scope)
                    report = self._publish("train", step if log_step is None else log_step)
                    alarm = self._threshold.check(report)
        if alarm is not None and self.on_dead == "warn":
            warn_user(alarm)
        elif alarm is not None and self.on_dead == "stop":
            self.stop_reason = alarm
        return report

    def _revive(self, scope: Scope) -> None:
        """Revive neurons by the window that has just closed, if that is due. All ranks call this at the same step."""
        acts = scope.acts
        if self._rule is None or (acts and scope.global_step - acts[-1].step < self._revive_every):
            return
        done = revive_in(scope, scope.closed_window, self.optimizers, self._rule)
        new = {site: reason for site, reason in done.left.items() if site not in self._left}
        self._left.update(new)
        for site, reason in new.items():
            warn_user(f"Neurons of {site} are not revived: {reason}.")

    @contextlib.contextmanager
    def evaluation(self, phase: str = "val") -> Iterator[None]:
        """Count everything that the model runs inside as one pass of a phase, and publish its report.

        What was counted is forgotten if the pass ends in an exception.

        Args:
            phase: ``val`` or ``test``.
        """
        self.begin_evaluation(phase)
        self.begin_batch()
        try:
            yield
        except BaseException:
            self.discard_evaluation()
            raise
        self.end_evaluation()

    @_while_attached
    def begin_evaluation(self, phase: str = "val") -> None:
        """Begin a pass of a phase, and count nothing until :meth:`begin_batch`; :meth:`end_evaluation` ends it.

        For trainers that call one method at the start of an evaluation and another at its end; elsewhere
        :meth:`evaluation` is shorter.

        Args:
            phase: ``val`` or ``test``.
        """
        self._gate.enter(phase)

    @_while_attached
    def end_evaluation(self, *, step: int | None = None, final: bool = False) -> Report | None:
        """End the pass, which is one window of its phase, and publish its report.

        Args:
            step: The step to write it at; by default the steps of training so far.
            final: Whether no other pass is expected: the report is drawn, whatever share of the time that takes.

        Returns:
            The phase's report; ``None`` if no pass was running.
        """
        phase = self._gate.phase
        if phase is None:
            return None
        self._gate.leave()
        return self._publish(phase, step, final=final)

    @_while_attached
    def interrupt_evaluation(self, *, ends: bool = False) -> None:
        """Leave the pass without a report: the next :meth:`begin_evaluation` of its phase continues it.

        For passes that come in many small parts, such as rollouts between gradient steps.

        Args:
            ends: Whether the pass is over, so that its window closes.
        """
        self._gate.leave(ends=ends)

    @_while_attached
    def discard_evaluation(self) -> None:
        """End the pass and forget what was counted in it. If no pass runs, only the batch ends."""
        self._gate.leave(keep=False)

    def finish(self, *, step: int | None = None, failed: bool = False) -> Report | None:
        """End the training: detach, publish the last reports, and wait until they are drawn.

        The last window is closed if it is long enough for certain verdicts.

        Args:
            step: The step to write at; by default the steps of training so far.
            failed: Whether training ended in an exception, perhaps on this rank alone: other ranks are not waited for.

        Returns:
            The report of training; ``None`` if nothing of it was observed.
        """
        reports: dict[str, Report] = {}
        with self.suppress_errors:
            if self.attached:
                scope = self._gate.scope
                self._runs.detach(join=not failed)
                for phase in ("train",) if failed else ("train", "val"):
                    if phase in scope.phases or (phase == "train" and INFERENCE in scope.phases):
                        reports[phase] = self._publish(phase, step, final=True)
                self._publisher.list_hyperparameters(self.logs, self.hyperparameters, at_start=False)
        self._publisher.finish()  # the logs may be closed next
        report = reports.get("train")
        return report if report is not None and report.phase == "train" else None

    def detach(self, *, join: bool = False) -> None:
        """Take the hooks off the model. Counts stay readable. Detaching twice is harmless.

        Args:
            join: Whether every rank of a distributed run calls this, so that what is open is counted together.
        """
        with self.suppress_errors:
            self._runs.detach(join=join)
        self._publisher.finish()

    def _publish(self, phase: str, step: int | None, *, final: bool = False) -> Report:
        report = self.report(phase)
        self._publisher.publish(
            report, self.logs, report.global_step if step is None else step, folder=self.folder, final=final
        )
        if report.phase == "train":
            self.dead_percent = report.dead_percent
        if self.console is not None:
            for sentence in self._announcements.new(report):
                self.console.warning("%s", visible(sentence))
        return report

    @_while_attached
    def note_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Note the learning rate, the loss and the gradient norm of training, so that reports show them beside deaths.

        Args:
            metrics: What the trainer knows or logs at its step, by its own names, such as ``train_loss`` or
                ``grad_norm``. Other metrics are left out.
        """
        self._gate.scope.note_metrics(**series_of(metrics))

    @property
    def state_key(self) -> str:
        """Identifies callbacks with different options in a checkpoint."""
        return self._state_key

    def state_dict(self, *, join: bool = False) -> dict[str, Any]:
        """Return everything counted so far, as tensors and primitives, for a checkpoint; empty before the first run.

        Reports note the step, so that they can name the last checkpoint before deaths.

        Args:
            join: Whether every rank of a distributed run calls this: see :meth:`neuronscope.Scope.state_dict`.
        """
        if self.attached:
            self._gate.scope.note_checkpoint()
        counted = self._runs.state_dict(join=join)
        return {**counted, "published": self._publisher.state_dict()} if counted else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue what was counted: at once in a training that runs, otherwise when one begins."""
        with SuppressErrors("take up what was saved"):
            published = check_published(state_dict.get("published") if isinstance(state_dict, dict) else None)
            self._runs.load_state_dict(state_dict)
            self._publisher.load_state_dict(published)

    def restart_logs(self) -> None:
        """Write to logs from step 0 again: the next training begins anew, in new logs."""
        self._publisher.load_state_dict({})
