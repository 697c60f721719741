"""A log folder that is full, gone or no folder: a watched training ends as an unwatched one does, with one warning."""

from __future__ import annotations

import contextlib
import importlib
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

import neuronscope as ns
from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.callbacks.transformers import DeadNeuronCallback
from neuronscope.errors import NeuronscopeWarning
from neuronscope.writers.tensorboard import Dashboard
from tests.callbacks import hugging, networks
from tests.callbacks.test_faults import ours
from tests.callbacks.test_publishing import read

Harm = Callable[[Path, int], None]
OPTIONS: dict[str, Any] = {"every_n_steps": 1, "window_steps": 1, "drawing_share": 1.0}


class Outcome(NamedTuple):
    """How a training ended.

    Attributes:
        error: Type of the error that ended it.
        steps: Optimizer steps.
        weights: The network's, at the end.
    """

    error: str | None
    steps: int
    weights: dict[str, torch.Tensor]


def run_lightning(framework: str, folder: Path, harm: Harm, *, watched: bool) -> Outcome:
    """Train with Lightning; the user logs nothing once the folder is harmed."""
    module = importlib.import_module(framework)
    logger = module.loggers.TensorBoardLogger(folder)

    class User(module.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.logger.log_metrics({"mine": 1.0}, 1)
                trainer.logger.experiment.flush()  # else the folder may be gone before the writer's thread writes it
            harm(Path(logger.log_dir), trainer.global_step)

    model = networks.network(framework)
    callbacks = [DeadNeuronMonitor(**OPTIONS)] if watched else []
    run = networks.trainer(User(), *callbacks, framework=framework, logger=logger, max_epochs=1, limit_val_batches=0)
    error = None
    try:
        run.fit(model, networks.batches(8, size=512), networks.batches(1))
    except (OSError, ValueError) as caught:
        error = type(caught).__name__
    return Outcome(error, run.global_step, hugging.weights(model))


def run_pytorch_lightning(folder: Path, harm: Harm, *, watched: bool) -> Outcome:
    return run_lightning("pytorch_lightning", folder, harm, watched=watched)


def run_lightning_pytorch(folder: Path, harm: Harm, *, watched: bool) -> Outcome:
    return run_lightning("lightning.pytorch", folder, harm, watched=watched)


def run_hugging_face(folder: Path, harm: Harm, *, watched: bool) -> Outcome:
    """Train with a Hugging Face Trainer, which logs to the folder itself, at every second step and at the end."""

    class User(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (log_dir,) = {path.parent for path in (folder / "runs").glob("*/events*")} or {folder / "gone"}
            harm(log_dir, state.global_step)

    model = hugging.gpt2()
    callbacks = [DeadNeuronCallback(**OPTIONS, policy=ns.Policy(confidence=0.5))] if watched else []
    options = {"report_to": ["tensorboard"], "per_device_train_batch_size": 24, "num_train_epochs": 8}
    run = hugging.trainer(folder, User(), *callbacks, model=model, **options)
    error = None
    try:
        run.train()
    except (OSError, ValueError) as caught:
        error = type(caught).__name__
    if watched:
        callbacks[0].detach()
    return Outcome(error, run.state.global_step, hugging.weights(model))


def run_plain_loop(folder: Path, harm: Harm, *, watched: bool) -> Outcome:
    """Train in a loop of the user's own, with a ``SummaryWriter`` of the user's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = SummaryWriter(str(folder / "run"))
    writer.add_scalar("mine", 1.0, 0)
    writer.flush()
    steps, error = 0, None
    with contextlib.ExitStack() as stack:
        scope = stack.enter_context(ns.watch(model)) if watched else None
        dashboard = Dashboard(writer)
        try:
            for x, y in networks.batches(8, size=512):
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                harm(folder / "run", steps)
                if scope is not None:
                    scope.step()
                    dashboard.write(scope.report(), steps)
            writer.flush()
            writer.close()
        except (OSError, ValueError) as caught:
            error = type(caught).__name__
    return Outcome(error, steps, hugging.weights(model))


RUNS = [run_pytorch_lightning, run_lightning_pytorch, run_hugging_face, run_plain_loop]


def nothing(folder: Path, step: int) -> None:
    """Do no harm."""


def delete(folder: Path, step: int) -> None:
    """Delete the run's folder in the middle."""
    if step == 3:
        shutil.rmtree(folder)


def replace(folder: Path, step: int) -> None:
    """Put a file where the run's folder was, in the middle."""
    if step == 3:
        shutil.rmtree(folder)
        folder.write_text("")


def occupy(folder: Path, step: int) -> None:
    """Put a file where our own folder should be."""
    if step == 1 and folder.is_dir():
        shutil.rmtree(folder / "neuronscope", ignore_errors=True)
        (folder / "neuronscope").write_text("")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on the size of files, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


#: Bytes of a file. The users' own numbers take 5,700 at most, with Neuronscope's 5,400 to 9,700; a report's pictures
#: take 38,000 at least.
LIMITS = {"our numbers do not fit": 6_000, "no picture fits": 30_000, "fills in mid-run": 200_000}
HARMS = {"deleted": delete, "replaced by a file": replace, "occupied": occupy}


@pytest.fixture(params=["full from the start", *LIMITS, *HARMS])
def harm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harm]:
    """What befalls the log folder; it befalls the unwatched run too."""
    if request.param == "full from the start":
        full = shutil._ntuple_diskusage(1 << 30, 1 << 30, 0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        yield nothing
    elif request.param in LIMITS:
        with largest_file(LIMITS[request.param]):
            yield nothing
    else:
        yield HARMS[request.param]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("run", RUNS)
def test_the_training_ends_as_an_unwatched_one_and_one_warning_is_given(
    run: Callable[..., Outcome], harm: Harm, tmp_path: Path
) -> None:
    plain = run(tmp_path / "plain", harm, watched=False)
    with pytest.warns(NeuronscopeWarning, match="could not write to .*; training goes on") as caught:
        got = run(tmp_path / "watched", harm, watched=True)
    assert len(ours(caught)) == 1
    assert (got.error, got.steps) == (plain.error, plain.steps)
    hugging.assert_same_weights(got.weights, plain.weights)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("run", RUNS)
def test_numbers_are_written_before_the_training_goes_on(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer's thread, here a slow one, must not find the folder gone while our numbers wait in its queue."""
    write = RecordWriter.write

    def write_slowly(self: RecordWriter, data: bytes) -> None:
        time.sleep(0.01)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_slowly)
    plain = run(tmp_path / "plain", delete, watched=False)
    with pytest.warns(NeuronscopeWarning, match="The log folder is gone"):
        got = run(tmp_path / "watched", delete, watched=True)
    assert (got.error, got.steps) == (plain.error, plain.steps)


@pytest.mark.parametrize("run", RUNS)
def test_what_was_drawn_before_the_disk_was_full_stays(run: Callable[..., Outcome], tmp_path: Path) -> None:
    with largest_file(LIMITS["fills in mid-run"]), pytest.warns(NeuronscopeWarning, match="File too large"):
        run(tmp_path, nothing, watched=True)
    (file,) = tmp_path.rglob("neuronscope/events*")
    found = read(file.parent)
    (tag,) = (tag for tag in found.Tags()["images"] if tag == "neuronscope/overview")
    drawn = [event.step for event in found.Images(tag)]
    assert drawn[:2] in ([0, 1], [1, 2], [3, 6])  # whole reports, as many as fit
    assert len(drawn) < 8
    assert [event.step for event in found.Tensors("neuronscope/diagnosis/text_summary")] == drawn
    (numbers,) = (path for path in tmp_path.rglob("events*") if path.parent != file.parent)
    assert [event.step for event in read(numbers.parent).Scalars("neuronscope/dead_pct")][-1] in (7, 8)


def test_a_logger_that_raises_anything_for_our_numbers_ends_nothing(tmp_path: Path) -> None:
    class Strict(TensorBoardLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(tag.startswith("neuronscope") for tag in metrics):
                raise KeyError("only my own numbers")
            super().log_metrics(metrics, step)

    run = networks.trainer(DeadNeuronMonitor(**OPTIONS), logger=Strict(tmp_path), max_epochs=1)
    with pytest.warns(NeuronscopeWarning, match="only my own numbers") as caught:
        run.fit(networks.network(), networks.batches(4, size=512), networks.batches(1))
    assert len(ours(caught)) == 1
    assert run.global_step == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_users_own_number_that_does_not_fit_ends_the_training_all_the_same(tmp_path: Path) -> None:
    def log(folder: Path, step: int) -> None:
        if step == 3:
            shutil.rmtree(folder)
        if step == 5:
            writer = SummaryWriter(str(folder))
            shutil.rmtree(folder)
            writer.add_scalar("mine", 1.0, step)
            writer.flush()

    plain = run_pytorch_lightning(tmp_path / "plain", log, watched=False)
    with pytest.warns(NeuronscopeWarning, match="The log folder is gone"):
        got = run_pytorch_lightning(tmp_path / "watched", log, watched=True)
    assert (got.error, got.steps) == (plain.error, plain.steps) == ("FileNotFoundError", 5)
