"""``neuronscope postmortem`` and ``ns.postmortem``: real checkpoints, a user's own modules, mistakes and exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.data.measure import InputMoments
from neuronscope.errors import CheckpointError, UsageError

THEIRS = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def batches():
    return [(torch.rand(200, 4), torch.zeros(200, dtype=torch.long)) for _ in range(2)]

def once():
    yield from batches()

def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])

def broken_network():
    raise RuntimeError("no weights\\nfor you")

def broken_batches():
    raise OSError("the disk is gone")

def late_batches():
    yield from batches()
    raise ValueError("the second epoch is damaged")

def broken_loss(output, batch):
    raise KeyError("labels")

def nothing():
    return []

number = 7
"""


def network() -> nn.Sequential:
    """Neurons 0 and 1 of 8 stay below zero for every input in [0, 1]; 2 does too for inputs below 1/2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.fill_(0.5)
        model[0].bias[:2] = -9.0
        model[0].bias[2] = -0.75 * float(model[0].weight[2].sum())
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and a module of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(THEIRS)
    torch.save({"state_dict": network().state_dict(), "global_step": 42}, tmp_path / "last.ckpt")
    return tmp_path


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    code = cli.main(["postmortem", *line.split()])
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines()


def test_the_command_examines_a_file_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("last.ckpt", capsys)
    assert (code, err) == (0, [])
    assert out.startswith("Neuronscope post-mortem · last.ckpt · ")
    assert "42 optimizer steps" in out
    assert re.search(r"^0 +8 ", out, re.MULTILINE)  # a layer of which nothing is known is in the table all the same
    assert "Nothing is known of 8 (100 %)." in out


def test_the_command_proves_deaths_with_a_model_and_an_input_box(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("last.ckpt --model theirs:network --box 0 1 --json a.json", capsys)
    assert (code, err) == (0, [])
    plain = json.loads((folder / "a.json").read_text())
    assert plain["level"] == "model"
    assert plain["model"] == "Sequential"
    verdicts = {layer["name"]: layer["verdicts"] for layer in plain["layers"]}
    assert verdicts["0"]["neuron"] == [0, 1]
    assert set(verdicts["0"]["basis"]) == {"proved"}
    assert "2 proved" in out


@pytest.mark.parametrize("data", ["batches", "once"])
def test_the_command_measures_with_data_and_a_loss(folder: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"last.ckpt --model theirs:network --data theirs:{data} --loss theirs:loss --box 0 1 --json a.json"
    assert run(line, capsys)[0] == 0
    plain = json.loads((folder / "a.json").read_text())
    assert plain["level"] == "data"
    site = next(layer for layer in plain["layers"] if layer["name"] == "0")
    measured = [one for one in site["evidence"] if one["basis"] == "measured" and one["claim"] == "dead"]
    assert measured[0]["neuron"] == [0, 1]
    assert "over 400 examples" in measured[0]["text"]  # the batch that the model was traced with is counted too
    assert plain["confirmations"] == [
        {"source": "interval bound", "claim": "dead", "basis": "proved", "held": 2, "refuted": 0, "untested": 0}
    ]


def test_the_command_writes_every_requested_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run("last.ckpt --html a.html --json a.json --markdown a.md", capsys)
    assert code == 0
    assert (folder / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (folder / "a.md").read_text(encoding="utf-8").startswith("## Neuronscope post-mortem: last.ckpt")
    assert json.loads((folder / "a.json").read_text())["schema_version"] == 2


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        # Of 8 hidden neurons 2 are proved dead: 25 %. The 3 outputs are no neurons.
        ("0", 1),
        ("24.9", 1),
        ("25", 0),
        ("100", 0),
    ],
)
def test_the_exit_code_is_1_when_more_neurons_are_dead_than_allowed(
    folder: Path, limit: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, out, err = run(f"last.ckpt --model theirs:network --box 0 1 --fail-above {limit}", capsys)
    assert ended == code
    assert "2 of 8 neurons" in out
    wanted = f"neuronscope: failed: 2 of 8 neurons (25 %) are dead, more than {limit} %."
    assert err == ([wanted] if code else [])


def test_suspected_neurons_do_not_count_for_the_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    with torch.no_grad():
        model[1].bias.fill_(-5.0)  # five standard deviations below zero: suspected
    torch.save(model.state_dict(), "norm.pt")
    (folder / "normed.py").write_text(
        "from torch import nn\n\n"
        "def network():\n    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())\n"
    )
    report = ns.postmortem("norm.pt", "normed:network")
    assert (report["1"].dead, report["1"].suspected + report["1"].count("quiet")) == (0, 8)
    assert run("norm.pt --model normed:network --fail-above 0", capsys)[0] == 0


def test_weights_that_are_not_finite_fail_the_check_at_every_limit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = network()
    with torch.no_grad():
        broken[0].weight[3, 1] = float("nan")
    torch.save(broken.state_dict(), "nan.pt")
    code, out, err = run("nan.pt --fail-above 100", capsys)
    assert code == 1
    assert err == ["neuronscope: failed: 1 neurons are NaN or infinite; 0 of 8 neurons (0 %) are dead."]
    assert "!! NOT FINITE" in out
    assert run("nan.pt", capsys)[0] == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nowhere.ckpt", ["nowhere.ckpt"]),
        ("theirs.py", ["theirs.py"]),
        ("last.ckpt --model theirs", ["`model`", "theirs"]),
        ("last.ckpt --model nowhere:network", ["nowhere"]),
        ("last.ckpt --model theirs:netwrk", ["netwrk"]),
        ("last.ckpt --model theirs:number", ["int"]),
        ("last.ckpt --model theirs:broken_network", ["RuntimeError", "no weights", "for you"]),
        ("last.ckpt --data theirs:batches", ["`model`", "`data`"]),
        ("last.ckpt --model theirs:network --loss theirs:loss", ["`data`", "`loss`"]),
        ("last.ckpt --box 0 1", ["`model`", "`box`"]),
        ("last.ckpt --model theirs:network --data theirs:number", ["`data`", "int"]),
        ("last.ckpt --model theirs:network --data theirs:nothing", ["`data`", "at least one batch"]),
        ("last.ckpt --model theirs:network --data theirs:broken_batches", ["OSError: the disk is gone"]),
        ("last.ckpt --model theirs:network --data theirs:late_batches", ["ValueError: the second epoch is damaged"]),
        (
            "last.ckpt --model theirs:network --data theirs:batches --loss theirs:broken_loss",
            ["KeyError: 'labels'"],
        ),
        ("last.ckpt --model theirs:network --data theirs:batches --loss theirs:number", ["`loss`", "int"]),
        ("last.ckpt --earlier nowhere.ckpt", ["nowhere.ckpt"]),
        ("last.ckpt --html nowhere/a.html", ["nowhere"]),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    folder: Path, line: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "")
    assert len(err) == 1
    assert err[0].startswith("neuronscope: ")
    for word in words:
        assert word in err[0]


@pytest.mark.parametrize("line", ["--debug postmortem nowhere.ckpt", "postmortem nowhere.ckpt --debug"])
def test_debug_shows_where_an_error_came_from(folder: Path, line: str) -> None:
    with pytest.raises(CheckpointError):
        cli.main(line.split())


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "CKPT"),
        ("last.ckpt --fail-above much", "percentage"),
        ("last.ckpt --fail-above 101", "percentage"),
        ("last.ckpt --fail-above nan", "percentage"),
        ("last.ckpt --box 0", "--box"),
        ("last.ckpt --box low high", "--box"),
    ],
)
def test_wrong_postmortem_arguments_end_with_exit_code_2_and_a_reason(
    line: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["postmortem", *line.split()])
    assert end.value.code == 2
    assert word in capsys.readouterr().err


def test_progress_bars_are_drawn_only_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", screen)
    assert cli.main(["postmortem", "last.ckpt", "--model", "theirs:network", "--data", "theirs:batches"]) == 0
    assert "reading" in screen.getvalue()
    assert "scanning" in screen.getvalue()
    assert "reading" not in capsys.readouterr().out


def test_progress_counts_each_tensor_and_batch_once(folder: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    ns.postmortem(
        "last.ckpt",
        network(),
        [torch.rand(9, 4)] * 3,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    reading = [one for one in seen if one[0] == "reading"]
    assert reading == [("reading", done, 4) for done in range(5)]  # two weights, two biases
    assert [one for one in seen if one[0] == "scanning"] == [("scanning", done, 3) for done in (1, 2, 3)]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal to send there")
def test_ctrl_c_ends_without_a_traceback(folder: Path) -> None:
    (folder / "slow.py").write_text("import time\ndef network():\n    print('here', flush=True)\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "neuronscope", "postmortem", "last.ckpt", "--model", "slow:network"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err == "neuronscope: interrupted\n"


def test_a_closed_output_pipe_is_not_an_error(folder: Path) -> None:
    """As in ``| head``: the pipe is closed before anything is printed; files are written all the same."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "neuronscope", "postmortem", "last.ckpt", "--json", "a.json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((folder / "a.json").read_text())["global_step"] == 42


