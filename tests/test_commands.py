"""``neuronscope report``, ``diff`` and ``scan``: what they print and write, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.report.comparison import compare_reports
from neuronscope.report.report import Report
from tests.writers import sample_reports as samples

THEIRS = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
net[0].bias.data[:2] = -100.0

def network(): return net
class Net(nn.Sequential):
    def __init__(self): super().__init__(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
def batches(): return [torch.rand(200, 4), torch.rand(200, 4)]
def few(): return [torch.rand(5, 4)]
def wide(): return [torch.rand(200, 9)]
def nan(): return [torch.full((300, 4), float("nan"))]
def nothing(): return []
def number(): return 7
def leave(): raise SystemExit(0)
def loss(output, batch): return output.pow(2).mean()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the user's module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(THEIRS)
    return tmp_path


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = cli.main(arguments.split())
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_saved_report_is_shown_and_written_as_the_report_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = samples.mixed()
    report.to_json("r.json")
    code, out, err = run("report r.json --html r.html --markdown r.md --json again.json", capsys)
    assert (code, out, err) == (0, f"{report}\n", "")
    assert Path("r.html").read_text() == report.to_html()
    assert Path("r.md").read_text() == report.to_markdown()
    assert Path("again.json").read_bytes() == Path("r.json").read_bytes()


def test_top_and_quiet_change_what_is_printed_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples.many().to_json("r.json")
    assert run("report r.json --top 1", capsys)[1] == f"{samples.many().to_text(1)}\n"
    assert run("report r.json --quiet --html r.html", capsys) == (0, "", "")
    assert Path("r.html").is_file()
    assert run("report r.json --top 0", capsys)[0] == 2
    # 3 of 1,920 neurons are dead.
    code, out, err = run("report r.json --quiet --fail-above 0.1", capsys)
    assert (code, out) == (1, "")
    assert err.startswith("neuronscope: failed: 3 of 1,920 neurons (0.1562 %) are dead")


@pytest.mark.parametrize(
    ("make", "limit", "code", "said"),
    [
        (samples.healthy, 0, 0, ""),
        (samples.mixed, 4, 0, ""),  # 40 of 1,040
        (samples.mixed, 3.8, 1, "more than 3.8 %"),
        (samples.broken, 100, 1, "24 neurons are NaN or infinite"),
        (samples.unwatched, 100, 2, "no layer was examined"),
        (lambda: samples.report(samples.site("a/relu", 9, samples.Fate(born=9))), 100, 1, "layer a/relu collapsed"),
    ],
)
def test_the_exit_code_is_1_only_if_the_check_failed(
    make: Any, limit: float, code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().to_json("r.json")
    got, _, err = run(f"report r.json --quiet --fail-above {limit}", capsys)
    assert got == code
    assert said in err
    assert err.count("\n") == (code > 0)


def test_a_provisional_report_that_fails_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = samples.report(samples.site("a/relu", 9, samples.Fate(born=3), examples=5))
    replace(report, window=replace(report.window, long_enough=False)).to_json("r.json")
    code, _, err = run("report r.json --quiet --fail-above 1", capsys)
    assert code == 1
    assert "(provisional: from 5 of 299 examples)" in err


@pytest.mark.parametrize("command", ["report {}", "diff {} good.json", "diff good.json {}"])
@pytest.mark.parametrize("content", [None, "", "{}", '{"a": 1}'])
def test_a_file_that_is_no_report_ends_with_2_and_one_line(
    command: str, content: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples.healthy().to_json("good.json")
    if content is not None:
        Path("bad.json").write_text(content)
    code, out, err = run(command.format("bad.json"), capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "bad.json" in err


def test_reading_reports_loads_no_torch(folder: Path) -> None:
    samples.mixed().to_json("a.json")
    code = (
        "import sys; from neuronscope.cli import main\n"
        "for line in ('report a.json --html a.html', 'diff a.json a.json'): main([*line.split(), '--quiet'])\n"
        "print('torch' in sys.modules)"
    )
    root = str(Path(ns.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    assert done.stdout.strip() == "False"


class Gates(nn.Module):
    """Unit i fires exactly where input i is positive."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(units, units, bias=False), nn.Linear(units, 1)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.fc(x)))


def scanned(dead: list[int], units: int = 8, value: float = 1.0) -> Report:
    x = torch.full((300, units), value)
    x[:, dead] = -1.0
    return ns.scan(Gates(units), [x])


def test_who_died_and_who_revived_is_told_neuron_by_neuron() -> None:
    found = compare_reports(scanned([0, 1, 2]), scanned([2, 3, 4, 5, 6]))
    (layer,) = found.layers
    assert layer.died.tolist() == [3, 4, 5, 6]
    assert layer.revived.tolist() == [0, 1]
    assert (found.died, found.revived, layer.dead_before, layer.dead_after) == (4, 2, 3, 5)
    text = str(found)
    assert "4 neurons died between the two, 2 revived." in text
    assert "3, 4, 5, 6" in text
    json.loads(found.to_json())


def test_a_neuron_that_was_not_seen_or_gave_nan_neither_died_nor_revived() -> None:
    dead, broken = scanned([0, 1]), scanned([], value=float("nan"))
    for found in (compare_reports(dead, broken), compare_reports(broken, dead)):
        assert (found.died, found.revived) == (0, 0)
    found = compare_reports(dead, broken)
    assert found.layers[0].broken == 8
    assert "NOT FINITE: 8 neurons more" in str(found)


