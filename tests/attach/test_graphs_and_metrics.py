"""What else calls activation functions while a model is watched: a compiled graph's code, and metrics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.act, self.gelu = nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(self.gelu(self.act(self.first(x)))))).sum()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compiled", ["model", "step"])
def test_a_graph_that_runs_its_functions_in_python_is_counted_once(backend: str, compiled: str) -> None:
    torch._dynamo.reset()
    model = Net()
    step = torch.compile(model if compiled == "model" else model.forward, backend=backend)
    with ns.watch(model) as scope:
        for _ in range(3):
            scope.open_step()
            step(torch.randn(8, 4)).backward()
            scope.close_step()
            scope.step()
    # 3 steps of 8 examples, one position each
    counted = {name: (tally.positions, tally.gradient_positions) for name, tally in scope.census().items()}
    assert counted == {"first/relu": (24, 24), "first/gelu": (24, 24), "second/relu": (24, 24)}
    assert not scope.report().not_measured


def test_activations_inside_metrics_are_not_counted() -> None:
    classification = pytest.importorskip("torchmetrics.classification")

    class Measured(Net):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = classification.BinaryAccuracy()

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.third(F.relu(self.second(self.act(self.first(x))))))
            self.accuracy(self.first(x)[:, 0] * 9, torch.ones(len(x), dtype=torch.int64))  # applies a sigmoid
            return y.sum()

    model = Measured()
    with ns.watch(model) as scope:
        for _ in range(2):
            model(torch.randn(8, 4)).backward()
            scope.step()
    assert list(scope.census()) == ["first/relu", "second/relu", "third/sigmoid"]
    assert scope.census()["third/sigmoid"].neurons == 2
