"""Where a Hugging Face training shows what the callback counts: its reporters, its metrics, its own records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, TrainerCallback

from neuronscope.callbacks.transformers import DeadNeuronCallback
from neuronscope.errors import NeuronscopeWarning
from neuronscope.writers.tensorboard.tags import card_name, network_tag, safe
from tests.callbacks.hugging import ACTS, Noting, gpt2, trainer

FIRST_TOTALS, MORE_TOTALS = ("dead_pct", "worst_layer_dead_pct", "dormant_pct"), ("collapsed_layers", "not_finite_pct")
VAL_TOTALS = {network_tag(name, "val") for name in (*FIRST_TOTALS, *MORE_TOTALS)}
#: Nobody dies in an evaluation, and without gradients no neuron is known to be silent.
TOTALS = {network_tag(name, "train") for name in (*FIRST_TOTALS, *MORE_TOTALS, "deaths_total", "silent_pct")}
DRAWINGS = "*/neuronscope/events*"
#: All 24 sentences in every step, 16 steps.
STEPS: dict[str, Any] = {"per_device_train_batch_size": 24, "num_train_epochs": 16}


def events(folder: Path, pattern: str = "*/events*") -> EventAccumulator:
    """What is in the one event file of a training; ``*/neuronscope/events*`` is ours."""
    (found,) = (folder / "runs").glob(pattern)
    board = EventAccumulator(str(found), size_guidance={"images": 0, "tensors": 0})
    board.Reload()
    return board


@pytest.mark.parametrize("place", [0, 1], ids=["before us", "after us"])
def test_other_callbacks_get_our_numbers_once_for_each_window_and_pass(tmp_path: Path, place: int) -> None:
    noting, callback = Noting(), DeadNeuronCallback(every_n_steps=1, window_steps=3)
    callbacks = [callback, callback]
    callbacks[place] = noting
    run = trainer(tmp_path, *callbacks, **STEPS, eval_strategy="steps", eval_steps=8, logging_steps=5)
    run.train()
    # 24 sentences a step: 13 make a window sure (312 ≥ 299). 16 steps; the last three are told at the end.
    assert noting.steps("neuronscope/dead_pct") == [13, 16]
    assert noting.steps("neuronscope/val_dead_pct") == [8, 16]
    assert noting.steps("loss") == [5, 10, 15]  # the Trainer's own are not disturbed
    assert not any(tag.startswith("neuronscope.dead_pct/") for _, logs in noting.given for tag in logs)
    dead = [logs["neuronscope/dead_pct"] for _, logs in noting.given if "neuronscope/dead_pct" in logs]
    assert all(100 * 6 / 64 <= value < 100 for value in dead)  # 3 of 32 in each of two layers never fire


def test_the_trainers_history_keeps_the_numbers_and_its_own_entries_stay_last(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1)
    run = trainer(tmp_path, callback, eval_strategy="epoch", save_strategy="epoch")
    run.train()
    history = run.state.log_history
    assert "train_runtime" in history[-1]
    assert [entry["step"] for entry in history if "neuronscope/dead_pct" in entry] == [12]
    told = [place for place, entry in enumerate(history) if "neuronscope/val_dead_pct" in entry]
    assert [history[place]["step"] for place in told] == [6, 12]
    assert all("eval_loss" in history[place + 1] for place in told)
    assert all(history[place]["step"] == history[place + 1]["step"] for place in told)  # the rows join
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert any("neuronscope/val_dead_pct" in entry for entry in saved["log_history"])


def test_tensorboard_gets_the_tags_that_lightning_has(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1, window_steps=3, drawing_share=1.0)
    run = trainer(tmp_path, callback, **STEPS, report_to=["tensorboard"], eval_strategy="steps", eval_steps=8)
    run.train()
    board, drawings = events(tmp_path), events(tmp_path, DRAWINGS)
    tags = board.Tags()
    assert set(tags["scalars"]) >= TOTALS | VAL_TOTALS
    assert not any(tag.startswith("train/neuronscope") for tag in tags["scalars"])
    for tag in ("neuronscope/dead_pct", f"neuronscope.dead_pct/{card_name(ACTS[0])}"):
        assert [event.step for event in board.Scalars(tag)] == [13, 16], tag
    for tag in ("neuronscope/overview", f"neuronscope.neurons/{card_name(ACTS[0])}"):
        assert [event.step for event in drawings.Images(tag)] == [13, 16], tag
    for tag in ("neuronscope/diagnosis/text_summary", f"neuronscope.vectors/{safe(ACTS[0])}"):
        assert [event.step for event in drawings.Tensors(tag)] == [13, 16], tag
    assert [event.step for event in board.Scalars("neuronscope/val_dead_pct")] == [8, 16]
    assert [event.value for event in board.Scalars("train/loss")]


@pytest.mark.parametrize("left_out", ["images", "text", "vectors"])
def test_pictures_text_and_vectors_can_be_left_out(tmp_path: Path, left_out: str) -> None:
    callback = DeadNeuronCallback(every_n_steps=1, **{left_out: False})
    trainer(tmp_path, callback, report_to=["tensorboard"], num_train_epochs=1).train()
    tags = events(tmp_path, DRAWINGS).Tags()
    there = {
        "images": "neuronscope/overview" in tags["images"],
        "text": "neuronscope/diagnosis/text_summary" in tags["tensors"],
        "vectors": f"neuronscope.vectors/{safe(ACTS[0])}" in tags["tensors"],
    }
    assert there == {name: name != left_out for name in there}


def test_a_second_training_is_logged_from_its_beginning(tmp_path: Path) -> None:
    noting = Noting()
    run = trainer(tmp_path, DeadNeuronCallback(every_n_steps=1, window_steps=3), noting, **STEPS)
    run.train()
    run.train()
    assert noting.steps("neuronscope/dead_pct") == [13, 16, 13, 16]


class Looking(TrainerCallback):
    """Notes what an evaluation's metrics hold when others look."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.seen = {name for name in metrics if "neuronscope" in name}


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_totals_are_there_when_other_callbacks_look_wherever_they_stand(tmp_path: Path, ours_first: bool) -> None:
    looking, callback = Looking(), DeadNeuronCallback()
    callbacks = (callback, looking) if ours_first else (looking, callback)
    trainer(tmp_path, *callbacks, eval_strategy="epoch").train()
    assert looking.seen == {f"eval_{tag}" for tag in TOTALS | VAL_TOTALS}


