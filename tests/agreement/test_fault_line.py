"""A fault of ours that ended a watch is the first line of every later report, with its step."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope.callbacks.publishing import summary
from neuronscope.checkpoints.file.monitor_record import recorded_report
from neuronscope.errors import StateError
from neuronscope.report.fault import Fault
from neuronscope.writers.tensorboard.diagnosis_text import diagnosis

SAID = (
    "Neuronscope stopped watching at step 2 because of an internal error; later steps are not counted. "
    "RuntimeError: a fault <b>of</b> ours"
)


def fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("a fault <b>of</b>\nours")


def ended(place: str, monkeypatch: pytest.MonkeyPatch) -> ns.Scope:
    """Five steps, the third of which meets a fault."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with ns.watch(net) as scope:
        for step in range(5):
            if step == 2:
                monkeypatch.setattr(scope._hooks.recorder, place, fail)
                with pytest.warns(ns.NeuronscopeWarning, match="a fault"):
                    net(torch.ones(2, 3)).sum().backward()
            else:
                net(torch.ones(2, 3)).sum().backward()
            scope.step()
    return scope


@pytest.mark.parametrize("place", ["begin", "end", "gradient"])
def test_every_writer_begins_with_the_line_on_a_fault(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = ended(place, monkeypatch)
    report = scope.report()
    assert report.global_step == 5
    assert report.fault == report.notes[0] == SAID
    assert json.loads(report.to_json())["notes"][0] == SAID
    shown = str(report)
    assert " ".join(shown.split("Neuronscope ·")[0].split()) == f"!! {SAID}"
    assert shown.count("internal error") == 1
    for markdown in (report.to_markdown(), diagnosis(report)):
        first = markdown.splitlines()[0]
        assert first.startswith("**Neuronscope stopped watching at step 2 because of an internal error")
        assert first.endswith("ours**")
        assert "<b>" not in markdown
        assert markdown.count("internal error") == 1
    page = report.to_html()
    body = re.sub(r"<[^>]+>", "", page.partition("<main>")[2]).strip()
    assert body.splitlines()[0] == SAID.replace("<", "&lt;").replace(">", "&gt;")
    assert page.count("internal error") == 1
    assert summary(report).startswith(SAID)
    assert scope.report("val").notes[0] == SAID


def test_the_line_on_a_fault_comes_before_other_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with ns.watch(net) as scope:
        net(torch.full((2, 3), float("nan")))
        scope.step()
        scope.retire(ValueError("no"))
    report = scope.report()
    assert report.notes[0].startswith("Neuronscope stopped watching at step 1")
    assert str(report).index("stopped watching") < str(report).index("NOT FINITE")
    page = report.to_html()
    assert page.index("stopped watching") < page.index("NOT FINITE")


def test_without_a_fault_there_is_no_line_on_it() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with ns.watch(net) as scope:
        net(torch.ones(2, 3))
        scope.step()
        scope.retire()
    report = scope.report()
    assert report.fault == ""
    assert report.other_notes == report.notes
    assert "fault" not in scope.state_dict()


def test_only_the_first_fault_is_reported() -> None:
    scope = ns.watch(nn.ReLU())
    scope.retire(ValueError("first"))
    scope.step()
    scope.retire(ValueError("second"))
    assert scope.report().fault.endswith(
        "at step 0 because of an internal error; later steps are not counted. ValueError: first"
    )


def test_loaded_counts_keep_the_line_on_their_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ended("end", monkeypatch).state_dict()
    state = json.loads(json.dumps(state["fault"])), state
    saved = {**state[1], "fault": state[0]}
    earlier = SAID.replace("later steps are", "later steps of that run are")
    later = ns.watch(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)))
    later.load_state_dict(saved)
    assert not later.detached
    assert later.report().notes[0] == earlier
    report = recorded_report(saved)
    assert report is not None
    assert report.notes[0] == earlier
    later.retire(ValueError("another"))  # a fault of this run is nearer
    assert "ValueError: another" in later.report().notes[0]
    later.detach()


@pytest.mark.parametrize("state", ["no", {"step": 1}, [1]])
def test_an_invalid_fault_in_a_state_raises_a_clear_error(state: Any) -> None:
    with pytest.raises(StateError, match="saved state of a fault"):
        Fault.from_state(state)
