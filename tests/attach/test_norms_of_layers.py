"""A site whose layer is a norm says which layer's units it normalises one by one: then both units are one neuron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns


class Net(nn.Module):
    """A convolution, a norm of what ``between`` makes of it, and a ReLU."""

    def __init__(self, norm: nn.Module, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), norm
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.between(self, self.conv(x))))


def found(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, tuple[bool, str]]:
    """For each site: whether its layer is a norm, and what it normalises."""
    with ns.watch(model) as scope:
        (call or model)(torch.rand(5, 3, 8, 8)).sum().backward()
        scope.step()
        census, report = scope.census("train"), scope.report()
    again = ns.watch(model)
    again.load_state_dict(scope.state_dict())
    again.detach()
    answer = {name: (tally.info.is_norm, tally.info.normalises) for name, tally in census.items()}
    assert {site.name: (site.is_norm, site.normalises) for site in report.layers} == answer
    loaded = again.census("train")
    assert {name: (tally.info.is_norm, tally.info.normalises) for name, tally in loaded.items()} == answer
    return answer


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
@pytest.mark.parametrize(
    "between",
    [
        lambda net, h: h,
        lambda net, h: F.max_pool2d(h, 2),
        lambda net, h: F.dropout(h, 0.1) * 0.5 + 1,
        lambda net, h: h.flatten(2).view(5, 4, 8, 8),
    ],
    ids=["nothing", "pooling", "dropout and scaling", "views"],
)
def test_a_norm_normalises_the_units_of_the_layer_before_it(norm: nn.Module, between: Any) -> None:
    assert found(Net(norm, between)) == {"norm/relu": (True, "conv")}


@pytest.mark.parametrize(
    "between",
    [
        lambda net, h: h + net.other(h),
        lambda net, h: h * net.other(h),
        lambda net, h: F.relu(h),
    ],
    ids=["residual sum", "product", "activation"],
)
def test_a_norm_of_something_mixed_normalises_no_layer(between: Any) -> None:
    assert found(Net(nn.BatchNorm2d(4), between))["norm/relu"] == (True, "")


def test_a_norm_of_two_layers_normalises_neither() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return F.relu(self.norm(h)) + F.relu(self.norm(self.other(h)))

    assert found(Two(nn.BatchNorm2d(4), lambda net, h: h)) == {"norm/relu": (True, "")}


def test_a_layer_that_is_no_norm_normalises_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert found(model) == {"1/relu": (False, "")}


def test_two_norms_in_a_row_lead_to_the_layer_before_both() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU())
    assert found(model) == {"2/relu": (True, "0")}


def test_a_norm_of_a_compiled_network_normalises_the_layer_before_it() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU())
    assert found(model, torch.compile(model, backend="eager")) == {"2/relu": (True, "0")}
