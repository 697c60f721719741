"""One monitor, several runs: what goes on, what begins anew, and models that change in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.errors import NeuronscopeWarning, UsageError
from tests.callbacks.networks import SITES, assert_counts, batches, counted, network, trainer


def test_a_second_fit_of_the_same_trainer_goes_on() -> None:
    once, twice = DeadNeuronMonitor(every_n_steps=1, window_steps=5), DeadNeuronMonitor(every_n_steps=1, window_steps=5)
    for monitor, epochs in ((once, (4,)), (twice, (1, 4))):
        model, run = network(), trainer(monitor, limit_val_batches=0, max_epochs=0)
        torch.manual_seed(3)
        for last in epochs:
            run.fit_loop.max_epochs = last
            run.fit(model, batches(8, size=100), batches(1))
        assert_counts(monitor.census()["first/relu"], counted(model.notes, "first/relu", "train"))
    # 100 examples a step: 3 steps are sure (299), windows have 5. The first fit ended after step 7 and closed steps 5
    # to 7 for its report; yet the second went on in that window. At the end, steps 30 and 31 have only 200 examples.
    for site in SITES:
        for monitor in (once, twice):
            assert monitor.report()[site].history.steps.tolist() == [4, 9, 14, 19, 24, 29]


def test_a_fit_with_another_trainer_begins_anew() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    model = network()
    for _ in range(2):
        trainer(monitor).fit(model, batches(2), batches(1))
    assert monitor.census()["first/relu"].positions == 2 * 2 * 8
    assert monitor.census().first_step == 0


def test_counts_of_a_fit_outlive_a_test_of_other_weights() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    model, run = network(), trainer(monitor)
    run.fit(model, batches(2), batches(1))
    run.test(network(), batches(3), verbose=False)
    assert_counts(monitor.census("train")["first/relu"], counted(model.notes, "first/relu", "train"))
    assert monitor.census("test").examples == 24
    run.fit_loop.max_epochs = 3
    run.fit(model, batches(2), batches(1))
    assert_counts(monitor.census("train")["first/relu"], counted(model.notes, "first/relu", "train"))
    assert monitor.census("test").examples == 24


@pytest.mark.parametrize("width", [7, 30])
def test_a_site_whose_width_changed_between_fits_starts_anew(width: int) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    model, run = network(), trainer(monitor, max_epochs=1)
    run.fit(model, batches(8, size=200), batches(1))
    assert len(monitor.report()["second/relu"].history.steps) == 4
    notes, model.notes = model.notes, []
    model.second, model.last = nn.Linear(12, width), nn.Linear(width, 3)
    run.fit_loop.max_epochs = 2
    run.fit(model, batches(8, size=200), batches(1))
    assert monitor.census()["second/relu"].neurons == width
    assert monitor.census()["second/relu"].positions == 8 * 200
    assert len(monitor.report()["second/relu"].history.steps) == 4
    assert_counts(monitor.census()["first/relu"], counted([*notes, *model.notes], "first/relu", "train"))
    assert len(monitor.report()["first/relu"].history.steps) == 8


def test_a_site_that_went_away_is_left_out_and_named_and_one_that_came_is_counted() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=2)
    model, run = network(), trainer(monitor, max_epochs=1)
    run.fit(model, batches(4, size=200), batches(1))
    model.act = nn.Sequential(nn.Identity(), nn.GELU())
    run.fit_loop.max_epochs = 2
    run.fit(model, batches(4, size=200), batches(1))
    report = monitor.report()
    assert "first/relu" not in [layer.name for layer in report.layers]
    assert any("counts of first/relu are left out: another activation follows" in note for note in report.notes)
    assert report["first/gelu"].positions > 0


@pytest.mark.parametrize(("stage", "phase"), [("validate", "val"), ("test", "test")])
def test_evaluation_without_training_is_counted(stage: str, phase: str) -> None:
    monitor = DeadNeuronMonitor()
    model = network()
    getattr(trainer(monitor), stage)(model, batches(40), verbose=False)
    assert_counts(monitor.census(phase)["first/relu"], counted(model.notes, "first/relu", stage))
    report = monitor.report(phase)
    assert report.window.long_enough
    assert report["first/relu"].judgement.dead[:3].all()
    assert monitor.census("train").neurons == 0
    assert monitor.scope is not None
    assert monitor.scope.detached


def test_prediction_is_not_watched() -> None:
    monitor = DeadNeuronMonitor()
    trainer(monitor).predict(network(), batches(2))
    assert monitor.scope is None
    with pytest.raises(UsageError, match="Expected a monitor that has watched a run"):
        monitor.report()
    with pytest.raises(UsageError, match="Expected a monitor that has watched a run"):
        monitor.census()


def test_callback_hooks_that_are_called_twice_do_no_harm() -> None:
    class Twice(DeadNeuronMonitor):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            super().on_fit_start(trainer, pl_module)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().teardown(trainer, pl_module, stage)
            super().teardown(trainer, pl_module, stage)

    monitor = Twice(every_n_steps=1)
    model = network()
    trainer(monitor).fit(model, batches(2), batches(1))
    assert_counts(monitor.census()["first/relu"], counted(model.notes, "first/relu", "train"))


def test_a_skipped_batch_does_not_start_counting() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    model = network()
    start = model.on_train_batch_start
    model.on_train_batch_start = lambda batch, index: -1 if index == 1 else start(batch, index)
    model.on_train_epoch_end = lambda: model.act(torch.zeros(5, 12))  # comes next, and there was no end of the batch
    trainer(monitor).fit(model, batches(4), batches(2))
    assert_counts(monitor.census()["first/relu"], counted(model.notes, "first/relu", "train"))


def test_a_model_without_activations_is_trained_all_the_same() -> None:
    monitor = DeadNeuronMonitor(functional=False)
    model = network()
    model.act = nn.Identity()
    with pytest.warns(NeuronscopeWarning, match="Expected a model with at least one activation"):
        trainer(monitor, max_epochs=1).fit(model, batches(2), batches(1))
    assert monitor.scope is None


def test_a_run_without_batches_gives_an_empty_report() -> None:
    monitor = DeadNeuronMonitor()
    trainer(monitor, max_epochs=0).fit(network(), batches(2), batches(1))
    assert monitor.report().neurons == 0
    assert monitor.scope is not None
    assert monitor.scope.detached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"window_steps": 1.5}, "window_steps"),
        ({"sites": []}, "sites"),
        ({"axes": {"a": "1"}}, "axes"),
        ({"policy": {}}, "policy"),
        ({"on_dead": "cry"}, "one of log, warn, stop"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": True}, "threshold"),
        ({"drawing_share": 0}, "drawing_share"),
    ],
)
def test_wrong_options_raise_an_error_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeadNeuronMonitor(**options)
