"""Faults of ours, or of a logger, warn once; training goes on to the end it would have had."""

from __future__ import annotations

from typing import Any

import pytest

from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.errors import NeuronscopeWarning
from neuronscope.scope import Scope
from tests.callbacks.networks import batches, network, trainer
from tests.callbacks.test_no_harm import hooks, weights
from tests.callbacks.test_publishing import Noting


def ours(caught: Any) -> list[Any]:
    """Ours among the warnings: Lightning has some of its own."""
    return [warning for warning in caught if issubclass(warning.category, NeuronscopeWarning)]


def break_down(*args: Any, **kwargs: Any) -> None:
    raise OSError("the disk is full")


@pytest.mark.parametrize("broken", ["step", "report", "open_step", "phase"])
def test_a_fault_of_ours_while_counting_removes_the_hooks(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    plain = network()
    trainer().fit(plain, batches(4), batches(1))
    model, monitor = network(), DeadNeuronMonitor(every_n_steps=1)
    monkeypatch.setattr(Scope, broken, break_down)
    run = trainer(monitor)
    with pytest.warns(NeuronscopeWarning, match="could not watch this run any longer; .* the disk is full") as caught:
        run.fit(model, batches(4), batches(1))
    assert len(ours(caught)) == 1
    assert run.global_step == 8
    assert hooks(model) == 0
    assert all((value == weights(model)[name]).all() for name, value in weights(plain).items())
    monkeypatch.undo()
    step = {"step": 0, "report": 4, "open_step": 0, "phase": 4}[broken]
    said = f"Neuronscope stopped watching at step {step} because of an internal error; later steps are not counted. "
    assert monitor.report().notes[0] == said + "OSError: the disk is full"
    assert str(monitor.report("val")).startswith(f"!! Neuronscope stopped watching at step {step}")


def test_a_fault_of_ours_while_attaching_does_not_stop_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    monkeypatch.setattr(Scope, "__init__", break_down)
    with pytest.warns(NeuronscopeWarning, match="could not watch this run any longer"):
        trainer(monitor).fit(network(), batches(2), batches(1))
    assert monitor.scope is None


def test_a_logger_that_fails_does_not_keep_others_from_their_numbers() -> None:
    class Failing(Noting):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(tag.startswith("neuronscope") for tag in metrics):
                break_down()

    good = Noting()
    monitor = DeadNeuronMonitor(every_n_steps=1)
    with pytest.warns(NeuronscopeWarning, match="could not write to a logger; .* the disk is full") as caught:
        trainer(monitor, logger=[Failing(), good], log_every_n_steps=1).fit(network(), batches(4), batches(1))
    assert len(ours(caught)) == 1
    assert good.steps("neuronscope/val_dead_pct") == [3, 7]
    assert good.steps("neuronscope/dead_pct") == [7]
    assert monitor.census().steps == 8


def test_exceptions_of_ours_are_suppressed_and_interrupts_are_not() -> None:
    faults = SuppressErrors("do anything")

    def fail() -> None:
        with faults:
            raise ValueError("no")

    with pytest.warns(NeuronscopeWarning, match="could not do anything"):
        fail()
    fail()  # a second warning would be an error here
    with pytest.raises(KeyboardInterrupt), faults:
        raise KeyboardInterrupt
