"""Few functions of Neuronscope are called in an observed step: they are what watching a small network costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import neuronscope as ns
from neuronscope.callbacks import Monitor

#: At most so many calls for one more site, for a step of a network with one, and for a batch that is not observed.
SITE, STEP, QUIET_BATCH = 33, 105, 22

_OURS = str(Path(ns.__file__).parent)


def _calls(function: Callable[[], Any]) -> int:
    """Return how many functions of Neuronscope a function calls."""
    calls = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(_OURS)

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def _mlp(sites: int) -> nn.Sequential:
    hidden = [layer for _ in range(sites) for layer in (nn.Linear(4, 4), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(4, 1))


def _steady_calls(sites: int, steps: int) -> tuple[int, int]:
    """Return the calls of a forward and a backward pass, and of the end of a step, after some steps."""
    model = _mlp(sites)
    x = torch.randn(2, 4)
    with ns.watch(model) as scope:
        for _ in range(steps):
            model(x).sum().backward()
            scope.step()
        passes = _calls(lambda: model(x).sum().backward())
        return passes, _calls(scope.step)


def test_a_site_and_a_step_call_few_functions() -> None:
    passes, step = _steady_calls(1, steps=5)
    more, same = _steady_calls(2, steps=5)
    assert same == step
    assert more - passes <= SITE, (more, passes)
    assert passes + step <= STEP, (passes, step)


def test_a_window_that_waits_for_examples_calls_no_function_for_each_site() -> None:
    few, many = (_steady_calls(sites, steps=101)[1] for sites in (1, 9))
    assert few == many


def test_a_monitor_calls_few_functions_in_a_batch_that_is_not_observed() -> None:
    model, monitor = _mlp(3), Monitor(every_n_steps=20)
    monitor.attach(model)

    def batch(step: int) -> int:
        began = _calls(monitor.begin_batch)
        model(torch.ones(2, 4)).sum().backward()
        return began + _calls(lambda: monitor.step(step))

    calls = [batch(step) for step in range(1, 41)]
    monitor.finish()
    assert max(calls[5:19]) <= QUIET_BATCH < calls[20], calls
