"""A neuron is a unit of a layer, however often, in which order and by which object an activation is called.

Each network keeps what its activations give, by the name that the site must bear; these tensors are the truth.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import neuronscope as ns

Counts = dict[str, tuple[list[int], int]]  # of each site: zero outputs of each neuron, and positions


class Keeping(nn.Module):
    """A network that keeps what its activations give."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {}

    def keep(self, name: str, y: Tensor, axis: int | tuple[int, ...] = -1) -> Tensor:
        """Keep the output of an activation; ``axis`` says where the neurons lie, the outermost dimension first."""
        if not torch.compiler.is_compiling():
            self.kept.setdefault(name, []).append((y.detach(), axis))
        return y

    def truth(self) -> Counts:
        found: Counts = {}
        for name, calls in self.kept.items():
            rows = torch.cat([_rows(y, axis) for y, axis in calls])
            found[name] = (rows == 0).sum(0).tolist(), len(rows)
        return found


def _rows(y: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    axes = (axis,) if isinstance(axis, int) else axis
    neurons = 1
    for each in axes:
        neurons *= y.shape[each]
    return y.movedim(axes, tuple(range(-len(axes), 0))).reshape(-1, neurons)


def counts(scope: ns.Scope, phase: str = "train") -> Counts:
    return {name: (tally.zero_outputs.tolist(), tally.positions) for name, tally in scope.census(phase).items()}


class Siamese(Keeping):
    """One encoder for both members of a pair, with a functional activation."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.project = nn.Conv1d(3, 7, 2), nn.Linear(7, 4)

    def tower(self, x: Tensor) -> Tensor:
        h = self.keep("encode/relu", F.relu(self.encode(x)), 1)
        return self.project(h.mean(2))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.tower(left) * self.tower(right)).sum(1)


class Levels(Keeping):
    """A detection head that is shared over maps of three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 1), nn.ReLU())
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.keep("stem/hardtanh", F.hardtanh(self.stem(x), 0.0, 0.5), 1), 0.0
        for level in (x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)):
            h = self.keep("head.0/silu", self.head[1](self.head[0](level)), 1)
            h = self.keep("head.2/relu", self.head[3](self.head[2](h)), 1)
            total = total + self.out(h).square().mean()
        return total


class Recurrent(Keeping):
    """A GRU cell by hand: three gates from one product of the input and one of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.recall, self.out = nn.Linear(3, 12), nn.Linear(4, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for step in range(x.shape[1]):
            given, known = self.read(x[:, step]), self.recall(h)
            r = self.keep("read(0:4)/hardsigmoid", F.hardsigmoid(4 * (given[:, :4] + known[:, :4])))
            z = self.keep("read(4:8)/hardsigmoid", F.hardsigmoid(4 * (given[:, 4:8] + known[:, 4:8])))
            n = self.keep("read(8:12)/relu", F.relu(given[:, 8:] + r + known[:, 8:]))
            h = n + h - z
        return self.out(h)


class Dropped(Keeping):
    """Blocks that share one activation object; every third call leaves out another block, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.act = nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), nn.ReLU()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for number, block in enumerate(self.blocks):
            if (self.calls + number) % 3:
                x = x + self.keep(f"blocks.{number}/relu", self.act(block(x)))
        return x


