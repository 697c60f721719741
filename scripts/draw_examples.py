"""Run two examples and draw docs/images/dqn-cartpole.png and docs/images/sparse-autoencoder.png from what they give.

Run by hand: ``python -m scripts.draw_examples [FOLDER]``. Five trainings of a kind for the agents, as in
docs/reinforcement-learning.md; it takes about a minute and a half of one core.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from examples import dqn_cartpole, sparse_autoencoder

matplotlib.use("Agg")
from matplotlib import pyplot

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SEEDS = 5


def draw_agents(runs: dict[str, list[dqn_cartpole.Run]], path: Path) -> None:
    """Draw the dormant share and the return of every run, and their means in bold."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (name, those), colour in zip(runs.items(), ("#b3261e", "#1a5fb4"), strict=True):
        every = np.arange(dqn_cartpole.REPORT_EVERY, dqn_cartpole.STEPS + 1, dqn_cartpole.REPORT_EVERY)
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
    """Return the mean of the last returns after each episode."""
    return [float(np.mean(returns[max(0, end - last) : end])) for end in range(1, len(returns) + 1)]


def draw_latents(runs: dict[str, tuple[list[int], Any]], path: Path) -> None:
    """Draw both runs: latents that have not fired for long, by step, and how densely the others fire at the end."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (name, (silent, latents)), colour in zip(runs.items(), ("#d55e00", "#0072b2"), strict=True):
        left.plot(np.arange(1, len(silent) + 1) * 100, silent, label=name, color=colour)
        counts, edges = latents.density_histogram(bins_per_decade=4)
        right.stairs(counts, edges, label=name, color=colour, linewidth=1.8)
    left.set(xlabel="optimizer step", ylabel=f"latents silent for {sparse_autoencoder.LONG:,} images", ylim=(0, None))
    right.set(xlabel="log10 of the firing density", ylabel="latents")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run both and draw both."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = sparse_autoencoder.features()
    latents = {
        name: sparse_autoencoder.train(data, resamples=name == "resampled") for name in ("left alone", "resampled")
    }
    draw_latents(latents, folder / "sparse-autoencoder.png")
    agents = {
        name: [dqn_cartpole.train(seed, revives=name == "revived") for seed in range(SEEDS)]
        for name in ("left alone", "revived")
    }
    draw_agents(agents, folder / "dqn-cartpole.png")


if __name__ == "__main__":
    main()
