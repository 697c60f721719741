"""A post-mortem is read back from its JSON as it was; a damaged one is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neuronscope as ns
from neuronscope.cli import main
from neuronscope.errors import ReportError

from . import samples

SAMPLES: dict[str, Callable[[], ns.PostmortemReport]] = {
    "alone": samples.alone,
    "with model": samples.with_model,
    "with data": samples.with_data,
    "several": samples.several,
    "idle": samples.idle,
    "broken": samples.broken,
    "empty": samples.empty,
    "hostile": samples.hostile,
}


def awake() -> ns.PostmortemReport:
    """A post-mortem with two inputs, of which one wakes neurons of the first layer."""
    report = samples.with_data()
    first, *others = report.layers
    woken = np.full(first.neurons, -1)
    woken[np.flatnonzero(first.dead_mask)[:2]] = 1
    inputs = tuple({"0": np.full((1, 3), at, np.float32), "mask.1": np.array([True, False])} for at in (0.5, 2.0))
    return replace(report, layers=(replace(first, woken=woken), *others), waking_inputs=inputs)


def shown(report: ns.PostmortemReport) -> list[str]:
    return [report.to_text(), report.to_markdown(), report.to_html(), report.to_json()]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_reads_back_and_shows_the_same(name: str, tmp_path: Path) -> None:
    report = SAMPLES[name]()
    report.to_json(tmp_path / "one.json")
    assert shown(ns.read_postmortem(tmp_path / "one.json")) == shown(report)


def test_inputs_that_wake_neurons_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = awake()
    for most in (2**20, 8):
        monkeypatch.setattr("neuronscope.checkpoints.verdict.waking_inputs._MOST_BYTES", most)
        report.to_json(tmp_path / "one.json")
        again = ns.read_postmortem(tmp_path / "one.json")
        assert shown(again) == shown(report)
        assert [[*one] for one in again.waking_inputs] == [["0", "mask.1"]] * 2
        for one, other in zip(again.waking_inputs, report.waking_inputs, strict=True):
            for name in other:
                assert one[name].dtype == other[name].dtype
                np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("state", ["missing", "another report's", "damaged"])
def test_without_the_file_of_its_inputs_a_post_mortem_says_so(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuronscope.checkpoints.verdict.waking_inputs._MOST_BYTES", 8)
    awake().to_json(tmp_path / "one.json")
    beside = tmp_path / "one-inputs.npz"
    if state == "damaged":
        beside.write_bytes(beside.read_bytes()[:200])
    else:
        beside.unlink()
        if state != "missing":
            np.savez(beside, **{f"{index}.{name}": np.zeros(2) for index in (0, 1) for name in ("0", "mask.1")})
    again = ns.read_postmortem(tmp_path / "one.json")
    assert again.waking_inputs == ()
    assert "The inputs that wake neurons are not shown: one-inputs.npz" in again.notes[-1]
    assert again.notes[-1] in again.to_html()
    assert again.in_box == awake().in_box


def without_a_verdict(plain: dict[str, Any]) -> None:
    plain["layers"][0]["verdicts"]["label"][0] = "alive"


def other_total(plain: dict[str, Any]) -> None:
    plain["summary"]["dead"] += 1


def huge(plain: dict[str, Any]) -> None:
    plain["layers"][0]["neurons"] = 2**40


def twice(plain: dict[str, Any]) -> None:
    plain["layers"].append(plain["layers"][0])


def falling(plain: dict[str, Any]) -> None:
    plain["layers"][0]["evidence"][0]["neuron"] = [3, 1]


def no_layers(plain: dict[str, Any]) -> None:
    del plain["layers"]


def outside(plain: dict[str, Any]) -> None:
    plain["layers"][0]["woken"]["neuron"] = [10**9, 0]


def not_base64(plain: dict[str, Any]) -> None:
    plain["waking_inputs"][0]["tensors"][0]["base64"] = "?"


def objects(plain: dict[str, Any]) -> None:
    plain["waking_inputs"][0]["tensors"][0]["dtype"] = "object"


@pytest.mark.parametrize(
    "damage", [without_a_verdict, other_total, huge, twice, falling, no_layers, outside, not_base64, objects]
)
def test_a_damaged_post_mortem_is_refused(damage: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    plain = awake().to_dict()
    damage(plain)
    (tmp_path / "one.json").write_text(json.dumps(plain))
    with pytest.raises(ReportError, match=r"one\.json is damaged"):
        ns.read_postmortem(tmp_path / "one.json")


def test_a_field_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Every field of the top, of a layer, of its evidence and of the timeline."""
    plain = json.loads(samples.several().to_json())
    layer = next(one for one in plain["layers"] if one["evidence"])
    for place in (plain, layer, layer["evidence"][0], plain["timeline"], plain["timeline"]["layers"][0]):
        for name in list(place):
            value = place.pop(name)
            (tmp_path / "one.json").write_text(json.dumps(plain))
            with pytest.raises(ReportError):
                ns.read_postmortem(tmp_path / "one.json")
            place[name] = value
    (tmp_path / "one.json").write_text(json.dumps(plain))
    assert ns.read_postmortem(tmp_path / "one.json").to_dict() == plain


def test_each_reader_refuses_the_other_kind_and_another_version(tmp_path: Path) -> None:
    samples.alone().to_json(tmp_path / "one.json")
    with pytest.raises(ReportError, match="read_postmortem"):
        ns.read_report(tmp_path / "one.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ReportError, match="Expected a post-mortem"):
        ns.read_postmortem(tmp_path / "other.json")
    (tmp_path / "old.json").write_text(json.dumps({**samples.alone().to_dict(), "schema_version": 1}))
    with pytest.raises(ReportError, match="an older version"):
        ns.read_postmortem(tmp_path / "old.json")


def test_the_command_shows_a_saved_post_mortem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = samples.several()
    report.to_json(tmp_path / "one.json")
    assert main(["report", str(tmp_path / "one.json"), "--html", str(tmp_path / "one.html")]) == 0
    assert capsys.readouterr().out.strip() == str(report).strip()
    assert (tmp_path / "one.html").read_text(encoding="utf-8") == report.to_html()
    assert main(["report", str(tmp_path / "one.json"), "--quiet", "--fail-above", "1"]) == 1


def test_reading_loads_no_torch(tmp_path: Path) -> None:
    samples.alone().to_json(tmp_path / "one.json")
    code = "import sys, neuronscope as ns; ns.read_postmortem(sys.argv[1]).to_html(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "one.json")], check=True)
