"""Small agents of Stable-Baselines3, and a slow twin: plain forward hooks on an agent that nothing watches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("stable_baselines3")

import gymnasium
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

ALGORITHMS = {kind.__name__: kind for kind in (A2C, DQN, PPO, SAC, TD3)}
ON_POLICY, CONTINUOUS = ("A2C", "PPO"), ("SAC", "TD3")
BATCH, ENVIRONMENT_STEPS = 8, 64
#: Of each algorithm that has them: the network that no optimizer trains.
TARGETS = {
    "DQN": ("q_net_target",),
    "SAC": ("critic_target",),
    "TD3": ("actor_target", "critic_target"),
}


class Drift(gymnasium.Env[Any, Any]):
    """A state that drifts at random, in episodes of 20 steps. Seen as four numbers or as a small picture."""

    def __init__(self, *, continuous: bool, picture: bool) -> None:
        self.action_space = spaces.Box(-1.0, 1.0, (1,)) if continuous else spaces.Discrete(3)
        self.picture = picture
        if picture:
            self.observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        else:
            self.observation_space = spaces.Box(-np.inf, np.inf, (4,))
        self.state, self.time = np.zeros(4), 0
        self.np_random = np.random.default_rng(0)  # where nobody gives a seed, as in an evaluation

    def _seen(self) -> npt.NDArray[Any]:
        if not self.picture:
            return self.state.astype(np.float32)
        grid = np.outer(np.sin(np.linspace(0, 3 + self.state[0], 36)), np.cos(np.linspace(0, 3 + self.state[1], 36)))
        return (127.5 * (grid + 1.0)).astype(np.uint8)[None]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.time = self.np_random.normal(size=4), 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[npt.NDArray[Any], float, bool, bool, dict[str, Any]]:
        self.state += 0.3 * self.np_random.normal(size=4) + 0.1 * float(np.sum(action))
        self.time += 1
        return self._seen(), -float(np.abs(self.state).sum()), False, self.time >= 20, {}


def environment(name: str, *, picture: bool = False) -> Drift:
    return Drift(continuous=name in CONTINUOUS, picture=picture)


def agent(name: str, *, picture: bool = False, kind: type[BaseAlgorithm] | None = None, **more: Any) -> BaseAlgorithm:
    """Return an agent with two hidden layers of 16 ReLU units in each of its networks, or NatureCNN before them."""
    policy: dict[str, Any] = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
    if picture:
        policy["features_extractor_kwargs"] = {"features_dim": 8}
    options: dict[str, Any] = {"learning_rate": 0.02}
    if name in ON_POLICY:
        options.update({"n_steps": 24}, **({"batch_size": BATCH, "n_epochs": 2} if name == "PPO" else {}))
    else:
        options.update(learning_starts=24, batch_size=BATCH, buffer_size=200, train_freq=4, gradient_steps=2)
    options.update(more)
    torch.manual_seed(0)
    make = kind or ALGORITHMS[name]
    spelled = "CnnPolicy" if picture else "MlpPolicy"
    world = environment(name, picture=picture)
    made = make(spelled, world, policy_kwargs=policy, device="cpu", seed=0, **options)  # type: ignore[call-arg]
    silence(made.policy)
    return made


def silence(policy: nn.Module) -> None:
    """Kill the first two neurons of the second layer of every network, targets too: they stay dead."""
    for path, module in policy.named_modules():
        if isinstance(module, nn.Linear) and module.weight.shape == (16, 16) and path.endswith(".2"):
            with torch.no_grad():
                module.bias[:2] = -1e3


@dataclass
class Count:
    zero_outputs: Any = 0
    zero_gradients: Any = 0
    positions: int = 0
    gradient_positions: int = 0


@dataclass
class Twin:
    """Counts the zeros of an unwatched agent's ReLUs, by what the agent does when they run.

    ``observed`` says of which gradient steps, and of which environment steps, everything is counted.
    """

    agent: BaseAlgorithm
    every: int = 1
    doing: str = "nothing"
    gradient_steps: int = 0
    environment_steps: int = 0
    counts: dict[str, dict[str, Count]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Count)))

    def __post_init__(self) -> None:
        policy = self.agent.policy
        for path, module in policy.named_modules():
            if isinstance(module, nn.ReLU) and not path.startswith(TARGETS.get(type(self.agent).__name__, ("-",))):
                stem, _, place = path.rpartition(".")
                module.register_forward_hook(self._hook(f"{stem}.{int(place) - 1}/relu"))
        actor = getattr(policy, "actor", None)
        own = "optimizer" in vars(policy)
        delayed = type(self.agent).__name__ == "TD3"
        optimizer = policy.optimizer if own else (policy.critic if delayed or actor is None else actor).optimizer
        optimizer.register_step_post_hook(self._stepped)
        train, collect = self.agent.train, self.agent.collect_rollouts  # type: ignore[attr-defined]

        def counted_train(*args: Any, **kwargs: Any) -> Any:
            self.doing = "train"
            try:
                return train(*args, **kwargs)
            finally:
                self.doing = "nothing"

        def counted_collect(*args: Any, **kwargs: Any) -> Any:
            self.doing = "rollout"
            try:
                return collect(*args, **kwargs)
            finally:
                self.doing = "nothing"

        self.agent.train, self.agent.collect_rollouts = counted_train, counted_collect  # type: ignore[attr-defined]

    def _stepped(self, *_: Any) -> None:
        self.gradient_steps += 1

    def _hook(self, site: str) -> Any:
        def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            doing = self.doing
            if doing == "train" and not torch.is_grad_enabled():
                doing = "inference"
            steps = self.environment_steps if doing == "rollout" else self.gradient_steps
            if doing != "val" and steps % self.every:
                return
            seen = self.counts[doing][site]
            dims = [dim for dim in range(output.dim()) if dim != 1]
            seen.zero_outputs = seen.zero_outputs + (output == 0).sum(dims).numpy()
            seen.positions += output[:, 0].numel()
            if doing == "train":
                args[0].register_hook(lambda grad: self._gradient(seen, grad, dims))

        return count

    @staticmethod
    def _gradient(seen: Count, gradient: Tensor, dims: list[int]) -> None:
        seen.zero_gradients = seen.zero_gradients + (gradient == 0).sum(dims).numpy()
        seen.gradient_positions += gradient[:, 0].numel()

    def callbacks(self, evaluation: EvalCallback | None = None) -> list[BaseCallback]:
        return [_EnvironmentSteps(self), *([] if evaluation is None else [evaluation])]


class _EnvironmentSteps(BaseCallback):
    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.twin = twin

    def _on_step(self) -> bool:
        self.twin.environment_steps = self.n_calls
        return True


class TwinEvaluation(EvalCallback):
    """An evaluation that tells a twin that it runs."""

    twin: Twin

    def _on_step(self) -> bool:
        before, self.twin.doing = self.twin.doing, "val"
        try:
            return super()._on_step()
        finally:
            self.twin.doing = before


def evaluation(name: str, *, picture: bool = False, kind: type[EvalCallback] = EvalCallback) -> EvalCallback:
    from stable_baselines3.common.monitor import Monitor

    world = Monitor(environment(name, picture=picture))
    return kind(world, eval_freq=25, n_eval_episodes=1, verbose=0, warn=False)


def weights(made: BaseAlgorithm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.policy.state_dict().items()}


def hooked(module: nn.Module) -> Iterator[str]:
    """Yield the path of every module that bears a hook."""
    for path, each in module.named_modules():
        if each._forward_hooks or each._forward_pre_hooks:
            yield path
