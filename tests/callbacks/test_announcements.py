"""What a run says on the console at once: a collapse, a first mass death and NaN, each once, and what the bar shows."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from transformers import TrainerCallback

from neuronscope.callbacks import DeadNeuronMonitor, Monitor
from neuronscope.callbacks.alarms import Announcements
from neuronscope.callbacks.transformers import DeadNeuronCallback
from tests.callbacks.hugging import gpt2
from tests.callbacks.hugging import trainer as hugging_trainer
from tests.callbacks.networks import batches, network, trainer
from tests.writers import sample_reports as samples

#: 299 examples are enough for a certain window.
ENOUGH = 320


def kill(layer: Any, neurons: int) -> None:
    layer.bias.data[:neurons] = -1000.0


def play(script: Callable[[nn.Sequential, int], None], steps: int = 12, examples: int = ENOUGH, **options: Any) -> None:
    """Train a network of two layers of 20 neurons; ``script`` changes it before a step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 1))
    for layer in (net[0], net[2]):
        layer.bias.data.fill_(1.0)
    monitor = Monitor(every_n_steps=1, window_steps=2, **options)
    monitor.attach(net)
    for step in range(steps):
        script(net, step)
        monitor.begin_batch()
        net(torch.randn(examples, 6)).mean().backward()
        monitor.step(step + 1)
        if step % 4 == 3:
            with monitor.evaluation("val"), torch.no_grad():
                net(torch.randn(8, 6))
    monitor.finish()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "neuronscope" in record.name]


def test_a_collapse_is_said_once_when_its_window_closes_with_the_step_to_go_back_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def script(net: nn.Sequential, step: int) -> None:
        if step == 5:
            kill(net[2], 19)

    play(script)
    (line,) = said(caplog)
    # The window of steps 4 and 5 has one step in which all fired; that of 6 and 7 is the first in which 19 are dead.
    assert line.startswith("Neuronscope at step 8: Nearly all neurons of a layer are dead: layer 2/relu (19 of 20).")
    assert "They have been dead since step 5." in line
    assert "Go back to a checkpoint before step 5." in line


def test_each_layer_that_collapses_is_said_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    def script(net: nn.Sequential, step: int) -> None:
        if step == 2:
            kill(net[0], 20)
        if step == 6:
            kill(net[2], 20)

    play(script)
    first, second = said(caplog)
    assert "layer 0/relu (20 of 20)" in first
    assert "2/relu" not in first
    assert "layer 2/relu (20 of 20)" in second
    assert "They have been dead since step 6." in second
    assert "Go back to a checkpoint before step 6." in second


def test_a_mass_death_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def script(net: nn.Sequential, step: int) -> None:
        if step in (4, 8):
            kill(net[0], step + 2)

    play(script)
    (line,) = said(caplog)
    assert line.startswith("Neuronscope at step 6: 6 neurons died at step 4: layer 0/relu (6 of 20).")
    assert "Go back to a checkpoint before step 4." in line


def test_a_mass_death_after_a_collapse_is_said_of_the_other_layers(caplog: pytest.LogCaptureFixture) -> None:
    def script(net: nn.Sequential, step: int) -> None:
        if step == 2:
            kill(net[0], 20)
        if step == 8:
            kill(net[2], 6)

    play(script)
    first, second = said(caplog)
    assert "layer 0/relu (20 of 20)" in first
    assert second.startswith("Neuronscope at step 10: 6 neurons died at step 8: layer 2/relu (6 of 20).")


@pytest.mark.parametrize(
    ("born", "died", "examples"),
    [(8, 0, ENOUGH), (0, 3, ENOUGH), (0, 19, 4)],
    ids=["dead from the start", "three of forty", "too few examples"],
)
def test_nothing_is_said_of_what_is_old_small_or_not_certain(
    born: int, died: int, examples: int, caplog: pytest.LogCaptureFixture
) -> None:
    def script(net: nn.Sequential, step: int) -> None:
        if step == 0:
            kill(net[0], born)
        if step == 4:
            kill(net[0], max(died, born))

    play(script, examples=examples)
    assert said(caplog) == []


@pytest.mark.parametrize("at", [4, 5])
def test_nan_is_said_once_also_in_a_short_validation(at: int, caplog: pytest.LogCaptureFixture) -> None:
    def script(net: nn.Sequential, step: int) -> None:
        if step == at:
            net[0].weight.data[0, 0] = float("nan")

    play(script, examples=4)
    (line,) = said(caplog)
    # Training's windows are too short to close: the validation after step 8 sees it, 8 examples long.
    assert line.startswith("Neuronscope at step 8: ")
    assert "NaN or infinite" in line
    assert "Go back to an earlier checkpoint without NaN." in line


def test_nan_of_a_layer_that_is_not_in_the_totals_is_said_once() -> None:
    # The axis of the second layer's neurons is assumed.
    sites = (samples.site("a/relu", 9), samples.site("b/relu", 9, samples.Fate(not_finite=2), axis_source="assumed"))
    found, report = Announcements(), samples.report(*sites)
    assert report.not_finite > report.not_finite_neurons == 0
    (line,) = found.new(report)
    assert "Outputs that are not in the totals are NaN or infinite: b/relu. Go back to" in line
    assert found.new(report) == []