class Tasks(Keeping):
    """One call of a function serves the head of whichever task the batch belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 6), nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        task = "ab"[self.calls % 2]
        return self.keep(f"heads.{task}/relu6", F.relu6(self.heads[task](torch.sin(self.body(x)))))


class Experts(Keeping):
    """Experts whose weights lie in one stack, written in some way."""

    def __init__(self, way: Callable[[Experts, Tensor], Tensor]) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 4, 5))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def in_a_loop(net: Experts, x: Tensor) -> Tensor:
    y, choice = torch.zeros_like(x), torch.arange(len(x)) % 3
    for number in range(3):
        rows = (choice == number).nonzero()[:, 0]
        h = net.keep(f"w1.{number}/relu", F.relu(x[rows] @ net.w1[number].T))
        y = y.index_add(0, rows, h @ net.w2[number].T)
    return y


def by_bmm(net: Experts, x: Tensor) -> Tensor:
    h = torch.bmm(x.expand(3, *x.shape), net.w1.transpose(1, 2))
    return torch.bmm(net.keep("w1/relu", F.relu(h), (0, 2)), net.w2.transpose(1, 2)).sum(0)


def by_einsum(net: Experts, x: Tensor) -> Tensor:
    h = net.keep("w1/relu", F.relu(torch.einsum("bd,ehd->bhe", x, net.w1)), (2, 1))
    return torch.einsum("bhe,edh->bd", h, net.w2)


def by_broadcast(net: Experts, x: Tensor) -> Tensor:
    h = net.keep("w1/relu", (net.w1 @ x.T).relu(), (0, 1))  # (experts, units, batch)
    return (net.w2 @ h).sum(0).T


class Auxiliary(Keeping):
    """A second head that runs in training only, and comes first there."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.main = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 5)
        self.out = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("body/relu", F.relu(self.body(x)))
        side = self.keep("side/relu", F.relu(self.side(h))).sum() if self.training else 0.0
        return self.out(self.keep("main/relu", F.relu(self.main(h)))).sum() + side


class Both(Keeping):
    """What a layer gives is rectified from both sides (Shang et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.out(torch.cat([self.keep("fc/relu", F.relu(h)), self.keep("fc/relu#1", F.relu(-h))], -1))


class Single(Keeping):
    """A classifier with one output, whose dimension is taken away before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("fc/relu", torch.relu(self.fc(x)))
        y = F.hardsigmoid(4 * self.out(h).squeeze(-1))
        self.keep("out/hardsigmoid", y[..., None])
        return y


class Steps(Keeping):
    """A layer that reads a whole sequence, and an activation that is applied to each of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.out = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        p = self.read(x)
        steps = [*p.unbind(1)[:2], *(piece[:, 0] for piece in p[:, 2:].split(1, 1))]
        positive = [self.keep("read/relu", F.relu(step)) for step in steps]
        negative = [self.keep("read/relu#1", F.relu(-step)) for step in steps]
        return self.out(torch.stack(positive) - 2 * torch.stack(negative))


class Groups(Keeping):
    """A layer for all rows, and an activation that is applied to each group of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.ModuleList(nn.Linear(6, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, group = self.up(x), torch.arange(len(x)) % 2
        parts = [down(self.keep("up/relu", F.relu(h[group == number]))) for number, down in enumerate(self.down)]
        return torch.cat(parts)


class ReadAtOnce(Keeping):
    """A recurrent cell whose layer on the input runs once for all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.state, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, h = self.read(x), torch.zeros(len(x), 6)
        for t in range(x.shape[1]):
            h = self.keep("state/relu", F.relu(p[:, t] + self.state(h)))
        return self.out(h)


class Overlapping(Keeping):
    """An activation that is applied to all rows, and to some of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        first = self.keep("up/relu", F.relu(h))
        some = [h[torch.arange(len(x)) % 2 == 0], h[:2], h[2:]]
        second = [self.keep("up/relu#1", F.relu(-each)) for each in some]
        return self.down(torch.cat([first, *second]))


class FirstPlusOther(Keeping):
    """The first step of a layer's sequence, to which another layer's output is added."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.other, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.keep("read/relu", F.relu(self.read(x)[:, 0] + self.other(x[:, 1]))))


class Dot(Keeping):
    """A layer whose weight is a vector, and one whose weight comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.keep("first/relu", F.relu(F.linear(self.first, row)), 0) for row in x])
        return self.keep("vector/relu", F.relu(F.linear(h, self.vector))[:, None])


