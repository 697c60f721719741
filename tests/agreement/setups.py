"""The set-ups that people train in, each written once, to be run unwatched, watched, and counted slowly.

A set-up builds a network and trains it for twenty steps; its loop talks to whoever watches (see :mod:`slow_twin`). The
twin's network may be built plainer where a set-up does not change the numbers (no activation checkpointing).
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Twin

STEPS = 20
#: Trains a model; gives the one that it ended with, where that is another.
Loop = Callable[[nn.Module, Nobody], nn.Module | None]


@dataclass(frozen=True)
class Setup:
    """One set-up.

    Attributes:
        name: As pytest shows it.
        build: The network; its argument says whether it is for the twin.
        loop: Trains it.
        axis: The neurons' dimension by site name, ``None`` for all others.
        options: For ``watch``.
        phases: That the loop goes through.
    """

    name: str
    build: Callable[[bool], nn.Module]
    loop: Loop
    axis: dict[str | None, int] = field(default_factory=lambda: {None: 1})
    options: dict[str, Any] = field(default_factory=dict)
    phases: tuple[str, ...] = ("train",)


class Mixed(nn.Module):
    """A small network with everything in it: (B, C, L) and (B, T, D), a reused in-place ReLU, F.gelu, dropout, norm."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.relu = nn.ReLU(inplace=True)
        self.block = Block()
        self.fc = nn.Linear(8, 12)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))  # (B, C, L): neurons on axis 1
        if self.checkpointing:
            x = checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")
        else:
            x = self.block(x)
        x = x.transpose(1, 2)  # (B, T, D)
        x = F.gelu(self.fc(x))
        x = self.act(x)
        return self.head(self.drop(x)).mean(1)


class Block(nn.Module):
    """One in-place ReLU module, called twice, with dropout so that a recomputation draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv1d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.conv2(self.drop(self.relu(self.conv1(x)))))


#: Where the neurons of ``Mixed`` lie.
MIXED = {None: 1, "gelu()": 2, "act": 2}


def mixed(checkpointing: str = "") -> Callable[[bool], nn.Module]:
    return lambda twin: Mixed("" if twin else checkpointing)


def batches(count: int = STEPS, size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Data from a generator of its own, so that the loop's random numbers are the network's."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield torch.randn(size, 3, 6, generator=generator), torch.randint(2, (size,), generator=generator)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def plain(model: nn.Module, watcher: Nobody, size: int = 4) -> None:
    train(model, adam(model), watcher, batches(size=size))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, watcher: Nobody, data: Iterable[tuple[Tensor, Tensor]]
) -> None:
    for x, y in data:
        watcher.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


def evaluating(model: nn.Module, watcher: Nobody) -> None:
    """A sanity check first, then an evaluation pass every five steps."""

    def evaluate() -> None:
        model.eval()
        with watcher.phase("val"), torch.no_grad():
            for x, _ in batches(2):
                model(x)
        model.train()

    evaluate()
    optimizer = adam(model)
    for number, (x, y) in enumerate(batches()):
        watcher.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()
        if number % 5 == 4:
            evaluate()


def accumulating(model: nn.Module, watcher: Nobody) -> None:
    """Four micro-batches a step."""
    optimizer = adam(model)
    for number, (x, y) in enumerate(batches(4 * STEPS)):
        watcher.backward(F.cross_entropy(model(x), y) / 4)
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            watcher.step()


def autocast(model: nn.Module, watcher: Nobody) -> None:
    optimizer = adam(model)
    for x, y in batches():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        watcher.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


def twice_a_step(model: nn.Module, watcher: Nobody) -> None:
    """The model is called twice before one backward, as in contrastive training."""
    optimizer = adam(model)
    for x, y in batches():
        watcher.backward(F.cross_entropy(model(x), y) + model(x + 0.1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


def two_backwards(model: nn.Module, watcher: Nobody) -> None:
    """Two forwards, two backwards, one step, as in adversarial training."""
    optimizer = adam(model)
    for x, y in batches():
        watcher.backward(F.cross_entropy(model(x), y))
        watcher.backward(F.cross_entropy(model(-x), y))
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


class Oops(Exception):
    pass


def failing(kind: type[BaseException]) -> Loop:
    """Every third forward ends in an exception from the depth of the network."""

    def loop(model: nn.Module, watcher: Nobody) -> None:
        optimizer = adam(model)

        def fail(module: nn.Module, args: Any) -> None:
            raise kind("a fault of the user's")

        for number, (x, y) in enumerate(batches()):
            if number % 3 == 1:
                handle = model.get_submodule("block.drop").register_forward_pre_hook(fail)
                with contextlib.suppress(kind):
                    model(x)
                handle.remove()
                optimizer.zero_grad()
            else:
                watcher.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            watcher.step()

    return loop


def averaging(model: nn.Module, watcher: Nobody) -> None:
    """An exponential moving average, deep-copied while watched, runs too and is not counted."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = adam(model)
    for x, y in batches():
        watcher.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters()):
                mean.lerp_(new, 0.1)
            average(x)


