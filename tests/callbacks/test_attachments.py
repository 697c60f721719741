"""Trackers get the page and the overview picture: W&B and MLflow offline, where they are installed; Comet in place."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.callbacks.attachments import attach_files, tracker_of
from neuronscope.callbacks.transformers import DeadNeuronCallback
from tests.callbacks import hugging
from tests.callbacks.networks import batches, network, trainer


def fit(logger: Any) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    trainer(monitor, max_epochs=1, logger=logger).fit(network(), batches(4), batches(1))


def assert_is_page(text: str) -> None:
    assert text.startswith("<!doctype html>")
    assert "<title>Neuronscope: " in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: W&B keeps its first folder as long as the process lives."""
    return tmp_path_factory.mktemp("trackers")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(folder)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_lightnings_wandb_logger_gets_the_page_and_the_picture(offline: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger

    fit(WandbLogger(save_dir=str(offline), offline=True))
    wandb.finish()
    for phase in ("train", "val"):
        (page,) = offline.rglob(f"media/html/neuronscope/{phase}_html_*.html")
        assert_is_page(page.read_text(encoding="utf-8"))
        (picture,) = offline.rglob(f"media/images/neuronscope/{phase}_png_*.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")
def test_transformers_wandb_callback_gets_the_page(offline: Path) -> None:
    wandb = pytest.importorskip("wandb")
    before = {*offline.rglob("*.html")}
    hugging.trainer(
        offline / "trainer", DeadNeuronCallback(every_n_steps=1, window_steps=2), report_to=["wandb"]
    ).train()
    wandb.finish()
    (page,) = {*offline.rglob("media/html/neuronscope/train_html_*.html")} - before
    assert_is_page(page.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore")
def test_lightnings_mlflow_logger_gets_the_page_and_the_picture(offline: Path) -> None:
    pytest.importorskip("mlflow")
    from pytorch_lightning.loggers import MLFlowLogger

    fit(MLFlowLogger(tracking_uri=(offline / "mlruns").as_uri()))
    assert not (offline / "mlruns" / "neuronscope").exists()  # MLflow would take it for an experiment
    found = sorted(path.name for path in offline.rglob("artifacts/neuronscope/*"))
    assert found == ["train.html", "train.png", "val.html", "val.png"]
    (page,) = offline.rglob("artifacts/neuronscope/train.html")
    assert_is_page(page.read_text(encoding="utf-8"))


def test_comets_experiment_takes_files_as_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    comet = pytest.importorskip("comet_ml")
    options = {"file_name": "neuronscope/train.html", "copy_to_tmp": True}
    for kind in (comet.OfflineExperiment, comet.CometExperiment):
        inspect.signature(kind.log_asset).bind(None, "train.html", **options)


class Run:
    """Takes files as the three trackers do."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, ...]] = []

    def log_artifact(self, *arguments: Any) -> None:
        self.taken.append(arguments)

    def log_asset(self, *arguments: Any, **options: Any) -> None:
        self.taken.append((*arguments, options["file_name"]))


def test_files_are_given_to_the_run_that_a_logger_writes_to(tmp_path: Path) -> None:
    page, run = tmp_path / "train.html", Run()
    mlflow = type("MLFlowLogger", (), {"experiment": run, "run_id": "7"})
    assert tracker_of(type("Mine", (mlflow,), {})()) == ("mlflow", (run, "7"))
    attach_files(("mlflow", (run, "7")), [page])
    attach_files(("mlflow", (run, None)), [page])
    attach_files(("comet", run), [page])
    for gone in (("mlflow", (None, None)), ("comet", None), ("wandb", None)):
        attach_files(gone, [page])
    assert run.taken == [
        ("7", str(page), "neuronscope"),
        (str(page), "neuronscope"),
        (str(page), "neuronscope/train.html"),
    ]
    assert tracker_of(object()) is None
