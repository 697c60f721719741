"""Dead neurons of a box in a post-mortem: proved, woken by an input that is stored, or open; the command's options."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.model.examine_model import Examination, examine_model
from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.combine import combine_evidence
from neuronscope.checkpoints.verdict.evidence import Evidence
from neuronscope.checkpoints.verdict.join_units import join_units
from neuronscope.checkpoints.verdict.waking_inputs import neurons_to_wake, note_woken, places_of_sites
from neuronscope.checkpoints.writers.neuron_map import pack, worst_first
from neuronscope.errors import UsageError

#: No test here is decided by the clock.
LONG = 600.0
THEIRS = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 1))

def batches():
    return [torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4 for _ in range(2)]
"""


def network() -> nn.Sequential:
    """On data near 1/2, and with inputs in [0, 1], neuron 0 is dead by a bound, 1 to 3 fire in corners of the box.

    Of the second layer, neuron 0 fires, and 1 never does: relu(x) − relu(x) − 0.01, which no bound of ours proves.
    """
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[3] = -1.0
        model[0].bias.copy_(torch.tensor([-4.5, -3.9, -3.5, 0.2, -1.9, -1.9]))
        model[2].weight.zero_()[:, 4:] = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        model[2].bias.copy_(torch.tensor([0.0, -0.01]))
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and a module of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(THEIRS)
    torch.save(network().state_dict(), tmp_path / "net.pt")
    return tmp_path


