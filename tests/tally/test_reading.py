"""Reading counters: few copies whatever the network's size, none on idle steps, and reports that stay as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope.count.counters import SiteCounters
from neuronscope.sites import SiteInfo
from neuronscope.tally import collect, phase_record

INFO = SiteInfo(activation="relu", kind="relu-like", linear_when_on=True, axis=1, axis_source="declared")


def filled(neurons: int, start: int) -> SiteCounters:
    counters = SiteCounters(neurons, torch.device("cpu"))
    for place, counter in enumerate(counters.tensors):
        counter.copy_(torch.arange(len(counter)) + start + 1000 * place)
    counters.positions, counters.gradient_positions, counters.examples = start, start + 1, start + 2
    return counters


def test_every_counter_of_every_meter_is_read_in_its_place_and_copied() -> None:
    all_counters = [filled(3, 10), filled(5, 50), filled(1, 90)]
    gated = filled(3, 70)
    gated.gate = all_counters[0]
    tallies = collect.read_tallies([(INFO, counters) for counters in [*all_counters, gated]])
    for counters, tally in zip([*all_counters, gated], tallies):
        asked = counters.gate or counters
        assert tally.zero_outputs.tolist() == counters.tensors.zero_outputs.tolist()
        assert tally.zero_gradients.tolist() == asked.tensors.zero_gradients.tolist()
        assert tally.not_finite_outputs.tolist() == counters.tensors.not_finite.tolist()
        assert tally.abs_sum.tolist() == counters.tensors.abs_sum.tolist()
        assert tally.last_active_step.tolist() == counters.tensors.last_active.tolist()
        assert tally.first_active_step.tolist() == counters.tensors.first_active.tolist()
        totals = (tally.positions, tally.gradient_positions, tally.examples)
        assert totals == (counters.totals()[0], asked.totals()[1], counters.totals()[2])
        assert tally.abs_sum.dtype == np.float64
        assert {array.dtype for array in (tally.zero_outputs, tally.last_active_step)} == {np.dtype(np.int64)}
    # The third meter begins at 90, and its traced totals at 6090 and 7090: 90 + 6090, 91 + 7090, 92 + 6091.
    assert (tallies[2].positions, tallies[2].gradient_positions, tallies[2].examples) == (6180, 7181, 6183)
    before = tallies[0].zero_outputs.copy()
    all_counters[0].reset()
    assert (tallies[0].zero_outputs == before).all()
    assert collect.read_tallies([]) == []


def test_positions_and_examples_of_each_site_are_read_from_the_device_only_where_a_graph_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    all_counters = [filled(3, 10), filled(2, 50), filled(4, 30)]
    for counters in all_counters[1:]:
        counters.in_graph = True
    copied: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors: copied.append(len(tensors)) or cat(tensors))
    # Positions of their own 10, 50 and 30, examples 12, 52 and 32; traced 6050 and 6030, 6051 and 6031.
    assert collect.observed(all_counters) == [(10, 12), (50 + 6050, 52 + 6051), (30 + 6030, 32 + 6031)]
    assert copied == [2]
    assert collect.observed([]) == []
    assert collect.observed(all_counters[:1]) == [(10, 12)]
    assert copied == [2]


@pytest.mark.parametrize("sites", [2, 20])
def test_a_census_is_one_copy_a_type_of_number(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    model = nn.Sequential(*(layer for _ in range(sites) for layer in (nn.Linear(3, 3), nn.ReLU())))
    with ns.watch(model) as scope:
        model(torch.randn(4, 3)).sum().backward()
        joined: list[int] = []
        cat = torch.cat
        monkeypatch.setattr(torch, "cat", lambda tensors: joined.append(len(tensors)) or cat(tensors))
        assert len(scope.census()) == sites
    # A sum of float32, two steps of int16, the traced totals of int64, and three counts of int32 a site.
    assert sorted(joined[:4]) == [sites, 2 * sites, 2 * sites, 3 * sites]


def test_idle_steps_of_a_window_that_wants_examples_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    observed = phase_record.observed

    def noting(all_counters: Any) -> list[tuple[int, int]]:
        asked.append(scope.global_step)
        return observed(all_counters)

    monkeypatch.setattr(phase_record, "observed", noting)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    closed = []
    with ns.watch(model, every_n_steps=10, window_steps=5) as scope:
        for step in range(60):
            model(torch.randn(100, 3)).sum().backward()
            if scope.step():
                closed.append(step + 1)
    # 100 examples at steps 0, 10, 20, …: 299 are there after step 20, and again after step 50. A window is due after 5
    # steps, is asked then, and again after each observed step.
    assert closed == [21, 51]
    assert asked == [5, 11, 21, 26, 31, 41, 51, 56]


def test_saying_which_phases_there_are_reads_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with ns.watch(model) as scope:
        assert scope.phases == ()
        with scope.phase("val"):
            model(torch.randn(4, 3))
        model(torch.randn(4, 3)).sum().backward()
        monkeypatch.setattr(phase_record, "read_tallies", lambda all_counters: pytest.fail("counters were read"))
        assert set(scope.phases) == {"train", "val"}
        scope.step()
        monkeypatch.undo()


def test_a_report_stays_as_it_was_when_windows_close_and_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuronscope.tally.history.MAX_WINDOWS", 20)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    kept = []
    with ns.watch(model, window_steps=1) as scope:
        for _ in range(90):
            model(torch.randn(400, 3)).sum().backward()
            scope.step()
            history = scope.report().layers[0].history
            kept.append((history, history.steps.copy(), history.levels.copy()))
            assert len(history.levels) == len(history.steps) <= 21
    for history, steps, levels in kept:
        assert (history.steps == steps).all()
        assert (history.levels == levels).all()
    assert (kept[-1][2][-1] != kept[0][2][0]).any()  # the windows differ: the above could fail