# --- in Python -----------------------------------------------------------------------------------------------------


def test_ns_postmortem_is_the_function_even_after_imports_of_its_package(folder: Path) -> None:
    code = (
        "import neuronscope.checkpoints.verdict.evidence\nimport neuronscope as ns\n"
        "print(ns.postmortem('last.ckpt').global_step)\n"
        "import neuronscope.checkpoints.postmortem_report as r\nprint(r.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["42", "neuronscope.checkpoints.postmortem_report"]


def test_models_and_data_may_be_given_in_any_form(folder: Path) -> None:
    data = [torch.rand(50, 4), torch.rand(50, 4)]
    reports = [
        ns.postmortem("last.ckpt", model, batches, box=(0.0, 1.0))
        for model in (network(), network, "theirs:network")
        for batches in (data, iter(data), lambda: data, torch.cat(data))
    ]
    assert {report.dead for report in reports} == {reports[0].dead}
    assert {report["0"].dead_by_basis()["proved"] for report in reports} == {2}


def test_an_input_box_proves_more_than_no_box(folder: Path) -> None:
    small, large, none = (ns.postmortem("last.ckpt", network, box=box) for box in ((0.0, 0.5), (0.0, 1.0), None))
    # Neuron 2 has bias −0.75 Σw: below −0.25 Σw for inputs up to 1/2, up to 0.25 Σw for inputs up to 1.
    assert [report["0"].dead for report in (small, large, none)] == [3, 2, 0]


class ReadTwice(nn.Module):
    """The first layer's neurons are read by the second and by a head that no name ties to them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        self.head = nn.Linear(5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inner = self.net[:2](images)
        seen: torch.Tensor = self.net[2](inner) + self.head(inner)
        return seen


def test_unread_neurons_are_guessed_from_the_file_only_without_a_model(folder: Path) -> None:
    model = ReadTwice()
    with torch.no_grad():
        model.net[2].weight[:, [1, 3]] = 0  # type: ignore[index]
        model.head.weight[:, 3] = 0  # 1 is read by the head; 3 by nobody
        model.net[0].bias.fill_(9.0)  # type: ignore[union-attr,operator]
    torch.save(model.state_dict(), "twice.pt")
    alone, told = ns.postmortem("twice.pt"), ns.postmortem("twice.pt", ReadTwice)
    found = [
        (one.neuron, one.label, one.basis)
        for report in (alone, told)
        for one in report.verdicts()
        if one.site == "net.0"
    ]
    assert found == [(1, "unread", "suspected"), (3, "unread", "suspected"), (3, "unread", "proved")]


def train(model: nn.Module, images: torch.Tensor, steps: range, optimizer: torch.optim.Optimizer) -> None:
    for step in steps:
        if step == 200:  # the last gradient that neurons 0 to 4 ever get is that of step 199
            with torch.no_grad():
                model[0].bias[:5] = -50.0  # type: ignore[index, union-attr]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(images), images[:, :3]).backward()
        optimizer.step()


def test_the_checkpoint_of_an_unwatched_run_is_examined(folder: Path) -> None:
    torch.manual_seed(1)
    images = torch.rand(64, 4)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    nn.init.zeros_(model[0].bias)  # so that a neuron whose weights are all negative is dead, and looks initialised
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for name, steps in (("early.pt", range(180)), ("late.pt", range(180, 520))):
        train(model, images, steps, optimizer)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps.stop}, folder / name
        )
    # The twin: which neurons fire for no image.
    silent = np.flatnonzero((torch.relu(model[0](images)) == 0).all(dim=0).numpy())
    report = ns.postmortem("late.pt", earlier="early.pt")
    layer = report["0"]
    assert np.flatnonzero(layer.dead_mask).tolist() == silent.tolist()
    assert set(range(5)) <= set(silent.tolist())
    assert layer.is_clocked
    # The last gradient came at step 199; the clock gives the earliest step that it can have been.
    assert all(150 <= layer.since[neuron] <= 199 for neuron in range(5)), layer.since[:5]
    born = next(one for one in report.diagnoses if one.sign == "dead since the beginning")
    assert born.neurons == int((layer.since == -1).sum())
    tested = ns.postmortem("late.pt", model, [images] * 5)  # 320 examples: enough to call silence measured
    assert tested["0"].dead == silent.size
    assert tested["0"].dead_by_basis()["measured"] == silent.size
    clock = [one for one in tested.confirmations if one.source == "adam state"]
    assert (sum(one.held for one in clock), sum(one.refuted for one in clock)) == (silent.size, 0)


def test_input_that_is_not_centred_is_reported(folder: Path) -> None:
    images = torch.rand(300, 4) * 0.1 + 1.0  # mean 1.05, deviation 0.029: 36 times
    model = network()
    with torch.no_grad():
        model[0].bias.fill_(-90.0)
    torch.save(model.state_dict(), "offset.pt")
    report = ns.postmortem("offset.pt", network, images)
    assert "an input that is off centre" in [one.sign for one in report.diagnoses]


def test_input_moments_are_those_of_all_batches_together() -> None:
    moments = InputMoments()
    whole = torch.randn(100, 3, 5, dtype=torch.float64) + 2.0
    for batch in whole.split(30):
        moments.add((batch, None))
    moments.add({"x": torch.zeros(9, 4)})  # of another shape: left out
    moments.add(torch.zeros(9, 3, 5, dtype=torch.int64))  # no real numbers: left out
    expected = float(whole.mean(0).norm() / whole.std(0, correction=0).norm())
    assert moments.offset() == pytest.approx(expected, rel=1e-12)
    assert InputMoments().offset() is None


@pytest.mark.parametrize(("name", "needs"), [("data", "model"), ("box", "model"), ("example", "model")])
def test_options_that_need_a_model_say_so(folder: Path, name: str, needs: str) -> None:
    given: dict[str, Any] = {name: torch.rand(3, 4)}
    with pytest.raises(UsageError, match=f"Expected argument `{needs}` with `{name}`"):
        ns.postmortem("last.ckpt", **given)


def test_the_command_takes_an_optimizer_that_lies_apart_and_the_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, torch.rand(64, 4), range(199), optimizer)
    torch.save(model.state_dict(), "weights.pt")
    torch.save(optimizer.state_dict(), "optimizer.pt")
    ended, out, err = run("weights.pt --optimizer optimizer.pt --step 500", capsys)
    assert (ended, err) == (0, [])
    assert "500 optimizer steps" in out
    assert "adam state" in out
    assert run("weights.pt --optimizer weights.pt", capsys)[0] == 2
