"""Windows of training whose number of examples is not known."""

from __future__ import annotations

import torch
from torch import nn

import neuronscope as ns


def test_windows_close_where_the_number_of_examples_is_not_known_and_stay_provisional() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with ns.watch(model, examples=None, window_steps=10) as scope:
        closed = []
        for _ in range(25):
            model(torch.randn(500, 4)).sum().backward()
            closed.append(scope.step())
    assert [step for step, each in enumerate(closed, 1) if each] == [10, 20]
    report = scope.report()
    assert report.provisional
    assert report.window.steps == 5  # the rest, closed at the end
    assert {tally.examples for tally in scope.census().values()} == {0}
