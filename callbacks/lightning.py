"""Lightning: a callback that watches a run, for ``pytorch_lightning`` and ``lightning.pytorch`` alike.

Everything here is about when: when hooks go on and off, which batches count as which phase, when a report is due. What
is counted is :class:`neuronscope.Scope`'s affair, and where it is shown :mod:`neuronscope.callbacks.publishing`'s.
"""

# ruff: noqa: ARG002  # a hook takes what Lightning gives it

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from neuronscope.callbacks.alarms import Alarm
from neuronscope.callbacks.faults import Faults
from neuronscope.callbacks.publishing import Publisher, summary, totals
from neuronscope.callbacks.runs import Runs
from neuronscope.callbacks.trainers import joined_callback, logger_of
from neuronscope.census import Census
from neuronscope.errors import NeuronscopeWarning, NothingToWatchError, UsageError
from neuronscope.report import Report
from neuronscope.scope import Scope
from neuronscope.sites import Activation
from neuronscope.verdicts import Policy

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
    from pytorch_lightning import Callback as _OtherCallback

    class Callback(_Callback, _OtherCallback):  # type: ignore[misc]
        """What the joined class is to a type checker."""
else:
    Callback = joined_callback()

__all__ = ["DEFAULT_EVERY_N_STEPS", "DeadNeuronMonitor"]

#: Optimizer steps from one observed step to the next, unless the user says otherwise. An observed step of an ordinary
#: network costs 3 to 5 % more and the others next to nothing (``benchmarks/steps.py``): under 1 % at every 20th. Where
#: a whole step takes under a millisecond, the fixed cost of hooks shows: 20 % in a Trainer's run of 400 such steps.
DEFAULT_EVERY_N_STEPS = 20


