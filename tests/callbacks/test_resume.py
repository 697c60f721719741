"""A run that is resumed from a checkpoint ends with the counts and the history of one that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.errors import NeuronscopeWarning
from tests.callbacks.networks import batches, network, trainer

OPTIONS: dict[str, Any] = {"every_n_steps": 2, "window_steps": 6}
SIZE = 100  # examples a batch: three observed steps make a window sure


def assert_same(one: DeadNeuronMonitor, other: DeadNeuronMonitor) -> None:
    """Counts, windows and histories of both phases are equal, bit for bit."""
    state, other_state = one.state_dict()["scope"], other.state_dict()["scope"]
    assert_equal(state, other_state, "scope")
    for phase in ("train", "val"):
        for site, report in enumerate(one.report(phase).layers):
            assert report.to_dict() == other.report(phase).layers[site].to_dict()


def assert_equal(one: Any, other: Any, path: str) -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            if key != "checkpoints":  # each run knows its own
                assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, torch.Tensor):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=path)
    else:
        assert one == other, path


def whole(epochs: int = 4, **options: Any) -> DeadNeuronMonitor:
    monitor = DeadNeuronMonitor(**OPTIONS)
    model = network()
    model.drop.p = 0.0  # a resumed run draws other random numbers
    trainer(monitor, max_epochs=epochs, **options).fit(model, batches(8, SIZE), batches(3, SIZE))
    return monitor


def resumed(checkpoint: Path, *callbacks: Any, **options: Any) -> DeadNeuronMonitor:
    monitor = DeadNeuronMonitor(**OPTIONS)
    model = network()
    model.drop.p = 0.0
    run = trainer(monitor, *callbacks, max_epochs=4, enable_checkpointing=bool(callbacks), **options)
    run.fit(model, batches(8, SIZE), batches(3, SIZE), ckpt_path=checkpoint, weights_only=True)
    return monitor


@pytest.mark.parametrize("saver", ["train_epoch_end", "validation_end"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=["plain", "accumulation"])
def test_a_run_resumed_from_model_checkpoint_has_the_counts_of_an_uninterrupted_one(
    tmp_path: Path, saver: str, options: dict[str, Any]
) -> None:
    def keep(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, save_top_k=-1, save_on_train_epoch_end=saver == "train_epoch_end")

    checkpoint = keep("first")
    first = DeadNeuronMonitor(**OPTIONS)
    model = network()
    model.drop.p = 0.0
    run = trainer(first, checkpoint, max_epochs=2, enable_checkpointing=True, **options)
    run.fit(model, batches(8, SIZE), batches(3, SIZE))
    assert_same(resumed(Path(checkpoint.best_model_path), keep("second"), **options), whole(**options))


def test_a_run_resumed_after_its_end_keeps_its_counts(tmp_path: Path) -> None:
    # The end of the first fit closed its window for the report; the resumed run goes on in that window.
    first = DeadNeuronMonitor(**OPTIONS)
    model = network()
    model.drop.p = 0.0
    run = trainer(first, max_epochs=2)
    run.fit(model, batches(8, SIZE), batches(3, SIZE))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert_same(resumed(tmp_path / "end.ckpt"), whole())


def test_the_saved_state_is_tensors_and_primitives(tmp_path: Path) -> None:
    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict):
            return set().union(*(kinds(inner) for inner in value.values()))
        if isinstance(value, list):
            return set().union(*(kinds(inner) for inner in value))
        return {type(value)}

    monitor = whole(epochs=1)
    assert kinds(monitor.state_dict()) <= {torch.Tensor, int, float, str, bool, type(None)}
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    assert_equal(torch.load(tmp_path / "state.pt", weights_only=True), monitor.state_dict(), "state")


def test_monitors_of_other_options_keep_their_states_apart(tmp_path: Path) -> None:
    def pair() -> tuple[DeadNeuronMonitor, DeadNeuronMonitor]:
        return DeadNeuronMonitor(every_n_steps=1, sites="act"), DeadNeuronMonitor(every_n_steps=1, sites="relu*")

    first, second = pair()
    run = trainer(first, second, max_epochs=1)
    run.fit(network(), batches(4), batches(1))
    run.save_checkpoint(tmp_path / "both.ckpt")
    first, second = pair()
    trainer(second, first, max_epochs=2).fit(network(), batches(4), batches(1), ckpt_path=tmp_path / "both.ckpt")
    assert [list(monitor.census()) for monitor in (first, second)] == [["first/relu"], ["second/relu"]]
    assert [monitor.census().steps for monitor in (first, second)] == [8, 8]
    assert [
        monitor.census()["first/relu" if monitor is first else "second/relu"].positions for monitor in (first, second)
    ] == [
        64,
        64,
    ]


def test_a_resumed_run_without_a_saved_state_begins_where_it_is(tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(network(), batches(7), batches(1))
    run.save_checkpoint(tmp_path / "bare.ckpt")
    monitor = DeadNeuronMonitor(every_n_steps=5)
    trainer(monitor, max_epochs=2).fit(network(), batches(7), batches(1), ckpt_path=tmp_path / "bare.ckpt")
    assert (monitor.census().first_step, monitor.census().last_step) == (7, 10)  # 7 is the first there is


def test_testing_a_checkpoint_keeps_the_counts_of_training(tmp_path: Path) -> None:
    monitor = DeadNeuronMonitor(**OPTIONS)
    run = trainer(monitor, max_epochs=1)
    model = network()
    run.fit(model, batches(8), batches(2))
    run.save_checkpoint(tmp_path / "early.ckpt")
    run.fit_loop.max_epochs = 2
    run.fit(model, batches(8), batches(2))
    positions = monitor.census()["first/relu"].positions
    run.test(model, batches(2), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert monitor.census()["first/relu"].positions == positions == 8 * 8
    # A monitor that has nothing at hand takes what the checkpoint has.
    other = DeadNeuronMonitor(**OPTIONS)
    trainer(other).test(network(), batches(2), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert other.census()["first/relu"].positions == 4 * 8
    assert other.census("test")["first/relu"].positions == 2 * 8


def test_a_state_put_back_in_the_middle_of_a_run_replaces_what_is_there() -> None:
    """As when a tuner saves a checkpoint, tries something and restores it."""
    states: list[dict[str, Any]] = []

    class Rolling(DeadNeuronMonitor):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            if trainer.global_step == 3:
                states.append(self.state_dict())
                self.load_state_dict(self.state_dict())

    monitor, plain = Rolling(every_n_steps=1), DeadNeuronMonitor(every_n_steps=1)
    trainer(monitor, plain, max_epochs=1).fit(network(), batches(8), batches(1))
    assert len(states) == 1
    assert_same(monitor, plain)


@pytest.mark.parametrize("state", [{"version": 7}, {"version": 1, "model": "Net"}, {"nonsense": 3}])
def test_a_state_that_is_not_understood_warns_and_training_goes_on(state: dict[str, Any]) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    with pytest.warns(NeuronscopeWarning, match="could not take up what was saved"):
        monitor.load_state_dict(state)
    trainer(monitor, max_epochs=1).fit(network(), batches(2), batches(1))
    assert monitor.census()["first/relu"].positions == 16


def changed_checkpoint(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint after five steps, whose saved scope was changed."""
    first = DeadNeuronMonitor(every_n_steps=1)
    run = trainer(first, max_epochs=1)
    run.fit(network(), batches(5), batches(1))
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    change(saved["callbacks"][first.state_key]["scope"])
    torch.save(saved, path)
    return path


