"""Every layer ends in a site, is read by something that is no activation, or is listed as not measured: a law.

Here whatever is applied to the layer is an activation, however it is written: so the layer has a site, or it is listed.
Networks of others are held to the law in :mod:`tests.networks.agreement`, by autograd's graph.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, assert_bits, state_of

#: Torch's own, of what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Rectify(torch.autograd.Function):
    """A rectifier of numpy's, which torch does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.maximum(x.detach().numpy(), 0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


class Spike(torch.autograd.Function):
    """A spike, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class SavingSwish(torch.autograd.Function):
    """The Swish of EfficientNet, which keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * gate * (1 + x * (1 - gate))


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
    SCRIPTED = torch.jit.script(_swish)


def cut(h: Tensor) -> Tensor:
    h = h * 1
    h[h < 0] = 0
    return h


def put(h: Tensor) -> Tensor:
    h = h * 1
    return h.index_put_((h < 0,), torch.zeros(()))


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "maximum": lambda h: torch.maximum(h, torch.zeros(())),
    "maximum of zeros": lambda h: torch.maximum(torch.zeros_like(h), h),
    "max": lambda h: torch.max(h, torch.zeros_like(h)),
    "fmax": lambda h: h.fmax(torch.zeros(())),
    "clamp by a tensor": lambda h: h.clamp(min=torch.zeros(())),
    "where": lambda h: torch.where(h > 0, h, 0.0),
    "where, of zeros": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "mask": lambda h: h * (h > 0),
    "mask as a number": lambda h: (h > 0).float() * h,
    "mask without a gradient": lambda h: (h.detach() > 0).float() * h,
    "masked_fill": lambda h: h.masked_fill(h < 0, 0),
    "assignment": cut,
    "index_put": lambda h: torch.index_put(h, (h < 0,), torch.zeros(())),
    "index_put_": put,
    "absolute values": lambda h: (h + h.abs()) / 2,
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
    "gelu with a tanh": lambda h: 0.5 * h * (1 + torch.tanh(0.79788 * (h + 0.044715 * h**3))),
    "silu": lambda h: h * torch.sigmoid(h),
    "silu by a division": lambda h: h / (1 + torch.exp(-h)),
    "softplus": lambda h: torch.log1p(torch.exp(h)),
    "mish": lambda h: h * torch.tanh(F.softplus(h)),
    "softsign": lambda h: h / (1 + h.abs()),
    "squared relu": lambda h: F.relu(h) ** 2,
    "an operator of aten": torch.ops.aten.relu.default,
    "another operator of aten": lambda h: torch.ops.aten.gelu.default(h, approximate="tanh"),
    "sine": torch.sin,
    "an unknown function": torch.special.i0e,
    "a spike": Spike.apply,
    "a function that saves memory": SavingSwish.apply,
    "numpy": Rectify.apply,
    "a scripted function": SCRIPTED,
    "another thread of torch": lambda h: torch.jit.wait(torch.jit.fork(torch.relu, h)),
}

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "convolution": lambda: nn.Conv1d(6, 6, 1, groups=2),
    "transposed convolution": lambda: nn.ConvTranspose1d(6, 6, 1),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "layer norm": lambda: nn.LayerNorm(6),
    "embedding": lambda: nn.Embedding(7, 6),
    "recurrent": lambda: nn.GRUCell(6, 6),
    "linear with a weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
}

ONWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda y, h, other: y,
    "residual": lambda y, h, other: y + h,
    "residual of another layer": lambda y, h, other: other + y,
    "gate of another layer": lambda y, h, other: y * other,
    "units cut apart": lambda y, h, other: y.reshape(4, 9).repeat(1, 2)[:, :6],
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module, apply: Callable[[Tensor], Tensor], onward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.apply_, self.onward = layer, apply, onward
        self.other, self.next, self.out = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        given = x[..., None] if isinstance(self.layer, (nn.Conv1d, nn.ConvTranspose1d)) else x
        if isinstance(self.layer, nn.Embedding):
            given = (x[:, 0] > 0).long()
        h = self.layer(given)
        y = self.apply_(h)
        h, y = h.reshape(len(x), -1), y.reshape(len(x), -1)
        return self.out(torch.tanh(self.next(self.onward(y, h, self.other(x)))))


