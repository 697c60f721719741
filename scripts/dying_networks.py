"""Networks that die for real reasons, trained on scikit-learn's digits while their gradients are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuronscope.checkpoints.checkpoint import Checkpoint, ComputedTensor, OptimizerState
from neuronscope.demo.digits import Digits

Ints = npt.NDArray[np.int64]


class Held(ComputedTensor):
    """A tensor as it is now, in the form of a stored one."""

    def __init__(self, tensor: Tensor) -> None:
        kept = tensor.detach().clone()
        super().__init__(tuple(kept.shape), kept.dtype, kept.clone)


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


def cnn(side: int = 8) -> nn.Module:
    """Three convolutions of 32 channels on ``side × side`` pixels."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    for inputs in (1, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1), nn.ReLU()]
    return _he(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)))


def cnn_with_norms(side: int = 8) -> nn.Module:
    """Three convolutions of 32 channels on ``side × side`` pixels, each with a batch norm."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    for inputs in (1, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return _he(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)))


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(side: int = 8) -> nn.Module:
    """A convolution and two residual blocks of 16 and 32 channels on ``side × side`` pixels."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, 16, 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(16), nn.ReLU(), _Residual(16, 16, 1), _Residual(16, 32, 2)]
    return _he(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))


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


def _sgd_decay(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=5e-4)


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
    Case("MLP, SGD .9, 1e-2, decay 5e-4, spike × 5", mlp, _sgd_decay, spike(1e-2, 5.0)),
    Case("CNN, SGD .9, 1e-2, decay 5e-4, spike × 10", cnn, _sgd_decay, spike(1e-2, 10.0)),
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
