"""A DQN on CartPole whose ReLU network goes dormant, left alone and with its dead and dormant neurons revived.

The agent is written by hand in plain torch. Its learning rate is ten times too high and it takes a gradient step after
every step of the environment, which is how Sokar et al. (2023) make networks go dormant. Only gradient steps count as
training; choosing an action runs without gradients and is phase ``inference``. A batch is a random draw from the replay
buffer, so its rows are independent examples of what is in the buffer, and a dead verdict has a bound.

Output (one seed; numbers differ between machines)::

OUTPUT

What it shows: that a network goes dormant, and that ``ns.revive`` keeps it from that. It does not show that an agent
gets better by it. CartPole needs few neurons, returns differ more between seeds than between the two ways, and
docs/reinforcement-learning.md has a picture of all seeds.

Run it with::

    python examples/dqn_cartpole.py [--seeds 5] [--picture FILE]
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import neuronscope as ns

STEPS, WARM_UP, BATCH, TARGET_EVERY, REPORT_EVERY = 4000, 200, 64, 100, 200
LEARNING_RATE, DISCOUNT = 1e-2, 0.99


@dataclass
class Run:
    """What one training gave: shares every 200 steps, and the return of each episode with the step of its end."""

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

    def add(self, *parts: object) -> None:
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


def draw(runs: dict[str, list[Run]], path: str) -> None:
    """Draw the dormant share and the return of every run, and their means in bold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (name, those), colour in zip(runs.items(), ("#b3261e", "#1a5fb4"), strict=True):
        every = np.arange(REPORT_EVERY, STEPS + 1, REPORT_EVERY)
        earned = [np.interp(every, run.ended, smooth(run.returns)) for run in those]
        for axes, steps, curves in (
            (left, those[0].steps, [run.dormant for run in those]),
            (right, every, earned),
        ):
            for curve in curves:
                axes.plot(steps, curve, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, np.mean(curves, axis=0), color=colour, linewidth=2.2, label=name)
            axes.set_xlabel("environment steps")
    left.set_title("τ-dormant neurons, % (Sokar et al. 2023)", fontsize=10)
    right.set_title("return, mean of the last 10 episodes", fontsize=10)
    left.set_ylim(0, None)
    right.set_ylim(0, None)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)


def smooth(returns: list[float], last: int = 10) -> list[float]:
    return [float(np.mean(returns[max(0, end - last) : end])) for end in range(1, len(returns) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="A DQN on CartPole, left alone and revived.")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument("--picture", help="file for a picture of all runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    runs: dict[str, list[Run]] = {"left alone": [], "revived": []}
    for seed in range(arguments.seeds):
        for name, those in runs.items():
            run = train(seed, revives=name == "revived")
            those.append(run)
            half = len(run.steps) // 2
            last = np.mean([earned for earned, end in zip(run.returns, run.ended, strict=True) if end > STEPS // 2])
            print(
                f"seed {seed}, {name:10}: {np.mean(run.dormant[half:]):4.1f} % dormant, "
                f"{np.mean(run.dead[half:]):4.1f} % dead, {run.revived:3} revived; "
                f"return {last:5.1f} (means of the second half)",
                flush=True,
            )
    if arguments.picture:
        draw(runs, arguments.picture)


if __name__ == "__main__":
    main()
