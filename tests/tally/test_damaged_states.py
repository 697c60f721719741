"""A damaged state is refused with one plain sentence, or what is taken of it makes reports that can be true."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.callbacks import Monitor
from neuronscope.errors import NeuronscopeWarning, StateError
from tests.tally.damaged import damaged

ROWS, WINDOW, STEPS = 10, 2, 9
POLICY = ns.Policy(max_rate=0.2)  # sure from 14 examples on: every window closes
OPTIONS: dict[str, Any] = {"window_steps": WINDOW, "policy": POLICY, "every_n_steps": 1}


class Network(nn.Module):
    """Neurons that die, come back, and give NaN; a gated product; a site without a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.last, self.raw = nn.Linear(3, 5), nn.Linear(5, 8), nn.Linear(4, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate(F.relu(self.first(self.raw(x)))).chunk(2, -1)
        return self.last(F.silu(a) * b)


def step(model: Network, number: int) -> None:
    with torch.no_grad():
        model.first.bias[0] = 5.0 if number in (0, 6) else -100.0
        model.first.bias[1] = torch.nan if number == 8 else 1.0
        model(torch.randn(ROWS, 3))  # a reference pass
    model(torch.randn(ROWS, 3)).sum().backward()


def run(model: Network, monitor: Monitor, steps: range) -> None:
    for number in steps:
        monitor.begin_batch()
        step(model, number)
        monitor.step(number + 1)
    with monitor.evaluation("val"), torch.no_grad():
        model(torch.randn(ROWS, 3))


@functools.cache
def saved() -> dict[str, Any]:
    """Return the state of a monitor, in the middle of a window."""
    monitor = Monitor(**OPTIONS)
    monitor.attach(model := Network())
    run(model, monitor, range(STEPS))
    state = monitor.state_dict()
    monitor.detach()
    state["scope"]["fault"] = {"step": 4, "error": "of an earlier run"}
    state["published"] = {"train:log": {"step": 8, "report_step": 8}}
    return state


def assert_plausible(scope: ns.Scope) -> None:
    """Every report can be written, every fraction lies between 0 and 1, and every count fits the others."""
    for phase in ("train", "val", "inference"):
        for window in ("all", "last", "open"):
            for tally in scope.census(phase, window).values():
                for fraction in (tally.zero_output_fraction, tally.zero_gradient_fraction):
                    assert ((fraction >= 0) & (fraction <= 1) | np.isnan(fraction)).all()
                assert (tally.last_active_step <= scope.global_step).all()
                assert min(tally.positions, tally.gradient_positions, tally.examples, tally.not_finite) >= 0
        report = scope.report(phase)
        assert 0 <= report.dead <= report.neurons
        texts = [str(report), report.to_json()]
        if phase == "train":
            texts += [report.to_html(), report.to_markdown()]
        assert all(texts)


def assert_refused_or_plausible(state: Any, what: str) -> bool:
    """Return whether the state was taken."""
    model = Network()
    scope = ns.watch(model, window_steps=WINDOW, policy=POLICY)
    try:
        try:
            scope.load_state_dict(state["scope"] if isinstance(state, dict) and "scope" in state else state)
        except StateError as error:
            assert str(error).startswith("Expected")  # noqa: PT017
            assert (scope.global_step, scope.phases) == (0, ())
            taken = False
        else:
            assert_plausible(scope)
            taken = True
        before = scope.global_step
        for number in range(2 * WINDOW + 1):
            step(model, number)
            scope.step()
        assert_plausible(scope)
        assert scope.global_step == before + 2 * WINDOW + 1
        again = ns.watch(Network(), window_steps=WINDOW, policy=POLICY)
        again.load_state_dict(scope.state_dict())
        again.detach()
        assert scope._hooks.failure is None
    except Exception as error:
        raise AssertionError(what) from error
    finally:
        scope.detach()
    return taken


def test_an_undamaged_state_is_taken() -> None:
    assert assert_refused_or_plausible(saved(), "nothing")


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_a_state_with_a_damaged_part_is_refused_or_gives_plausible_reports(seed: int) -> None:
    state, what = damaged(saved()["scope"], random.Random(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NeuronscopeWarning)  # of an earlier version, if that is the damage
        assert_refused_or_plausible({"scope": state}, what)


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_a_callback_with_a_damaged_state_warns_or_gives_plausible_reports_and_goes_on(seed: int) -> None:
    state, what = damaged(saved(), random.Random(seed))
    monitor = Monitor(**OPTIONS)
    with warnings.catch_warnings(record=True) as given_warnings:
        warnings.simplefilter("always")
        monitor.load_state_dict(state)
        monitor.attach(model := Network())
        start = monitor.scope.global_step
        run(model, monitor, range(start, start + STEPS))
        assert_plausible(monitor.scope)
        assert monitor.scope.global_step == start + STEPS, what
        assert monitor.attached, what
        monitor.detach()
    ours = [str(each.message) for each in given_warnings if each.category is NeuronscopeWarning]
    assert len(ours) <= 1, what
    assert all("could not take up what was saved; training goes on. StateError: " in each for each in ours) or (
        "from an earlier version" in ours[0]
    ), (what, ours)


def spoilt(path: str, entry: Any) -> dict[str, Any]:
    """Return the state with one part replaced; of a tensor, its first entry."""
    whole = copy.deepcopy(saved())
    part: Any = whole
    *parts, last = path.split(".")
    for name in parts:
        part = part[name]
    if isinstance(part[last], Tensor) and isinstance(entry, int | float):
        part[last].view(-1)[0] = entry
    else:
        part[last] = entry
    return whole


RECORD = "scope.phases.train"
SITE = f"{RECORD}.closed.tallies.first/relu"


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        (f"{SITE}.zero_outputs", -1),
        (f"{SITE}.zero_outputs", 2**40),  # more than there are positions
        (f"{SITE}.zero_gradients", 2**40),
        (f"{SITE}.positions", 2**63),
        (f"{SITE}.positions", 1),
        (f"{SITE}.positions", 40.0),
        (f"{SITE}.abs_sum", float("nan")),
        (f"{SITE}.abs_sum", -1.0),
        (f"{SITE}.last_active_step", 10**6),  # after the state was saved
        (f"{SITE}.info.linear_when_on", "yes"),
        (f"{SITE}.info.units", [["first", 0, 5, 0]]),
        (f"{SITE}.info.units", [["first", 0, float("inf"), 1]]),
        (f"{RECORD}.last.tallies.first/relu.last_active_step", 10**6),
        ("scope.phases.inference.last.tallies.first/relu.last_active_step", 10**6),
        (f"{RECORD}.closed.last_step", 10**6),
        (f"{RECORD}.last.last_step", 10**6),
        (f"{RECORD}.open_steps", [8, 3]),
        (f"{RECORD}.looked_at_step", -1),
        (f"{RECORD}.history.stride", 0),
        (f"{RECORD}.history.windows", -3),
        (f"{RECORD}.history.trails.first/relu.deaths", -1),
        (f"{RECORD}.history.trails.first/relu.died_step", 10**6),
        (f"{RECORD}.history.trails.first/relu.steps", 10**6),
        (f"{RECORD}.history.trails.first/relu.is_dead", torch.zeros(4, dtype=torch.bool)),
        (SITE, torch.zeros(0)),
        (f"{RECORD}.history.trails.first/relu", torch.zeros(0)),
        (RECORD, torch.zeros(0)),
        ("scope.step", -1),
        ("scope.step", True),
        ("scope.phases", {7: {}}),
        ("scope.fault", {"step": "x", "error": ""}),
    ],
)
def test_an_impossible_count_step_or_type_is_refused(path: str, entry: Any) -> None:
    assert not assert_refused_or_plausible(spoilt(path, entry), path)
