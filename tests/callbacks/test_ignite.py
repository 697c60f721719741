"""A callback for another trainer, written over public names alone: the example for PyTorch Ignite."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import neuronscope as ns
from examples import ignite_callback
from examples.ignite_callback import DeadNeuronHandler
from neuronscope.errors import NeuronscopeWarning
from tests.agreement.slow_twin import assert_bits, hook_tables, state_of

EPOCHS, STEPS, SIZE = 3, 8, 16
TALLY = ("zero_outputs", "zero_gradients", "last_active_step", "positions", "gradient_positions", "examples")


def network() -> nn.Sequential:
    """Two activations, one of them after dropout, and three neurons that never fire."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.25), nn.Linear(12, 10), nn.ReLU(inplace=True), nn.Linear(10, 3)
    )
    with torch.no_grad():
        model[0].bias[:3] = -100.0
    return model


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(SIZE, 8, generator=generator), torch.randint(3, (SIZE,), generator=generator))
        for _ in range(count)
    ]


TRAIN, VAL = batches(STEPS, seed=1), batches(3, seed=2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def engines(model: nn.Module) -> tuple[Engine, Engine]:
    """A trainer that validates after every epoch, as users write it."""
    trainer, evaluator = (
        create_supervised_trainer(model, sgd(model), F.cross_entropy),
        create_supervised_evaluator(model),
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(VAL))
    return trainer, evaluator


def run(handler: DeadNeuronHandler | None, model: nn.Module) -> Engine:
    trainer, evaluator = engines(model)
    if handler is not None:
        handler.attach(trainer, evaluator)
    torch.manual_seed(3)
    trainer.run(TRAIN, max_epochs=EPOCHS)
    return trainer


def looped(every_n_steps: int) -> ns.Scope:
    """The same training in a plain loop, watched by `ns.watch`."""
    model = network()
    optimizer = sgd(model)
    torch.manual_seed(3)
    with ns.watch(model, every_n_steps=every_n_steps) as scope:
        for _ in range(EPOCHS):
            for x, y in TRAIN:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scope.step()
            model.eval()
            with scope.phase("val"), torch.no_grad():
                for x, _ in VAL:
                    model(x)
            model.train()
    return scope


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_weights_and_random_numbers_are_those_of_a_run_without_the_handler(every_n_steps: int, tmp_path: Path) -> None:
    plain, watched = network(), network()
    run(None, plain)
    numbers = torch.get_rng_state()
    with SummaryWriter(tmp_path) as writer:
        run(DeadNeuronHandler(watched, writer, every_n_steps=every_n_steps, window_steps=4), watched)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert_bits(state_of(plain), state_of(watched))
    assert hook_tables(watched) == hook_tables(plain)


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_counts_are_those_of_a_plain_loop_and_validation_is_apart(every_n_steps: int) -> None:
    model = network()
    handler = DeadNeuronHandler(model, every_n_steps=every_n_steps)
    run(handler, model)
    scope = looped(every_n_steps)
    for phase in ("train", "val"):
        census = handler.monitor.census(phase)
        assert list(census) == list(scope.census(phase)) == ["0/relu", "3/relu"]
        for name, tally in census.items():
            for field in TALLY:
                np.testing.assert_array_equal(getattr(tally, field), getattr(scope.census(phase)[name], field), field)
    observed = EPOCHS * STEPS // every_n_steps
    assert handler.monitor.census("train").examples == observed * SIZE
    assert handler.monitor.census("val").examples == EPOCHS * len(VAL) * SIZE
    assert handler.monitor.census("val")["0/relu"].gradient_positions == 0


def test_the_writer_gets_every_window_and_every_pass_once(tmp_path: Path) -> None:
    model = network()
    with SummaryWriter(tmp_path) as writer:
        run(DeadNeuronHandler(model, writer, every_n_steps=1, window_steps=20), model)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [event.step for event in found.Scalars("neuronscope/dead_pct")] == [20, 24]
    assert [event.step for event in found.Scalars("neuronscope/val_dead_pct")] == [8, 16, 24]
    drawn = EventAccumulator(str(tmp_path / "neuronscope"))
    drawn.Reload()
    assert [event.step for event in drawn.Images("neuronscope/overview")] == [24]


def test_a_training_is_stopped_when_too_many_neurons_are_dead() -> None:
    model = network()
    handler = DeadNeuronHandler(model, every_n_steps=1, window_steps=20, on_dead="stop", threshold=10)
    trainer = run(handler, model)
    assert trainer.state.iteration == 20
    assert "the threshold is 10 %" in str(handler.monitor.stop_reason)


def test_after_an_exception_no_hook_is_left_and_the_exception_is_the_users() -> None:
    model = network()
    handler = DeadNeuronHandler(model, every_n_steps=1)
    trainer, evaluator = engines(model)
    handler.attach(trainer, evaluator)

    @trainer.on(Events.ITERATION_COMPLETED(once=5))
    def fail() -> None:
        raise RuntimeError("the user's own mistake")

    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer.run(TRAIN, max_epochs=1)
    assert hook_tables(model) == hook_tables(network())
    assert handler.monitor.census().examples == 5 * SIZE
    assert not handler.monitor.attached


def test_a_resumed_training_continues_the_counts() -> None:
    model = network()
    first = DeadNeuronHandler(model, every_n_steps=1)
    trainer, evaluator = engines(model)
    first.attach(trainer, evaluator)
    trainer.run(TRAIN, max_epochs=1)
    saved = {"neurons": first.monitor.state_dict(), "trainer": trainer.state_dict()}  # as Ignite's Checkpoint does

    resumed = DeadNeuronHandler(model, every_n_steps=1)
    trainer, evaluator = engines(model)
    resumed.attach(trainer, evaluator)
    resumed.monitor.load_state_dict(saved["neurons"])
    trainer.load_state_dict(saved["trainer"])
    trainer.run(TRAIN, max_epochs=2)
    assert resumed.monitor.census("train").examples == 2 * STEPS * SIZE
    assert resumed.monitor.census("val").examples == 2 * len(VAL) * SIZE
    assert resumed.monitor.report().global_step == 2 * STEPS


def test_a_fault_of_neuronscope_ends_the_watch_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = network(), network()
    run(None, plain)

    def break_down(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(ns.Scope, "report", break_down)
    with pytest.warns(NeuronscopeWarning, match="could not watch this run any longer") as caught:
        trainer = run(DeadNeuronHandler(model, every_n_steps=1), model)
    assert len(caught) == 1
    assert trainer.state.iteration == EPOCHS * STEPS
    assert_bits(state_of(plain), state_of(model))
    assert hook_tables(model) == hook_tables(plain)


def test_the_example_uses_no_underscore_name() -> None:
    tree = ast.parse(inspect.getsource(ignite_callback))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not {name for name in names if name.startswith("_")}