@pytest.mark.parametrize("apply", SPELLINGS.values(), ids=SPELLINGS)
def test_a_layer_with_any_activation_has_a_site_or_is_listed(apply: Callable[[Tensor], Tensor]) -> None:
    missing = []
    for layer, onward in [*((layer, "plain") for layer in LAYERS), *(("linear", onward) for onward in ONWARD)]:
        torch.manual_seed(0)
        model = Net(LAYERS[layer](), apply, ONWARD[onward])
        with ns.watch(model) as scope:
            model(torch.randn(6, 6)).sum().backward()
            scope.step()
        census = scope.census()
        if "layer" not in {tally.layer for tally in census.values()} | {
            each.name for each in scope.report().not_measured
        }:
            missing.append((layer, onward))
        assert "next/tanh" in census
    assert missing == []


# A scripted function is another one at its third call: torch optimizes it then.
@pytest.mark.parametrize("name", sorted({*SPELLINGS} - {"a scripted function"}))
def test_watching_an_activation_that_is_written_out_changes_nothing(name: str) -> None:
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Net(nn.Linear(6, 6), SPELLINGS[name], ONWARD["residual"])
        scope = ns.watch(model) if watched else None
        for _ in range(2):
            Nobody().backward(model(torch.randn(6, 6)).sum())
            if scope is not None:
                scope.step()
        states.append(state_of(model))
    assert_bits(*states)


def listed(model: nn.Module, *inputs: Tensor, graded: bool = True) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ns.watch(model) as scope, torch.set_grad_enabled(graded):
            output = model(*inputs)
            if graded:
                output.sum().backward()
            scope.step()
    return {item.name: item.reason for item in scope.report("train" if graded else "inference").not_measured}


def test_without_gradients_a_layer_that_is_read_unseen_is_listed_as_read_by_nothing() -> None:
    model = Net(nn.Linear(6, 6), lambda h: torch.from_numpy(h.detach().numpy().clip(0)), ONWARD["plain"])
    found = listed(model, torch.randn(6, 6), graded=False)
    assert set(found) == {"layer", "other"}  # what `other` gives is used nowhere
    assert all(reason.startswith("its output reached no activation") for reason in found.values())


def test_a_function_that_only_autograd_shows_is_named() -> None:
    found = listed(Net(nn.Linear(6, 6), Rectify.apply, ONWARD["residual"]), torch.randn(6, 6))
    assert list(found) == ["layer", "other"]
    assert "`RectifyBackward` in autograd's graph" in found["layer"]


class Identity(torch.autograd.Function):
    """Returns what it is given, as the functions do that frameworks put around a layer for its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_units_are_followed_through_a_function_that_returns_what_it_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    model[0].register_forward_hook(lambda module, args, output: Identity.apply(output))
    with ns.watch(model) as scope:
        model(torch.randn(5, 4)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["0/relu"]
    assert not scope.report().not_measured


class Deformed(nn.Module):
    """A layer whose weight an operator receives that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.xlog1py(x, self.weight.abs())


def test_a_layer_whose_weight_an_unknown_function_receives_is_listed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Deformed()), nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 1))
    found = listed(model, torch.rand(5, 4))
    assert "`special_xlog1py`, which is not known as a layer" in found["1.0"]


def test_a_known_activation_that_is_left_out_as_a_function_is_not_called_unknown() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(F.relu(self.a(x)))))

    model = Functional()
    with ns.watch(model, functional=False) as scope:
        model(torch.randn(5, 4))
        scope.step()
    (listed,) = scope.report().not_measured
    assert listed.name == "a"
    assert "where functions are not watched" in listed.reason


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: {"y": y},
        lambda y: [y, None],
        lambda y: type("Output", (), {"__init__": lambda s: s.__dict__.update(y=y)})(),
    ],
    ids=["mapping", "list", "object"],
)
def test_what_a_model_returns_in_any_container_is_an_output(pack: Callable[[Tensor], Any]) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return pack(self.out(torch.relu(self.fc(x))))

    model = Packed()
    with ns.watch(model) as scope:
        model(torch.randn(5, 4))
        scope.step()
    assert not scope.report().not_measured
