"""What a run's loggers and other callbacks are given: which numbers, at which steps, and what they can do with them."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neuronscope.callbacks import DeadNeuronMonitor, publishing
from neuronscope.writers.pictures.canvas import Canvas
from neuronscope.writers.tensorboard.tags import card_name, network_tag, safe
from tests.callbacks.networks import SITES, batches, network, trainer

#: The first layer in the tags of vectors, and both in those of charts and pictures.
FIRST = safe("first/relu")
FIRST_CARD, SECOND_CARD = map(card_name, SITES)
FIRST_TOTALS, MORE_TOTALS = ("dead_pct", "worst_layer_dead_pct", "dormant_pct"), ("collapsed_layers", "not_finite_pct")
VAL_TOTALS = {network_tag(name, "val") for name in (*FIRST_TOTALS, *MORE_TOTALS)}
#: Nobody dies in an evaluation, and without gradients no neuron is known to be silent.
TOTALS = {network_tag(name, "train") for name in (*FIRST_TOTALS, *MORE_TOTALS, "deaths_total", "silent_pct")}
VAL_DEAD = "neuronscope/val_dead_pct"


class Noting(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int | None, dict[str, float]]] = []
        self.experiment = None

    name = "noting"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.given.append((step, metrics))

    def steps(self, tag: str) -> list[int | None]:
        return [step for step, metrics in self.given if tag in metrics]


def events(logger: TensorBoardLogger) -> EventAccumulator:
    """What is in the run's own folder: numbers."""
    return read(Path(logger.log_dir))


def drawings(logger: TensorBoardLogger) -> EventAccumulator:
    """What is in our event file: pictures, text and vectors."""
    return read(Path(logger.log_dir) / "neuronscope")


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def test_every_window_of_training_and_every_pass_is_logged_once_at_the_trainers_step() -> None:
    logger = Noting()
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=3)
    run = trainer(monitor, logger=logger, num_sanity_val_steps=2)
    run.fit(network(), batches(8, size=128), batches(3))
    run.test(network(), batches(3), verbose=False)
    # 128 examples a step: windows of 3 steps are sure (384 ≥ 299). 16 steps: the last one is alone and is not.
    assert logger.steps("neuronscope/dead_pct") == [2, 5, 8, 11, 14, 15]
    assert logger.steps(f"neuronscope.dead_pct/{FIRST_CARD}") == [2, 5, 8, 11, 14, 15]
    # As the Trainer's own: batches are numbered from 0, and the test after them comes at the number of the next one.
    assert logger.steps("neuronscope/val_dead_pct") == [7, 15]
    assert logger.steps("neuronscope/test_dead_pct") == [16]
    values = [
        metrics[f"neuronscope.dead_pct/{FIRST_CARD}"]
        for _, metrics in logger.given
        if f"neuronscope.dead_pct/{FIRST_CARD}" in metrics
    ]
    assert all(value >= 25.0 for value in values)  # 3 of 12 never fire: 25 %


def test_fits_one_after_another_never_log_a_lower_step() -> None:
    logger = Noting()
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=3)
    run = trainer(monitor, logger=logger)
    for epochs in (1, 1, 3):  # the second has nothing to do
        run.fit_loop.max_epochs = epochs
        run.fit(network(), batches(8, size=128), batches(1))
    for tag in ("neuronscope/dead_pct", "neuronscope/val_dead_pct"):
        steps = logger.steps(tag)
        assert steps == sorted(set(steps)), tag
    assert logger.steps("neuronscope/dead_pct")[-1] == 23


def test_tensorboard_gets_pictures_text_and_vectors_and_other_loggers_scalars(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=4, drawing_share=1.0)
    run = trainer(monitor, logger=[table, board], log_every_n_steps=1)
    run.fit(network(), batches(8, size=128), batches(3))
    numbers, found = events(board), drawings(board)
    assert set(numbers.Tags()["scalars"]) >= TOTALS
    # The Trainer's own file holds nothing of ours but numbers, and ours holds no numbers.
    assert (numbers.Tags()["images"], numbers.Tags()["tensors"], found.Tags()["scalars"]) == ([], [], [])
    for tag in ("neuronscope/overview", f"neuronscope.neurons/{FIRST_CARD}", f"neuronscope.neurons/{SECOND_CARD}"):
        assert [event.step for event in found.Images(tag)] == [3, 7, 11, 15], tag
    for tag in ("neuronscope/diagnosis/text_summary", f"neuronscope.vectors/{FIRST}"):
        assert [event.step for event in found.Tensors(tag)] == [3, 7, 11, 15], tag
    assert [event.step for event in found.Images("neuronscope/val_overview")] == [7, 15]
    scalars = [(event.step, event.value) for event in numbers.Scalars("neuronscope/dead_pct")]
    with (Path(table.log_dir) / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["neuronscope/dead_pct"]]
    assert [(int(row["step"]), float(row["neuronscope/dead_pct"])) for row in rows] == [
        (step, pytest.approx(value)) for step, value in scalars
    ]


