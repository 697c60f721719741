"""A DQN on CartPole whose ReLU network goes dormant, left alone and with its dead and dormant neurons revived.

The agent is written by hand in plain torch. Its learning rate is five times the usual one, and it takes a gradient step
after every step of the environment: Sokar et al. (2023) found that many gradient steps make networks go dormant. Only
gradient steps count as training; choosing an action runs without gradients and is phase ``inference``. A batch is a
random draw from the replay buffer, so its rows are independent examples of what is in the buffer, and a dead verdict
has a bound.

Output (one seed, means of the second half; numbers differ between machines)::

    seed 0, left alone: 45.4 % dormant, 39.5 % dead,   0 revived; return 103.5
    seed 0, revived   : 31.2 % dormant, 29.5 % dead, 1516 revived; return 171.5

What it shows: that a network goes dormant, and that reviving keeps some of it awake; neurons die again while the
learning rate stays. It does not show that an agent earns more by it: over five seeds the mean return is 118 left alone
and 114 revived, and docs/reinforcement-learning.md has the picture.

Run it with::

    python examples/dqn_cartpole.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import neuronscope as ns

STEPS, WARM_UP, BATCH, TARGET_EVERY, REPORT_EVERY = 4000, 200, 64, 100, 100
LEARNING_RATE, DISCOUNT = 5e-3, 0.99


@dataclass
class Run:
    """What one training gave: shares every 100 steps, and the return of each episode with the step of its end."""

    steps: list[int] = field(default_factory=list)
    dormant: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    revived: int = 0


class Replay:
    """The last transitions; a batch of them is drawn at random."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.rows = np.zeros((size, 4 + 1 + 1 + 4 + 1), dtype=np.float32)  # state, action, reward, next state, ended
        self.count, self.rng = 0, rng

    def add(self, *parts: Any) -> None:
        """Keep a transition, in the place of the oldest one."""
        self.rows[self.count % len(self.rows)] = np.hstack(parts)
        self.count += 1

    def draw(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Return states, actions, rewards, next states and ends of random transitions, each ``(rows, …)``."""
        chosen = self.rng.integers(0, min(self.count, len(self.rows)), rows)
        return torch.from_numpy(self.rows[chosen]).split([4, 1, 1, 4, 1], dim=1)


def train(seed: int, *, revives: bool) -> Run:
    """Train one agent, and return how many of its neurons were dormant and dead, and what it earned."""
    torch.manual_seed(seed)
    rng, run = np.random.default_rng(seed), Run()
    world = gymnasium.make("CartPole-v1")
    value = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    target = copy.deepcopy(value)
    optimizer = torch.optim.Adam(value.parameters(), lr=LEARNING_RATE)
    replay = Replay(4000, rng)
    state, _ = world.reset(seed=seed)
    earned = 0.0
    with ns.watch(value, optimizer=optimizer, every_n_steps=5, window_steps=50) as scope:
        for step in range(1, STEPS + 1):
            exploration = max(0.05, 1.0 - step / 1000)
            if rng.random() < exploration:
                action = int(rng.integers(2))
            else:
                with torch.no_grad():
                    action = int(value(torch.from_numpy(state)[None]).argmax())
            after, reward, terminated, truncated, _ = world.step(action)
            replay.add(state, action, reward, after, terminated)
            earned += float(reward)
            state = after
            if terminated or truncated:
                run.ended.append(step)
                run.returns.append(earned)
                (state, _), earned = world.reset(), 0.0
            if step > WARM_UP:
                learn(value, target, optimizer, replay)
            if step % TARGET_EVERY == 0:
                target.load_state_dict(value.state_dict())
            if step > WARM_UP and step % REPORT_EVERY == 0:
                report = scope.report()
                run.steps.append(step)
                run.dormant.append(report.tau_dormant_percent)  # as the paper counts: dead ones too
                run.dead.append(report.dead_percent)
                if revives:
                    run.revived += ns.revive(scope, optimizer, "dormant").neurons
    return run


def learn(value: nn.Module, target: nn.Module, optimizer: torch.optim.Optimizer, replay: Replay) -> None:
    """Take one gradient step."""
    states, actions, rewards, afters, ended = replay.draw(BATCH)
    with torch.no_grad():
        wanted = rewards + DISCOUNT * (1 - ended) * target(afters).max(1, keepdim=True).values
    loss = F.smooth_l1_loss(value(states).gather(1, actions.long()), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description="A DQN on CartPole, left alone and revived.")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    for seed in range(parser.parse_args().seeds):
        for name in ("left alone", "revived"):
            run = train(seed, revives=name == "revived")
            half = len(run.steps) // 2
            last = np.mean([earned for earned, end in zip(run.returns, run.ended, strict=True) if end > STEPS // 2])
            shares = f"{np.mean(run.dormant[half:]):4.1f} % dormant, {np.mean(run.dead[half:]):4.1f} % dead"
            print(f"seed {seed}, {name:10}: {shares}, {run.revived:3} revived; return {last:5.1f}", flush=True)


if __name__ == "__main__":
    main()
