"""Random networks with many dead neurons, and an adversary that tries to make each of their neurons fire.

Nothing here knows of neuronscope: sites are activation modules, named by their path and the count of their calls; what
they are given and what they give is kept whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.checkpoints.model.traced_graph import Graph, Site
from neuronscope.count.neuron_layout import NeuronLayout, neurons_first

WIDTH = 8
ACTIVATIONS = {
    "relu": lambda: nn.ReLU(),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "leaky backwards": lambda: nn.LeakyReLU(-0.5),
    "prelu": lambda: nn.PReLU(WIDTH),
    "elu": nn.ELU,
    "celu": lambda: nn.CELU(0.5),
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "logsigmoid": nn.LogSigmoid,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 2.0),
    "hardsigmoid": nn.Hardsigmoid,
    "hardshrink": lambda: nn.Hardshrink(0.1),
    "softshrink": nn.Softshrink,
    "threshold": lambda: nn.Threshold(0.3, -0.7),
    "threshold at its value": lambda: nn.Threshold(0.0, 0.0),
    "softsign": nn.Softsign,
    "glu": lambda: nn.Sequential(Widen(), nn.GLU(1)),
}
ROW_NORMS = ("layer norm", "rms norm", "no affine")
VECTOR_OPS = (
    *(
        "linear",
        "linear",
        "linear",
        "no bias",
        "layer norm",
        "rms norm",
        "no affine",
        "batch norm",
        "shared",
        "residual",
        "cat",
    ),
    *(
        "gate",
        "square",
        "turn",
        "scale",
        "divide",
        "dropout",
        "softmax",
        "subtract",
        "where",
        "clamp",
        "twins",
        "positive",
    ),
)
PICTURE_OPS = (
    *(
        "conv",
        "conv",
        "conv",
        "padded",
        "strided",
        "dilated",
        "grouped",
        "depthwise",
        "transposed",
        "reflected",
        "same",
    ),
    *(
        "batch norm",
        "batch norm",
        "group norm",
        "instance norm",
        "max pool",
        "avg pool",
        "residual",
        "cat",
        "shuffle",
        "upsample",
    ),
    *("shared", "squeeze", "linear over channels", "adaptive", "corner"),
)


class Widen(nn.Module):
    """Twice the features, one half the negative of the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, -x), 1)


class Block(nn.Module):
    """One operation and an activation after it."""

    def __init__(self, operation: str, activation: str, picture: bool) -> None:
        super().__init__()
        self.operation = operation
        self.act = ACTIVATIONS[activation]()
        self.layer = picture_layer(operation) if picture else vector_layer(operation)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return self.act(apply(self.operation, self.layer, x, first))


def vector_layer(operation: str) -> nn.Module:
    if operation in ("linear", "no bias", "shared", "residual", "gate", "scale", "subtract", "twins", "positive"):
        return nn.Linear(WIDTH, WIDTH, bias=operation != "no bias")
    if operation in ("cat", "turn"):
        return nn.Linear(2 * WIDTH if operation == "cat" else WIDTH, WIDTH)
    norm = {
        "layer norm": lambda: nn.LayerNorm(WIDTH),
        "rms norm": lambda: nn.RMSNorm(WIDTH),
        "no affine": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    }.get(operation)
    if norm is not None:
        return nn.Sequential(norm(), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH))
    return nn.BatchNorm1d(WIDTH) if operation == "batch norm" else nn.Linear(WIDTH, WIDTH)


def picture_layer(operation: str) -> nn.Module:
    conv = {
        "padded": {"padding": 1},
        "strided": {"padding": 1, "stride": 2},
        "dilated": {"padding": 2, "dilation": 2},
        "grouped": {"padding": 1, "groups": 2},
        "depthwise": {"padding": 1, "groups": WIDTH},
        "reflected": {"padding": 1, "padding_mode": "reflect"},
        "same": {"padding": "same"},
        "residual": {"padding": 1},
    }
    if operation == "transposed":
        return nn.ConvTranspose2d(WIDTH, WIDTH, 3, stride=2, padding=1, output_padding=1, groups=2)
    if operation == "batch norm":
        return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
    if operation == "group norm":
        return nn.GroupNorm(2, WIDTH)
    if operation == "instance norm":
        return nn.InstanceNorm2d(WIDTH, affine=True)
    if operation in ("linear over channels", "squeeze"):
        return nn.Linear(WIDTH, WIDTH)
    wide = 2 * WIDTH if operation == "cat" else WIDTH
    return nn.Conv2d(wide, WIDTH, 1 if operation not in conv else 3, **conv.get(operation, {}))