class Letters(Keeping):
    """Layers written as ``einsum``, with the units on another dimension each time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Parameter(torch.randn(*size)) for size in ((5, 4), (5, 3), (2, 3, 6)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("first/relu", F.relu(torch.einsum("k i, b t i -> k b t", self.first, x)), 0)
        h = self.keep("second/relu", F.relu(torch.einsum("kbt,kn->bnt", h, self.second)), 1)
        return self.keep("third/relu", F.relu(torch.einsum("bnt,hnd->bthd", h, self.third)), (2, 3))


class Left(Keeping):
    """The weight is the left factor: units in rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6))
        self.w3, self.w4, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2, 5)), torch.ones(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("w1/relu", F.relu(self.w1 @ x.t()), 0)
        h = self.keep("w2/relu", F.relu(torch.addmm(self.bias, self.w2, h)), 0)
        h = self.keep("w3/relu", F.relu(F.linear(self.w3, h.T)), 0)
        return self.keep("w4/clamp", torch.stack([torch.mv(self.w4, row) for row in h.T]).clamp(min=0))


class Spike(nn.Module):
    """A spiking neuron: it gives its spikes, and then its state."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x * (x > 0.2), x)


class Pair(NamedTuple):
    spikes: Tensor
    state: Tensor


class Spiking(Keeping):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any], pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.fc, self.spike, self.pick, self.out = nn.Linear(4, 6), Spike(pack), pick, nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.keep("fc/spike", self.pick(self.spike(self.fc(x)))))


class Scores(Keeping):
    """Attention whose scores pass activations: a soft cap, and a ReLU in the place of the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.out = nn.Linear(6, 18), nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        capped = 5 * torch.tanh(query @ key.transpose(-1, -2) / 5)
        weights = capped.softmax(-1) + F.relu(torch.einsum("bhqd,bhkd->bhqk", query, key)) / x.shape[1]
        return self.out(self.keep("up/relu", F.relu(self.up((weights @ value).transpose(1, 2).flatten(2)))))


class Thresholds(Keeping):
    """Functions of parameters alone, and of the input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 1)
        self.floor, self.gate, self.width = (nn.Parameter(torch.randn(6)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("fc/relu", F.relu(self.fc(torch.tanh(x))))
        return self.out(h * torch.sigmoid(self.gate) / F.softplus(self.width * 2) - self.floor.clamp(min=0))


class Overlaps(Keeping):
    """The overlap of boxes, in the forward: what is clamped are units of a layer, and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        low, size = self.box(self.keep("body.0/relu", self.body(x))).chunk(2, -1)
        low, high = torch.stack([low, low + size.exp()])
        sides = self.keep("box(0:2)/relu", F.relu(torch.min(high, target[:, 2:]) - torch.max(low, target[:, :2])))
        return sides[:, 0] * sides[:, 1] + (low - target[:, :2]).abs().sum(1)


class Triplets(Keeping):
    """A triplet loss in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def embed(self, x: Tensor) -> Tensor:
        return self.out(self.keep("fc/relu", F.relu(self.fc(x))))

    def forward(self, anchor: Tensor, near: Tensor, far: Tensor) -> Tensor:
        anchor, near, far = self.embed(anchor), self.embed(near), self.embed(far)
        return F.relu((anchor - near).square().sum(1) - torch.cdist(anchor[:, None], far[:, None]).flatten() + 0.5)


class Tied(Keeping):
    """Two layers share a weight, and a third shares an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.one, self.two = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.two.weight, self.head.weight = self.one.weight, self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("embedding/relu", F.relu(self.embedding(x)))
        h = self.keep("two/relu", F.relu(self.two(self.keep("one/relu", F.relu(self.one(h))))))
        return self.keep("head/relu", F.relu(self.head(h)))


class BothDirections(Keeping):
    """A decoder uses the weight of its encoder: its units are the encoder's inputs, and no units of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.w, self.v = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("encoder/relu", F.relu(self.encoder(x)))
        x = self.keep("encoder(transposed)/relu", F.relu(F.linear(h, self.encoder.weight.t())))
        h = self.keep("w/relu", F.relu(x @ self.w))
        x = self.keep("w(transposed)/relu", F.relu(torch.matmul(h, self.w.mT)))
        h = self.keep("v/relu", F.relu(torch.einsum("bi,oi->bo", x, self.v)))
        x = self.keep("v(transposed)/relu", F.relu(torch.einsum("bo,oi->bi", h, self.v)))
        return self.head(x)


class BothDirectionsOfMaps(Keeping):
    """The same of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 3, 2), nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("encoder/relu", F.relu(self.encoder(x)), 1)
        x = self.keep("encoder(transposed)/relu", F.relu(F.conv_transpose2d(h, self.encoder.weight)), 1)
        return self.head(x)


