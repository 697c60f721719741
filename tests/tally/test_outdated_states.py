"""A state that an earlier version saved counted other neurons: counts begin anew, and a warning says so once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope.checkpoints.file.monitor_record import recorded_report
from neuronscope.errors import NeuronscopeWarning, StateError

ROWS, STEP = 4, 7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))


def train(model: nn.Module, scope: ns.Scope, steps: int) -> bool:
    """Take some steps; return whether the last closed a window."""
    closed = False
    for _ in range(steps):
        model(torch.randn(ROWS, 3)).sum().backward()
        closed = scope.step()
    return closed


def outdated() -> dict[str, Any]:
    """A state of version 1, of a training of some steps and a validation."""
    model = network()
    with ns.watch(model) as scope:
        train(model, scope, STEP)
        with scope.phase("val"):
            model(torch.randn(ROWS, 3))
        return {**scope.state_dict(), "version": 1}


def test_counts_begin_anew_at_the_saved_step_with_one_warning() -> None:
    state, model = outdated(), network()
    with ns.watch(model) as scope:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            scope.load_state_dict(state)
        assert [each.category for each in given] == [NeuronscopeWarning]
        assert "from an earlier version of Neuronscope" in str(given[0].message)
        assert f"The counts begin anew at step {STEP}." in str(given[0].message)
        assert (scope.global_step, scope.phases) == (STEP, ())
        train(model, scope, 2)
        (tally,) = scope.census().values()
        assert (scope.global_step, scope.census().first_step, scope.census().last_step) == (STEP + 2, STEP, STEP + 1)
        assert (tally.positions, tally.examples) == (2 * ROWS, 2 * ROWS)


def test_what_is_saved_next_is_continued_without_a_warning() -> None:
    state, model = outdated(), network()
    with ns.watch(model) as scope:
        with pytest.warns(NeuronscopeWarning, match="earlier version"):
            scope.load_state_dict(state)
        train(model, scope, 2)
        later = scope.state_dict()
    with ns.watch(model) as scope, warnings.catch_warnings():
        warnings.simplefilter("error")
        scope.load_state_dict(later)
        train(model, scope, 1)
        assert scope.census().examples == 3 * ROWS


def test_the_first_window_after_it_has_as_many_steps_as_every_other() -> None:
    state, model = outdated(), network()
    with ns.watch(model, window_steps=3, policy=ns.Policy(max_rate=0.7)) as scope:
        with pytest.warns(NeuronscopeWarning, match="earlier version"):
            scope.load_state_dict(state)
        assert [train(model, scope, 1) for _ in range(3)] == [False, False, True]


def test_a_state_of_a_later_version_is_refused() -> None:
    with ns.watch(network()) as scope, pytest.raises(StateError, match="but got version 99"):
        scope.load_state_dict({**outdated(), "version": 99})


def test_a_post_mortem_says_that_a_record_is_from_an_earlier_version() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StateError, match="written by an earlier version"):
            recorded_report({"version": 1, "model": "Net", "scope": outdated(), "published": {}})