def saving(model: nn.Module, watcher: Nobody) -> None:
    """The whole model is saved while it is watched, and what was saved runs too and is not counted."""
    optimizer = adam(model)
    for number, batch in enumerate(batches()):
        train(model, optimizer, watcher, [batch])
        if number % 5 == 2 and not isinstance(watcher, Twin):  # whose own hooks cannot be saved
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            saved = torch.load(file, weights_only=False).eval()
            with torch.no_grad():
                saved(batch[0])


def doubly_watched(model: nn.Module, watcher: Nobody) -> None:
    """A second scope comes and goes, while the first counts on."""
    optimizer, data = adam(model), list(batches())
    train(model, optimizer, watcher, data[:5])
    with watcher.another(model) as second:
        for batch in data[5:15]:
            train(model, optimizer, watcher, [batch])
            second.step()
    train(model, optimizer, watcher, data[15:])


def fitted_twice(model: nn.Module, watcher: Nobody) -> None:
    """Two runs over one model, each with an optimizer of its own; the second counts on."""
    data = list(batches())
    train(model, adam(model), watcher, data[:10])
    watcher.attach_anew(model, watcher.state())
    train(model, adam(model), watcher, data[10:])


def rebuilt_between_fits(model: nn.Module, watcher: Nobody) -> None:
    """Between two runs an activation goes, one comes, and a block of several is put in."""
    data = list(batches())
    train(model, adam(model), watcher, data[:10])
    model.act = nn.Identity()
    model.drop = nn.Sequential(nn.Linear(12, 12), nn.Mish(), nn.Linear(12, 12), nn.ReLU(inplace=True))
    watcher.attach_anew(model, watcher.state())
    train(model, adam(model), watcher, data[10:])


def resumed(model: nn.Module, watcher: Nobody) -> nn.Module:
    """A run ends two steps after it saved a checkpoint; a new model and a new optimizer go on from the checkpoint."""
    data, optimizer, file = list(batches()), adam(model), io.BytesIO()
    train(model, optimizer, watcher, data[:9])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "watcher": watcher.state()}
    torch.save(saved, file)
    train(model, optimizer, watcher, data[9:11])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = Mixed()
    model.load_state_dict(saved["model"])
    optimizer = adam(model)
    optimizer.load_state_dict(saved["optimizer"])
    watcher.attach_anew(model, saved["watcher"])
    train(model, optimizer, watcher, data[9:])
    return model


def frozen(twin: bool) -> nn.Module:
    model = Mixed()
    for part in (model.stem, model.norm, model.block):
        part.requires_grad_(False)
    return model


def diverging(twin: bool) -> nn.Module:
    model = Mixed()
    with torch.no_grad():
        model.block.conv2.weight[1, 0, 0] = float("nan")
        model.block.conv1.weight[2, 0, 0] = float("inf")
    return model


def evaluation_only(model: nn.Module, watcher: Nobody) -> None:
    """No gradient at all."""
    model.eval()
    for x, _ in batches():
        with torch.no_grad():
            model(x)
        watcher.step()


def inference_only(model: nn.Module, watcher: Nobody) -> None:
    model.eval()
    for x, _ in batches():
        with torch.inference_mode():
            model(x)
        watcher.step()


def sometimes_empty(model: nn.Module, watcher: Nobody) -> None:
    """Every fourth batch is empty."""
    optimizer = adam(model)
    for number, (x, y) in enumerate(batches()):
        if number % 4 == 1:
            x, y = x[:0], y[:0]
        loss = model(x).square().sum() + 0.0 * y.sum()
        watcher.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