@pytest.mark.parametrize("ours_first", [True, False])
def test_early_stopping_and_the_best_model_can_use_the_totals(tmp_path: Path, ours_first: bool) -> None:
    stopping, callback = EarlyStoppingCallback(early_stopping_patience=2), DeadNeuronCallback(every_n_steps=1)
    callbacks = (callback, stopping) if ours_first else (stopping, callback)
    options = {"eval_strategy": "epoch", "save_strategy": "best", "load_best_model_at_end": True}
    best = {"metric_for_best_model": "neuronscope/dead_pct", "greater_is_better": False}
    # The share of dead neurons cannot fall below the 6 of 64 that never fire, and a network that does not learn
    # keeps what it has: the second and the third epoch are no better than the first.
    run = trainer(tmp_path, *callbacks, **options, **best, learning_rate=0.0, num_train_epochs=9)
    run.train()
    assert run.state.epoch == 3.0
    assert run.state.best_metric >= 100 * 6 / 64
    assert run.state.best_global_step == 6


def test_a_network_of_nothing_but_nan_has_no_dead_share(tmp_path: Path) -> None:
    model, noting = gpt2(), Noting()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    trainer(tmp_path, DeadNeuronCallback(every_n_steps=1), noting, model=model, eval_strategy="epoch").train()
    evaluation = next(logs for _, logs in noting.given if "eval_runtime" in logs)
    assert math.isnan(evaluation["eval_neuronscope/dead_pct"])
    assert evaluation["eval_neuronscope.more/not_finite_pct"] == 100.0
    assert evaluation["eval_neuronscope.more/val_not_finite_pct"] == 100.0
    assert [logs.get("neuronscope/dead_pct") for step, logs in noting.given if step == 12][-1] is None


def test_a_reporter_that_fails_does_not_keep_others_from_their_numbers(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if any(tag.startswith("neuronscope") for tag in logs):
                raise OSError("the disk is full")

    noting = Noting()
    run = trainer(tmp_path, Failing(), DeadNeuronCallback(every_n_steps=1), noting)
    with pytest.warns(NeuronscopeWarning, match="could not write to a logger; .* the disk is full"):
        run.train()
    assert noting.steps("neuronscope/dead_pct") == [12]
    assert run.state.global_step == 12
