"""What ends a Hugging Face training and what does not: alarms, faults of ours, mistakes of the user's; what is left."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from neuronscope.callbacks.transformers import DeadNeuronCallback
from neuronscope.errors import NeuronscopeWarning, UsageError
from neuronscope.judge.verdicts import Policy
from neuronscope.scope import Scope
from tests.callbacks.hugging import ACTS, assert_same_weights, gpt2, trainer, weights
from tests.callbacks.test_no_harm import hooks

#: 4 sentences a step; log(0.05) / log(0.7) = 8.4 make a window sure: windows of 3 steps. 6 of 64 neurons never fire.
OPTIONS: dict[str, Any] = {"every_n_steps": 1, "window_steps": 3, "policy": Policy(max_rate=0.3)}


class FailingTrainer(Trainer):
    """One whose loss fails in the sixth step, after the model ran."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 5:
            raise RuntimeError("the user's own mistake")
        return loss


def test_an_alarm_stops_the_training_cleanly(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(**OPTIONS, on_dead="stop", threshold=5)
    run = trainer(tmp_path, callback)
    assert run.train().global_step == 3
    assert callback.census().steps == 3
    assert hooks(run.model) == 0


def test_an_alarm_warns_once(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(**OPTIONS, on_dead="warn", threshold=5)
    with pytest.warns(NeuronscopeWarning, match="the threshold is 5 %. Worst is transformer.h.") as caught:
        assert trainer(tmp_path, callback).train().global_step == 12
    assert len([warning for warning in caught if issubclass(warning.category, NeuronscopeWarning)]) == 1


def test_below_the_threshold_no_alarm_is_raised(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(**OPTIONS, on_dead="stop", threshold=95)
    assert trainer(tmp_path, callback).train().global_step == 12


@pytest.mark.parametrize("broken", ["__init__", "step", "report", "phase", "state_dict"])
def test_a_fault_of_ours_never_ends_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "neuronscope/dead_pct"}
    plain = trainer(tmp_path, eval_strategy="epoch")
    plain.train()

    def break_down(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    callback = DeadNeuronCallback(**OPTIONS)
    monkeypatch.setattr(Scope, broken, break_down)
    run = trainer(tmp_path, callback, **options)
    with pytest.warns(NeuronscopeWarning, match=r"Neuronscope could not .*; training goes on.* the disk is full"):
        assert run.train().global_step == 12
    assert hooks(run.model) == 0
    assert_same_weights(weights(run.model), weights(plain.model))
    monkeypatch.undo()
    if broken in ("step", "phase"):
        assert callback.report().notes[0].startswith("Neuronscope stopped watching at step ")
        assert callback.report().notes[0].endswith("later steps are not counted. OSError: the disk is full")


def test_after_a_users_exception_the_hooks_go_with_the_context(tmp_path: Path) -> None:
    with DeadNeuronCallback(every_n_steps=1) as callback:
        run = trainer(tmp_path, callback, kind=FailingTrainer)
        with pytest.raises(RuntimeError, match="the user's own mistake"):
            run.train()
        assert hooks(run.model) > 0
    assert hooks(run.model) == 0
    assert torch.overrides._get_current_function_mode() is None
    assert callback.census()[ACTS[0]].positions == 6 * 4 * 6  # six steps of 4 sentences of 6 tokens


def test_after_a_users_exception_the_next_training_begins_anew(tmp_path: Path) -> None:
    callback, model = DeadNeuronCallback(every_n_steps=1), gpt2()
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer(tmp_path, callback, model=model, kind=FailingTrainer).train()
    trainer(tmp_path, callback, model=model).train()
    assert callback.census()[ACTS[0]].positions == 12 * 4 * 6
    assert hooks(model) == 0


def test_after_a_users_exception_the_hooks_go_when_the_callback_goes(tmp_path: Path) -> None:
    model = gpt2()
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer(tmp_path, DeadNeuronCallback(every_n_steps=1), model=model, kind=FailingTrainer).train()
    gc.collect()
    assert hooks(model) == 0


def test_a_model_without_activations_is_trained_all_the_same(tmp_path: Path) -> None:
    model = gpt2()
    for block in model.transformer.h:
        block.mlp.act = nn.Identity()
    callback = DeadNeuronCallback(functional=False)
    with pytest.warns(NeuronscopeWarning, match="Expected a model with at least one activation"):
        assert trainer(tmp_path, callback, model=model, eval_strategy="epoch").train().global_step == 12
    assert callback.scope is None
    with pytest.raises(UsageError, match="Expected a monitor that has watched a run"):
        callback.report()


def test_a_callback_called_by_an_unknown_trainer_still_counts(tmp_path: Path) -> None:
    class State:
        global_step, is_world_process_zero, log_history, epoch = 0, True, [], 0.0

    model, callback, event = gpt2(0.0), DeadNeuronCallback(every_n_steps=1), (None, State(), None)
    with pytest.warns(NeuronscopeWarning, match="could not find the Trainer"):
        callback.on_train_begin(*event, model=model)
    callback.on_step_begin(*event)
    model(torch.zeros(2, 6, dtype=torch.int64)).logits.sum().backward()
    callback.on_pre_optimizer_step(*event)
    State.global_step = 1
    callback.on_step_end(*event)
    callback.on_train_end(*event)
    assert callback.census()[ACTS[0]].positions == 12
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"window_steps": 1.5}, "window_steps"),
        ({"sites": []}, "sites"),
        ({"policy": {}}, "policy"),
        ({"on_dead": "cry"}, "one of log, warn, stop"),
        ({"threshold": 0}, "threshold"),
        ({"drawing_share": 0}, "drawing_share"),
    ],
)
def test_wrong_options_raise_an_error_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeadNeuronCallback(**options)


def test_without_transformers_the_error_names_the_command() -> None:
    code = "import sys; sys.modules['transformers'] = None; import neuronscope.callbacks.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingExtraError" in done.stderr
    assert "pip install 'neuronscope[transformers]'" in done.stderr
