"""What the monitor counts is what the module itself recorded, integer by integer, however it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from neuronscope.attach.function_mode import ActivationFunctionMode
from neuronscope.callbacks import DeadNeuronMonitor
from tests.callbacks.networks import FEATURES, SETUPS, SITES, Setup, assert_counts, batches, counted, network, trainer


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_counts_of_a_fit_equal_the_record_of_its_module(setup: Setup) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=setup.every_n_steps, window_steps=4)
    model = network(manual=setup.manual)
    trainer(monitor, **setup.options).fit(model, batches(8), batches(3))
    assert list(monitor.census("train")) == list(SITES)
    for site in SITES:
        assert_counts(monitor.census("train")[site], counted(model.notes, site, "train", setup.steps))
        assert_counts(monitor.census("val")[site], counted(model.notes, site, "validate"))
    assert monitor.census("train").steps == len(setup.steps)


class Twice(torch.optim.SGD):
    """Asks for a second gradient, at the point to which the first one led."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        super().step(closure)
        return loss


@pytest.mark.parametrize(
    ("optimizer", "evaluations"),
    [(torch.optim.SGD, 1), (Twice, 2), (lambda weights, lr: torch.optim.LBFGS(weights, lr, max_iter=3), 3)],
    ids=["once", "twice", "LBFGS"],
)
def test_each_time_that_an_optimizer_runs_the_model_counts(optimizer: Callable[..., Any], evaluations: int) -> None:
    model = network()
    model.configure_optimizers = lambda: optimizer(model.parameters(), lr=0.1)
    monitor = DeadNeuronMonitor(every_n_steps=1)
    trainer(monitor, max_epochs=1).fit(model, batches(4), batches(1))
    for site in SITES:
        assert_counts(monitor.census("train")[site], counted(model.notes, site, "train"))
        assert monitor.census("train")[site].positions == evaluations * 4 * 8


def test_each_time_that_a_users_own_loop_runs_the_model_counts() -> None:
    model = network()

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for _ in range(2):
            with torch.device("meta"):  # a function mode of somebody else's
                optimizer.step(closure=closure)
                assert torch.empty(()).is_meta

    model.optimizer_step = optimizer_step
    monitor = DeadNeuronMonitor(every_n_steps=1)
    trainer(monitor, max_epochs=1).fit(model, batches(4), batches(1))
    for site in SITES:
        assert_counts(monitor.census("train")[site], counted(model.notes, site, "train"))
        assert monitor.census("train")[site].positions == 2 * 4 * 8


def test_an_optimizer_of_torch_steps_without_a_function_mode() -> None:
    depths = []

    def note(*_: Any) -> None:
        depths.append(torch._C._len_torch_function_stack())

    model = network()
    optimizer = model.configure_optimizers()
    optimizer.register_step_post_hook(note)  # the forward and the backward pass run within the step
    model.configure_optimizers = lambda: optimizer
    trainer(DeadNeuronMonitor(every_n_steps=1), max_epochs=1).fit(model, batches(4), batches(1))
    assert depths == [0] * 4


def test_the_hooks_are_off_the_model_in_steps_that_are_not_observed() -> None:
    model = network()
    logits, hooked = model.logits, []

    def note(x: Tensor) -> Tensor:
        if model.trainer.training:
            hooked.append((model.trainer.global_step, bool(model.act._forward_hooks or model.act._forward_pre_hooks)))
        return logits(x)

    model.logits = note
    monitor = DeadNeuronMonitor(every_n_steps=10)
    trainer(monitor, max_epochs=1, val_check_interval=5).fit(model, batches(14), batches(2))
    assert hooked == [(step, step % 10 == 0) for step in range(14)]
    for site in SITES:
        assert_counts(monitor.census("train")[site], counted(model.notes, site, "train", {0, 10}))
        assert_counts(monitor.census("val")[site], counted(model.notes, site, "validate"))


