"""Patterns match the names of sites, the paths of their layers and the places of their activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.pool = nn.ModuleList(Mlp() for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return torch.relu(self.pool(x)).sum()


GATES = [f"layers.{number}.gate_proj/{name}" for number in range(3) for name in ("silu", "swiglu")]
PATTERNS = {
    "*.act_fn": GATES,
    "layers.1.*": GATES[2:4],
    "layers.?.gate_proj": GATES,
    "*/swiglu": GATES[1::2],
    "relu()": ["pool/relu"],
    "pool*": ["pool/relu"],
    "layers.2.gate_proj/silu": GATES[4:5],
}


@pytest.mark.parametrize(("pattern", "sites"), PATTERNS.items(), ids=PATTERNS)
def test_a_pattern_matches_sites_layers_and_places(pattern: str, sites: list[str]) -> None:
    model, counted = Net(), {}
    for option in ("sites", "exclude"):
        with ns.watch(model, **{option: pattern}) as scope:
            model(torch.randn(5, 4)).backward()
            scope.step()
        counted[option] = list(scope.census())
    assert counted["sites"] == sites
    assert counted["exclude"] == [name for name in (*GATES, "pool/relu") if name not in sites]


def test_a_pattern_that_matches_nothing_names_what_there_is() -> None:
    model = Net()
    with (
        ns.watch(model, exclude="*.act") as scope,
        pytest.warns(ns.NeuronscopeWarning, match="layers.0.gate_proj/silu"),
    ):
        model(torch.randn(5, 4)).backward()
        scope.step()


def test_a_reentrant_checkpoint_outside_of_any_forward_is_training() -> None:
    model = Net()
    with ns.watch(model) as scope:
        for _ in range(3):
            checkpoint(model.layers[0], torch.randn(5, 4, requires_grad=True), use_reentrant=True).sum().backward()
            scope.step()
    assert scope.phases == ("train",)
    counted = {name: (tally.positions, tally.gradient_positions) for name, tally in scope.census().items()}
    assert counted == dict.fromkeys(GATES[:2], (15, 15))
