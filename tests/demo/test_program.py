"""What the demo leaves behind: its table, its files, its TensorBoard logs; and what it leaves alone."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from neuronscope.demo.digits import Digits
from neuronscope.demo.program import run_demo
from neuronscope.demo.recipe import QUICK, VARIANTS
from neuronscope.demo.tensorboard_logs import remove_earlier_logs
from neuronscope.errors import UsageError

from .conftest import MINIATURE, Shown

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_the_demo_writes_all_its_files(shown: Shown) -> None:
    assert sorted(path.name for path in shown.out.iterdir()) == [
        "comparison.png",
        "report-ReLU.html",
        "results.json",
        "tensorboard",
    ]
    with Image.open(shown.out / "comparison.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1:] == (1200, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # something is drawn
    html = (shown.out / "report-ReLU.html").read_text(encoding="utf-8")
    assert "linear1/relu" in html
    assert "linear4/relu" in html


def test_the_json_file_holds_the_measured_numbers(shown: Shown) -> None:
    plain = json.loads((shown.out / "results.json").read_text(encoding="utf-8"))
    assert plain["seeds"] == [0, 1]
    assert [(run["variant"], run["seed"]) for run in plain["runs"]] == [
        (name, seed) for name in QUICK for seed in (0, 1)
    ]
    for name in QUICK:
        dead = [sum(run.end.dead) for run in shown.result.of(name)]
        summary = plain["summary"][name]["dead_at_end"]
        assert summary["mean"] == pytest.approx(np.mean(dead))
        assert summary["deviation"] == pytest.approx(np.std(dead, ddof=1))
        assert sum(plain["summary"][name]["dead_at_end_by_layer"]) == pytest.approx(np.mean(dead))
    assert plain["recipe"]["spike_epochs"] == [3, 3]


def test_the_table_and_the_sentences_show_the_same_numbers(shown: Shown) -> None:
    end = shown.result.spread("ReLU", "dead_at_end")
    said = f"{end.mean:.1f} ± {end.deviation:.1f}"
    row = next(line for line in shown.text.splitlines() if line.startswith("ReLU  "))
    assert said in row
    text = " ".join(shown.text.split())
    assert f"ReLU ends with {said} of 256 neurons dead" in text
    assert "finds the same dead neurons in 6 of 6 runs" in text
    assert "…" not in row  # no number is cut off at 120 columns


def test_the_output_ends_with_the_command_that_starts_tensorboard(shown: Shown) -> None:
    last = shown.text.strip().splitlines()[-1]
    assert last.endswith(f"tensorboard --logdir '{shown.out / 'tensorboard'}'")  # quoted, for the space in it
    assert "100%" in shown.text  # the progress bar came to its end


def test_each_variant_is_a_tensorboard_run_and_all_share_their_tags(shown: Shown) -> None:
    scalars = {}
    for name in QUICK:
        log = event_accumulator.EventAccumulator(str(shown.out / "tensorboard" / name)).Reload()
        scalars[name] = set(log.Tags()["scalars"])
        mean = log.Scalars("mean_of_2_seeds/dead_pct")
        assert [event.step for event in mean] == [0, 45, 90, 135, 180, 225]
        counts = [[sum(scan.dead) for scan in run.scans] for run in shown.result.of(name)]
        assert [event.value for event in mean] == pytest.approx(
            (np.mean(counts, axis=0) * 100 / 256).tolist(), abs=1e-4
        )
        watched = log.Scalars("neuronscope/dead_pct")
        first = next(run for run in shown.result.of(name) if run.seed == 0)
        assert [event.value for event in watched] == pytest.approx(
            [100 * sum(epoch.dead) / 256 for epoch in first.epochs], abs=1e-4
        )
        drawn = event_accumulator.EventAccumulator(str(shown.out / "tensorboard" / name / "neuronscope")).Reload()
        assert "neuronscope/overview" in drawn.Tags()["images"]
    assert scalars["ReLU"] == scalars["GELU"] == scalars["SiLU"]
    assert "neuronscope.dead_pct/layer4" in scalars["ReLU"]


def test_a_second_demo_in_processes_replaces_the_first_and_touches_nothing_else(
    digits: Digits, tmp_path: Path, shown: Shown
) -> None:
    mine = [tmp_path / "thesis.txt", tmp_path / "tensorboard" / "ReLU" / "notes.txt"]
    other = tmp_path / "tensorboard" / "my-run" / "events.out.tfevents.1.me"
    for path in (*mine, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    earlier = [
        tmp_path / "tensorboard" / name / "events.out.tfevents.1.then" for name in ("ReLU", "Tanh", "Tanh/neuronscope")
    ]
    for path in earlier:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("earlier")
    text = io.StringIO()
    result = run_demo(tmp_path, 1, quick=True, recipe=MINIATURE, console=Console(file=text, width=120), processes=2)
    assert all(path.read_text() == "mine" for path in (*mine, other))
    assert not any(path.exists() for path in earlier)
    assert not (tmp_path / "tensorboard" / "Tanh").exists()  # an empty folder would be an empty run
    for folder in ("ReLU", "ReLU/neuronscope"):
        assert len(list((tmp_path / "tensorboard" / folder).glob("events.*"))) == 1
    assert re.search(r"Replacing the logs of an earlier demo .*\(3 files\)", " ".join(text.getvalue().split()))
    assert "±" not in text.getvalue()  # one seed has no deviation
    # What other processes trained is what this one does.
    same = [run for run in shown.result.runs if run.seed == 0]
    assert [replace(run, seconds=0) for run in result.runs] == [replace(run, seconds=0) for run in same]


def test_removing_logs_where_there_are_none_is_harmless(tmp_path: Path) -> None:
    assert remove_earlier_logs(tmp_path / "nowhere", [variant.name for variant in VARIANTS]) == 0


def test_a_folder_that_cannot_be_made_is_reported_before_any_training(digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Expected a folder that can be written to"):
        run_demo(tmp_path / "file" / "out", 1, quick=True)


def test_zero_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1, but got 0"):
        run_demo(tmp_path, 0)
