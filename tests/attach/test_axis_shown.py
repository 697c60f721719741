"""The neuron axis of every site is printed with how it is known, and can be overruled."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

import neuronscope as ns


class Net(nn.Module):
    """A map, tokens, a volume, and what no layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), nn.Linear(5, 7)
        self.volume = nn.Conv3d(1, 4, 1)
        self.map, self.normed, self.tokens, self.solid, self.raw = (nn.ReLU() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.raw(x)
        y = self.normed(self.norm(self.map(self.conv(x))))
        y = self.tokens(self.fc(y.transpose(1, 2)))
        return y.sum() + self.solid(self.volume(x[:, None, :, :, None])).sum() + raw.sum()


def printed(**options: Any) -> dict[str, str]:
    """What the printed report says of each site's axis."""
    model = Net()
    with ns.watch(model, **options) as scope:
        model(torch.randn(2, 3, 6)).backward()
        scope.step()
    rows = (re.split(r"\s{2,}", line.strip()) for line in str(scope.report()).splitlines())
    return {row[0]: row[3] for row in rows if row[1:2] == ["relu"]}  # the layer, activation, neurons, axis


KNOWN = {
    "raw *": "2 · assumed ?",  # the mark of a layer that is not in the totals
    "conv/relu": "1",  # that of the units of the layer
    "norm/relu": "1",
    "fc/relu": "2",
    "volume/relu": "1",
}


def test_a_report_prints_how_each_axis_is_known():
    assert printed() == KNOWN


def test_a_declared_axis_overrules_the_one_that_was_found():
    kept = {name: axis for name, axis in KNOWN.items() if name not in ("raw *", "fc/relu")}
    assert printed(axes={"tokens": 1, "r*": 1}) == {**kept, "fc/relu": "1 · declared", "raw": "1 · declared"}