def test_a_checkpoint_with_impossible_counts_warns_and_counting_begins_anew(tmp_path: Path) -> None:
    def damage(scope: dict[str, Any]) -> None:
        for tally in scope["phases"]["train"]["open"]["tallies"].values():
            tally["zero_gradients"] -= 10**9

    damaged = changed_checkpoint(tmp_path / "damaged.ckpt", damage)
    monitor = DeadNeuronMonitor(every_n_steps=1)
    with pytest.warns(NeuronscopeWarning, match=r"could not take up what was saved.* zero_gradients has -"):
        trainer(monitor, max_epochs=2).fit(network(), batches(5), batches(1), ckpt_path=damaged)
    assert (monitor.census().first_step, monitor.census().last_step, monitor.census().steps) == (5, 9, 5)
    assert monitor.census()["first/relu"].positions == 5 * 8


def test_a_checkpoint_of_an_earlier_version_begins_anew_at_its_step_and_says_so_once(tmp_path: Path) -> None:
    old = changed_checkpoint(tmp_path / "old.ckpt", lambda scope: scope.update(version=1))
    monitor = DeadNeuronMonitor(every_n_steps=1)
    with pytest.warns(NeuronscopeWarning) as given:
        trainer(monitor, max_epochs=2).fit(network(), batches(5), batches(1), ckpt_path=old)
    ours = [str(each.message) for each in given if each.category is NeuronscopeWarning]
    assert len(ours) == 1
    assert "from an earlier version of Neuronscope" in ours[0]
    assert (monitor.census().first_step, monitor.census().last_step, monitor.census().steps) == (5, 9, 5)
    assert monitor.census()["first/relu"].positions == 5 * 8
