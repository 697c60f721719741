"""How right the optimizer's clock is: networks that die for real reasons, counted, beside what their state says.

    python -m scripts.optimizer_clock [--seeds 3]        # prints the tables of docs/optimizer-clock.md

Each network trains on scikit-learn's digits with an ordinary loop. After every backward pass the script notes which
rows of each layer got a gradient that is not zero; at the end it reads the clock off the optimizer's state and
compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuronscope.demo.data import Digits, load_digits
from neuronscope.postmortem.checkpoint import Checkpoint, OptimizerState
from neuronscope.postmortem.file_alone import examine

Ints = npt.NDArray[np.int64]


class Held:
    """A tensor in memory, as a checkpoint's reader would give it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach().clone()

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self._tensor.shape)

    @property
    def dtype(self) -> str:
        """Name of its type."""
        return str(self._tensor.dtype).removeprefix("torch.")

    def read(self) -> Tensor:
        """A copy of it."""
        return self._tensor.clone()


def as_checkpoint(
    model: nn.Module, *optimizers: torch.optim.Optimizer, step: int | None = None, **more: Any
) -> Checkpoint:
    """What a reader would make of a file with this model and these optimizers."""
    return Checkpoint(
        path=Path("memory"),
        format="in memory",
        tensors={name: Held(tensor) for name, tensor in model.state_dict().items()},
        optimizers=tuple(map(_as_state, optimizers)),
        step=step,
        **more,
    )


def _as_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    state = optimizer.state_dict()
    slots = {
        key: {
            name: Held(value) if isinstance(value, Tensor) and value.dim() else float(value)
            for name, value in kept.items()
            if value is not None
        }
        for key, kept in state["state"].items()
    }
    return OptimizerState(groups=tuple(state["param_groups"]), slots=slots)


# --- networks that die ----------------------------------------------------------------------------------------------


