"""The optimizer's clock against counted gradients: five networks × the optimizers in use × eight ways of training.

    python -m scripts.clock_truths train [--only TEXT ...] [--seeds 2]   # some hours; trains what the folder lacks
    python -m scripts.clock_truths table [--only TEXT ...]               # a line for each cell that was trained
    python -m scripts.clock_truths page                                  # writes docs/clock-truths.md

Each cell trains a small network on scikit-learn's digits, with a learning rate that kills neurons for some steps; one
neuron in eight is killed by its bias, since few die of the learning rate behind a norm. After each backward pass, plain
``param.grad`` tells which rows got a gradient that is not zero. The last checkpoint and these counts are stored in
``runs/clock_truths``, so that training can be stopped and continued, and the clock can be read again when its code has
changed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils

from neuronscope.checkpoints.file.examine_file import examine_file
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.demo.digits import Digits, load_digits
from scripts.dying_networks import Transformer, Truth, cnn, cnn_with_norms, mlp, resnet

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "runs" / "clock_truths", ROOT / "docs" / "clock-truths.md"
#: Steps of a training; those with a high learning rate; the one at which biases kill; the first of a new optimizer.
STEPS, SPIKE, KILLED, RENEWED = 600, range(151, 211), 200, 301
#: How far biases fall then, and in which of so many neurons.
FALL, ONE_IN = 20.0, 8
#: A row without gradient for so many steps is silent; one with a gradient within so many is living.
SILENT, LIVING = 100, 80

#: Pixels of a side of the pictures that networks with convolutions are given: the mean of each 2 × 2 of the digits'.
SIDE = 4

# --- optimizers -----------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023), with the state and the groups of the package lion-pytorch."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                    first, second = group["betas"]
                    parameter -= group["lr"] * torch.sign(mean.lerp(parameter.grad, 1 - first))
                    mean.lerp_(parameter.grad, 1 - second)


def _adafactor_of_transformers(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


def _eight_bits(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The package keeps the state of parameters with fewer than 4,096 elements in float32."""
    from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=1e-3)
    return optimizer


