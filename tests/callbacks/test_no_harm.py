"""A run that is watched gives the weights of one that is not, bit for bit, and leaves nothing on the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.callbacks.runs import Runs
from tests.callbacks.networks import SETUPS, Setup, batches, network, trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def fitted(setup: Setup, *callbacks: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = network(manual=setup.manual)
    torch.manual_seed(3)  # dropout draws from here
    trainer(*callbacks, **setup.options).fit(model, batches(8), batches(3))
    assert hooks(model) == 0
    return weights(model), torch.get_rng_state()


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_weights_and_random_numbers_are_those_of_an_unwatched_run(setup: Setup) -> None:
    plain, plain_rng = fitted(setup)
    watched, watched_rng = fitted(
        setup,
        DeadNeuronMonitor(every_n_steps=setup.every_n_steps, window_steps=4),
        DeadNeuronMonitor(every_n_steps=1, sites="act"),
    )
    assert plain.keys() == watched.keys()
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    assert torch.equal(plain_rng, watched_rng)


def test_after_a_users_exception_nothing_is_left_on_the_model() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    model = network(fails_at=5)
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer(monitor).fit(model, batches(8), batches(3))
    assert hooks(model) == 0
    assert torch.overrides._get_current_function_mode() is None  # no function mode of ours is left on torch's stack
    assert monitor.census()["act"].positions == 5 * 8  # steps 0 … 4, and the mistake came before anything ran
    model.fails_at = -1
    trainer(monitor).fit(model, batches(2), batches(1))  # and the monitor can be used again
    assert monitor.census()["act"].positions == 2 * 2 * 8


def test_a_model_can_be_copied_and_pickled_while_it_is_watched() -> None:
    copies: list[nn.Module] = []

    class Copying(DeadNeuronMonitor):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            copies.append(copy.deepcopy(pl_module.act))
            copies.append(pickle.loads(pickle.dumps(pl_module.act)))
            copies[-1](torch.zeros(4, 12))

    monitor = Copying(every_n_steps=1)
    trainer(monitor, max_epochs=1).fit(network(), batches(2), batches(1))
    assert len(copies) == 4
    assert monitor.census()["act"].positions == 2 * 8


def test_a_monitor_that_has_not_run_can_be_copied_and_pickled() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=7, sites=["a", "b"])
    assert copy.deepcopy(monitor).state_key == monitor.state_key
    assert pickle.loads(pickle.dumps(monitor)).state_key == monitor.state_key


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda runs: pickle.loads(pickle.dumps(runs))], ids=["copy", "pickle"]
)
def test_what_a_monitor_has_seen_can_be_copied_and_pickled(copied: Any) -> None:
    # Not the monitor itself, once it has run: Lightning hangs the network's own `log` on every callback.
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    runs = Runs({"every_n_steps": 1})
    runs.begin_fit(model, step=0)
    assert runs.gate is not None
    runs.gate.open()
    model(torch.ones(5, 4))
    other = copied(runs)
    assert (other.scope, other.gate) == (None, None)
    other.begin_fit(model, step=0)
    assert other.scope.census()["1"].positions == 5
    other.detach()
    runs.detach()