def test_how_gradients_are_set_to_zero_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, look = [], ActivationFunctionMode.__torch_function__

    def note(mode: ActivationFunctionMode, func: Any, *rest: Any) -> Any:
        seen.append(getattr(func, "__self__", None) if func.__name__ in ("__get__", "__set__") else func)
        return look(mode, func, *rest)

    monkeypatch.setattr(ActivationFunctionMode, "__torch_function__", note)
    model, monitor = network(), DeadNeuronMonitor(every_n_steps=1)
    trainer(monitor, max_epochs=1).fit(model, batches(4), batches(1))
    assert F.linear in seen
    assert Tensor.grad not in seen
    for site in SITES:
        assert_counts(monitor.census("train")[site], counted(model.notes, site, "train"))


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "optimizer_zero_grad"])
def test_a_model_that_a_hook_runs_before_the_backward_pass_is_counted(hook: str) -> None:
    model, monitor, depths = network(), DeadNeuronMonitor(every_n_steps=1), []
    theirs = getattr(model, hook)

    def run(*args: Any) -> None:
        model.loss((torch.ones(4, FEATURES), torch.zeros(4, dtype=torch.long)))
        theirs(*args)

    setattr(model, hook, run)
    model.on_before_backward = lambda _: depths.append(torch._C._len_torch_function_stack())
    trainer(monitor, max_epochs=1).fit(model, batches(4), batches(1))
    assert set(monitor.census("train")) == set(SITES)
    assert {monitor.census("train")[site].positions for site in SITES} == {4 * (8 + 4)}
    assert depths == [1] * 4


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_without_a_loss_that_runs_again_is_counted() -> None:
    class RunsTwice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return closure(), super().step(closure)

    model, monitor = network(), DeadNeuronMonitor(every_n_steps=1)
    model.configure_optimizers = lambda: RunsTwice(model.parameters(), lr=0.1)
    loss = model.loss
    model.training_step = lambda batch, batch_idx: loss(batch) if len(model.notes) % 4 else [loss(batch), None][1]
    trainer(monitor, max_epochs=1).fit(model, batches(4), batches(1))
    assert set(monitor.census("train")) == set(SITES)
    assert {monitor.census("train")[site].positions for site in SITES} == {2 * 4 * 8}


def test_a_phase_of_the_users_own_is_counted_in_every_step() -> None:
    model, monitor = network(), DeadNeuronMonitor(every_n_steps=5)
    loss = model.loss

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        assert monitor.scope is not None
        with monitor.scope.phase("again"):
            model.logits(batch[0])
        return loss(batch)

    model.training_step = training_step
    trainer(monitor, max_epochs=1).fit(model, batches(14), batches(1))
    for site in SITES:
        assert monitor.census("again")[site].positions == 14 * 8
        assert monitor.census("train")[site].positions == 3 * 8


@pytest.mark.parametrize("framework", ["pytorch_lightning", "lightning.pytorch"])
def test_phases_are_kept_apart(framework: str) -> None:
    monitor = DeadNeuronMonitor(every_n_steps=2)
    model, run = network(framework), trainer(monitor, framework=framework, num_sanity_val_steps=2)
    run.fit(model, batches(8), batches(3))
    run.validate(model, batches(2), verbose=False)
    run.test(model, batches(4), verbose=False)
    run.predict(model, batches(5))
    for site in SITES:
        assert_counts(monitor.census("train")[site], counted(model.notes, site, "train", set(range(0, 16, 2))))
        assert_counts(monitor.census("val")[site], counted(model.notes, site, "validate"))
        assert_counts(monitor.census("test")[site], counted(model.notes, site, "test"))
    # 2 epochs of 3 batches and one pass of 2, of 8 examples each: 8 × (2 × 3 + 2) = 64; the sanity check is not there.
    assert monitor.census("val").examples == 64
    assert monitor.census("test").examples == 32


def test_neurons_that_never_fire_are_dead_and_carry_their_bound() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=16)
    trainer(monitor).fit(network(), batches(8, size=32), batches(1))
    report = monitor.report()
    # 16 steps of 32 examples: 512, and 299 are enough.
    assert report.window.long_enough
    assert report["first/relu"].judgement.dead[:3].all()
    assert report["first/relu"].dead >= 3
    assert all(verdict.since == -1 for verdict in report.verdicts() if verdict.label == "dead" and verdict.neuron < 3)


def test_the_watched_sites_can_be_chosen() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=1, exclude="relu*", axes={"act": 1})
    trainer(monitor).fit(network(), batches(2), batches(1))
    assert list(monitor.census()) == ["first/relu"]
    assert monitor.census()["first/relu"].axis_source == "declared"
    assert list(monitor.census(window="last")) == []


class Pairs(LightningModule):
    """Gives both members of each pair to one encoder, in a step that is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = batch
        return (self.encoder(one) - self.encoder(other)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def listed(samples: list[Any]) -> list[Tensor]:
    """As torch's own way to make a batch, but not known to be."""
    return [torch.stack(members) for members in zip(*samples)]


@pytest.mark.parametrize(("options", "examples"), [({}, 8 * 3), ({"collate_fn": listed}, 2 * 3)], ids=["usual", "own"])
def test_the_examples_of_a_step_count_once_however_often_it_calls_a_module(
    options: dict[str, Any], examples: int
) -> None:
    """Where a list may be of examples or of inputs, the smaller number counts."""
    pairs = TensorDataset(torch.randn(24, 3), torch.randn(24, 3))
    monitor = DeadNeuronMonitor(every_n_steps=1)
    trainer(monitor, max_epochs=1).fit(Pairs(), DataLoader(pairs, batch_size=8, **options))
    (tally,) = monitor.census().values()
    assert (tally.positions, tally.examples) == (2 * 24, examples)
