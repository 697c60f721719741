"""The callback for Stable-Baselines3: it watches the networks of PPO, A2C, DQN, SAC, TD3 and the like.

This file only says when; the rest is in :class:`neuronscope.callbacks.Monitor`. The library tells its callbacks when a
rollout begins and ends; what comes after it is training. Nothing tells them of gradient steps, so a hook on the
optimizer does. Neither does anything say that an evaluation runs: the ``on_step`` of each ``EvalCallback`` is wrapped
while a training runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from neuronscope.errors import MissingExtraError

try:
    from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, ProgressBarCallback
except ImportError as error:
    raise MissingExtraError(
        f"Expected stable-baselines3 for `DeadNeuronCallback`, but it could not be imported ({error}): "
        "pip install 'neuronscope[stable-baselines3]'"
    ) from error

from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neuronscope.callbacks.logs import SummaryWriterLog
from neuronscope.callbacks.monitor import Monitor
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.errors import warn_user
from neuronscope.report.report import Report
from neuronscope.writers.formatting import percent

__all__ = ["DeadNeuronCallback"]


class DeadNeuronCallback(Monitor, BaseCallback):
    """Watches which neurons die while Stable-Baselines3 trains an agent, and writes it to the library's logger.

    A step is a gradient step: one of the policy's optimizer, or of the actor's if actor and critic have one each; of
    the critic's where the actor's is delayed (TD3).
    Rollouts are phase ``rollout``, of which every ``every_n_steps``-th environment step counts. The evaluations of an
    ``EvalCallback`` are phase ``val``. What a gradient step runs without gradients is phase ``inference``. Target
    networks, which no optimizer trains, are not watched. Numbers go through ``logger.record``, those of single layers
    not to the console; pictures, diagnosis, tab and the page go to TensorBoard's folder. In eager mode the weights
    are the same, bit for bit, with the callback and without.

    Replay buffers give random draws, so each row of their batches is an example, once a gradient step and layer. States
    of a rollout or an evaluation follow each other and are no independent examples: there, and in the training of
    on-policy algorithms (PPO, A2C), no bound is claimed, unless ``examples`` is given.

    The library does not tell its callbacks when a training ends in an exception. The hooks then stay on the networks
    until the next training begins, the callback is collected, or :meth:`detach` is called. As a context manager the
    callback detaches by itself.

    Raises:
        UsageError: An argument is not what is expected.

    >>> from neuronscope.callbacks.stable_baselines3 import DeadNeuronCallback
    >>> callback = DeadNeuronCallback(every_n_steps=10, revive="dormant")
    >>> # DQN("MlpPolicy", "CartPole-v1").learn(50_000, callback=callback), then:
    >>> # print(callback.report())
    """

    step_is_model = False
    default_examples = None
    model: Any
    how_to_use = "give it to `learn(callback=...)` and train a policy that has activations"
    _steps = 0  # optimizer steps of the policy that is trained
    _networks: nn.Module | None = None  # what is watched; the scope itself does not keep it alive
    _step_hooks: tuple[RemovableHandle, ...] = ()
    _in_training = False  # whether gradient steps run, or what comes between them and the next rollout
    _in_rollout = False  # whether the environment step that runs is counted
    _rollout_ends = False  # whether a window of training has closed since that of the rollouts began
    _wrapped: tuple[EvalCallback, ...] = ()

    def detach(self, *, join: bool = False) -> None:
        """Take the hooks off the networks after a training that failed. Counts stay readable; twice is harmless.

        Args:
            join: See :meth:`neuronscope.callbacks.Monitor.detach`.
        """
        for hook in self._step_hooks:
            hook.remove()
        for evaluation in self._wrapped:
            vars(evaluation).pop("on_step", None)
        self._step_hooks, self._wrapped = (), ()
        self._in_training = self._in_rollout = self._rollout_ends = False
        super().detach(join=join)
        self.logs, self.optimizers = (), ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is sent to another process, keeps the counts but neither hooks nor the agent."""
        own = {"_networks": None, "_step_hooks": (), "_wrapped": ()}
        agents: dict[str, Any] = {"model": None, "parent": None, "locals": {}, "globals": {}}
        return {**super().__getstate__(), **own, **agents}

    def _on_training_start(self) -> None:
        """Attach to the networks that are trained."""
        self.detach()  # from a training that failed
        with self.suppress_errors:
            self._begin(self.model.policy)

    def _begin(self, policy: nn.Module) -> None:
        optimizers = {name: each for name, each in _optimizers(policy) if isinstance(each, Optimizer)}
        networks = _trained(policy, optimizers.values())
        if self._networks is None or not _same(networks, self._networks):
            self._networks, self._steps = networks, 0
        self.logs = [_LoggerLog(self.logger)]
        self.optimizers = list(optimizers.values())
        self.attach(self._networks, step=self._steps)
        if self.attached and self.scope is not None:
            self.scope.restart_at_parts()  # the agent calls the parts of its policy one by one
        if self.on_dead != "log" and self.options.examples is None and not self._draws_at_random:
            warn_user(
                f"`on_dead={self.on_dead!r}` has no effect: {type(self.model).__name__} trains on the states of its "
                "rollouts, of which no number is independent. Give `examples=`, if you know a number."
            )
        last = optimizers.get("", optimizers.get("actor", next(iter(self.optimizers), None)))
        delayed = getattr(self.model, "policy_delay", 1) > 1 and "critic" in optimizers
        steps = optimizers["critic"] if delayed else last
        if steps is not None and last is not None:
            hooks = ((steps, self._after_step), (last, self._share_examples))
            self._step_hooks = tuple(optimizer.register_step_post_hook(hook) for optimizer, hook in hooks)
        self._wrapped = tuple(each for each in self._callbacks() if isinstance(each, EvalCallback))
        for evaluation in self._wrapped:
            vars(evaluation)["on_step"] = partial(self._evaluate, evaluation, evaluation.on_step)

    @property
    def _draws_at_random(self) -> bool:
        """Whether the batches of training are random draws, from a replay buffer."""
        return isinstance(self.model, OffPolicyAlgorithm)

    def _callbacks(self) -> Iterator[BaseCallback]:
        """Yield every callback of the training."""
        waiting = [self.locals.get("callback")]
        while waiting:
            callback = waiting.pop()
            if isinstance(callback, BaseCallback):
                yield callback
                waiting += [*getattr(callback, "callbacks", ()), getattr(callback, "callback", None)]

    def _after_step(self, *_: Any) -> None:
        """Count a gradient step. Its report waits: no weight may change between a forward and its backward pass."""
        self._steps += 1
        self.note_step(self._steps)

    def _share_examples(self, *_: Any) -> None:
        """Say that all networks are given the same batch from now on. A delayed actor makes it two batches at times."""
        if self.attached and self.scope is not None and self._draws_at_random and self.options.examples is None:
            with self.suppress_errors:
                self.scope.share_examples(self.model.batch_size)

    def _on_rollout_start(self) -> None:
        """Publish what the gradient steps have brought, and count what runs now as a rollout."""
        self._end_training()
        self._count_rollout()

    def _on_step(self) -> bool:
        """Count the next environment step, if it is one that is observed. The training goes on unless it is to stop."""
        self._count_rollout()
        return self.stop_reason is None

    def _on_rollout_end(self) -> None:
        """Count what runs now as training."""
        self._leave_rollout()
        self._in_training = True
        self._go_on_training()

    def _on_training_end(self) -> None:
        """Detach, write the last numbers, and have the logger write them."""
        self._end_training()
        self._leave_rollout()
        self.finish(step=self.num_timesteps)
        if self.logger.name_to_value:
            with SuppressErrors("write to a logger"):
                self.logger.dump(self.num_timesteps)
        self.detach()

    def _end_training(self) -> None:
        if not self._in_training:
            return
        self._in_training = False
        self.note_metrics(self.logger.name_to_value)
        self._rollout_ends |= self.step(self._steps, log_step=self.num_timesteps) is not None
        if self.prog_bar and self.dead_percent is not None:
            for callback in self._callbacks():
                if isinstance(callback, ProgressBarCallback):
                    callback.pbar.set_postfix_str(f"dead {percent(self.dead_percent)}", refresh=False)

    def _count_rollout(self) -> None:
        """Count the environment step that comes next, if it is one that is observed."""
        if self.n_calls % self.options.every_n_steps:
            self._leave_rollout()
        elif not self._in_rollout:
            self._in_rollout = True
            self.begin_evaluation("rollout")
            self.begin_batch()

    def _leave_rollout(self) -> None:
        """Count no rollout now. Its window closes if one of training has closed since it began."""
        if self._in_rollout:
            self.interrupt_evaluation(ends=self._rollout_ends)
            self._in_rollout = self._rollout_ends = False

    def begin_evaluation(self, phase: str = "val") -> None:
        """Begin a pass of a phase, in the middle of a rollout too; see :meth:`Monitor.begin_evaluation`.

        Args:
            phase: ``val`` or ``test``.
        """
        if phase != "rollout":
            self._leave_rollout()
        super().begin_evaluation(phase)

    def end_evaluation(self, *, step: int | None = None, final: bool = False) -> Report | None:
        """End the pass; see :meth:`Monitor.end_evaluation`.

        Args:
            step: The step to write it at; by default the environment steps so far.
            final: Whether no other pass is expected.
        """
        report = super().end_evaluation(step=self.num_timesteps if step is None else step, final=final)
        self._go_on_training()
        return report

    def discard_evaluation(self) -> None:
        """End the pass and forget what was counted in it."""
        super().discard_evaluation()
        self._go_on_training()

    def _go_on_training(self) -> None:
        """Count what runs now as training, if an evaluation came between a rollout and its gradient steps."""
        if self._in_training:
            self.begin_batch()
            self._share_examples()

    def _evaluate(self, evaluation: EvalCallback, on_step: Callable[[], bool]) -> bool:
        """Run ``on_step`` of an ``EvalCallback``, and count the evaluation that it may run as a pass of ``val``."""
        if evaluation.eval_freq <= 0 or (evaluation.n_calls + 1) % evaluation.eval_freq:
            return on_step()
        in_rollout, self.num_timesteps = self._in_rollout, self.model.num_timesteps
        with self.evaluation("val"):
            goes_on = on_step()
        if in_rollout:
            self._count_rollout()
        return goes_on


