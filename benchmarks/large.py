"""Networks of the size that GPUs train: one like ResNet-50, one like GPT-2; smaller where asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["gpt", "resnet"]


class _Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1 with a short cut; one in-place ReLU used three times, as torchvision's."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.short: nn.Module = nn.Identity()
        if inside != outside or stride != 1:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.short(x))


def resnet(*, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, batch: int = 64, side: int = 224) -> _Built:
    """ResNet-50 by default: 49 sites."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inside = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(_Bottleneck(inside, width << stage, 2 if stage and not block else 1))
            inside = 4 * (width << stage)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))
    return net, torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(self.act(self.up(self.norm2(x))))


def gpt(
    *, layers: int = 12, width: int = 768, heads: int = 12, batch: int = 8, time: int = 1024, words: int = 50304
) -> _Built:
    """GPT-2's smallest by default, without its position embedding: 12 sites."""
    blocks = (_Layer(width, heads) for _ in range(layers))
    net = nn.Sequential(nn.Embedding(words, width), *blocks, nn.LayerNorm(width), nn.Flatten(0, 1))
    net.append(nn.Linear(width, words, bias=False))
    return net, torch.randint(words, (batch, time)), torch.randint(words, (batch * time,))


_Built = tuple[nn.Module, Tensor, Tensor]