def apply(operation: str, layer: nn.Module, x: Tensor, first: Tensor) -> Tensor:
    """The operation, on vectors ``(B, D)`` or pictures ``(B, C, H, W)``."""
    if operation == "residual":
        y = layer(x)
        y += x
        return y
    if operation == "cat":
        return layer(torch.cat((x, -x), 1))
    if operation == "gate":
        return F.silu(layer(x)) * x
    if operation == "square":
        return layer(x * x - x**2 / 2)
    if operation == "turn":
        return layer(x.view(-1, 2, WIDTH // 2).transpose(1, 2).flatten(1).contiguous())
    if operation == "scale":
        return 0.5 - layer(x) * -1.5
    if operation == "divide":
        return layer(x / (1.5 + torch.sigmoid(x)))
    if operation == "dropout":
        return layer(F.dropout(x, 0.5, layer.training))
    if operation == "softmax":
        return layer(x.softmax(1))
    if operation == "subtract":
        return layer(x) - first.abs() if first.shape == x.shape else layer(x)
    if operation == "where":
        return layer(torch.where(x > 0.2, x, -x / 4))
    if operation == "clamp":
        return layer(x.clamp(-0.3, 0.9).neg())
    if operation == "twins":
        a, b = layer(x).chunk(2, dim=1)
        return torch.cat((torch.maximum(a, b), a[:, 1:], b[:, :1]), 1)
    if operation == "positive":
        return layer(F.relu(x))
    if operation == "max pool":
        return layer(F.max_pool2d(x, 3, 1, 1))
    if operation == "avg pool":
        return layer(F.avg_pool2d(x, 3, 1, 1))
    if operation == "adaptive":
        return layer(F.adaptive_avg_pool2d(x, 3))
    if operation == "upsample":
        return layer(F.interpolate(F.adaptive_max_pool2d(x, 2), scale_factor=2, mode="bilinear"))
    if operation == "shuffle":
        return layer(F.channel_shuffle(x, 2).flip(-1))
    if operation == "squeeze":
        return x * torch.sigmoid(layer(x.mean((2, 3))))[:, :, None, None]
    if operation == "linear over channels":
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if operation == "corner":
        return layer(F.pad(x[..., 1:, :], (0, 0, 1, 0), value=0.25))
    return layer(x)


class Network(nn.Module):
    """Blocks one after another; a *shared* block runs twice."""

    def __init__(self, program: tuple[tuple[str, str], ...], picture: bool, seed: int) -> None:
        super().__init__()
        self.picture = picture
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block(operation, activation, picture) for operation, activation in program)
        self.head = nn.Linear(WIDTH, 3)
        make_some_dead(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x, first)
            if block.operation == "shared":
                x = block(x, first)
        return self.head(x.mean((2, 3)) if self.picture else x)

    def example(self) -> Tensor:
        return torch.zeros((1, WIDTH, 6, 6) if self.picture else (1, WIDTH))


def make_some_dead(network: nn.Module) -> None:
    """Weights of all sizes, biases that lean down, statistics that are not the data's; some exact zeros."""
    with torch.no_grad():
        for module in network.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, nn.Parameter):
                weight.mul_(torch.empty(()).uniform_(0.3, 2.0)) if weight.dim() > 1 else weight.copy_(
                    torch.randn_like(weight)
                )
                if isinstance(module, nn.PReLU):
                    weight.abs_()
                weight[torch.rand(weight.shape) < 0.1] = 0
                if weight.dim() > 1:
                    weight[:, torch.rand(weight.shape[1]) < 0.1] = 0
            if isinstance(bias, nn.Parameter):
                bias.copy_(torch.empty_like(bias).uniform_(-2.5, 0.5))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 3)


