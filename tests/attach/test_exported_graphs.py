"""Graphs of ``torch.export`` call operators of aten, and have the sites of the network that they were made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns


class Net(nn.Module):
    """Modules and functions, a gated product, attention, a bare parameter, and parts of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.grouped, self.up, self.fused = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 12), nn.Linear(12, 16)
        self.last_norm, self.out = nn.LayerNorm(8), nn.Linear(8, 4)
        self.attention, self.w = nn.MultiheadAttention(4, 2, batch_first=True), nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.grouped(self.act(self.norm(self.conv(x)))))
        x = F.gelu(self.up(F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)))
        gate, up = self.fused(x).chunk(2, -1)
        x = self.last_norm(torch.tanh(gate) * up)
        x = torch.cat([x[:, 1:3], x[:, :1].sigmoid()], 1)
        y = torch.clamp(self.out(x), 0, 6)
        y = y + self.attention(y, y, y)[0]
        return y.sum() + torch.relu(torch.einsum("bti,oi->bto", x, self.w)).sum()


def counts(model: nn.Module, x: Tensor, graded: bool = True) -> tuple[dict[str, Any], list[str]]:
    with ns.watch(model) as scope, scope.phase("train" if graded else "test"):
        output = model(x)
        if graded:
            output.backward()
        scope.step()
    census = scope.census("train" if graded else "test")
    found = {
        name: (tally.zero_outputs.tolist(), tally.zero_gradients.tolist(), tally.positions, tally.gradient_positions)
        for name, tally in census.items()
    }
    return found, [item.name for item in scope.report("train" if graded else "test").not_measured]


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_graph_has_the_sites_and_counts_of_its_network(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Net().train(training), torch.randn(4, 3, 6, 6)
    expected = counts(copy.deepcopy(model), x)
    assert len(expected[0]) == 8
    assert expected[1] == []
    assert counts(torch.export.export(model, (x,)).module(), x) == expected


def test_an_exported_graph_of_core_operators_has_the_sites_of_its_network_or_lists_the_layer() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    expected, _ = counts(copy.deepcopy(model), x, graded=False)
    graph = torch.export.export(model, (x,)).run_decompositions().module()
    found, missing = counts(graph, x, graded=False)
    same = {name for name in expected if found.get(name) == expected[name]}
    # A hardswish is written out. The matrix of `up` is repeated, once for each picture.
    assert set(expected) - same == {"grouped/hardswish", "up/gelu"}
    assert missing == ["gelu()", "grouped"]


def test_a_graph_inside_a_network_has_names_below_its_own_path() -> None:
    inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    for graph in (torch.export.export(inner, (torch.randn(8, 4),)).module(), torch.fx.symbolic_trace(inner)):
        model = nn.Sequential(graph, nn.ReLU(), nn.Linear(4, 1))
        with ns.watch(model) as scope:
            model(torch.randn(8, 4)).sum().backward()
            scope.step()
        assert {name: tally.neurons for name, tally in scope.census().items()} == {"0.0/relu": 5, "0.2/relu": 4}


ATEN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "an overload": ("relu", torch.ops.aten.relu.default),
    "an operator": ("relu", torch.ops.aten.relu),
    "in place": ("relu", lambda h: torch.ops.aten.relu_.default(h * 1)),
    "from below": ("clamp", lambda h: torch.ops.aten.clamp_min.default(h, 0)),
    "with an argument": ("gelu", lambda h: torch.ops.aten.gelu.default(h, approximate="tanh")),
}


@pytest.mark.parametrize(("activation", "call"), ATEN.values(), ids=ATEN)
def test_an_operator_of_aten_is_the_activation_of_its_name(activation: str, call: Callable[[Tensor], Tensor]) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(call(self.fc(x)))

    model = Small()
    with ns.watch(model) as scope:
        model(torch.randn(8, 4)).sum().backward()
        scope.step()
    ((name, tally),) = scope.census().items()
    assert (name, tally.neurons, tally.positions) == (f"fc/{activation}", 6, 8)


def test_an_operator_of_aten_can_be_registered_as_an_activation() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.ops.aten.sin.default(self.fc(x)))

    model = Small()
    with ns.watch(model, activations={torch.ops.aten.sin.default: "smooth"}) as scope:
        model(torch.randn(8, 4)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["fc/sin.default"]