def _muon(model: nn.Module, momentum: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers, AdamW for all else."""
    named = list(model.named_parameters())
    last = [name for name, parameter in named if parameter.dim() == 2][-1]
    hidden = {name for name, parameter in named if parameter.dim() == 2 and name not in (last, "position")}
    return [
        torch.optim.Muon([one for name, one in named if name in hidden], lr=5e-3, momentum=momentum),
        torch.optim.AdamW([one for name, one in named if name not in hidden], lr=1e-3),
    ]


@dataclass(frozen=True)
class Recipe:
    """An optimizer as it is used.

    Attributes:
        make: Makes the optimizers of a network, with the decay of the first running mean or the momentum.
        spike: How many times higher its learning rate is while neurons die.
        beta: The usual decay of its running mean of gradients; ``None`` if it has none that can be chosen.
        package: The package that it needs besides torch.
    """

    make: Callable[[nn.Module, float], list[torch.optim.Optimizer]]
    spike: float
    beta: float | None = 0.9
    package: str = ""


def _recipe(
    kind: Callable[..., torch.optim.Optimizer], spike: float, beta: str = "", package: str = "", **options: Any
) -> Recipe:
    """Return the recipe of one optimizer for all parameters; ``beta`` names its option for the decay of the mean."""

    def make(model: nn.Module, value: float) -> list[torch.optim.Optimizer]:
        second = options.get("betas", (0.9, 0.99 if kind is Lion else 0.999))[1]
        chosen = {"betas": {"betas": (value, second)}, "": {}}.get(beta, {beta: value})
        return [kind(list(model.parameters()), **{**options, **chosen})]

    return Recipe(make, spike, 0.9 if beta else None, package)


OPTIMIZERS: dict[str, Recipe] = {
    "SGD": _recipe(torch.optim.SGD, 15, lr=1e-1),
    "SGD, momentum": _recipe(torch.optim.SGD, 10, "momentum", lr=1e-2),
    "SGD, momentum, decay": _recipe(torch.optim.SGD, 10, "momentum", lr=1e-2, weight_decay=5e-4),
    "Adam": _recipe(torch.optim.Adam, 20, "betas", lr=1e-3),
    "Adam, L2": _recipe(torch.optim.Adam, 20, "betas", lr=1e-3, weight_decay=1e-4),
    "AdamW": _recipe(torch.optim.AdamW, 20, "betas", lr=1e-3, weight_decay=0.1),
    "amsgrad": _recipe(torch.optim.AdamW, 20, "betas", lr=1e-3, amsgrad=True),
    "NAdam": _recipe(torch.optim.NAdam, 20, "betas", lr=1e-3),
    "RAdam": _recipe(torch.optim.RAdam, 20, "betas", lr=1e-3),
    "Adamax": _recipe(torch.optim.Adamax, 20, "betas", lr=2e-3),
    "Adagrad": _recipe(torch.optim.Adagrad, 30, lr=1e-2),
    "RMSprop": _recipe(torch.optim.RMSprop, 20, lr=1e-3),
    "Adafactor (torch)": _recipe(torch.optim.Adafactor, 20, lr=1e-2),
    "Adafactor (transformers)": _recipe(_adafactor_of_transformers, 20, package="transformers"),
    "Lion": _recipe(Lion, 20, "betas", lr=3e-4),
    "Muon": Recipe(_muon, 20, 0.95),
    "AdamW, 8 bits (bitsandbytes)": _recipe(_eight_bits, 20, package="bitsandbytes"),
}
_WITH_CLOCKS = {"SGD, momentum", "SGD, momentum, decay", "Adam", "AdamW", "amsgrad", "NAdam", "RAdam", "Muon"}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": mlp,
    "CNN": partial(cnn, SIDE),
    "CNN, BN": partial(cnn_with_norms, SIDE),
    "Transformer": Transformer,
    "ResNet": partial(resnet, SIDE),
}
_WITH_CONVOLUTIONS = {"CNN", "CNN, BN", "ResNet"}
#: How many times higher the high learning rates are, with SGD and else: behind norms, neurons die of far higher ones;
#: but SGD gives numbers that are not finite then.
HIGHER = {"MLP": (1, 1), "CNN": (1, 1), "CNN, BN": (1, 4), "Transformer": (0.3, 2), "ResNet": (1, 4)}
SCHEDULES = ("constant", "OneCycle", "warm restarts", "β1 .5", "fine-tuned", "bfloat16", "clipped", "EMA")

# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training: a network, an optimizer, a schedule and a seed."""

    network: str
    optimizer: str
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return " · ".join(map(str, (self.network, self.optimizer, self.schedule, self.seed)))

    @property
    def absent(self) -> str:
        """Why there is no such training; ``""`` if there is one."""
        recipe = OPTIMIZERS[self.optimizer]
        if self.optimizer == "Muon" and self.network in _WITH_CONVOLUTIONS:
            return "networks with convolutions, since it takes matrices only"
        if self.schedule == "β1 .5" and recipe.beta is None:
            return "another β1, since it has none that can be chosen"
        if recipe.package and importlib.util.find_spec(recipe.package) is None:
            return f"{recipe.package} is not installed"
        return ""


def all_cells(seeds: int) -> Iterator[Cell]:
    """Yield all cells: first each optimizer as it is, then those with a clock in other ways of training."""
    cells = [
        Cell(network, optimizer, schedule, seed)
        for seed in range(seeds)
        for schedule in SCHEDULES
        for network in NETWORKS
        for optimizer in OPTIMIZERS
    ]
    return iter(
        sorted(
            cells,
            key=lambda cell: (
                cell.seed,
                cell.schedule != "constant",
                cell.optimizer not in _WITH_CLOCKS or cell.schedule == "bfloat16",
            ),
        )
    )


#: Ways of training that begin alike: one training gives a checkpoint for each.
_TOGETHER = ("constant", "EMA", "fine-tuned")


def train_cells(cells: Sequence[Cell], digits: Digits) -> Iterator[tuple[Cell, dict[str, Any], Truth]]:
    """Train the network of one cell, or of several that begin alike, and count.

    Args:
        cells: What to train: cells of one network, optimizer and seed, whose ways of training are all the same or all
            among :data:`_TOGETHER`.
        digits: The data.

    Yields:
        For each cell the checkpoint, and at which step each row last got a gradient.
    """
    batches = _batches(digits, cells[0].seed)
    by_schedule = {cell.schedule: cell for cell in cells}
    renewed = by_schedule.pop("fine-tuned", None)
    training = _Training(cells[0], averages="EMA" in by_schedule)
    for batch in batches[: RENEWED - 1]:
        training.step(digits, batch)
    if renewed is not None:
        branch = training.with_new_optimizers()
        for batch in batches[RENEWED - 1 :]:
            branch.step(digits, batch)
        yield renewed, branch.checkpoint(), branch.truth
    if by_schedule:
        for batch in batches[RENEWED - 1 :]:
            training.step(digits, batch)
    for schedule, cell in by_schedule.items():
        yield cell, training.checkpoint(averaged=schedule == "EMA"), training.truth


class _Training:
    """A network that is being trained, while its gradients are counted.

    Args:
        cell: The network, the optimizer, the way of training and the seed.
        averages: Whether to keep an exponential moving average of the weights.
    """

    def __init__(self, cell: Cell, averages: bool) -> None:
        self.truth = Truth()
        self._cell = cell
        torch.manual_seed(cell.seed)
        self._dtype = torch.bfloat16 if cell.schedule == "bfloat16" else torch.float32
        self._model = NETWORKS[cell.network]().to(self._dtype)
        averaging = swa_utils.get_ema_multi_avg_fn(0.99)
        self._averaged = swa_utils.AveragedModel(self._model, multi_avg_fn=averaging) if averages else None
        self._make_optimizers()

    def with_new_optimizers(self) -> _Training:
        """Return a copy of this training that goes on with new optimizers."""
        other = copy.copy(self)
        other.truth, other._model, other._averaged = copy.deepcopy(self.truth), copy.deepcopy(self._model), None
        other._make_optimizers()
        return other

    def _make_optimizers(self) -> None:
        cell, recipe = self._cell, OPTIMIZERS[self._cell.optimizer]
        spike = recipe.spike * HIGHER[cell.network][not cell.optimizer.startswith("SGD")]
        self._optimizers = recipe.make(self._model, 0.5 if cell.schedule == "β1 .5" else recipe.beta or 0.0)
        self._schedulers = [_scheduler(cell.schedule, optimizer, spike) for optimizer in self._optimizers]

    def step(self, digits: Digits, batch: Tensor) -> None:
        """Take one step.

        Args:
            digits: The data.
            batch: Indices of the step's images.
        """
        x = digits.train_x[batch].to(self._dtype)
        if self._cell.network in _WITH_CONVOLUTIONS:
            x = F.avg_pool2d(x.unflatten(1, (1, 8, 8)), 8 // SIDE).flatten(1)
        F.cross_entropy(self._model(x).float(), digits.train_y[batch]).backward()
        if self._cell.schedule == "clipped":
            nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self.truth.note(self._model)
        for optimizer, scheduler in zip(self._optimizers, self._schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if self._averaged is not None:
            self._averaged.update_parameters(self._model)
        if self.truth.steps == KILLED:
            _kill(self._model)

    def checkpoint(self, averaged: bool = False) -> dict[str, Any]:
        """Return what a file would hold.

        Args:
            averaged: Whether with the averages in place of the weights that the optimizers train.
        """
        states = [optimizer.state_dict() for optimizer in self._optimizers]
        kept = self._averaged if averaged else self._model
        assert kept is not None
        optimizer = states[0] if len(states) == 1 else states
        return {"model": kept.state_dict(), "optimizer": optimizer, "step": self.truth.steps}


def _batches(digits: Digits, seed: int) -> list[Tensor]:
    """Return the indices of each step's images."""
    order, found = torch.Generator().manual_seed(seed), []
    while len(found) < STEPS:
        found += torch.randperm(len(digits.train_y), generator=order).split(32)
    return found[:STEPS]


@torch.no_grad()
def _kill(model: nn.Module) -> None:
    """Lower the bias of some neurons of each layer with an activation so far that they do not fire again."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    layers = norms or [module for path, module in model.named_modules() if path.endswith("up")]
    for layer in layers or [one for one in model.modules() if isinstance(one, (nn.Linear, nn.Conv2d))][:-1]:
        bias = layer.bias
        assert isinstance(bias, Tensor)
        bias[::ONE_IN] -= FALL


def _scheduler(schedule: str, optimizer: torch.optim.Optimizer, spike: float) -> lr_scheduler.LRScheduler:
    if schedule == "OneCycle":
        rates = [spike * group["lr"] for group in optimizer.param_groups]
        cycled = any("betas" in group or group.get("momentum") for group in optimizer.param_groups)
        return lr_scheduler.OneCycleLR(optimizer, rates, total_steps=STEPS + 1, cycle_momentum=cycled)
    if schedule == "warm restarts":
        for group in optimizer.param_groups:
            group["lr"] *= spike / 2
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100, 2)
    return lr_scheduler.LambdaLR(optimizer, lambda taken: spike if taken + 1 in SPIKE else 1.0)


def train_missing(cells: Iterable[Cell], folder: Path) -> None:
    """Train the cells of which the folder holds no checkpoint.

    Args:
        cells: The cells, the most important first.
        folder: Where the checkpoints and the counts are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    together: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        if not cell.absent and not (folder / f"{cell.name}.json").exists():
            begins = _TOGETHER if cell.schedule in _TOGETHER else cell.schedule
            together.setdefault((cell.network, cell.optimizer, cell.seed, begins), []).append(cell)
    for alike in together.values():
        for cell, checkpoint, truth in train_cells(alike, digits):
            torch.save(checkpoint, folder / f"{cell.name}.pt")
            counts = json.dumps({path: last.tolist() for path, last in truth.last.items()})
            (folder / f"{cell.name}.json").write_text(counts)
            print(cell.name, file=sys.stderr, flush=True)


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """Counts of rows of one or more trainings; see :func:`score`.

    Attributes:
        silent: Rows without gradient for 100 steps or more, in layers that have a clock.
        found: Those of them that the report calls *no gradient* or *never trained*, on whatever basis.
        firm: Those of these that are inferred.
        living: Rows with a gradient within the last 80 steps.
        inferred: Those of them that are inferred to have none.
        suspected: Those of them that are suspected to have none.
        broken: Rows of which something that is called certain is not true.
        unsaid: Rows of which nothing is said, in layers of which no reason is given either.
        clockless: Rows in layers of which the report says that there is no clock.
        errors: For silent rows with a number of steps, this number minus the count.
        reasons: What the report says of layers without a clock.
    """

    silent: int = 0
    found: int = 0
    firm: int = 0
    living: int = 0
    inferred: int = 0
    suspected: int = 0
    broken: int = 0
    unsaid: int = 0
    clockless: int = 0
    errors: tuple[float, ...] = ()
    reasons: frozenset[str] = frozenset()

    def __add__(self, other: Score) -> Score:
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return Score(*(one | two if isinstance(one, frozenset) else one + two for one, two in pairs))

    @property
    def has_clock(self) -> bool:
        """Whether any layer has a clock."""
        return self.silent + self.living > 0 and not (self.clockless and not self.silent)

    def misses(self) -> Iterator[str]:
        """Yield what does not reach the aim."""
        if self.found < 0.99 * self.silent:
            yield f"{self.found} of {self.silent} silent rows found"
        if self.inferred > 0.01 * self.living:
            yield f"{self.inferred} of {self.living} living rows inferred"
        if self.broken:
            yield f"{self.broken} rows with a broken bound"
        if self.unsaid:
            yield f"nothing said of {self.unsaid} rows"


def score(checkpoint: Path, last: Mapping[str, npt.NDArray[np.int64]], steps: int = STEPS) -> Score:
    """Compare what a checkpoint's optimizer state says with counted gradients.

    Args:
        checkpoint: The file.
        last: For each layer, the step at which each row last got a gradient; 0: never.
        steps: Steps of the training.
    """
    evidence, abstentions = examine_file(open_checkpoint(checkpoint))
    found = Score()
    for path, row_last in last.items():
        reasons = {one.reason for one in abstentions if one.layer in (path, "")}
        no_clock = {one for one in reasons if "o clock" in one}
        silence = steps - row_last
        said = np.full(len(silence), "", dtype="<U24")
        for piece in evidence:
            if piece.layer != path or not piece.source.endswith("state"):
                continue
            own, is_gone = silence[piece.neurons], piece.claim in ("no gradient", "never trained")
            said[piece.neurons] = piece.basis if is_gone else piece.claim
            found.broken += int(_broken(piece, own, steps).sum())
            if is_gone and piece.measure.endswith(("at most", "about")):
                found.errors += tuple((piece.numbers - own)[own >= SILENT].tolist())
        silent, living = (silence >= SILENT) & (not no_clock), silence < LIVING
        found.silent += int(silent.sum())
        found.found += int((silent & np.isin(said, ("inferred", "suspected"))).sum())
        found.firm += int((silent & (said == "inferred")).sum())
        found.living += int(living.sum())
        found.inferred += int((living & (said == "inferred")).sum())
        found.suspected += int((living & (said == "suspected")).sum())
        found.unsaid += 0 if reasons else int((said == "").sum())
        found.clockless += len(silence) if no_clock else 0
        found.reasons |= no_clock
    return found


def _broken(piece: Any, silence: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.bool_]:
    """Return for which rows something is not true that is called certain: a bound, a date, *never*."""
    wrong = np.zeros(len(silence), dtype=bool)
    if piece.measure.endswith("at most"):
        wrong |= piece.numbers < silence
        if piece.since is not None:
            wrong |= piece.since > steps - silence
    if piece.measure.endswith("at least"):
        wrong |= piece.numbers > silence
    if piece.claim == "never trained":
        wrong |= silence < steps
    return wrong


def read_scores(cells: Iterable[Cell], folder: Path) -> dict[Cell, Score]:
    """Score all cells of which the folder holds a checkpoint."""
    found = {}
    for cell in cells:
        checkpoint, counts = (folder / f"{cell.name}{suffix}" for suffix in (".pt", ".json"))
        if checkpoint.exists() and counts.exists():
            last = {path: np.array(rows) for path, rows in json.loads(counts.read_text()).items()}
            found[cell] = score(checkpoint, last)
    return found


def _dates(one: Score) -> str:
    return ", ".join(f"{at:+.0f}" for at in np.percentile(one.errors, [1, 50, 99])) if one.errors else "none"


def table(scores: Mapping[Cell, Score]) -> Iterator[str]:
    """Yield a line for each cell."""
    for cell, one in scores.items():
        yield (
            f"{cell.name}: found {one.found}/{one.silent}, of {one.living} living inferred {one.inferred}, suspected "
            f"{one.suspected}; broken {one.broken}, unsaid {one.unsaid}, no clock {one.clockless}; {_dates(one)}"
            + "".join(f" <<< {miss}" for miss in one.misses())
        )


# --- the page -------------------------------------------------------------------------------------------------------

_HEAD = """\
# The clock against counted gradients

<!-- Written by scripts/clock_truths.py page. Do not edit. -->

How often is a post-mortem right about what it reads from an optimizer's state
([optimizer-clock.md](optimizer-clock.md))? Here it is compared with counted gradients, for the optimizers in use
and for usual ways of training. `python -m scripts.clock_truths` trains, compares and writes this page; it is run by
hand, last on {date} with torch {torch}.

Each cell is {seeds} of a small network on scikit-learn's digits: {steps} steps of 32 images. Between steps {first} and
{last} the learning rate is many times higher, so that neurons die. Behind a norm, few die of that; so at step
{killed}, one neuron in {one_in} is killed by its bias. After each backward pass, plain `param.grad` tells which rows
of each layer got a gradient that is not zero. The report is made from the file of the last checkpoint alone.

- *Silent*: a row without gradient for {silent} steps or more. *Found*: the report says *no gradient* or
  *never trained*, on any basis; *inferred*: on this basis.
- *Living*: a row with a gradient within the last {living} steps. *Inferred*, *suspected*: the report says,
  on this basis, that a living row gets none. Rows of the last layers count, too.
- *Broken*: the report calls a bound, a date or *never* certain, and it is not true.
- *Unsaid*: a row of which the report says nothing, not even that there is no clock.
- *Error*: the report's number of steps since the last gradient minus the count, for silent rows that have
  a number; 1, 50 and 99 % quantiles.

The aim: where there is a clock, 99 % of silent rows are found; at most 1 % of living rows are inferred to be
silent; nothing is broken or unsaid. The threshold of *inferred*, 300 steps, was chosen with these trainings
and those of optimizer-clock.md in view.

A row is found once its clock has fallen far enough. Adam's must have fallen by 8.4 e-foldings: in 80 steps at
the usual β1 of .9, in 165 at .95 (the end of OneCycle). SGD's and Muon's must have fallen by 5 e-foldings, and
for at least 80 steps: in 97 at .95. Networks with convolutions are given pictures of {side} × {side} pixels,
which are means of the digits' pixels.

The ways of training: *OneCycle* goes up to the high learning rate and cycles β1 or the momentum. *Warm
restarts* begin at half the high rate, at steps 0, 100 and 300. *β1 .5* is the momentum of SGD and Muon,
too. *Fine-tuned*: a new optimizer from step {renewed} on. *bfloat16*: weights and state. *Clipped*: the norm of
all gradients is clipped to 1. *EMA*: the file holds the weights of an `AveragedModel` in place of those that
the optimizer trained.
"""


def page(scores: Mapping[Cell, Score], today: str) -> Iterator[str]:
    """Yield the lines of the page.

    Args:
        scores: The scores of all cells that were trained.
        today: The date.
    """
    cells: dict[tuple[str, str, str], Score] = {}
    for cell, one in scores.items():
        key = cell.network, cell.optimizer, cell.schedule
        cells[key] = cells.get(key, Score()) + one
    seeds = len({cell.seed for cell in scores})
    head = _HEAD.format(
        date=today,
        torch=torch.__version__.partition("+")[0],
        seeds="one training" if seeds == 1 else f"up to {seeds} trainings",
        steps=STEPS,
        first=SPIKE[0],
        last=SPIKE[-1],
        killed=KILLED,
        one_in="eight" if ONE_IN == 8 else ONE_IN,
        renewed=RENEWED,
        silent=SILENT,
        living=LIVING,
        side=SIDE,
    )
    for paragraph in head.split("\n\n"):
        yield from _wrapped(paragraph)
        yield ""
    yield "## By optimizer"
    yield ""
    yield from _sums(cells, 1, OPTIMIZERS)
    yield "## By way of training"
    yield ""
    yield from _sums(cells, 2, SCHEDULES)
    yield "## What does not reach the aim"
    yield ""
    misses = [f"- {', '.join(key)}: {'; '.join(one.misses())}." for key, one in cells.items() if any(one.misses())]
    for miss in misses or ["Nothing."]:
        yield from _wrapped(miss)
    yield ""
    yield "## Each cell"
    yield ""
    yield from _wrapped(
        "Each cell has the silent rows that were found, of all silent rows, and then the living rows that are inferred "
        "+ suspected to be silent. *None*: there is no clock, and the report says so. A cell with a dash was not run."
    )
    yield ""
    absent: dict[str, dict[str, None]] = {}
    for cell in all_cells(1):
        if cell.absent:
            absent.setdefault(cell.absent, {})[cell.optimizer] = None
    yield "These cannot be run:"
    yield ""
    for why, who in absent.items():
        yield from _wrapped(f"- {'; '.join(who)}: {why}.")
    yield ""
    for network in NETWORKS:
        yield f"### {network}"
        yield ""
        yield f"| optimizer | {' | '.join(SCHEDULES)} |"
        yield "| --- |" + " --- |" * len(SCHEDULES)
        for optimizer in OPTIMIZERS:
            row = [cells.get((network, optimizer, schedule)) for schedule in SCHEDULES]
            if any(row):
                yield f"| {optimizer} | {' | '.join(map(_cell, row))} |"
        yield ""
    yield "## What the report says where there is no clock"
    yield ""
    yield from _reasons(cells)


def _sums(cells: Mapping[tuple[str, str, str], Score], place: int, names: Iterable[str]) -> Iterator[str]:
    """Yield the table of the sums of cells by one part of their key."""
    yield "| | cells | silent | found | inferred | living | inferred | suspected | broken | unsaid | error |"
    yield "| --- |" + " ---: |" * 10
    for name in names:
        chosen = [one for key, one in cells.items() if key[place] == name]
        if chosen:
            one = sum(chosen, Score())
            found = f"{one.silent} | {one.found} | {one.firm}" if one.has_clock else "no clock | – | –"
            inferred = f"{one.inferred} ({one.inferred / one.living:.1%})" if one.living else "0"
            yield (
                f"| {name} | {len(chosen)} | {found} | {one.living} | {inferred} | {one.suspected} | {one.broken} | "
                f"{one.unsaid} | {_dates(one)} |"
            )
    yield ""


def _cell(one: Score | None) -> str:
    if one is None:
        return "–"
    if not one.has_clock:
        return "none" + (f" ({one.inferred} false)" if one.inferred else "")
    text = f"{one.found}/{one.silent}, {one.inferred} + {one.suspected}"
    return f"**{text}**" if any(one.misses()) else text


def _reasons(cells: Mapping[tuple[str, str, str], Score]) -> Iterator[str]:
    """Yield what is said of layers without a clock, and for which optimizers and ways of training."""
    said: dict[str, dict[tuple[str, str], None]] = {}
    for (_, optimizer, schedule), one in cells.items():
        for reason in sorted(one.reasons):
            said.setdefault(reason, {})[optimizer, schedule] = None
    for reason, where in said.items():
        schedules = {schedule for _, schedule in where}
        only = f" ({schedules.pop()})" if len(schedules) == 1 else ""
        yield from _wrapped(f"- {'; '.join(dict.fromkeys(name for name, _ in where))}{only}: {reason}")


def _wrapped(text: str) -> list[str]:
    """Return a paragraph, or items of a list, in lines of 100 columns."""
    if text.startswith(("#", "<!--")):
        return text.splitlines()
    items = re.split(r"\n(?=- )", text)
    return [
        line
        for item in items
        for line in textwrap.wrap(
            " ".join(item.split()), 100, subsequent_indent="  " * item.startswith("- "), break_on_hyphens=False
        )
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=["train", "table", "page"])
    parser.add_argument("--only", nargs="*", default=[], help="texts of which the cell's name contains one")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [
        cell
        for cell in all_cells(arguments.seeds)
        if not arguments.only or any(text in cell.name for text in arguments.only)
    ]
    if arguments.act == "train":
        train_missing(chosen, arguments.folder)
    elif arguments.act == "table":
        for line in table(read_scores(chosen, arguments.folder)):
            print(line)
    else:
        lines = page(read_scores(chosen, arguments.folder), f"{date.today():%Y-%m-%d}")
        PAGE.write_text("\n".join(lines).rstrip() + "\n")