@dataclass
class Seen:
    """What one call of an activation module was given and gave."""

    before: Tensor
    after: Tensor


def site_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = tuple({type(build()) for name, build in ACTIVATIONS.items() if name != "glu"} | {nn.GLU})
    return ((path, module) for path, module in network.named_modules() if isinstance(module, kinds))


@contextmanager
def watched(network: nn.Module) -> Iterator[dict[str, Seen]]:
    """While inside, input and output of every call of an activation module, by path and number of the call."""
    seen: dict[str, Seen] = {}
    counts: dict[str, int] = {}
    handles = []
    for path, module in site_modules(network):

        def before(module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            number = counts[path] = counts.get(path, -1) + 1
            seen[f"{path}#{number}" if number else path] = Seen(args[0].clone(), args[0])

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, path: str = path) -> None:
            seen[f"{path}#{counts[path]}" if counts[path] else path].after = output.clone()

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    handles.append(network.register_forward_pre_hook(lambda *_: counts.clear()))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def seen_sites(graph: Graph, seen: Mapping[str, Seen]) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Each call of a site that is a module, with its input and output: the neurons first, ``(N, …)`` both.

    Of a GLU, the input has two halves of ``N``; it is given as it is.
    """
    for path in {name.partition("#")[0] for name in seen}:
        calls = [site for site in graph.sites if site.info.place == path and site.kind != "gated"]
        found = [call for name, call in seen.items() if name.partition("#")[0] == path]
        assert len(calls) in (0, len(found))
        for site, call in zip(calls, found, strict=False):
            before, after = (call.before, call.after) if call.before.shape == call.after.shape else (None, call.after)
            after = by_neuron(after, site.layout)
            yield site, call.before if before is None else by_neuron(before, site.layout), after


def by_neuron(tensor: Tensor, layout: NeuronLayout) -> Tensor:
    found, axis = neurons_first(tensor, *layout)
    return found.transpose(0, axis).flatten(1)


def adversarial_inputs(network: Network, box: tuple[float, float] | None, steps: int = 6) -> Iterator[Tensor]:
    """Inputs that try hard: corners of the box or huge scales, and ascent on each site's pre-activations from there."""
    shape = (48, *network.example().shape[1:])
    low, high = box or (-1.0, 1.0)
    corners = torch.where(torch.rand(shape) < 0.5, low, high)
    if box is None:  # from tiny to huge, and rows of one number almost
        starts = [torch.randn(shape) * scale for scale in (1e-3, 1.0, 30.0, 1e3)] + [3 + torch.randn(shape) * 0.1]
    else:
        starts = [corners, torch.empty(shape).uniform_(low, high), torch.full(shape, low), torch.full(shape, high)]
    yield from starts
    with watched(network) as seen:
        network(network.example())
        names = list(seen)
    for name in names:
        x = starts[0].clone()
        for _ in range(steps):
            x.requires_grad_(True)
            with watched(network) as seen:
                network(x)
                before = seen[name].before
                wanted = torch.arange(len(x)) % before.shape[1]  # each row lifts another neuron
                flat = before.flatten(2).amax(2) if before.dim() > 2 else before
                (gradient,) = torch.autograd.grad(flat[torch.arange(len(x)), wanted].sum(), x)
            with torch.no_grad():
                if box is None:
                    x = x + gradient / gradient.abs().amax().clamp_min(1e-9) * x.abs().amax() * 0.5
                else:
                    x = (x + gradient.sign() * (high - low) / 4).clamp(low, high)
            yield x.detach()


@st.composite
def networks(draw: st.DrawFn) -> Network:
    picture = draw(st.booleans())
    operations = st.sampled_from(PICTURE_OPS if picture else VECTOR_OPS)
    activations = st.one_of(st.just("relu"), st.sampled_from(sorted(ACTIVATIONS)))
    program = draw(st.lists(st.tuples(operations, activations), min_size=1, max_size=5))
    return Network(tuple(program), picture, draw(st.integers(0, 10_000)))