class _LoggerLog:
    """Writes through the library's logger, which writes everything with the agent's next numbers."""

    def __init__(self, logger: Logger) -> None:
        self.key = f"stable_baselines3:{logger.dir or ''}"
        self._logger = logger

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        del step  # the logger has its own: environment steps
        for tag, value in metrics.items():
            of_network = tag.startswith(("neuronscope/", "neuronscope.more/"))
            self._logger.record(tag, value, exclude=None if of_network else ("stdout", "log"))

    def event_folder(self) -> str | None:
        for output in self._logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                return SummaryWriterLog(output.writer).event_folder()
        return None


def _optimizers(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the optimizers of a policy and of the networks in it, by the path of the network."""
    for path, module in policy.named_modules():
        yield path, getattr(module, "optimizer", None)


def _trained(policy: nn.Module, optimizers: Any) -> nn.Module:
    """Return the networks of a policy without those of which no optimizer trains a weight: target networks.

    That is the policy itself, or a network that holds those of its networks under their names.
    """
    trained = {id(weight) for each in optimizers for group in each.param_groups for weight in group["params"]}
    networks, kept = dict(policy.named_children()), {}
    for name, network in networks.items():
        weights = list(network.parameters())
        if not weights or any(id(weight) in trained for weight in weights):
            kept[name] = network
    if len(kept) == len(networks):
        return policy
    # Modules keep their paths, and reports the policy's name.
    rest: nn.Module = type(type(policy).__name__, (nn.ModuleDict,), {})(kept)
    return rest


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same weights, not only equal ones."""
    return [id(weight) for weight in one.parameters()] == [id(weight) for weight in other.parameters()]
