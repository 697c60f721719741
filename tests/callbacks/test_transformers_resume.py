"""A Hugging Face training resumed from a checkpoint ends with the counts and the history of one that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neuronscope.callbacks.hf_trainer import FILE
from neuronscope.callbacks.transformers import DeadNeuronCallback
from neuronscope.errors import NeuronscopeWarning
from neuronscope.judge.verdicts import Policy
from tests.callbacks.hugging import ACTS, assert_same_weights, gpt2, trainer, weights
from tests.callbacks.test_resume import assert_equal

#: 6 steps of 4 sentences an epoch. A window is sure with log(0.05) / log(0.7) = 8.4 of them: three observed steps.
OPTIONS: dict[str, Any] = {"every_n_steps": 2, "window_steps": 4, "policy": Policy(max_rate=0.3)}
#: The Trainer logs every step: the mean loss of several would be of fewer behind a resume in the midst of them.
SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "logging_steps": 1,
}


def trained(folder: Path, callback: Any, *, resume: Path | None = None, **options: Any) -> Any:
    run = trainer(folder, callback, model=gpt2(0.0), **{**SAVING, **options})
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run


def assert_same_record(one: DeadNeuronCallback, other: DeadNeuronCallback) -> None:
    assert_equal(one.state_dict()["scope"], other.state_dict()["scope"], "scope")


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 4, "save_steps": 3, "num_train_epochs": 4}],
    ids=["plain", "accumulation"],
)
def test_a_resumed_training_has_the_counts_of_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, first, second = (DeadNeuronCallback(**OPTIONS) for _ in range(3))
    unbroken = trained(tmp_path / "whole", whole, **options)
    trained(tmp_path / "first", first, **options)
    # In the middle of the first epoch, or at its end's second step; into another folder, where there is nothing yet.
    saved = tmp_path / "first" / f"checkpoint-{options.get('save_steps', 5)}"
    resumed = trained(tmp_path / "second", second, resume=saved, **options)
    assert len(whole.report()[ACTS[0]].history.steps) >= 2
    assert_same_record(second, whole)
    assert_same_weights(weights(resumed.model), weights(unbroken.model))


def test_training_resumes_from_the_last_checkpoint_of_the_folder(tmp_path: Path) -> None:
    whole, first, second = (DeadNeuronCallback(**OPTIONS) for _ in range(3))
    trained(tmp_path / "whole", whole, num_train_epochs=3)
    run = trained(tmp_path / "run", first, num_train_epochs=3, max_steps=10)
    run = trainer(tmp_path / "run", second, model=gpt2(0.0), **SAVING, num_train_epochs=3)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 18
    assert (second.census().first_step, second.census().steps) == (0, 9)
    assert list(second.census()) == ACTS
    for act in ACTS:
        assert second.census()[act].positions == whole.census()[act].positions


def test_one_callback_trains_twice_and_goes_back_to_a_checkpoint(tmp_path: Path) -> None:
    whole, callback = DeadNeuronCallback(**OPTIONS), DeadNeuronCallback(**OPTIONS)
    trained(tmp_path / "whole", whole)
    run = trained(tmp_path / "run", callback)
    assert_same_record(callback, whole)
    run.train()  # anew, with what was learnt: 12 steps, and not 24
    assert (callback.census().first_step, callback.census().last_step, callback.census().steps) == (0, 10, 6)
    trained(tmp_path / "again", callback, resume=tmp_path / "whole" / "checkpoint-5")
    assert_same_record(callback, whole)


def test_the_saved_state_holds_only_tensors_and_primitives(tmp_path: Path) -> None:
    pair = DeadNeuronCallback(every_n_steps=1, sites="*.0.*"), DeadNeuronCallback(every_n_steps=1, sites="*.1.*")
    run = trainer(tmp_path, *pair, **SAVING)
    run.train()
    folder = tmp_path / "checkpoint-10"
    saved = torch.load(folder / FILE, weights_only=True)
    assert list(saved) == [callback.state_key for callback in pair]
    assert all(list(state) == ["version", "model", "scope", "published"] for state in saved.values())
    assert all(state["model"] == "GPT2LMHeadModel" for state in saved.values())
    assert not list(folder.glob("*.part"))
    other = DeadNeuronCallback(every_n_steps=1, sites="*.1.*"), DeadNeuronCallback(every_n_steps=1, sites="*.0.*")
    trainer(tmp_path, *other, **SAVING).train(resume_from_checkpoint=str(folder))
    assert [list(callback.census()) for callback in other] == [[ACTS[1]], [ACTS[0]]]
    assert [callback.census().steps for callback in other] == [12, 12]


def test_a_resumed_training_that_nobody_watched_before_begins_where_it_is(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVING).train()
    callback = DeadNeuronCallback(every_n_steps=5)
    trainer(tmp_path, callback, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert (callback.census().first_step, callback.census().last_step) == (5, 10)


def impossible(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with more zeros than positions."""
    for tally in state["scope"]["phases"]["train"]["open"]["tallies"].values():
        tally["zero_outputs"] += 10**9
    return state


@pytest.mark.parametrize("damage", ["damaged", "foreign", "impossible"])
def test_a_file_that_is_not_understood_warns_and_training_goes_on(tmp_path: Path, damage: str) -> None:
    trainer(tmp_path, DeadNeuronCallback(every_n_steps=1), **SAVING).train()
    path = tmp_path / "checkpoint-5" / FILE
    if damage == "damaged":
        path.write_bytes(b"no file of torch's")
    elif damage == "foreign":
        torch.save([1, 2], path)
    else:
        torch.save({key: impossible(state) for key, state in torch.load(path, weights_only=True).items()}, path)
    callback = DeadNeuronCallback(every_n_steps=1)
    run = trainer(tmp_path, callback, **{**SAVING, "save_strategy": "no"})
    with pytest.warns(NeuronscopeWarning, match="could not take up what was saved; training goes on"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert run.state.global_step == 12
    assert callback.census().first_step == 5


def test_a_checkpoint_of_an_earlier_version_begins_anew_at_its_step_and_says_so_once(tmp_path: Path) -> None:
    trainer(tmp_path, DeadNeuronCallback(every_n_steps=1), **SAVING).train()
    path = tmp_path / "checkpoint-5" / FILE
    saved = torch.load(path, weights_only=True)
    for state in saved.values():
        state["scope"]["version"] = 1
    torch.save(saved, path)
    callback = DeadNeuronCallback(every_n_steps=1)
    run = trainer(tmp_path, callback, **{**SAVING, "save_strategy": "no"})
    with pytest.warns(NeuronscopeWarning) as given:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    ours = [str(each.message) for each in given if each.category is NeuronscopeWarning]
    assert len(ours) == 1
    assert "from an earlier version of Neuronscope" in ours[0]
    assert (callback.census().first_step, callback.census().steps, run.state.global_step) == (5, 7, 12)