class Unbatched(nn.Module):
    """Input without a batch dimension: (C, L) and (T, D), reached by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 8)

    def forward(self, *, signal: Tensor, scale: float = 1.0) -> Tensor:
        x = self.relu(self.conv(signal)) * scale  # (C, L): axis 0
        x = torch.tanh(self.fc(x.T))  # (L, D): axis 1
        return F.relu(x.mean(0))  # (D,): axis 0


def unbatched(model: nn.Module, watcher: Nobody) -> None:
    optimizer = adam(model)
    for x, _ in batches():
        watcher.backward(model(signal=x[0]).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


def channels_last(model: nn.Module, watcher: Nobody) -> None:
    optimizer = adam(model)
    model.to(memory_format=torch.channels_last)
    for x, _ in batches():
        x = x[:, :, None].expand(-1, -1, 6, -1).contiguous(memory_format=torch.channels_last)
        watcher.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


def images(twin: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
        nn.ReLU6(),
    )


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.stem = nn.Linear(3, 8)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.encoder(self.stem(x), src_key_padding_mask=padding)
        return x if padding is None else x.masked_fill(padding[..., None], 0.0)


def tokens(model: nn.Module, watcher: Nobody) -> None:
    """A transformer in training and in evaluation, where torch runs it in fused kernels, uncounted."""
    optimizer = adam(model)
    for number, (x, _) in enumerate(batches()):
        x = x.transpose(1, 2)
        padding = torch.arange(6) >= torch.tensor([6, 5, 4, 2])[:, None]
        watcher.backward(model(x, padding).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()
        if number % 10 == 5:
            model.eval()
            with watcher.phase("val"), torch.no_grad():
                model(x)
            with watcher.phase("padded"), torch.no_grad():
                model(x, padding)
            model.train()


class ReusedAcross(nn.Module):
    """One ReLU shared by two checkpointed segments, and a third call outside any."""

    def __init__(self, checkpointing: str) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = nn.Conv1d(3, 6, 1)
        self.conv1 = nn.Conv1d(6, 6, 1)
        self.conv2 = nn.Conv1d(6, 6, 1)
        self.relu = nn.ReLU()
        self.head = nn.Conv1d(6, 2, 1)

    def one(self, x: Tensor) -> Tensor:
        return self.relu(self.conv1(x))

    def two(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(x)) - 0.1

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in (self.one, self.two):
            x = checkpoint(part, x, use_reentrant=self.checkpointing == "reentrant") if self.checkpointing else part(x)
        return self.relu(self.head(x)).mean(2)


#: Windows that close every three steps, sure of themselves with the few examples that these set-ups have.
SHORT = {"window_steps": 3, "policy": ns.Policy(max_rate=0.9)}
SETUPS = (
    Setup("plain", mixed(), plain, MIXED),
    Setup("evaluation passes", mixed(), evaluating, MIXED, phases=("train", "val")),
    Setup("accumulation", mixed(), accumulating, MIXED),
    Setup("autocast bf16", mixed(), autocast, MIXED),
    Setup("checkpointing", mixed("plain"), plain, MIXED),
    Setup("checkpointing, reentrant", mixed("reentrant"), plain, MIXED),
    Setup("checkpointing, shared", lambda twin: ReusedAcross("" if twin else "plain"), plain),
    Setup("checkpointing, shared, reentrant", lambda twin: ReusedAcross("" if twin else "reentrant"), plain),
    Setup("checkpointing and autocast", mixed("plain"), autocast, MIXED),
    Setup("frozen layers", frozen, plain, MIXED),
    Setup("called twice in a step", mixed(), twice_a_step, MIXED),
    Setup("two backwards in a step", mixed(), two_backwards, MIXED),
    Setup("exceptions", mixed(), failing(Oops), MIXED),
    Setup("keyboard interrupts", mixed(), failing(KeyboardInterrupt), MIXED),
    Setup("moving average", mixed(), averaging, MIXED),
    Setup("saved while watched", mixed(), saving, MIXED),
    Setup("two scopes on one model", mixed(), doubly_watched, MIXED),
    Setup("fit twice", mixed(), fitted_twice, MIXED),
    Setup("modules that change between fits", mixed(), rebuilt_between_fits, {**MIXED, "drop.1": 2, "drop.3": 2}),
    Setup("resumed from a checkpoint", mixed(), resumed, MIXED),
    Setup("resumed, every third step", mixed(), resumed, MIXED, {"every_n_steps": 3}),
    Setup("resumed, short windows", mixed(), resumed, MIXED, SHORT),
    Setup("NaN and inf", diverging, plain, MIXED),
    Setup("batch size 1", mixed(), lambda model, watcher: plain(model, watcher, size=1), MIXED),
    Setup("empty batches", mixed(), sometimes_empty, MIXED),
    Setup("no gradient", mixed(), evaluation_only, MIXED, phases=("inference",)),
    Setup("inference mode", mixed(), inference_only, MIXED, phases=("inference",)),
    Setup("unbatched, by keyword", lambda twin: Unbatched(), unbatched, {"relu": 0, "tanh()": 1, "relu()": 0, None: 0}),
    Setup("channels last", images, channels_last),
    Setup("transformer", lambda twin: Encoder(), tokens, {None: 2}),
    Setup("every third step", mixed(), evaluating, MIXED, {"every_n_steps": 3}, ("train", "val")),
    Setup("short windows", mixed(), evaluating, MIXED, SHORT, ("train", "val")),
)