def data() -> torch.Tensor:
    return torch.rand(400, 4, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4


def postmortem(wake_seconds: float | None = LONG, **options: Any) -> PostmortemReport:
    return ns.postmortem("net.pt", network, data().split(100), box=(0.0, 1.0), wake_seconds=wake_seconds, **options)


def test_each_dead_neuron_is_proved_woken_or_open_and_the_counts_add_up(folder: Path) -> None:
    report = postmortem()
    assert report.dead == 5
    assert report.in_box == (5, 1, 3, 1)
    assert [layer.in_box for layer in report.layers] == [(4, 1, 3, 0), (1, 0, 0, 1), (0, 0, 0, 0)]
    assert (report["0"].woken >= 0).tolist() == [False, True, True, True, False, False]
    assert not report.notes
    sentence = "Of 5 dead neurons: 1 proved dead for every input of the box, 3 woken by an input of the box, 1 open."
    line = "0, neurons 1, 2, 3: by 2 inputs, stored in the JSON report"
    for text in (str(report), report.to_markdown(), report.to_html()):
        plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
        assert sentence in plain
        assert line in plain
    assert re.search(r"^0 +6 +4 +67 % +1 proved, 3 measured +3 ", str(report), re.MULTILINE)
    assert re.search(
        r"^\| `0` +\| +6 \| +4 \| +67 % \| 1 proved, 3 measured \| +3 \|", report.to_markdown(), re.MULTILINE
    )
    marks = zlib.decompress(base64.b64decode(pack(report.layers[0], 1 << 30).data))[10 * 6 : 11 * 6]
    woken = report["0"].woken
    assert woken is not None
    assert list(marks) == [2 * int(woken[neuron] >= 0) for neuron in worst_first(report.layers[0])]


def test_a_woken_neuron_stays_dead_on_the_data(folder: Path) -> None:
    for report in (postmortem(), postmortem(wake_seconds=0.0)):
        verdicts = {(one.site, one.neuron): one for one in report.verdicts()}
        assert (verdicts["0", 1].label, verdicts["0", 1].basis) == ("dead", "measured")
        assert not report.contested
    assert verdicts["0", 1].woken_by is None
    verdicts = {(one.site, one.neuron): one for one in postmortem().verdicts()}
    assert verdicts["0", 1].woken_by == postmortem()["0"].woken[1]
    assert verdicts["0", 0].woken_by is None


def test_without_a_search_nothing_is_said_of_the_box(folder: Path) -> None:
    reports = [postmortem(wake_seconds=0.0), ns.postmortem("net.pt", network, data().split(100))]
    for report in reports:
        assert report.in_box is None
        assert json.loads(report.to_json())["summary"]["in_box"] is None
        assert "woken by" not in str(report)


def test_the_json_report_holds_inputs_that_can_be_replayed(folder: Path) -> None:
    plain = json.loads(postmortem().to_json())
    assert plain["summary"]["in_box"] == {"dead": 5, "proved": 1, "woken": 3, "open": 1}
    (layer,) = [one for one in plain["layers"] if one["name"] == "0"]
    assert layer["woken"]["neuron"] == [1, 2, 3]
    for neuron, index in zip(layer["woken"]["neuron"], layer["woken"]["input"], strict=True):
        (tensor,) = plain["waking_inputs"][index]["tensors"]
        assert (tensor["name"], tensor["dtype"], tensor["shape"]) == ("0", "float32", [1, 4])
        numbers = np.frombuffer(base64.b64decode(tensor["base64"]), tensor["dtype"]).reshape(tensor["shape"])
        with torch.no_grad():
            assert float(network()[:2](torch.tensor(numbers))[0, neuron]) > 0


def test_large_inputs_are_stored_beside_the_json_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    postmortem().to_json("small.json")
    assert not Path("small-inputs.npz").exists()
    monkeypatch.setattr("neuronscope.checkpoints.verdict.waking_inputs._MOST_BYTES", 16)
    report = postmortem()
    assert len(report.waking_inputs) == 2
    report.to_json("large.json")
    plain = json.loads(Path("large.json").read_text())
    assert [one["tensors"][0]["base64"] for one in plain["waking_inputs"]] == [None, None]
    index = plain["layers"][0]["woken"]["input"][0]
    with np.load("large-inputs.npz") as stored, torch.no_grad():
        assert sorted(stored) == ["0.0", "1.0"]
        assert float(network()[:2](torch.from_numpy(stored[f"{index}.0"]))[0, 1]) > 0


def test_a_neuron_without_gradient_is_woken_without_any_data(folder: Path) -> None:
    """Adam's state of a neuron that never got a gradient; the model alone shows which input makes it fire."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for _ in range(250):
        model(data()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, "adam.pt")
    report = ns.postmortem("adam.pt", network, box=(0.0, 1.0), wake_seconds=LONG)
    assert report["0"].in_box == (4, 1, 3, 0)


def test_a_search_that_ran_out_of_time_or_was_not_possible_is_reported(
    folder: Path,
) -> None:
    short = postmortem(wake_seconds=1e-9)
    assert short.in_box == (5, 1, 0, 4)
    (reason,) = [one.reason for one in short.abstentions if one.source == "wake search"]
    assert "still being tried for 4 neurons" in reason
    endless = ns.postmortem("net.pt", network, data().split(100), box=(0.0, float("inf")), wake_seconds=LONG)
    assert endless.in_box is None
    (reason,) = [one.reason for one in endless.abstentions if one.source == "wake search"]
    assert "the box is not finite" in reason


def test_a_wrong_proof_that_an_input_refutes_is_called_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, **options: Any) -> Examination:
        found = examine_model(model, **options)
        claims = [
            replace(one, neurons=np.array([0, 1]), numbers=np.zeros(2)) if one.claim == "dead" else one
            for one in found.evidence
        ]
        return found._replace(evidence=tuple(claims))

    monkeypatch.setattr("neuronscope.checkpoints.run.examine_model", wrong)
    report = postmortem()
    (note,) = report.notes
    assert note.startswith("FAULT OF NEURONSCOPE: interval bound called 1 neuron of 0/relu proved dead")
    assert "(first 1, by waking input " in note


@pytest.mark.parametrize("found_at_b", [0, -1])
def test_a_unit_of_two_sites_is_woken_if_it_is_woken_at_both(found_at_b: int) -> None:
    sites = [
        SimpleNamespace(
            name=name, kind="relu-like", neurons=2, units=(("g", 0, 2, 1),), in_headlines=True, normalises=""
        )
        for name in ("g/a", "g/b")
    ]
    dead = Evidence("g/a", 2, "scan", "dead", "measured", np.array([0]), np.zeros(1), "", "Silent.", site="g/a")
    evidence, joined = join_units([dead], sites, {"g": 2})
    layers, places = combine_evidence(evidence), places_of_sites(sites, joined)
    targets = neurons_to_wake(layers, places, {"g/a": 2, "g/b": 2})
    assert {name: mask.tolist() for name, mask in targets.items()} == {"g/a": [True, False], "g/b": [True, False]}
    found = {"g/a": np.array([3, 3]), "g/b": np.array([found_at_b, 3])}
    assert note_woken(layers, places, found)[0].woken.tolist() == [3 if found_at_b == 0 else -1, -1]


def test_the_command_searches_the_box_and_stores_the_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "postmortem net.pt --model theirs:network --data theirs:batches --box 0 1 --wake 600 --seed 7 --json"
    assert cli.main([*line.split(), "a.json"]) == 0
    assert "3 woken by an input of the box, 1 open." in " ".join(capsys.readouterr().out.split())
    assert cli.main([*line.split(), "b.json"]) == 0
    first, again = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert first == again
    assert first["waking_inputs"]


def test_the_command_can_leave_the_search_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "postmortem net.pt --model theirs:network --data theirs:batches --box 0 1 --wake 0"
    assert cli.main(line.split()) == 0
    assert "woken" not in capsys.readouterr().out


@pytest.mark.parametrize("options", ["--wake -1", "--wake soon", "--wake inf", "--seed x"])
def test_wrong_options_of_the_search_end_with_exit_code_2(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["postmortem", "net.pt", *options.split()])
    assert ended.value.code == 2
    assert options.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"wake_seconds": -1.0}, {"wake_seconds": "1"}, {"seed": 1.5}, {"seed": -1}])
def test_wrong_arguments_of_the_search_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"Expected argument `{next(iter(options))}` to be"):
        postmortem(**options)


def test_a_search_needs_a_box(folder: Path) -> None:
    with pytest.raises(UsageError, match="Expected argument `box` with `wake_seconds`"):
        ns.postmortem("net.pt", network, wake_seconds=3.0)