@pytest.mark.parametrize(
    ("usual", "drawn"),
    [
        (0.0, [0, 4]),  # the first at once; then it would take 10**6 times its own time until the next
        (0.4, [4]),  # the first after 0.4 s * (10**6 - 1): five days
    ],
)
def test_drawing_keeps_to_its_share_of_time_and_the_end_is_always_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual: float, drawn: list[int]
) -> None:
    monkeypatch.setattr(publishing, "_USUAL_DRAWING_S", usual)
    board = TensorBoardLogger(tmp_path, prefix="mine")
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=1, drawing_share=1e-6)
    trainer(monitor, logger=board, log_every_n_steps=1, max_epochs=1).fit(network(), batches(5, size=512), batches(1))
    assert [event.step for event in drawings(board).Images("neuronscope/overview")] == drawn
    assert [event.step for event in events(board).Scalars("mine-neuronscope/dead_pct")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("left_out", ["images", "text", "vectors"])
def test_pictures_text_and_vectors_can_be_left_out(tmp_path: Path, left_out: str) -> None:
    board = TensorBoardLogger(tmp_path)
    monitor = DeadNeuronMonitor(every_n_steps=1, **{left_out: False})
    trainer(monitor, logger=board, log_every_n_steps=1, max_epochs=1).fit(network(), batches(2), batches(1))
    tags = drawings(board).Tags()
    there = {
        "images": "neuronscope/overview" in tags["images"],
        "text": "neuronscope/diagnosis/text_summary" in tags["tensors"],
        "vectors": f"neuronscope.vectors/{FIRST}" in tags["tensors"],
    }
    assert there == {name: name != left_out for name in there}


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}, {"barebones": True}], ids=str)
def test_without_a_logger_there_is_still_a_report(options: dict[str, Any]) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    if "barebones" in options:
        options = {**options, "num_sanity_val_steps": None, "enable_checkpointing": None}
        run = trainer(monitor, **{**options, "enable_progress_bar": None, "enable_model_summary": None, "logger": None})
        model = network()
        model.log = lambda *_: None  # Lightning's own warns that it does nothing
    else:
        run, model = trainer(monitor, **options), network()
    run.fit(model, batches(2), batches(1))
    assert monitor.report()["first/relu"].neurons == 12
    assert monitor.report("val").neurons == 22
    assert {"neuronscope/dead_pct", "neuronscope/val_dead_pct"} <= set(run.callback_metrics)


class Looking(Callback):
    """Notes what there is to see when others look."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}

    def look(self, hook: str, trainer: Any) -> None:
        self.seen[hook] = {name for name in trainer.callback_metrics if name.startswith("neuronscope")}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.look("validation", trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look("epoch", trainer)


def test_totals_are_there_when_other_callbacks_look_wherever_they_stand() -> None:
    looking = Looking()
    monitor = DeadNeuronMonitor(every_n_steps=100)
    trainer(looking, monitor, num_sanity_val_steps=1, max_epochs=1).fit(network(), batches(2), batches(1))
    assert looking.seen == {"validation": TOTALS | VAL_TOTALS, "epoch": TOTALS | VAL_TOTALS}


def test_early_stopping_and_checkpoints_can_use_the_totals(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="neuronscope/dead_pct", filename="{epoch}", every_n_train_steps=2)
    stop = EarlyStopping("neuronscope/val_dead_pct", stopping_threshold=1.0, mode="max", strict=True)
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    run = trainer(stop, monitor, keep, max_epochs=5, enable_checkpointing=True)
    run.fit(network(), batches(8, size=256), batches(2))
    assert run.current_epoch == 1  # 3 of 22 are dead from the start: more than 1 %
    assert keep.best_model_score is not None
    assert keep.best_model_score >= 100 * 3 / 22


class Killing(Callback):
    """Kills some neurons of the first layer at the beginning of the third epoch."""

    def __init__(self, neurons: int = 9) -> None:
        self.neurons = neurons

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            with torch.no_grad():
                pl_module.first.bias[: self.neurons] = -1000.0


def dead_percent_by_pass(model: Any, stage: str = "validate") -> list[float]:
    """The share of neurons that gave nothing but zeros in each pass, from the model's own record."""
    notes = [note for note in model.notes if note.stage == stage]
    shares = []
    for step in dict.fromkeys(note.step for note in notes):
        by_site = [torch.cat([n.y for n in notes if (n.step, n.site) == (step, site)]) for site in SITES]
        shares.append(100 * sum(int((y == 0).all(0).sum()) for y in by_site) / sum(SITES.values()))
    return shares