class DeadNeuronMonitor(Callback):
    """Watches which neurons die while a Trainer trains, and shows it in its loggers.

    Scalars go to every logger, pictures, diagnosis and vectors to TensorBoard's; ``trainer.callback_metrics`` holds
    ``neuronscope/dead_pct``, ``neuronscope/dormant_pct`` and ``neuronscope/not_finite_pct`` (of validation:
    ``neuronscope/val_dead_pct`` and so on) for ``EarlyStopping`` and ``ModelCheckpoint``. What was counted is saved in
    checkpoints; a resumed run continues it. Batches of training, validation and test count, each as its own phase;
    sanity checks and predictions do not. Weights come out the same, bit for bit, with the monitor and without.

    Args:
        every_n_steps: Observe every n-th optimizer step; the others cost next to nothing.
        window_steps: Optimizer steps of a window at least; a report is logged when a window closes.
        sites: Glob patterns on site names: only these are counted.
        exclude: Glob patterns on site names: these are not.
        functional: Watch functional activations (``F.relu``) and gated products too.
        axes: Glob patterns on site names → the dimension of the neurons, where it is not what was inferred.
        policy: The thresholds; see :class:`neuronscope.Policy`.
        activations: Activation classes or functions of your own → their :class:`neuronscope.Activation` or kind.
        on_dead: What to do when, in a window of training that is long enough to be sure, ``threshold`` percent of the
            neurons are dead or give NaN: ``log`` nothing more than always, ``warn`` as well, or ``stop`` the training
            cleanly through the Trainer.
        threshold: Percent of all observed neurons.
        images: Whether TensorBoard gets pictures.
        text: Whether TensorBoard gets the diagnosis.
        vectors: Whether TensorBoard gets a byte a neuron and window, for Neuronscope's own tab.
        drawing_share: Largest share of the run's time that pictures, diagnosis and vectors may take; 1 draws them
            whenever a window closes. The end of a run is always drawn.

    Raises:
        UsageError: An argument is not what is expected.

    >>> from neuronscope.callbacks import DeadNeuronMonitor
    >>> monitor = DeadNeuronMonitor(every_n_steps=10, on_dead="stop", threshold=30)
    >>> # Trainer(callbacks=[monitor]).fit(model), then:
    >>> # print(monitor.report())
    """

    def __init__(
        self,
        *,
        every_n_steps: int = DEFAULT_EVERY_N_STEPS,
        window_steps: int = 100,
        sites: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        functional: bool = True,
        axes: Mapping[str, int] | None = None,
        policy: Policy | None = None,
        activations: Mapping[Any, Activation | str] | None = None,
        on_dead: str = "log",
        threshold: float = 50.0,
        images: bool = True,
        text: bool = True,
        vectors: bool = True,
        drawing_share: float = 0.01,
    ) -> None:
        super().__init__()
        told = {
            "every_n_steps": every_n_steps,
            "window_steps": window_steps,
            "sites": sites,
            "exclude": exclude,
            "functional": functional,
            "axes": axes,
            "policy": policy,
        }
        self._runs = Runs({**told, "activations": activations})
        self._alarm = Alarm(on_dead, threshold)
        self._publisher = Publisher(images=images, text=text, vectors=vectors, drawing_share=drawing_share)
        self._faults = Faults("watch this run any longer", self._runs.give_up)
        self._key = {**told, "on_dead": on_dead, "threshold": self._alarm.threshold}
        self._window_steps = window_steps
        self._step = 0
        self._stop = False
        self._news = False  # whether training was observed since its totals were told

    # --- what was seen ---------------------------------------------------------------------------------------------

    @property
    def scope(self) -> Scope | None:
        """What watches the model, or watched it last; ``None`` before anything ran."""
        return self._runs.scope

    def report(self, phase: str = "train") -> Report:
        """What is known of one phase: ``train``, ``val`` or ``test``.

        Raises:
            UsageError: Nothing was watched yet.
        """
        return self._watched().report(phase)

    def census(self, phase: str = "train", window: str = "all") -> Census:
        """The exact counts of one phase over one window; see :meth:`neuronscope.Scope.census`.

        Raises:
            UsageError: Nothing was watched yet.
        """
        return self._watched().census(phase, window)

    def _watched(self) -> Scope:
        if self._runs.scope is None:
            raise UsageError(
                "Expected a monitor that has watched a run, but this one has not: give it to a Trainer "
                "(`Trainer(callbacks=[monitor])`) and fit, validate or test a model that has activations."
            )
        return self._runs.scope

    @property
    def state_key(self) -> str:
        """Tells monitors of different options apart in a checkpoint."""
        return self._generate_state_key(**self._key)

    def state_dict(self, *, join: bool = False) -> dict[str, Any]:
        """Everything counted so far, as tensors and primitives.

        Args:
            join: Every rank of a distributed run calls this: see :meth:`neuronscope.Scope.state_dict`.
        """
        counted = self._runs.state_dict(join=join)
        return {**counted, "published": self._publisher.state_dict()} if counted else {}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning makes a checkpoint on every rank, whoever writes it: let it hold what all of them counted."""
        if trainer.world_size > 1 and self.state_key in checkpoint.get("callbacks", {}):
            with self._faults:
                checkpoint["callbacks"][self.state_key] = self.state_dict(join=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue what was counted. Lightning calls this before a run starts; tuners may while it runs."""
        with Faults("take up what was saved"):
            self._runs.load_state_dict(state_dict)
            self._publisher.load_state_dict(state_dict["published"])

    # --- on and off ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: the strategy is set up, and nothing has run yet. The step is known later, if the run is resumed."""
        self._news = False
        with self._faults:
            try:
                self._runs.begin_fit(pl_module, trainer.global_step)
            except NothingToWatchError as error:
                warnings.warn(str(error), NeuronscopeWarning, stacklevel=2)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the Trainer's step, where counting begins in the middle of a run."""
        self._step = trainer.global_step
        self._stop = False
        gate = self._runs.gate
        if gate is not None and gate.scope.global_step != self._step:
            with self._faults:
                gate.end_training_batch(self._step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach, at the end of every run that went well."""
        self._runs.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach, at the end of every run that did not."""
        self._runs.detach(join=False)

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch of training counts."""
        gate = self._runs.gate
        if gate is not None:
            with self._faults:
                gate.open()
                self._news |= gate.scope.observing

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """What runs until the next batch does not count; a report is due when a window closed."""
        before, self._step = self._step, trainer.global_step
        gate = self._runs.gate
        alarm = None
        if gate is not None:
            with self._faults:
                if gate.end_training_batch(self._step):
                    alarm = self._alarm.hear(self._tell(trainer, "train"))
        if alarm is not None:
            self._raise_alarm(trainer, alarm)
        if self._alarm.action == "stop":
            self._stop_together(trainer, before)

    def _stop_together(self, trainer: Any, before: int) -> None:
        """Stop if any rank wants to; they agree at steps that all of them come to, whatever they have seen."""
        if trainer.world_size == 1:
            trainer.should_stop = trainer.should_stop or self._stop
        elif before // self._window_steps != self._step // self._window_steps:
            stop = trainer.strategy.reduce_boolean_decision(self._stop, all=False)
            trainer.should_stop = trainer.should_stop or stop

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Callbacks that watch a metric look now: make sure that there is one, however long the windows are."""
        gate = self._runs.gate
        if gate is not None:
            with self._faults:
                gate.shut()  # a batch that was skipped has no end
                self._renew(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, which closes the last window if it is sure, and say how it ended."""
        if self._runs.gate is None:
            return
        with self._faults:
            self._runs.detach()
            for phase in ("val", "train"):
                if phase in self._watched().phases:
                    report = self._tell(trainer, phase, final=True)
            if trainer.is_global_zero and "train" in self._watched().phases:
                logger_of(trainer).info(summary(report))

    # --- validation and test ---------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """A pass of validation begins, in the middle of training or alone."""
        self._begin_pass(trainer, pl_module, "val")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """A pass of testing begins."""
        self._begin_pass(trainer, pl_module, "test")

    def _begin_pass(self, trainer: Any, module: Any, phase: str) -> None:
        if trainer.sanity_checking:
            return
        with self._faults:
            if not _fits(trainer):
                try:
                    self._runs.begin_evaluation(module)
                except NothingToWatchError as error:
                    warnings.warn(str(error), NeuronscopeWarning, stacklevel=2)
            if self._runs.gate is not None:
                self._runs.gate.enter(phase)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A batch of validation counts, unless it is of the sanity check."""
        if self._runs.gate is not None and not trainer.sanity_checking:
            with self._faults:
                self._runs.gate.open()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """What runs until the next batch does not count."""
        if self._runs.gate is not None:
            with self._faults:
                self._runs.gate.shut()

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A batch of testing counts."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """What runs until the next batch does not count."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The pass is over, and one window of its phase with it: before any callback looks for a metric."""
        self._end_pass(trainer, "val")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The pass is over, and one window of its phase with it."""
        self._end_pass(trainer, "test")

    def _end_pass(self, trainer: Any, phase: str) -> None:
        if self._runs.gate is None or trainer.sanity_checking:
            return
        with self._faults:
            self._runs.gate.leave()
            self._tell(trainer, phase, final=not _fits(trainer))
            if _fits(trainer):
                self._renew(trainer)

    # --- telling ---------------------------------------------------------------------------------------------------

    def _tell(self, trainer: Any, phase: str, *, final: bool = False) -> Report:
        """Give a phase's report to the loggers, and its totals to the other callbacks."""
        report = self._watched().report(phase)
        self._offer(trainer, report)
        if trainer.is_global_zero:
            self._publisher.publish(report, trainer.loggers, trainer.global_step, final=final)
        return report

    def _renew(self, trainer: Any) -> None:
        """Renew the totals of training, if anything was observed since they were told."""
        if self._news:
            self._offer(trainer, self._watched().report("train"))

    def _offer(self, trainer: Any, report: Report) -> None:
        self._news = self._news and report.phase != "train"
        device = trainer.strategy.root_device
        trainer.callback_metrics.update(
            {tag: torch.tensor(value, device=device) for tag, value in totals(report).items()}
        )

    def _raise_alarm(self, trainer: Any, alarm: str) -> None:
        if self._alarm.action == "warn":
            warnings.warn(alarm, NeuronscopeWarning, stacklevel=3)
        elif self._alarm.action == "stop":
            self._stop = True
            if trainer.is_global_zero:
                logger_of(trainer).info("Neuronscope stops the training: %s", alarm)


def _fits(trainer: Any) -> bool:
    """Whether the run is one of training, be it in a pass of validation just now."""
    return bool(trainer.state.fn == "fit")
