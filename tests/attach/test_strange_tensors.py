"""Activations on what is no tensor of real numbers: not measured, said with the reason, and training is unharmed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns


class Strange(nn.Module):
    """One activation on ordinary features and one on what ``strange`` makes of them."""

    def __init__(self, act: nn.Module, strange: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.relu, self.act, self.strange = nn.Linear(4, 6), nn.ReLU(), act, strange

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.fc(x))
        self.act(self.strange(x.detach()))
        return x


class Summed(nn.ReLU):
    """An activation of one's own that is given a list."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        return super().forward(sum(parts))


CASES = {
    "complex": (nn.Tanh(), lambda x: torch.complex(x, x), "complex64 tensors"),
    "integers": (nn.ReLU(), lambda x: x.round().long(), "int64 tensors"),
    "quantised": (nn.ReLU(), lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8 tensors"),
    "a number": (nn.Sigmoid(), lambda x: x.mean(), "float32 tensors without dimensions"),
    "a list": (Summed(), lambda x: [x, x], "an input of type list"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other")  # torch's own
@pytest.mark.parametrize(("act", "strange", "what"), CASES.values(), ids=CASES)
def test_a_report_states_why_an_activation_was_not_measured(
    act: nn.Module, strange: Callable[[Tensor], Any], what: str
):
    model = Strange(act, strange)
    with ns.watch(model) as scope:
        model(torch.randn(5, 4)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["fc/relu"]
    (missing,) = scope.report().not_measured
    assert (missing.name, missing.reason) == ("act", f"it ran on {what}, which cannot be counted")


def test_modules_whose_parameters_have_no_shape_yet_are_counted_from_the_first_step_on() -> None:
    """The first forward of a lazy module gives its parameters their shapes."""
    model = nn.Sequential(
        nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.ReLU()
    )
    model.append(nn.LazyLinear(1))
    with ns.watch(model) as scope:
        for _ in range(3):
            model(torch.randn(8, 3, 5, 5)).sum().backward()
            scope.step()
        assert not scope.detached
    positions = {name: (tally.positions, tally.gradient_positions) for name, tally in scope.census().items()}
    assert positions == {"1/relu": (3 * 8 * 9,) * 2, "4/relu": (3 * 8,) * 2}