class OtherDirectionFirst(Keeping):
    """The decoder runs before the encoder whose weights it uses, as where a run is resumed that generates first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.maps = nn.Linear(4, 4), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.keep("encoder(transposed)/relu", F.relu(x @ self.encoder.weight))
        x = self.keep("encoder/relu", F.relu(self.encoder(x)))
        x = self.keep("maps(transposed)/relu", F.relu(F.conv_transpose1d(x[..., None], self.maps.weight)), 1)
        return self.keep("maps/relu", F.relu(self.maps(x)), 1)[..., 0]


class Sliced(Keeping):
    """Parts of weights: some units of a layer, in both orientations; and inputs that are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.elastic, self.conv = nn.Linear(4, 9), nn.Linear(9, 8), nn.Conv1d(4, 6, 1)
        self.columns, self.fewer = nn.Parameter(torch.randn(5, 7)), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fused.weight.split((5, 4))
        one = self.keep("fused(0:5)/relu", F.relu(F.linear(x, first, self.fused.bias[:5])))
        two = self.keep("fused(5:9)/relu", F.relu(x @ second.t()))
        three = self.keep("columns(1:7:2)/relu", F.relu(one @ self.columns[:, 1::2]))
        four = self.keep("elastic(2:6)/relu", F.relu(F.linear(two, self.elastic.weight[2:6, :4])))
        five = self.keep("conv(0:3)/relu", F.relu(F.conv1d(four[..., None], self.conv.weight[:3])), 1)[..., 0]
        return self.keep("fewer/relu", F.relu(F.linear(three + five, self.fewer.weight[:, :3])))


class Joined(Keeping):
    """Joined layers, and joined parts of the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(11, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = self.keep("a+b/relu", F.relu(torch.cat([a, b], 1)))
        part = self.keep("a+b(a:0:4,b:0:5)/relu", F.relu(torch.cat([a[:, :4], b], 1)))
        again = self.keep("a+b(a:2:6,b:0:5)/relu", F.relu(torch.cat([a[:, 2:], b], 1)))
        both = self.keep("a(0:6,0:6)/relu", F.relu(torch.cat([a, -a], 1)))
        alone = self.keep("a/relu", F.relu(torch.cat([a[:, :2], a[:, 2:]], 1)))
        return self.out(y) + sum(each.sum(1, keepdim=True) for each in (part, again, both, alone))


class Computed(Keeping):
    """Weights that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(4, 6))
        self.b = parametrizations.spectral_norm(nn.Conv1d(6, 5, 1))
        self.c, self.low, self.high = nn.Linear(5, 4), nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))
        self.register_buffer("mask", torch.ones(4, 5).tril())

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("a/relu", F.relu(self.a(x)))
        h = self.keep("b/relu", F.relu(self.b(h[:, :, None])), 1)[:, :, 0]
        weight = (self.c.weight + self.low @ self.high) * self.mask
        return self.keep("c/relu", F.relu(F.linear(h, weight, self.c.bias)))


class ComputedByHooks(Keeping):
    """Weights that hooks of their layers compute before each forward."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.a = nn.utils.weight_norm(nn.Linear(4, 6))
            self.b = nn.utils.weight_norm(nn.Conv1d(6, 5, 1), dim=None)
        self.c, self.d = nn.utils.spectral_norm(nn.Linear(5, 4)), nn.utils.spectral_norm(nn.Conv1d(4, 3, 1))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.keep("a/relu", F.relu(self.a(x)))
        h = self.keep("b/relu", self.act(self.b(h[:, :, None])), 1)[:, :, 0]
        h = self.keep("c/relu", F.relu(self.c(h)))
        return self.keep("d/relu", self.act(self.d(h[:, :, None])), 1)[:, :, 0]


class Segment(Keeping):
    """A layer with an activation module, and a fused gate with an activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.fused, self.first_run = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 10), True

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc(x))
        gate, up = self.fused(h).chunk(2, -1)
        gate = F.relu(gate)
        y = gate * up
        if self.first_run:
            self.keep("segment.fc/relu", h)
            self.keep("segment.fused(0:5)/relu", gate)
            self.keep("segment.fused(0:5)/reglu", y)
        return y