def _he(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def mlp() -> nn.Module:
    """64-[64]×6-10 with ReLU."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return _he(nn.Sequential(*layers, nn.Linear(64, 10)))


def cnn() -> nn.Module:
    """Three convolutions of 32 channels on the 8 × 8 pixels."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs in (1, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1), nn.ReLU()]
    return _he(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks of width 32 over the 8 rows of an image; feed-forward layers with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(0.02 * torch.randn(8, 32))
        self.blocks = nn.ModuleList([_Block(32), _Block(32)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits, ``(B, 10)``."""
        x = self.embed(x.unflatten(1, (8, 8))) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        label: For a reader.
        network: Makes the network.
        optimizer: Makes its optimizer.
        rate: The learning rate of an epoch, counted from 1.
        epochs: Passes over the 1437 images, 45 steps each.
        layers: Paths of the layers whose rows are looked at; all with neurons where empty.
    """

    label: str
    network: Callable[[], nn.Module]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    rate: Callable[[int], float]
    epochs: int = 20
    layers: tuple[str, ...] = ()


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def _language_betas(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def spike(base: float, factor: float = 20.0) -> Callable[[int], float]:
    """A learning rate that jumps in epochs 6 and 7."""
    return lambda epoch: base * (factor if epoch in (6, 7) else 1.0)


def constant(rate: float) -> Callable[[int], float]:
    """The same learning rate all along."""
    return lambda _: rate


_FEED_FORWARD = ("blocks.0.up", "blocks.1.up")

CASES = (
    Case("MLP, Adam 1e-3, spike × 20", mlp, _adam, spike(1e-3)),
    Case("MLP, AdamW 1e-3, decay .1, spike × 20", mlp, _adamw, spike(1e-3)),
    Case("MLP, AdamW 1e-3, β2 .95, spike × 20", mlp, _language_betas, spike(1e-3)),
    Case("MLP, Adam 1e-2 throughout", mlp, _adam, constant(1e-2)),
    Case("MLP, Adam 1e-3, no spike (slow deaths)", mlp, _adam, constant(1e-3), 40),
    Case("CNN, Adam 1e-3, spike × 20", cnn, _adam, spike(1e-3)),
    Case("CNN, AdamW 1e-2 throughout", cnn, _adamw, constant(1e-2)),
    Case("Transformer, AdamW 1e-3, spike × 30", Transformer, _adamw, spike(1e-3, 30.0), 20, _FEED_FORWARD),
    Case("MLP, SGD .9, 1e-2, spike × 10", mlp, _sgd, spike(1e-2, 10.0)),
)


# --- the truth ------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What was counted while a network trained.

    Attributes:
        last: Step, from 1, at which each row of a layer last got a gradient that is not zero, int64 ``(N,)``; 0: never.
        steps: Steps taken.
    """

    last: dict[str, Ints] = field(default_factory=dict)
    steps: int = 0

    def note(self, model: nn.Module) -> None:
        """A backward pass is done, and the optimizer is about to take its step."""
        self.steps += 1
        for path, module in model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or module.weight.grad is None:
                continue
            got = (module.weight.grad != 0).flatten(1).any(dim=1)
            if module.bias is not None and module.bias.grad is not None:
                got |= module.bias.grad != 0
            last = self.last.setdefault(path, np.zeros(len(got), dtype=np.int64))
            last[got.numpy()] = self.steps


#: Called after each optimizer step.
AfterStep = Callable[[nn.Module, torch.optim.Optimizer, Truth], None]


def train(
    case: Case, seed: int, digits: Digits, after_step: AfterStep | None = None
) -> tuple[nn.Module, torch.optim.Optimizer, Truth]:
    """Train one network, counting."""
    torch.manual_seed(seed)
    model = case.network()
    optimizer = case.optimizer(list(model.parameters()))
    order = torch.Generator().manual_seed(seed)
    truth = Truth()
    for epoch in range(1, case.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = case.rate(epoch)
        for batch in torch.randperm(len(digits.train_y), generator=order).split(32):
            F.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch]).backward()
            truth.note(model)
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step(model, optimizer, truth)
    return model, optimizer, truth


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """What clock and count say of many rows, side by side.

    Attributes:
        silence: Steps since the last gradient, counted; rows that never got one: all steps.
        never: Whether a row never got one.
        said: What the clock says at most (or about): infinite where it has run out, NaN where it says nothing.
        claim: ``alive``, ``no gradient``, ``never trained`` or ``""``.
        whole: Whether it was said of the whole layer, not of the neuron.
    """

    silence: Ints
    never: npt.NDArray[np.bool_]
    said: npt.NDArray[np.float64]
    claim: npt.NDArray[np.str_]
    whole: npt.NDArray[np.bool_]


def compare(checkpoint: Checkpoint, truth: Truth, paths: tuple[str, ...] = ()) -> Rows:
    """The clock of a checkpoint beside the truth, row by row."""
    evidence, _ = examine(checkpoint)
    parts = []
    for path in paths or tuple(truth.last):
        last = truth.last[path]
        said, claim, whole = np.full(len(last), np.nan), np.full(len(last), "", dtype="<U16"), np.zeros(len(last), bool)
        for piece in evidence:
            if piece.layer == path and piece.source.startswith(("adam state", "sgd state")):
                claim[piece.neurons] = piece.claim
                whole[piece.neurons] = piece.source.endswith("whole layer")
                said[piece.neurons] = np.inf if "or more" in piece.measure else piece.numbers
        parts.append(Rows(truth.steps - last, last == 0, said, claim, whole))
    return joined(parts)


def joined(parts: list[Rows]) -> Rows:
    """Rows of several networks together."""
    return Rows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in Rows.__dataclass_fields__})


@dataclass(frozen=True)
class Score:
    """One line of the table; counts are of rows."""

    rows: int
    silent: int
    found: int
    never: int
    never_found: int
    living: int
    false_alarms: int
    violations: int
    errors: npt.NDArray[np.float64]


def score(rows: Rows, exact: bool = True) -> Score:
    """Count hits and misses.

    *Silent*: no gradient for 100 steps or more, and one before. *Living*: one within the last 45 steps, an epoch. A
    violation is a bound below the truth. Errors are of what was found and dated: said minus counted.
    """
    silent = ~rows.never & (rows.silence >= 100)
    living = ~rows.never & (rows.silence < 45)
    found = silent & (rows.claim == "no gradient")
    dated = found & np.isfinite(rows.said)
    bounded = np.isfinite(rows.said) & ~rows.never
    return Score(
        rows=len(rows.silence),
        silent=int(silent.sum()),
        found=int(found.sum()),
        never=int(rows.never.sum()),
        never_found=int((rows.never & (rows.claim == "never trained")).sum()),
        living=int(living.sum()),
        false_alarms=int((living & np.isin(rows.claim, ["no gradient", "never trained"])).sum()),
        violations=int((rows.said[bounded] < rows.silence[bounded]).sum()) if exact else 0,
        errors=rows.said[dated] - rows.silence[dated],
    )


@dataclass(frozen=True)
class Between:
    """One line of the second table: rows, by two checkpoints."""

    silent: int
    found: int
    trained: int
    false_alarms: int
    died: int
    died_found: int


def compare_two(earlier: Checkpoint, later: Checkpoint, truth: Truth, paths: tuple[str, ...] = ()) -> Between:
    """What two checkpoints say beside the truth.

    *Silent*: a gradient before the earlier one and none between the two. *Trained*: one in between. *Died*: one in
    between and none for 100 steps or more.
    """
    evidence, _ = examine(later, earlier=earlier)
    counts = dict.fromkeys(Between.__dataclass_fields__, 0)
    first = earlier.step or 0
    for path in paths or tuple(truth.last):
        last = truth.last[path]
        kept, fell = np.zeros(len(last), dtype=bool), np.zeros(len(last), dtype=bool)
        for piece in evidence:
            if piece.layer == path and piece.source.startswith("two checkpoints") and piece.claim == "no gradient":
                (kept if piece.measure.endswith("at least") else fell)[piece.neurons] = True
        silent, trained = (last > 0) & (last <= first), last > first
        died = trained & (truth.steps - last >= 100)
        for name, mask in (
            ("silent", silent),
            ("found", silent & kept),
            ("trained", trained),
            ("false_alarms", trained & kept),
            ("died", died),
            ("died_found", died & fell),
        ):
            counts[name] += int(mask.sum())
    return Between(**counts)


def _measure(case: Case, seeds: int, digits: Digits) -> tuple[Rows, Between]:
    """Train a case's networks; a first checkpoint is taken after epoch 6, in the middle of the spike."""
    parts, between = [], []
    for seed in range(seeds):
        kept: list[Checkpoint] = []

        def keep(
            model: nn.Module, optimizer: torch.optim.Optimizer, truth: Truth, kept: list[Checkpoint] = kept
        ) -> None:
            if truth.steps == 6 * 45:
                kept.append(as_checkpoint(model, optimizer, step=truth.steps))

        model, optimizer, truth = train(case, seed, digits, keep)
        last = as_checkpoint(model, optimizer, step=truth.steps)
        parts.append(compare(last, truth, case.layers))
        between.append(compare_two(kept[0], last, truth, case.layers))
    names = Between.__dataclass_fields__
    return joined(parts), Between(**{name: sum(getattr(one, name) for one in between) for name in names})


def _tables(seeds: int) -> Iterator[str]:
    digits = load_digits()
    first = [
        "| network | rows | silent | found | never trained | found | living | false alarms | bound broken | error |",
        "| --- |" + " ---: |" * 9,
    ]
    second = [
        "| network | living | bound > 80 | > 120 | > 200 | > 400 |",
        "| --- |" + " ---: |" * 5,
    ]
    third = [
        "| network | silent in between | found | trained in between | false alarms | died in between | found |",
        "| --- |" + " ---: |" * 6,
    ]
    for case in CASES:
        print(f"… {case.label}", file=sys.stderr, flush=True)
        rows, between = _measure(case, seeds, digits)
        exact = "SGD" not in case.label
        got = score(rows, exact)
        error = ", ".join(f"{at:+.0f}" for at in np.percentile(got.errors, [1, 50, 99])) if got.errors.size else "none"
        first.append(
            f"| {case.label} | {got.rows} | {got.silent} | {got.found} | {got.never} | {got.never_found} | "
            f"{got.living} | {got.false_alarms} | {got.violations if exact else 'no bound'} | "
            f"{error} |"
        )
        said = rows.said[~rows.never & (rows.silence < 45)]
        shares = " | ".join(f"{(said > limit).mean():.1%}" for limit in (80, 120, 200, 400))
        second.append(f"| {case.label} | {got.living} | {shares} |")
        third.append(f"| {case.label} | {' | '.join(str(getattr(between, name)) for name in vars(between))} |")
    for table in (first, second, third):
        yield from table
        yield ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    for line in _tables(parser.parse_args().seeds):
        print(line, flush=True)