@pytest.mark.parametrize("size", [8, 160])
def test_the_metric_of_validation_is_that_of_the_newest_pass(size: int) -> None:
    logger = Noting()
    model = network()
    run = trainer(DeadNeuronMonitor(every_n_steps=1), Killing(), logger=logger, max_epochs=4)
    run.fit(model, batches(2), batches(2, size=size))
    shown = [metrics[VAL_DEAD] for _, metrics in logger.given if VAL_DEAD in metrics]
    assert shown == pytest.approx(dead_percent_by_pass(model))
    assert min(shown[2:]) > max(shown[:2])  # 9 are dead that fired in earlier passes
    assert run.callback_metrics[VAL_DEAD] == pytest.approx(shown[-1])


def test_early_stopping_sees_deaths_found_in_short_passes() -> None:
    stop = EarlyStopping(VAL_DEAD, stopping_threshold=100 * 9 / 22 - 0.1, mode="max", patience=100)
    run = trainer(stop, DeadNeuronMonitor(every_n_steps=1), Killing(), max_epochs=6)
    run.fit(network(), batches(2), batches(2))
    assert run.current_epoch == 3  # the first that begins with the nine dead is the last


@pytest.mark.parametrize(
    ("tag", "threshold"),
    [
        ("neuronscope/worst_layer_dead_pct", 100.0),
        ("neuronscope.more/collapsed_layers", 1.0),
        ("neuronscope/deaths_total", 9.0),  # nine of the first layer that worked before
        ("neuronscope/val_worst_layer_dead_pct", 100.0),
        ("neuronscope.more/val_collapsed_layers", 1.0),
    ],
)
def test_a_layer_that_collapses_can_stop_a_training_and_choose_its_checkpoint(
    tmp_path: Path, tag: str, threshold: float
) -> None:
    stop = EarlyStopping(
        tag, stopping_threshold=threshold - 0.1, mode="max", patience=100, check_on_train_epoch_end="val" not in tag
    )
    keep = ModelCheckpoint(tmp_path, monitor=tag, mode="min", filename="best", save_on_train_epoch_end=True)
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    run = trainer(stop, monitor, Killing(12), keep, max_epochs=6, enable_checkpointing=True)
    run.fit(network(), batches(2, size=160), batches(2))
    assert run.current_epoch == 3  # the twelve of the first layer are dead from the third epoch on
    assert run.callback_metrics[tag] >= threshold
    assert keep.best_model_score is not None
    assert keep.best_model_score < threshold


def test_pictures_of_a_short_pass_show_that_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    whole = Canvas.text

    def text(canvas: Canvas, at: Any, words: str, *more: Any, **options: Any) -> None:
        texts.append(words)
        whole(canvas, at, words, *more, **options)

    monkeypatch.setattr(Canvas, "text", text)
    board, model = TensorBoardLogger(tmp_path), network()
    monitor = DeadNeuronMonitor(every_n_steps=1, drawing_share=1)
    trainer(monitor, Killing(), logger=board, max_epochs=3).fit(model, batches(2), batches(2))
    share = dead_percent_by_pass(model)[-1]
    assert any(words.startswith(f"{share:.0f} % dead, ") for words in texts)
    # 16 examples: 1 - .05 ** (1 / 16) = .1707, rounded up
    assert "Provisional: 16 of 299 examples; dead ones may fire on up to 18 %" in texts
    (said,) = drawings(board).Tensors("neuronscope/val_diagnosis/text_summary")[-1].tensor_proto.string_val
    assert b"Provisional: based on 16 validation examples at step 6 (299 are needed for a bound of 1 %)" in said
    assert f"neurons are dead ({share:.0f} %). ".encode() in said


def test_a_network_of_nothing_but_nan_has_no_dead_share() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    model = network()
    with torch.no_grad():
        model.first.weight.fill_(float("nan"))
    run = trainer(monitor, max_epochs=1)
    run.fit(model, batches(2), batches(1))
    assert math.isnan(run.callback_metrics["neuronscope/dead_pct"])
    assert run.callback_metrics["neuronscope.more/not_finite_pct"] == 100.0


@pytest.mark.parametrize("framework", ["pytorch_lightning", "lightning.pytorch"])
def test_the_end_of_a_fit_prints_one_line_where_lightning_prints_its_own(framework: str) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(framework).addHandler(handler)
    try:
        trainer(DeadNeuronMonitor(every_n_steps=1), framework=framework).fit(network(framework), batches(2), batches(1))
    finally:
        logging.getLogger(framework).removeHandler(handler)
    ours = [line for line in lines if line.startswith("Neuronscope")]
    assert len(ours) == 1
    assert "of 22 neurons dead" in ours[0]
    assert "provisional, from 32 of 299 examples, at step 4." in ours[0]
