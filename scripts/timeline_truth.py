"""How right the timeline of several checkpoints is: deaths and revivals beside gradients noted at every step.

    python -m scripts.timeline_truth [--seeds 3]        # prints the table of docs/postmortem.md

Small networks train on scikit-learn's digits. The learning rate jumps for 20 steps, and later the weights of some dead
neurons are reset. Which neuron got a gradient at which step is noted, and compared with the timeline of checkpoints
that were saved every 60 or 240 steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.checkpoints.file.optimizer_clocks import SURE_STEPS
from neuronscope.checkpoints.verdict.checkpoint_timeline import DIED, CheckpointTimeline
from neuronscope.demo.digits import Digits, load_digits

STEPS, SPIKE, RESET = 960, range(240, 260), 610
LAYERS = ("0", "2")

#: Names of optimizers, how each is made, and by how much the learning rate jumps.
OPTIMIZERS: dict[str, tuple[Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], float]] = {
    "Adam 1e-3": (lambda p: torch.optim.Adam(p, lr=1e-3), 30.0),
    "AdamW 1e-3, decay .1": (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), 30.0),
    "SGD .9, 1e-2": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 40.0),
    "SGD .9, 1e-2, decay 5e-4": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=5e-4), 40.0),
}


@dataclass
class Score:
    """Counts over all networks of a line.

    Attributes:
        silences: Times without gradient, long enough to be found.
        found: Those whose last gradient is in the interval of a death.
        deaths: Deaths that the timeline claims.
        held: Those whose interval contains the last gradient before a silence of more than 100 steps.
        revivals: Revivals that it claims.
        back: Those whose interval contains a gradient, or the reset of the neuron's weights.
    """

    silences: int = 0
    found: int = 0
    deaths: int = 0
    held: int = 0
    revivals: int = 0
    back: int = 0

    def add(self, other: Score) -> None:
        """Add the counts of another network."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


def train(
    name: str, seed: int, digits: Digits, every: tuple[int, ...], folder: Path
) -> dict[str, npt.NDArray[np.bool_]]:
    """Train a network, save checkpoints in ``folder/<every>``, and return whether each row got a gradient, by layer.

    The arrays are bool ``(steps, N)``.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    make, factor = OPTIMIZERS[name]
    optimizer, order = make(model.parameters()), torch.Generator().manual_seed(seed)
    rate = optimizer.param_groups[0]["lr"]
    noted: dict[str, list[npt.NDArray[np.bool_]]] = {path: [] for path in LAYERS}
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = rate * (factor if step in SPIKE else 1.0)
        batch = torch.randint(len(digits.train_y), (32,), generator=order)
        F.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch]).backward()
        for path, steps in noted.items():
            weight, bias = (parameter.grad for parameter in model.get_submodule(path).parameters())
            steps.append(((weight != 0).any(dim=1) | (bias != 0)).numpy())
        optimizer.step()
        optimizer.zero_grad()
        if step == RESET:
            dead = np.flatnonzero(~np.stack(noted["0"][-150:]).any(axis=0))[:8]
            with torch.no_grad():
                model[0].weight[dead] = torch.randn(len(dead), 64, generator=order) * 0.18
                model[0].bias[dead] = 0.1
            noted["0"][-1][dead] = True  # weights set anew count as a gradient
        for interval in every:
            if step % interval == 0:
                (folder / str(interval)).mkdir(exist_ok=True)
                content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(content, folder / str(interval) / f"{step}.pt")
    return {path: np.stack(steps) for path, steps in noted.items()}


def score(timeline: CheckpointTimeline, noted: dict[str, npt.NDArray[np.bool_]], every: int) -> Score:
    """Compare a timeline with the noted gradients."""
    found = Score()
    for layer in timeline.layers:
        if layer.name not in noted:
            continue
        died = layer.events(DIED)
        for neuron, got in enumerate(noted[layer.name].T):
            steps = np.flatnonzero(got) + 1
            mine = layer.neuron == neuron
            early, late = layer.earliest[mine & died], layer.latest[mine & died]
            for last, following in zip([0, *steps], [*steps, STEPS + 1], strict=True):
                if following - last > SURE_STEPS + every:  # the clock is sure at some checkpoint
                    found.silences += 1
                    found.found += bool(((early <= last) & (last <= late)).any() or (last == 0 and -1 in early))
            for first, end in zip(early, late, strict=True):
                found.deaths += 1
                before = steps[steps <= end]
                last = int(before[-1]) if before.size else -1
                after = steps[steps > end]
                silent_until = int(after[0]) if after.size else STEPS + 1
                found.held += first <= last and silent_until - last > 100
            for first, end in zip(layer.earliest[mine & ~died], layer.latest[mine & ~died], strict=True):
                found.revivals += 1
                found.back += bool(((steps >= first) & (steps <= end)).any())
    return found


def _table(seeds: int) -> Iterator[str]:
    digits, every = load_digits(), (60, 240)
    yield "| optimizer | a checkpoint every | long silences | found | deaths | hold | revivals | hold |"
    yield "| --- |" + " ---: |" * 7
    for name in OPTIMIZERS:
        print(f"… {name}", file=sys.stderr, flush=True)
        totals = {interval: Score() for interval in every}
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                noted = train(name, seed, digits, every, Path(folder))
                for interval, total in totals.items():
                    timeline = ns.postmortem(Path(folder) / str(interval)).timeline
                    assert timeline is not None
                    total.add(score(timeline, noted, interval))
        for interval, total in totals.items():
            numbers = " | ".join(str(getattr(total, one.name)) for one in fields(total))
            yield f"| {name} | {interval} steps | {numbers} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    for line in _table(parser.parse_args().seeds):
        print(line, flush=True)
