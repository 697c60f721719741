"""The callback for Lightning: it watches a run, for ``pytorch_lightning`` and ``lightning.pytorch`` alike.

This file only says when: when hooks go on and off, which batches count as which phase, when a report is due. The rest
is in :class:`neuronscope.callbacks.Monitor`.
"""

# ruff: noqa: ARG002  # a hook has the arguments that Lightning passes

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from neuronscope.callbacks.lightning_compat import (
    FRAMEWORKS,
    LightningLog,
    hyperparameters_of,
    joined_callback,
    known_metrics,
    logged_step,
    logger_of,
    step_inputs,
)
from neuronscope.callbacks.monitor import Monitor
from neuronscope.callbacks.publishing import summary, totals
from neuronscope.report.report import Report
from neuronscope.scope import Scope

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
    from pytorch_lightning import Callback as _OtherCallback

    class Callback(_Callback, _OtherCallback):  # type: ignore[misc]
        """Stands for the joined class in type checking."""
else:
    Callback = joined_callback()

__all__ = ["DeadNeuronMonitor"]

#: With what the names of the frameworks' own modules begin.
_OWN = tuple(f"{name}." for name in FRAMEWORKS)


class DeadNeuronMonitor(Monitor, Callback):  # type: ignore[misc]  # the two Callbacks disagree about Trainers
    """Watches which neurons die while a Trainer trains, and shows it in its loggers.

    Scalars go to every logger, pictures, diagnosis and tab to a file beside TensorBoard's.
    ``trainer.callback_metrics`` holds ``neuronscope/dead_pct``, ``neuronscope/worst_layer_dead_pct``,
    ``neuronscope.more/collapsed_layers``, ``neuronscope.more/not_finite_pct`` and more (of validation:
    ``neuronscope/val_dead_pct`` and so on), and of training ``neuronscope/deaths_total``, for ``EarlyStopping`` and
    ``ModelCheckpoint``. The counts are saved in checkpoints, and a resumed run continues them. Batches of training,
    validation and test count, each as its own phase; sanity checks and predictions do not. What a training step runs
    without gradients (a target network, a reference model, generation) counts as phase ``inference``. In eager mode the
    weights are the same, bit for bit, with the monitor and without.

    Raises:
        UsageError: An argument is not what is expected.

    >>> from neuronscope.callbacks import DeadNeuronMonitor
    >>> monitor = DeadNeuronMonitor(every_n_steps=10, on_dead="stop", threshold=30)
    >>> # Trainer(callbacks=[monitor]).fit(model), then:
    >>> # print(monitor.report())
    """

    step_is_model = True
    how_to_use = (
        "give it to a Trainer (`Trainer(callbacks=[monitor])`) and fit, validate or test a model that has activations"
    )
    _step = 0
    _logged_step = 0  # the step of the row that the Trainer logged last in training
    _logged: dict[str, Any]  # what the Trainer had logged at the last batch of training, by name
    _unpublished = False  # whether training was observed since its totals were given to other callbacks

    @property
    def _observing(self) -> Scope | None:
        """The scope, if the step that runs is observed."""
        scope = self.scope
        return scope if scope is not None and self.attached and scope.observing else None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the counts of all ranks into the checkpoint: Lightning makes it on every rank, and one rank writes it."""
        if trainer.world_size > 1 and self.state_key in checkpoint.get("callbacks", {}):
            with self.suppress_errors:
                checkpoint["callbacks"][self.state_key] = self.state_dict(join=True)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: the strategy is set up, and nothing has run yet. The step of a resumed run is known later."""
        self._unpublished, self._logged = False, {}
        self.logs, self.folder = _logs(trainer), _folder(trainer)
        self.console = logger_of(trainer) if trainer.is_global_zero else None
        self.hyperparameters = hyperparameters_of(trainer)
        self.attach(pl_module, trainer.global_step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue at the Trainer's step, if counting begins in the middle of a run."""
        self._step = trainer.global_step
        self._logged_step = max(logged_step(trainer) - 1, 0)
        self.move_to(self._step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach at the end of every run that succeeded, and wait until all is drawn: loggers are closed next."""
        self.detach(join=True)
        self.logs, self.optimizers = (), ()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach at the end of every run that failed, and show what was seen of training until then."""
        if _fits(trainer):
            report = self.finish(step=self._logged_step, failed=True)
            self._give_totals(trainer, report)
        else:
            self.detach()
        self.logs = ()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count this batch as training. Where a strategy wraps the module, the step runs in place of its forward."""
        inputs = step_inputs(batch, trainer.train_dataloader)
        self.begin_batch(step_in_forward=trainer.strategy.model is not pl_module, inputs=inputs)
        self._unpublished |= self._observing is not None

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Do not look at how gradients are set to zero, if no code of the user's runs then, which may run the model."""
        scope = self._observing
        if scope is not None and pl_module.automatic_optimization and _zeroes_only(trainer, pl_module):
            scope.pause_step()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Look at the step again: activation checkpointing may run parts of the model in the backward pass."""
        scope = self._observing
        if scope is not None:
            scope.resume_step()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Do not look at the functions that the optimizer calls, if it is known not to run the model in its step."""
        scope = self._observing
        if scope is None:
            return
        if _runs_once(pl_module, optimizer):
            self.begin_optimizer_step()
        else:
            scope.resume_step()  # a step that gave no loss had no backward pass, and may run again

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count nothing until the next batch, and publish a report if a window closed."""
        before, self._step = self._step, trainer.global_step
        self.optimizers = trainer.optimizers
        reason, self._logged_step = self.stop_reason, logged_step(trainer)
        self._give_totals(trainer, self.step(self._step, log_step=self._logged_step))
        if self.attached:
            with self.suppress_errors:
                # What is on an accelerator is known only where a window ends, which waits for it anyway.
                window_ends = before // self.options.window_steps != self._step // self.options.window_steps
                self.note_metrics(known_metrics(trainer, outputs, self._logged, synchronise=window_ends))
        if self.prog_bar and self.dead_percent is not None:
            trainer.progress_bar_metrics["dead_pct"] = self.dead_percent
        if self.stop_reason != reason and trainer.is_global_zero:
            logger_of(trainer).info("Neuronscope stops the training: %s", self.stop_reason)
        if self.on_dead == "stop":
            self._stop_together(trainer, before)

    def _stop_together(self, trainer: Any, before: int) -> None:
        """Stop if any rank has a reason. The ranks agree at steps that all of them reach, whatever they have seen."""
        stop, window = self.stop_reason is not None, self.options.window_steps
        if trainer.world_size == 1:
            trainer.should_stop = trainer.should_stop or stop
        elif before // window != self._step // window:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            trainer.should_stop = trainer.should_stop or stop

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Renew the totals before other callbacks look for a metric, however long the windows are."""
        self.end_batch()  # a batch that was skipped has no end
        self._renew(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, which closes the last window if it is long enough, and log one line about the end."""
        report = self.finish(step=self._logged_step)
        self._give_totals(trainer, report)
        if report is not None and trainer.is_global_zero:
            logger_of(trainer).info(summary(report))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a pass of validation, in the middle of training or alone."""
        self._begin_pass(trainer, pl_module, "val")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a pass of testing."""
        self._begin_pass(trainer, pl_module, "test")

    def _begin_pass(self, trainer: Any, module: Any, phase: str) -> None:
        if trainer.sanity_checking:
            return
        if not _fits(trainer):
            self.logs, self.folder = _logs(trainer), _folder(trainer)
            self.console = logger_of(trainer) if trainer.is_global_zero else None
            self.attach_for_evaluation(module)
        self.begin_evaluation(phase)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count this batch as validation, unless it belongs to the sanity check."""
        if not trainer.sanity_checking:
            self.begin_batch(inputs=step_inputs(batch, _one_of(trainer.val_dataloaders, dataloader_idx)))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count nothing until the next batch."""
        self.end_batch()

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count this batch as testing."""
        self.begin_batch(inputs=step_inputs(batch, _one_of(trainer.test_dataloaders, dataloader_idx)))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End the pass, which is one window of its phase, before any callback looks for a metric."""
        if not trainer.sanity_checking:
            self._give_totals(trainer, self.end_evaluation(step=logged_step(trainer), final=not _fits(trainer)))
            if _fits(trainer):
                self._renew(trainer)

    on_test_epoch_end = on_validation_epoch_end

    def _renew(self, trainer: Any) -> None:
        """Renew the totals of training, if anything was observed since the last time."""
        if self._unpublished and self.attached:
            with self.suppress_errors:
                self._give_totals(trainer, self.report("train"))

    def _give_totals(self, trainer: Any, report: Report | None) -> None:
        """Give a report's totals to the other callbacks."""
        if report is None:
            return
        with self.suppress_errors:
            self._unpublished = self._unpublished and report.phase != "train"
            device = trainer.strategy.root_device
            trainer.callback_metrics.update(
                {tag: torch.tensor(value, device=device) for tag, value in totals(report, report.phase).items()}
            )


def _folder(trainer: Any) -> str | None:
    """The folder of the first logger that has one for each run, on the first rank. Without it, no file is left."""
    found = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return next((str(folder) for folder in found if folder), None) if trainer.is_global_zero else None


def _logs(trainer: Any) -> list[LightningLog]:
    """The Trainer's loggers on the first rank, none on the others."""
    return (
        [LightningLog(place, logger) for place, logger in enumerate(trainer.loggers)] if trainer.is_global_zero else []
    )


def _one_of(loaders: Any, place: int) -> Any:
    """The loader that gave a batch of an evaluation: evaluations take one after another."""
    return loaders[place] if isinstance(loaders, (list, tuple)) and place < len(loaders) else loaders


def _runs_once(pl_module: Any, optimizer: Any) -> bool:
    """Whether an optimizer's step is known to run the model exactly once, before ``on_before_optimizer_step``."""
    kind = type(optimizer)
    usual = pl_module.automatic_optimization and _is_frameworks(pl_module.optimizer_step)
    return usual and kind.__module__.startswith("torch.optim.") and not issubclass(kind, torch.optim.LBFGS)


def _zeroes_only(trainer: Any, pl_module: Any) -> bool:
    """Whether nothing but the framework's own code runs between a step's forward and its backward pass."""
    hooks = [each.on_before_zero_grad for each in trainer.callbacks if not isinstance(each, DeadNeuronMonitor)]
    return all(map(_is_frameworks, (pl_module.on_before_zero_grad, pl_module.optimizer_zero_grad, *hooks)))


def _is_frameworks(function: Any) -> bool:
    """Whether a function is the framework's own, and not a user's in its place."""
    return (getattr(function, "__module__", None) or "").startswith(_OWN)


def _fits(trainer: Any) -> bool:
    """Whether the run is a training. A pass of validation in the middle of it counts as training here."""
    return bool(trainer.state.fn == "fit")