class Checkpointed(Keeping):
    """One segment twice, computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.lead, self.segment, self.out, self.reentrant = nn.Linear(4, 5), Segment(), nn.Linear(5, 1), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.lead(x)
        for _ in range(2):
            self.segment.first_run = True
            x = checkpoint(self.segment, x - 0.2, use_reentrant=self.reentrant)
            self.segment.first_run = False
        self.kept = self.segment.kept
        return self.out(x)


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what else is to be seen of it.

    Attributes:
        build: Makes the network.
        inputs: Makes the inputs of a step.
        examples: Examples of each step; a mapping says it by site.
        no_neurons: Places that must be named as no neurons.
        outputs: Sites whose layers give outputs of the network.
        missing: Sites that are not measured.
        options: Options of the watch.
        compiles: Whether it compiles to one graph.
    """

    build: Callable[[], Keeping]
    inputs: Callable[[], tuple[Tensor, ...]]
    examples: int | dict[str, int]
    no_neurons: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    options: Any = None
    compiles: bool = True


def rows(*shape: int, number: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for _ in range(number))


LIF: dict[str, Any] = {"activations": {Spike: "relu-like"}}
EXPERTS = {f"w1.{number}/relu": each for number, each in enumerate((3, 2, 2))}  # of 7 rows in turn

CASES = {
    "siamese": Case(Siamese, rows(5, 3, 6, number=2), 5),
    "levels": Case(Levels, rows(2, 2, 8, 8), 2),
    "recurrent": Case(Recurrent, rows(6, 4, 3), 6, compiles=False),
    "dropped blocks": Case(Dropped, rows(6, 5), 6, compiles=False),
    "tasks": Case(Tasks, rows(6, 4), 6, outputs=("heads.a/relu6", "heads.b/relu6"), missing=("body",), compiles=False),
    "experts in a loop": Case(lambda: Experts(in_a_loop), rows(7, 4), EXPERTS, compiles=False),
    "experts by bmm": Case(lambda: Experts(by_bmm), rows(7, 4), 7),
    "experts by einsum": Case(lambda: Experts(by_einsum), rows(7, 4), 7),
    "experts by broadcast": Case(lambda: Experts(by_broadcast), rows(7, 4), 7),
    "auxiliary head": Case(Auxiliary, rows(6, 4), 6, outputs=("side/relu",)),
    "both signs": Case(Both, rows(6, 4), 6),
    "one output": Case(Single, rows(6, 4), 6, outputs=("out/hardsigmoid",), compiles=False),
    "steps of a sequence": Case(Steps, rows(6, 4, 4), 6),
    "groups of rows": Case(Groups, rows(7, 4), 7, compiles=False),
    "all rows, and some again": Case(Overlapping, rows(7, 4), 7, compiles=False),
    "a step beside another layer": Case(FirstPlusOther, rows(6, 4, 4), 6),
    "recurrent, the input read at once": Case(ReadAtOnce, rows(6, 4, 3), 6),
    "vectors": Case(Dot, rows(6, 4), 6, outputs=("vector/relu",), compiles=False),
    "letters": Case(Letters, rows(6, 3, 4), 6, outputs=("third/relu",)),
    "weight on the left": Case(Left, rows(6, 4), 6, outputs=("w4/clamp",)),
    "tuple": Case(lambda: Spiking(lambda *two: two, lambda two: two[0]), rows(6, 4), 6, options=LIF),
    "named tuple": Case(lambda: Spiking(Pair, lambda two: two.spikes), rows(6, 4), 6, options=LIF),
    "list": Case(lambda: Spiking(lambda *two: [*two], lambda two: two[0]), rows(6, 4), 6, options=LIF),
    "mapping": Case(lambda: Spiking(lambda a, b: {"s": a, "u": b}, lambda two: two["s"]), rows(6, 4), 6, options=LIF),
    "scores": Case(Scores, rows(3, 4, 6), 3, no_neurons=("tanh()", "relu()")),
    "thresholds": Case(Thresholds, rows(6, 4), 6, no_neurons=("tanh()", "sigmoid()", "softplus()", "clamp()")),
    "overlaps": Case(Overlaps, rows(6, 4, number=2), 6, outputs=("box(0:2)/relu",)),
    "triplets": Case(Triplets, rows(6, 4, number=3), 6, no_neurons=("relu()",)),
    "tied weights": Case(Tied, lambda: (torch.randint(9, (3, 4)),), 3, outputs=("head/relu",)),
    "both directions of a weight": Case(BothDirections, rows(6, 4), 6),
    "both directions of a convolution": Case(BothDirectionsOfMaps, rows(2, 3, 5, 5), 2),
    "the other direction of a weight first": Case(OtherDirectionFirst, rows(6, 4), 6, outputs=("maps/relu",)),
    "computed weights": Case(Computed, rows(6, 4), 6, outputs=("c/relu",)),
    "weights computed by hooks": Case(ComputedByHooks, rows(6, 4), 6),
    "parts of weights": Case(Sliced, rows(6, 4), 6, outputs=("fewer/relu",)),
    "joined parts": Case(Joined, rows(6, 4), 6),
    "checkpointed": Case(lambda: Checkpointed(False), rows(6, 4), 6, compiles=False),
    "checkpointed, reentrant": Case(lambda: Checkpointed(True), rows(6, 4), 6, compiles=False),
}
STEPS = 6


