"""Lightning: a callback that watches a run, for ``pytorch_lightning`` and ``lightning.pytorch`` alike.

Everything here is about when: when hooks go on and off, which batches count as which phase, when a report is due. What
is counted is :class:`neuronscope.Scope`'s affair, and where it is shown :mod:`neuronscope.callbacks.publishing`'s.
"""

# ruff: noqa: ARG002  # a hook takes what Lightning gives it

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from neuronscope.callbacks.lightning_compat import FRAMEWORKS, LightningLog, joined_callback, logger_of
from neuronscope.callbacks.monitor import Monitor
from neuronscope.callbacks.publishing import summary, totals
from neuronscope.errors import NeuronscopeWarning, NothingToWatchError
from neuronscope.report.report import Report

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
    from pytorch_lightning import Callback as _OtherCallback

    class Callback(_Callback, _OtherCallback):  # type: ignore[misc]
        """What the joined class is to a type checker."""
else:
    Callback = joined_callback()

__all__ = ["DeadNeuronMonitor"]


class DeadNeuronMonitor(Monitor, Callback):  # type: ignore[misc]  # the two Callbacks disagree about Trainers
    """Watches which neurons die while a Trainer trains, and shows it in its loggers.

    Scalars go to every logger, pictures, diagnosis and vectors to a file beside TensorBoard's.
    ``trainer.callback_metrics`` holds ``neuronscope/dead_pct``, ``neuronscope/dormant_pct`` and
    ``neuronscope/not_finite_pct`` (of validation:
    ``neuronscope/val_dead_pct`` and so on) for ``EarlyStopping`` and ``ModelCheckpoint``. What was counted is saved in
    checkpoints; a resumed run continues it. Batches of training, validation and test count, each as its own phase;
    sanity checks and predictions do not. In eager mode weights come out the same, bit for bit, with the monitor and
    without.

    Raises:
        UsageError: An argument is not what is expected.

    >>> from neuronscope.callbacks import DeadNeuronMonitor
    >>> monitor = DeadNeuronMonitor(every_n_steps=10, on_dead="stop", threshold=30)
    >>> # Trainer(callbacks=[monitor]).fit(model), then:
    >>> # print(monitor.report())
    """

    step_is_model = True
    used_like = (
        "give it to a Trainer (`Trainer(callbacks=[monitor])`) and fit, validate or test a model that has activations"
    )
    _step = 0
    _stop = False
    _news = False  # whether training was observed since its totals were told

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning makes a checkpoint on every rank, whoever writes it: let it hold what all of them counted."""
        if trainer.world_size > 1 and self.state_key in checkpoint.get("callbacks", {}):
            with self._faults:
                checkpoint["callbacks"][self.state_key] = self.state_dict(join=True)

    # --- on and off ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: the strategy is set up, and nothing has run yet. The step is known later, if the run is resumed."""
        self._news = False
        self._begin_training(pl_module, trainer.global_step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the Trainer's step, where counting begins in the middle of a run."""
        self._step = trainer.global_step
        self._stop = False
        self._move_to(self._step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach, at the end of every run that went well, and see everything drawn: loggers are closed next."""
        self._runs.detach()
        self._publisher.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach, at the end of every run that did not, and show what was seen of training until then."""
        training = self._runs.gate is not None and _fits(trainer)
        self._runs.detach(join=False)
        if training:
            with self._faults:
                if "train" in self._watched().phases:
                    self._tell(trainer, "train", final=True)
        self._publisher.finish()

    # --- training --------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch of training counts."""
        gate = self._runs.gate
        if gate is not None:
            with self._faults:
                gate.open()
                self._news |= gate.scope.observing

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """What an optimizer calls is no model's, and that may be twenty functions a weight: they need not be seen."""
        gate = self._runs.gate
        if gate is not None and _runs_once(pl_module, optimizer):
            with self._faults:
                gate.scope.close_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """What runs until the next batch does not count; a report is due when a window closed."""
        before, self._step = self._step, trainer.global_step
        self._end_training_batch(trainer, self._step)
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
        report = self._end_training(trainer)
        if report is not None and trainer.is_global_zero:
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

    def _tell(self, run: Any, phase: str, *, final: bool = False) -> Report:
        """Give a phase's report to the loggers, and its totals to the other callbacks."""
        report = self._watched().report(phase)
        self._offer(run, report)
        if run.is_global_zero:
            logs = [LightningLog(place, logger) for place, logger in enumerate(run.loggers)]
            self._publisher.publish(report, logs, run.global_step, final=final)
        return report

    def _renew(self, trainer: Any) -> None:
        """Renew the totals of training, if anything was observed since they were told."""
        if self._news:
            self._offer(trainer, self._watched().report("train"))

    def _offer(self, trainer: Any, report: Report) -> None:
        self._news = self._news and report.phase != "train"
        device = trainer.strategy.root_device
        trainer.callback_metrics.update(
            {tag: torch.tensor(value, device=device) for tag, value in totals(report, report.phase).items()}
        )

    def _stop_training(self, run: Any, alarm: str) -> None:
        self._stop = True
        if run.is_global_zero:
            logger_of(run).info("Neuronscope stops the training: %s", alarm)


def _runs_once(pl_module: Any, optimizer: Any) -> bool:
    """Whether an optimizer's step is known to run the model once, and not as often as a user's own code likes."""
    loop, kind = getattr(pl_module.optimizer_step, "__module__", ""), type(optimizer)
    usual = pl_module.automatic_optimization and loop.startswith(tuple(f"{name}." for name in FRAMEWORKS))
    return usual and kind.__module__.startswith("torch.optim.") and not issubclass(kind, torch.optim.LBFGS)


def _fits(trainer: Any) -> bool:
    """Whether the run is one of training, be it in a pass of validation just now."""
    return bool(trainer.state.fn == "fit")