def test_each_neuron_counts_once_in_the_totals_of_a_comparison() -> None:
    class Twice(Gates):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.fc(x)
            return self.out(torch.relu(h) + torch.relu(-h).clamp(max=0.0))

    def twice(dead: list[int]) -> Report:
        x = torch.ones(300, 8)
        x[:, dead] = 0.0
        return ns.scan(Twice(8), [x])

    before, after = twice([]), twice([1, 2])
    found = compare_reports(before, after)
    assert found.died == after.dead - before.dead
    # relu(-h) never fires: by their most serious label all are dead before and after, though some died at relu(h).
    assert [layer.died.size for layer in found.layers] == [2, 0]
    assert compare_reports(scanned([0]), scanned([1, 2])).died == 2


def test_layers_that_cannot_be_compared_are_listed_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = samples.report(samples.site("a/relu", 9), samples.site("b/relu", 9), samples.site("c/relu", 9))
    other = samples.report(samples.site("a/relu", 12), samples.site("b/relu", 9), samples.site("d/relu", 9))
    one.to_json("one.json")
    other.to_json("other.json")
    code, out, _ = run("diff one.json other.json", capsys)
    assert code == 0
    assert "a/relu: it had 9 neurons and has 12" in out
    assert "d/relu: only the second report has it" in out
    assert "c/relu: only the first report has it" in out
    samples.report(samples.site("z/relu", 9)).to_json("strange.json")
    code, _, err = run("diff one.json strange.json", capsys)
    assert code == 2
    assert "no layer of one name and width in common" in err


def test_a_diff_in_which_too_many_died_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scanned([0]).to_json("a.json")
    scanned([0, 1, 2]).to_json("b.json")
    scanned([], value=float("nan")).to_json("nan.json")
    for files, limit, code in (("a b", 25, 0), ("a b", 24.9, 1), ("b a", 0, 0), ("a nan", 100, 1), ("nan a", 0, 2)):
        before, after = files.split()
        got, out, _ = run(f"diff {before}.json {after}.json --fail-above {limit} --quiet", capsys)
        assert (got, out) == (code, ""), files
    assert "no neuron was observed in both" in run("diff nan.json a.json --fail-above 9 --quiet", capsys)[2]
    assert run("diff a.json b.json --json d.json --html d.html", capsys)[0] == 0
    assert Path("d.html").read_text() == compare_reports(scanned([0]), scanned([0, 1, 2])).to_html()
    assert json.loads(Path("d.json").read_text())["died"] == 2


def test_a_diff_of_many_layers_shows_those_with_the_most_deaths() -> None:
    before = samples.report(*(samples.site(f"s{i:02}", 40) for i in range(30)))
    after = samples.report(*(samples.site(f"s{i:02}", 40, samples.Fate(died=i)) for i in range(30)))
    text = compare_reports(before, after).to_text(4)
    rows = [line[:3] for line in text.splitlines() if line[:1] == "s" and line[1:3].isdigit()]
    assert rows == ["s26", "s27", "s28", "s29"]
    assert "… 25 more layers with changes" in text
    assert "… 1 more layer without a change" in text
    assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("model", ["net", "network", "Net"])
def test_scan_runs_a_network_over_data(model: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(f"scan theirs:{model} --data theirs:batches --json s.json --html s.html", capsys)
    assert (code, err) == (0, "")
    saved = ns.read_report("s.json")
    assert saved.phase == "scan"
    assert saved.examples == 400
    assert f"{saved}\n" == out
    assert Path("s.html").read_text() == saved.to_html()
    if model != "Net":
        assert list(np.flatnonzero(saved["0/relu"].judgement.dead))[:2] == [0, 1]


def test_a_loss_adds_gradients_to_a_scan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, positions in (("", 0), ("--loss theirs:loss", 400)):
        assert run(f"scan theirs:net --data theirs:batches --json s.json --quiet {options}", capsys)[0] == 0
        assert ns.read_report("s.json")["0/relu"].gradient_positions == positions


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("theirs:net --data theirs:batches --fail-above 90", 0, ""),
        ("theirs:net --data theirs:batches --fail-above 10", 1, "4 of 8 neurons"),
        ("theirs:net --data theirs:few --fail-above 10", 1, "provisional: from 5 of 299"),
        ("theirs:net --data theirs:nan --fail-above 90", 1, "NaN"),
        ("theirs:net", 2, "--data"),
        ("theirs --data theirs:batches", 2, "package.module:name"),
        ("theirs:absent --data theirs:batches", 2, "absent"),
        ("nowhere:net --data theirs:batches", 2, "nowhere"),
        ("theirs:number --data theirs:batches", 2, "int"),
        ("theirs:leave --data theirs:batches", 2, "sys.exit"),
        ("theirs:net --data theirs:leave", 2, "sys.exit"),
        ("theirs:net --data theirs:nothing", 2, "at least one batch"),
        ("theirs:net --data theirs:number", 2, "int"),
        ("theirs:net --data theirs:wide", 2, "RuntimeError"),
        ("theirs:net --data theirs:batches --html no/such/folder.html", 2, "no/such/folder.html"),
        ("theirs:net --data theirs:batches --loss theirs:number", 2, "theirs:number"),
    ],
)
def test_scan_ends_with_the_right_exit_code_and_one_line(
    arguments: str, code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, _, err = run(f"scan {arguments} --quiet", capsys)
    assert got == code
    assert said in err
    assert "Traceback" not in err


def test_the_post_mortem_takes_top_and_quiet_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a.weight": torch.zeros(4, 3), "b.weight": torch.randn(2, 4)}, "c.pt")
    code, out, err = run("postmortem c.pt --quiet --json c.json", capsys)
    assert (code, out, err) == (0, "", "")
    assert Path("c.json").is_file()
    assert run("postmortem c.pt --top 1", capsys)[0] == 0
    code, out, err = run("report c.json", capsys)
    assert (code, err) == (0, "")
    assert "c.pt" in out
    code, _, err = run("diff c.json c.json", capsys)
    assert code == 2
    assert "post-mortem" in err
