"""A run that is watched gives the weights of one that is not, bit for bit, and leaves nothing on the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn

from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.callbacks.runs import Runs
from neuronscope.options import WatchOptions
from tests.agreement.slow_twin import assert_bits, hook_tables, state_of
from tests.callbacks.networks import SETUPS, Setup, batches, network, trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    """How many hooks a model bears, in all of torch's tables together."""
    return sum(len(hooks) for tables in hook_tables(model).values() for hooks in tables.values())


class Left(NamedTuple):
    """What a run leaves of itself."""

    weights: dict[str, torch.Tensor]
    random: torch.Tensor
    tables: dict[str, dict[str, list[int]]]


def assert_unharmed(plain: Left, watched: Left) -> None:
    assert_bits(plain.weights, watched.weights)
    assert torch.equal(plain.random, watched.random)
    assert plain.tables == watched.tables


def users_hook(*args: Any) -> None:
    """A hook of the user's own, that must be where it was in the end."""


def ready(**options: Any) -> Any:
    """A network with a hook of the user's, about to draw its dropout."""
    model = network(**options)
    model.act.register_forward_hook(users_hook, always_call=True)
    model.act.register_forward_pre_hook(users_hook, with_kwargs=True)
    torch.manual_seed(3)
    return model


def monitors(**options: Any) -> list[DeadNeuronMonitor]:
    """Two of them at once on one model."""
    return [DeadNeuronMonitor(window_steps=4, **options), DeadNeuronMonitor(every_n_steps=1, sites="act*")]


def left(model: nn.Module) -> Left:
    return Left(state_of(model), torch.get_rng_state(), hook_tables(model))


def fitted(setup: Setup, callbacks: list[Any]) -> Left:
    model = ready(manual=setup.manual)
    run = trainer(*callbacks, **setup.options, max_epochs=5)
    run.fit(model, batches(12), batches(3))
    assert run.global_step >= 20
    return left(model)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_weights_and_random_numbers_are_those_of_an_unwatched_run(setup: Setup) -> None:
    assert_unharmed(fitted(setup, []), fitted(setup, monitors(every_n_steps=setup.every_n_steps)))


def fitted_twice(callbacks: list[Any]) -> Left:
    """Between two fits of 12 steps an activation is replaced, as a block of several."""
    model, run = ready(), trainer(*callbacks, max_epochs=1)
    run.fit(model, batches(12), batches(2))
    model.act = nn.Sequential(nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 12), nn.ReLU(inplace=True))
    run.fit_loop.max_epochs = 2
    run.fit(model, batches(12), batches(2))
    assert run.global_step == 24
    return left(model)


def resumed(callbacks: list[Any], folder: Path) -> Left:
    """A run of 12 steps is saved; a new model and a new trainer go on from there."""
    run = trainer(*callbacks, max_epochs=1)
    run.fit(ready(), batches(12), batches(2))
    run.save_checkpoint(folder / "run.ckpt")
    again = [DeadNeuronMonitor(window_steps=4, every_n_steps=2)] if callbacks else []
    model, run = ready(), trainer(*again, max_epochs=2)
    run.fit(model, batches(12), batches(2), ckpt_path=folder / "run.ckpt", weights_only=True)
    assert run.global_step == 24
    return left(model)


def averaged(callbacks: list[Any]) -> Left:
    """Lightning's own moving average, of a copy that it makes of the watched model."""
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    model = ready()
    trainer(averaging, *callbacks, max_epochs=2).fit(model, batches(12), batches(2))
    return left(model)


def compiled(callbacks: list[Any]) -> Left:
    torch._dynamo.reset()
    model = ready()
    model.act = nn.Sequential(nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 12), nn.ReLU(inplace=True))
    model.act.compile(backend="aot_eager")
    run = trainer(*callbacks, max_epochs=2)
    run.fit(model, batches(12), batches(2))
    assert run.global_step == 24
    return left(model)


RUNS = [fitted_twice, averaged, pytest.param(compiled, marks=pytest.mark.slow)]


# The compiler's own deprecations, and what it does with the .grad of a graph's inputs.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("run", RUNS)
def test_weights_and_random_numbers_of_longer_runs_are_those_of_unwatched_ones(
    run: Callable[[list[Any]], Left],
) -> None:
    assert_unharmed(run([]), run(monitors(every_n_steps=2)))


def test_weights_and_random_numbers_of_a_resumed_run_are_those_of_an_unwatched_one(tmp_path: Path) -> None:
    unwatched = resumed([], tmp_path)
    assert_unharmed(unwatched, resumed([DeadNeuronMonitor(window_steps=4, every_n_steps=2)], tmp_path))


def test_after_a_users_exception_nothing_is_left_on_the_model() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    model = network(fails_at=5)
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer(monitor).fit(model, batches(8), batches(3))
    assert hooks(model) == 0
    assert torch.overrides._get_current_function_mode() is None  # no function mode of ours is left on torch's stack
    assert monitor.census()["first/relu"].positions == 5 * 8  # steps 0 … 4, and the mistake came before anything ran
    model.fails_at = -1
    trainer(monitor).fit(model, batches(2), batches(1))  # and the monitor can be used again
    assert monitor.census()["first/relu"].positions == 2 * 2 * 8


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
    assert monitor.census()["first/relu"].positions == 2 * 8


def test_a_monitor_that_has_not_run_can_be_copied_and_pickled() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=7, sites=["a", "b"])
    assert copy.deepcopy(monitor).state_key == monitor.state_key
    assert pickle.loads(pickle.dumps(monitor)).state_key == monitor.state_key


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda runs: pickle.loads(pickle.dumps(runs))], ids=["copy", "pickle"]
)
def test_the_census_of_a_monitor_can_be_copied_and_pickled(copied: Any) -> None:
    # Not the monitor itself, once it has run: Lightning hangs the network's own `log` on every callback.
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    runs = Runs(WatchOptions(every_n_steps=1))
    runs.begin_training(model, step=0)
    assert runs.gate is not None
    runs.gate.open()
    model(torch.ones(5, 4))
    other = copied(runs)
    assert (other.scope, other.gate) == (None, None)
    other.begin_training(model, step=0)
    assert other.scope.census()["0/relu"].positions == 5
    other.detach()
    runs.detach()