def test_a_hostile_name_reaches_the_console_as_printable_text(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential()
    net.add_module("a\x1b[31m", nn.Linear(4, 8))
    net.add_module("act", nn.ReLU())
    net.add_module("end", nn.Linear(8, 1))
    monitor = Monitor(every_n_steps=1, window_steps=1)
    monitor.attach(net)
    kill(net[0], 8)
    monitor.begin_batch()
    net(torch.randn(ENOUGH, 4)).sum().backward()
    monitor.step(1)
    monitor.finish()
    (line,) = said(caplog)
    assert line.isprintable()


def collapsing(at: int) -> Any:
    """A Lightning network whose first layer collapses at a step."""
    model = network()
    step = model.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        if model.trainer.global_step == at:
            kill(model.first, 12)
        return step(batch, batch_idx)

    model.training_step = training_step
    return model


@pytest.mark.parametrize("first", [True, False])
def test_lightning_says_it_by_its_own_logger_and_only_on_the_first_rank(
    first: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    run = trainer(monitor, max_epochs=1)
    monkeypatch.setattr(type(run), "is_global_zero", first)
    run.fit(collapsing(4), batches(10, size=ENOUGH), batches(1))
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING and "dead" in record.getMessage()]
    if not first:
        assert lines == []
        return
    assert [record.name for record in lines] == ["pytorch_lightning.neuronscope"]
    assert "first/relu (12 of 12)" in lines[0].getMessage()


def test_the_last_checkpoint_before_a_collapse_is_named_also_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def saving(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")

    options = {"max_epochs": 1, "enable_checkpointing": True}
    run = trainer(DeadNeuronMonitor(every_n_steps=1, window_steps=2), saving("first"), **options)
    run.fit(collapsing(5), batches(10, size=ENOUGH), batches(1))
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "Go back to a checkpoint before step 5 (the last one known is of step 4)." in said
    resumed = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    run = trainer(resumed, saving("second"), **{**options, "max_epochs": 2})
    run.fit(network(), batches(10, size=ENOUGH), batches(1), ckpt_path=tmp_path / "first" / "step=10.ckpt")
    assert resumed.report().checkpoints[:5] == (2, 4, 6, 8, 10)


def test_lightnings_progress_bar_shows_the_share_only_if_asked_to() -> None:
    for asked in (True, False):
        run = trainer(DeadNeuronMonitor(every_n_steps=1, window_steps=2, prog_bar=asked), max_epochs=1)
        run.fit(collapsing(4), batches(10, size=ENOUGH), batches(1))
        shown = run.progress_bar_metrics
        # 12 of 22 neurons are in the layer that collapsed.
        assert ("dead_pct" in shown) == asked
        assert not asked or shown["dead_pct"] >= 100 * 12 / 22


def test_hugging_face_says_it_by_its_own_logger_and_shows_the_share_in_its_bar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt2()

    shown: list[str] = []

    class Bar:
        def set_postfix_str(self, text: str, refresh: bool) -> None:
            assert not refresh  # the bar decides how often it is drawn
            shown.append(text)

    class Progress(TrainerCallback):
        training_bar = Bar()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 13:
                kill(model.transformer.h[0].mlp.c_fc, 32)

    callback = DeadNeuronCallback(every_n_steps=1, window_steps=1, prog_bar=True)
    sizes = {"per_device_train_batch_size": 24, "num_train_epochs": 40}
    logger = logging.getLogger("transformers.neuronscope")
    logger.addHandler(caplog.handler)
    hugging_trainer(tmp_path, Progress(), callback, model=model, **sizes).train()
    logger.removeHandler(caplog.handler)
    (line,) = {*said(caplog)}  # transformers may pass it on to the root's handler too
    assert "transformer.h.0.mlp.c_fc/relu (32 of 32)" in line
    assert shown[-1].startswith("dead 5")  # 32 and 3 of 64


@pytest.mark.parametrize("manual", [False, True], ids=["one optimizer", "two optimizers"])
def test_rows_join_with_the_trainers_own(tmp_path: Path, manual: bool) -> None:
    """Our numbers bear the step under which Lightning logs the same batch's loss, and the same pass of validation."""
    table, model = CSVLogger(tmp_path), network(manual=manual)
    model.on_train_batch_end = lambda outputs, batch, batch_idx: model.log("seen", float(batch_idx))
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=3)
    run = trainer(monitor, logger=table, log_every_n_steps=1)
    run.fit(model, batches(7, size=ENOUGH), batches(2))
    run.test(model, batches(2), verbose=False)
    with (Path(table.log_dir) / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))

    def steps(name: str) -> list[int]:
        return [int(row["step"]) for row in rows if row.get(name)]

    assert steps("neuronscope/val_dead_pct") == steps("loss") == [6, 13]
    assert steps("neuronscope/test_dead_pct") == steps("test_loss")
    assert set(steps("neuronscope/dead_pct")) <= set(steps("seen"))
    assert steps("neuronscope/dead_pct")[-1] == steps("seen")[-1]