def train(case: Case, model: nn.Module, run: Callable[..., Tensor]) -> ns.Scope:
    """Train a network for some steps, and give the scope."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ns.watch(model, **(case.options or {})) as scope:
        for _ in range(STEPS):
            run(*case.inputs()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
    return scope


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_units_of_each_layer_are_counted_together_and_nothing_else_is(case: Case) -> None:
    model = case.build()
    scope = train(case, model, model)
    truth = model.truth()
    assert counts(scope) == truth
    zeros = torch.cat([torch.tensor(each) for each, _ in truth.values()])
    assert 0 < zeros.sum() < sum(len(each) * positions for each, positions in truth.values())  # both sorts are there
    for name, tally in scope.census().items():
        assert tally.gradient_positions == tally.positions, name
        assert len(tally.zero_gradients) == tally.neurons == len(tally.zero_outputs)
        ran = STEPS if tally.layer.split(".")[0] not in ("blocks", "heads") else len(model.kept[name])
        expected = case.examples[name] if isinstance(case.examples, dict) else case.examples
        assert tally.examples == expected * ran, name
        assert (name in case.outputs) == tally.info.output, name
        assert tally.axis_source == f"layer ({tally.layer})"
    assert {place.rpartition(".")[2] for place in scope.not_neurons()} == set(case.no_neurons)
    assert [item.name for item in scope.report().not_measured] == list(case.missing)


def test_a_run_that_is_resumed_by_a_decoder_names_the_directions_of_a_weight_as_before() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 4)

        def forward(self, x: Tensor, decodes: bool) -> Tensor:
            return F.relu(x @ self.encoder.weight) if decodes else F.relu(self.encoder(x))

    model, state, found = Autoencoder(), None, []
    for order in ((False, True), (True, False)):
        with ns.watch(model) as scope:
            if state is not None:
                scope.load_state_dict(state)
            for decodes in order:
                model(torch.randn(3 + 4 * decodes, 4), decodes).sum().backward()
                scope.step()
            state = scope.state_dict()
        found.append({name: tally.positions for name, tally in scope.census().items()})
    assert found == [
        {"encoder/relu": 3, "encoder(transposed)/relu": 7},
        {"encoder/relu": 6, "encoder(transposed)/relu": 14},
    ]


COMPILED = {name: case for name, case in CASES.items() if case.compiles}


def facts(tally: ns.Tally) -> list[Any]:
    """Return all that a compiled run must count as an eager one does."""
    arrays = (tally.zero_outputs, tally.zero_gradients, tally.last_active_step)
    totals = [tally.positions, tally.gradient_positions, tally.examples]
    return [replace(tally.info, reader_notes=()), *(array.tolist() for array in arrays), *totals]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_a_compiled_network_has_the_names_and_the_counts_of_the_eager_one(case: Case) -> None:
    censuses, others = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = case.build()
        scope = train(case, model, torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)
        assert not scope.detached or scope.report()
        census = scope.census()
        censuses.append({name: facts(tally) for name, tally in census.items()})
        others.append((scope.not_neurons(), scope.report().not_measured))
    assert censuses[0] == censuses[1]
    assert others[0] == others[1]


class Heads(nn.Module):
    """Heads that run together; a number picks the one whose output is used, or all are."""

    def __init__(self, pick: Callable[[list[Tensor], int], Tensor]) -> None:
        super().__init__()
        self.heads, self.out, self.pick = nn.ModuleList(nn.Linear(4, 3) for _ in range(3)), nn.Linear(3, 1), pick
        with torch.no_grad():
            for head, bias in zip(self.heads, ([-1e3, 1e3, 1e3], [1e3, 1e3, 1e3], [1e3, 1e3, -1e3]), strict=True):
                head.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor, number: int) -> Tensor:
        return self.out(self.pick([head(x) for head in self.heads], number))


@pytest.mark.parametrize(
    "pick",
    [
        lambda heads, number: F.relu(torch.cat(heads, 1)[:, 3 * number : 3 * number + 3]),
        lambda heads, number: F.relu(torch.cat(heads, 1).chunk(3, 1)[number]),
        lambda heads, number: F.relu(torch.stack(heads)[number]),
        lambda heads, number: F.relu(torch.stack(heads, 1))[:, number],
        lambda heads, number: F.relu(torch.stack(heads, -1)).sum(-1),
        lambda heads, number: sum(F.relu(each) for each in torch.stack(heads, 1).unbind(1)),
        lambda heads, number: F.relu(torch.stack(heads).transpose(0, 1).flatten(1)).view(-1, 3, 3)[:, number],
    ],
)
def test_heads_that_were_joined_are_told_apart(pick: Callable[[list[Tensor], int], Tensor]) -> None:
    model = Heads(pick)
    with ns.watch(model) as scope:
        for step in range(9):
            model(torch.randn(5, 4), step % 3).sum().backward()
            scope.step()
    report = scope.report()
    dead = sum(int((tally.zero_outputs == tally.positions).sum()) for tally in scope.census().values())
    assert (report.neurons, report.dead, dead) == (9, 2, 2)


@pytest.mark.parametrize("function", [torch.sum, torch.mean])
def test_the_sum_of_a_stack_of_layers_has_the_units_of_the_first(function: Callable[..., Tensor]) -> None:
    model = Heads(lambda heads, _: F.relu(function(torch.stack(heads[::-1], 1), 1)))
    with ns.watch(model) as scope:
        model(torch.randn(5, 4), 0).sum().backward()
        scope.step()
    assert list(scope.census()) == ["heads.0/relu"]


class Cell(nn.Module):
    """A recurrent cell whose steps are calls of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return F.relu(self.read(x) + self.keep(state))


def test_a_state_that_the_next_forward_reads_is_no_output() -> None:
    model = Cell()
    with torch.no_grad():
        model.read.bias[2] = -100
    with ns.watch(model) as scope:
        for _ in range(5):
            state = torch.zeros(8, 6)
            for _ in range(4):
                state = model(torch.randn(8, 4), state)
            state.sum().backward()
            scope.step()
    assert (scope.report().neurons, scope.census()["read/relu"].positions) == (6, 5 * 4 * 8)
    assert scope.census()["read/relu"].zero_output_fraction[2] == 1
