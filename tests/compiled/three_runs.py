"""Compare a compiled run with an eager one, and with a compiled one that nobody watches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo
from torch import nn

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.compiled.test_compile import assert_same_census

__all__ = ["in_three_runs"]


def in_three_runs(run: Callable[[Nobody, bool], nn.Module]) -> ns.Scope:
    """Hold a watched compiled run to the counts of an eager one, and to the weights of an unwatched compiled one.

    Args:
        run: Builds and trains a network, watched by what it is given, and compiled or not; returns the network.

    Returns:
        The scope of the watched compiled run.
    """
    runs = []
    for watcher, compiles in ((Watched(), False), (Watched(), True), (Nobody(), True)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = run(watcher, compiles)
        runs.append((getattr(watcher, "scope", None), state_of(model)))
    (eager, _), (compiled, weights), (_, plain) = runs
    assert_bits(weights, plain)
    assert compiled._hooks.failure is None
    assert compiled.phases == eager.phases
    assert "train" in eager.phases
    for phase in eager.phases:
        assert_same_census(compiled.census(phase), eager.census(phase))
    assert compiled.report().not_measured == eager.report().not_measured
    return compiled
