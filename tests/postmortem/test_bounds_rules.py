"""Each rule on its own: it knows something, and what the function makes of random tensors in the box lies within."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.checkpoints.model.bounds.propagate import propagate_bounds
from neuronscope.checkpoints.model.examine_model import examine_model
from neuronscope.checkpoints.model.trace import trace

VECTOR, ROWS, LINE, PICTURE, CUBE = (2, 6), (2, 4, 6), (2, 6, 9), (2, 6, 8, 8), (2, 6, 5, 5, 5)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# name → (shape of the input, function of the input and a weight, shape of the weight)
CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "matmul": (VECTOR, lambda x, w: x @ w, (6, 3)),
    "torch.matmul": (ROWS, lambda x, w: torch.matmul(x, w), (6, 3)),
    "mm": (VECTOR, lambda x, w: x.mm(w), (6, 3)),
    "addmm": (VECTOR, lambda x, w: torch.addmm(w[0], x, w), (6, 3)),
    "linear without bias": (ROWS, lambda x, w: F.linear(x, w), (3, 6)),
    "conv1d": (LINE, lambda x, w: F.conv1d(x, w, padding=2, stride=2), (3, 6, 5)),
    "conv2d": (PICTURE, lambda x, w: F.conv2d(x, w, None, 1, 1, 1, 2), (4, 3, 3, 3)),
    "conv3d": (CUBE, lambda x, w: F.conv3d(x, w), (3, 6, 3, 3, 3)),
    "conv_transpose1d": (LINE, lambda x, w: F.conv_transpose1d(x, w, stride=3), (6, 2, 2)),
    "conv_transpose3d": (CUBE, lambda x, w: F.conv_transpose3d(x, w, stride=2, groups=2), (6, 2, 3, 3, 3)),
    "embedding": (VECTOR, lambda x, w: F.embedding((x > 0).long(), w) + 0 * x[..., None], (5, 3)),
    "attention": (ROWS, lambda x, w: F.scaled_dot_product_attention(x, x, x.abs() + 1), (1,)),
    "group norm": (PICTURE, lambda x, w: F.group_norm(x, 3, w, w), (6,)),
    "instance norm": (LINE, lambda x, w: F.instance_norm(x, weight=w, bias=w), (6,)),
    "layer norm over two": (LINE, lambda x, w: F.layer_norm(x, (6, 9), w), (6, 9)),
    "rms norm": (ROWS, lambda x, w: F.rms_norm(x, (6,), w), (6,)),
    "normalize": (ROWS, lambda x, w: F.normalize(x, dim=-1), (1,)),
    "softmax": (ROWS, lambda x, w: x.softmax(-1), (1,)),
    "divide by an interval": (ROWS, lambda x, w: x / (x.abs() + 0.5), (1,)),
    "one over": (ROWS, lambda x, w: 1 / (x * x + 0.5), (1,)),
    "negative divisor": (ROWS, lambda x, w: x / (-0.5 - x.abs()), (1,)),
    "rsub": (ROWS, lambda x, w: 2 - x, (1,)),
    "torch.rsub": (ROWS, lambda x, w: torch.rsub(x, 2), (1,)),
    "in place": (ROWS, lambda x, w: x.clone().mul_(w).sub_(0.5).add_(w).div_(-2.0), (6,)),
    "square": (ROWS, lambda x, w: (x - 0.3) ** 2 + x.square() * x.pow(2), (1,)),
    "times itself": (ROWS, lambda x, w: x * x, (1,)),
    "where": (ROWS, lambda x, w: torch.where(x > w, x, -1.0), (6,)),
    "masked fill": (ROWS, lambda x, w: x.masked_fill(x > 0.5, -7.0), (1,)),
    "broadcast mask": (VECTOR, lambda x, w: torch.where(w > 0, x, 0.0), (3, 1, 6)),
    "maximum": (ROWS, lambda x, w: torch.maximum(x, -x) + torch.minimum(x, w), (6,)),
    "max over": (ROWS, lambda x, w: x.max(dim=1).values + x.amin(1), (1,)),
    "mean": (ROWS, lambda x, w: x.mean(1, keepdim=True) + x.sum(-1, keepdim=True), (1,)),
    "cumsum": (ROWS, lambda x, w: x.cumsum(1), (1,)),
    "cat": (ROWS, lambda x, w: torch.cat((x, x.abs(), w.expand(2, 4, 6)), 2), (6,)),
    "stack": (VECTOR, lambda x, w: torch.stack((x, -x), 1).unbind(1)[1], (1,)),
    "split": (ROWS, lambda x, w: x.split((2, 4), -1)[1] * x.chunk(3, -1)[2].repeat(1, 1, 2), (1,)),
    "slices": (PICTURE, lambda x, w: x[:, 1:, ::2, None, -1], (1,)),
    "permute": (PICTURE, lambda x, w: x.permute(2, 0, 3, 1).mT.movedim(0, 1), (1,)),
    "flatten": (PICTURE, lambda x, w: (x * w[:, None, None]).flatten(1).unflatten(1, (6, 64)), (6,)),
    "roll": (PICTURE, lambda x, w: x.roll(3, -1).flip(1), (1,)),
    "pad": (LINE, lambda x, w: F.pad(F.pad(x, (1, 2), value=0.1), (2, 2), mode="reflect"), (1,)),
    "pixel shuffle": ((2, 8, 3, 3), lambda x, w: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), (1,)),
    "unfold": (LINE, lambda x, w: x.unfold(2, 3, 2), (1,)),
    "avg pool": (CUBE, lambda x, w: F.avg_pool3d(x, 3, 2, 1), (1,)),
    "avg pool with an own divisor": (PICTURE, lambda x, w: F.avg_pool2d(x, 2, divisor_override=3), (1,)),
    "max pool with indices": (PICTURE, lambda x, w: F.max_pool2d(x, 2, return_indices=True)[0], (1,)),
    "adaptive": (LINE, lambda x, w: F.adaptive_max_pool1d(x, 4) - F.adaptive_avg_pool1d(x, 4), (1,)),
    "interpolate": (PICTURE, lambda x, w: F.interpolate(x, size=(5, 11), mode="bilinear"), (1,)),
    "casts": (ROWS, lambda x, w: x.half().float().double().to(torch.float32).type_as(w), (1,)),
    "sine": (ROWS, lambda x, w: torch.sin(x * 9) + torch.cos(x), (1,)),
    "special sigmoid": (ROWS, lambda x, w: torch.special.expit(x) + x.sigmoid() + torch.exp(-x), (1,)),
    "prelu of one": (ROWS, lambda x, w: F.prelu(x, w), (1,)),
    "prelu of channels": (LINE, lambda x, w: F.prelu(x, w), (6,)),
    "leaky in place": (LINE, lambda x, w: F.leaky_relu(x.clone(), -0.3, inplace=True), (1,)),
    "scaled": (LINE, lambda x, w: F.elu(x, 0.3) + F.softplus(x, 2.0, 5.0) + F.celu(x, 0.7), (1,)),
    "clamp from above": (LINE, lambda x, w: x.clamp_max(0.1).clip(max=0.05).clamp(-0.5, 0.04), (1,)),
}


class Case(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.shape, self.function, shape = CASES[name]
        self.weight = weight(*shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize("box", [(-1.0, 1.0), (0.2, 0.9), (-2.0, -0.5)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_bounding_rule_is_found_for_its_function(name: str, box: tuple[float, float]) -> None:
    model = Case(name)
    graph = trace(model, (torch.zeros(model.shape),))
    (number,) = graph.outputs
    found = propagate_bounds(graph, box)[number]
    assert bool(found.low.isfinite().all() and found.high.isfinite().all())
    assert found.shape == graph.values[number].shape
    for corners in (True, False):
        for _ in range(100):
            x = torch.empty(model.shape).uniform_(*box)
            x = torch.where(x > sum(box) / 2, box[1], box[0]) if corners else x
            with torch.no_grad():
                y = model(x).double()
            assert bool((y <= found.high).all())
            assert bool((y >= found.low).all())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.elu(x, -1.0),
        lambda x: F.softplus(x, -1.0),
        lambda x: x.view(torch.int32).view(torch.float32),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: x / x.mean(),
    ],
)
def test_a_case_outside_a_bounding_rule_has_unknown_bounds(function: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    graph = trace(Model(), (torch.rand(PICTURE),))
    output = propagate_bounds(graph, (-1.0, 1.0))[graph.outputs[0]]
    assert output.normed is None
    assert bool(((output.low == -torch.inf) & (output.high == torch.inf)).all())


@pytest.mark.parametrize("name", ["matmul", "conv2d", "slices", "cat", "permute", "avg pool", "where", "square", "pad"])
def test_the_bounds_of_a_single_input_are_its_output(name: str) -> None:
    """A box that is one point gives that point's own result, but for rounding."""
    model = Case(name)
    x = torch.rand(model.shape) - 0.5
    graph = trace(model, (x,))
    found = propagate_bounds(graph, (x, x))[graph.outputs[0]]
    with torch.no_grad():
        y = model(x).double()
    assert bool((y <= found.high).all())
    assert bool((y >= found.low).all())
    if name in ("matmul", "slices", "cat", "permute", "square"):
        assert float((found.high - found.low).max()) < 1e-4


def test_a_function_of_torch_that_takes_its_arguments_in_another_order_tells_nothing() -> None:
    """Read as `F.batch_norm`, the weight of `torch.batch_norm` would be a running mean, and its bias a variance."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.weight, self.bias = nn.Parameter(torch.full((3,), 1e-9)), nn.Parameter(torch.zeros(3))
            self.register_buffer("mean", torch.full((3,), 0.5))
            self.register_buffer("variance", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.fc(x))
            return torch.batch_norm(x, self.weight, self.bias, self.mean, self.variance, False, 0.1, 1e-5, False)

    assert not examine_model(Normed().eval(), example=torch.randn(2, 4)).evidence
