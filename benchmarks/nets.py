"""The networks whose training step is measured: two MLPs, a CNN with a reused in-place ReLU, a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """512-[1024]×4-10 with ReLU, batch 128."""
    layers: list[nn.Module] = []
    for inside in (512, 1024, 1024, 1024):
        layers += [nn.Linear(inside, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(128, 512), torch.randint(10, (128,))


def small() -> tuple[nn.Module, Tensor, Tensor]:
    """64-[64]×6-10 with ReLU, batch 32: a step of half a millisecond, the worst case for a hook's fixed cost."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(32, 64), torch.randint(10, (32,))


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def cnn(batch: int = 32) -> tuple[nn.Module, Tensor, Tensor]:
    """Four residual blocks of 64 channels on 32 × 32 images."""
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    net = nn.Sequential(*stem, *(_Block(64) for _ in range(4)), *head)
    return net, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(self.act(self.up(self.norm2(x))))


def transformer(batch: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    """Four layers of width 256 with GELU, 128 tokens."""
    net = nn.Sequential(nn.Embedding(256, 256), *(_Layer(256) for _ in range(4)), nn.Flatten(0, 1), nn.Linear(256, 256))
    return net, torch.randint(256, (batch, 128)), torch.randint(256, (batch * 128,))


NETS = {"small MLP": small, "MLP": mlp, "CNN": cnn, "transformer": transformer}
