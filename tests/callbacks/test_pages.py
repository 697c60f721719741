"""The page is in the folder of the logs, with what the training logged beside the deaths."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import neuronscope as ns
from neuronscope.callbacks import DeadNeuronMonitor, Monitor
from neuronscope.callbacks.transformers import DeadNeuronCallback
from neuronscope.errors import UsageError
from neuronscope.tally.series import MOST_POINTS, Series
from tests.callbacks import hugging
from tests.callbacks.networks import batches, network, trainer


def pages(folder: Path) -> dict[str, str]:
    """The pages below a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_lightning_leaves_a_page_for_each_phase_in_the_log_folder(tmp_path: Path, kind: Any) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    trainer(monitor, max_epochs=2, logger=kind(tmp_path, name="run")).fit(network(), batches(4), batches(2))
    found = pages(tmp_path / "run" / "version_0" / "neuronscope")
    assert sorted(found) == ["train.html", "val.html"]
    for phase, text in found.items():
        assert f'<span class="phase">{phase.removesuffix(".html")}</span>' in text
    assert "learning rate" in found["train.html"]
    assert "Compared with phase train at step 8" in found["val.html"]


def test_no_page_is_left_where_it_is_not_wanted(tmp_path: Path) -> None:
    off = DeadNeuronMonitor(every_n_steps=1, html=False)
    trainer(off, max_epochs=1, logger=CSVLogger(tmp_path)).fit(network(), batches(4), batches(1))
    trainer(DeadNeuronMonitor(every_n_steps=1), max_epochs=1, logger=False).fit(network(), batches(4), batches(1))
    assert pages(tmp_path) == {}


def test_lightning_notes_rate_loss_and_checkpoints(tmp_path: Path) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    trainer(monitor, max_epochs=2, logger=CSVLogger(tmp_path)).fit(network(), batches(4), batches(1))
    series = monitor.report().series
    assert [step for step, _ in series["learning_rate"]] == [*range(1, 9)]
    (group,) = network().configure_optimizers().param_groups
    assert {value for _, value in series["learning_rate"]} == {group["lr"]}
    assert [step for step, _ in series["loss"]] == [*range(1, 9)]
    assert all(math.isfinite(value) for _, value in series["loss"])


def test_the_trainers_own_numbers_are_noted_and_its_folder_gets_the_page(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1, window_steps=2)
    run = hugging.trainer(tmp_path, callback, logging_steps=1)
    run.train()
    series = callback.report().series
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert series["loss"] == tuple((entry["step"], entry["loss"]) for entry in logged)
    assert series["learning_rate"] == tuple((entry["step"], entry["learning_rate"]) for entry in logged)
    assert series["gradient_norm"] == tuple((entry["step"], float(entry["grad_norm"])) for entry in logged)
    (where,) = [path for path in pages(tmp_path) if path.endswith("train.html")]
    assert Path(where).parts[-2:] == ("neuronscope", "train.html")


def test_a_page_is_written_again_at_each_drawing(tmp_path: Path) -> None:
    monitor = Monitor(every_n_steps=1, window_steps=1, drawing_share=1.0)
    monitor.folder = str(tmp_path)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    seen = []
    monitor.attach(model)
    for step in range(1, 4):
        monitor.begin_batch()
        model(torch.randn(400, 4)).sum().backward()
        monitor.step(step)
        monitor.note_metrics({"train_loss": 1.0 / step, "accuracy": 0.5, "grad_norm": torch.tensor(2.0), "lr": "none"})
        monitor._publisher.finish()
        seen.append(re.findall(r"(\d) optimizer steps?\.", (tmp_path / "neuronscope" / "train.html").read_text())[0])
    report = monitor.finish()
    assert seen == ["1", "2", "3"]
    assert report is not None
    assert report.series["loss"] == ((1, 1.0), (2, 0.5), (3, 1 / 3))
    assert report.series["gradient_norm"] == ((1, 2.0), (2, 2.0), (3, 2.0))
    assert "learning_rate" not in report.series
    plain = json.loads(report.to_json())
    assert plain["series"]["loss"] == {"steps": [1, 2, 3], "values": [1.0, 0.5, 1 / 3]}


def test_a_page_that_cannot_be_written_does_not_end_the_training(tmp_path: Path) -> None:
    monitor = Monitor(every_n_steps=1, window_steps=1)
    monitor.folder = str(tmp_path / "file")
    (tmp_path / "file").write_text("no folder")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    monitor.attach(model)
    monitor.begin_batch()
    model(torch.randn(400, 4)).sum().backward()
    monitor.step(1)
    with pytest.warns(UserWarning, match="write to a logger"):
        report = monitor.finish()
    assert report is not None


def test_a_long_series_keeps_its_spikes_evenly_and_in_bounded_memory() -> None:
    series = Series()
    for step in range(50_000):
        series.note(step, {"loss": float("nan") if step == 40_001 else 9.0 if step == 307 else step % 7 / 7})
    points = series.points()["loss"]
    assert len(points) <= MOST_POINTS
    steps = [step for step, _ in points]
    assert max(later - one for one, later in zip(steps, steps[1:], strict=False)) < 3 * 50_000 / MOST_POINTS * 2
    assert (307, 9.0) in points
    assert any(math.isnan(value) for _, value in points)
    again = Series.from_state(series.state_dict())
    assert repr(again.points()) == repr(series.points())
    again.note(300, {"loss": 1.0})  # taken up at an earlier step
    assert again.points()["loss"][-1][0] <= 300
    assert Series.from_state({"loss": torch.tensor([1.0]), "learning_rate": "x"}).points() == {}
    assert Series.from_state(None).points() == {}


def test_a_plain_loop_notes_its_numbers_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with ns.watch(model, every_n_steps=1) as scope:
        for _ in range(3):
            model(torch.randn(8, 4)).sum().backward()
            scope.step()
            scope.note_metrics(loss=1.0, learning_rate=0.1)
        with pytest.raises(UsageError, match="Expected `learning_rate`, `loss`, `gradient_norm`, but got `accuracy`"):
            scope.note_metrics(accuracy=0.5)
    noted = scope.report().series
    assert noted == {name: ((1, v), (2, v), (3, v)) for name, v in (("learning_rate", 0.1), ("loss", 1.0))}
    again = ns.watch(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), every_n_steps=1)
    again.load_state_dict(scope.state_dict())
    assert again.report().series == scope.report().series
    again.detach()
