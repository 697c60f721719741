"""``watch(optimizer=…)``: the optimizer's steps are the steps of the training, without a call of ``scope.step()``."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.errors import UsageError
from tests.agreement.slow_twin import assert_bits, state_of


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss(model: nn.Module, number: int = 0) -> Tensor:
    return model(torch.randn(5, 3, generator=torch.Generator().manual_seed(number))).square().mean()


def train(model: nn.Module, optimizer: Any, steps: int = 6, scope: ns.Scope | None = None) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        loss(model, number).backward()
        optimizer.step()
        if scope is not None:
            scope.step()


def test_the_optimizers_steps_count_as_calls_of_step_do() -> None:
    counted = []
    for given in (True, False):
        model = net()
        optimizer = sgd(model)
        options: dict[str, Any] = {"optimizer": optimizer} if given else {}
        with ns.watch(model, every_n_steps=2, window_steps=2, policy=ns.Policy(max_rate=0.9), **options) as scope:
            train(model, optimizer, scope=None if given else scope)
        (tally,) = scope.census().values()
        window = scope.report().window
        counted.append(
            (scope.global_step, tally.zero_outputs.tolist(), tally.last_active_step.tolist(), tally.positions, window)
        )
    assert counted[0] == counted[1]
    assert counted[0][0] == 6


def test_gradients_accumulated_over_batches_are_one_step() -> None:
    model = net()
    optimizer = sgd(model)
    with ns.watch(model, optimizer=optimizer) as scope:
        for _ in range(2):
            loss(model).backward()
            loss(model).backward()
            optimizer.step()
    assert scope.global_step == 2
    (tally,) = scope.census().values()
    assert tally.positions == 20


def test_a_call_of_step_beside_the_optimizer_is_an_error_that_says_so() -> None:
    model = net()
    with (
        ns.watch(model, optimizer=sgd(model)) as scope,
        pytest.raises(UsageError, match=r"no call of `step\(\)`, because the steps of the optimizer .* are counted"),
    ):
        scope.step()
    assert scope.global_step == 0


def test_of_several_optimizers_the_first_ones_steps_count() -> None:
    generator, critic = net(), net()
    model = nn.ModuleList([generator, critic])
    first, second = sgd(generator), sgd(critic)
    with ns.watch(model, optimizer=[first, second]) as scope:
        for _ in range(3):
            for _ in range(4):
                loss(critic).backward()
                second.step()
            loss(generator).backward()
            first.step()
    assert scope.global_step == 3


def test_a_step_that_the_gradient_scaler_skips_is_none() -> None:
    model = net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    with ns.watch(model, optimizer=optimizer) as scope:
        for number in range(4):
            optimizer.zero_grad()
            scaler.scale(loss(model, number) * (float("inf") if number == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scope.global_step == 3


def test_an_optimizer_that_calls_a_closure_several_times_takes_one_step() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    with ns.watch(model, optimizer=optimizer) as scope:
        optimizer.step(closure)
    assert scope.global_step == 1


def test_an_optimizer_in_a_wrapper_is_found() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As Accelerate's: it is an optimizer by class only, and hands everything on."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model = net()
    optimizer = Wrapper(sgd(model))
    with ns.watch(model, optimizer=optimizer) as scope:
        loss(model).backward()
        optimizer.step()
    assert scope.global_step == 1


@pytest.mark.parametrize(
    "wrong", [3, "adam", [], [nn.Linear(1, 1)], (None,), net().parameters()], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_optimizer_is_an_error_that_says_so(wrong: Any) -> None:
    model = net()
    with pytest.raises(UsageError, match=r"`optimizer` to be a torch.optim.Optimizer or a list of them, but got"):
        ns.watch(model, optimizer=wrong)
    assert not model[1]._forward_hooks
    assert not model._forward_pre_hooks


def test_after_the_watch_nothing_is_left_on_the_optimizer() -> None:
    model = net()
    optimizer = sgd(model)
    scope = ns.watch(model, optimizer=optimizer)
    train(model, optimizer, 2)
    scope.detach()
    scope.detach()
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 2)
    assert scope.global_step == 2
    reference = weakref.ref(scope)
    del scope
    gc.collect()
    assert reference() is None


def test_the_optimizer_is_unchanged_and_can_be_copied_and_saved() -> None:
    model, watched = net(), net()
    optimizer, seen = sgd(model), sgd(watched)
    train(model, optimizer)
    with ns.watch(watched, optimizer=seen) as scope:
        train(watched, seen)
        assert seen.state_dict() == optimizer.state_dict()
        copied = copy.deepcopy(seen)
        copied.step()
    assert scope.global_step == 6
    assert_bits(state_of(model), state_of(watched))


def test_an_error_of_ours_in_a_step_warns_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = sgd(model)
    with ns.watch(model, optimizer=optimizer) as scope:
        train(model, optimizer, 2)

        def break_down(*_: Any) -> None:
            raise RuntimeError("our own mistake")

        monkeypatch.setattr(scope._hooks.recorder.sites, "note_missed_sites", break_down)
        with pytest.warns(ns.NeuronscopeWarning, match="our own mistake") as caught:
            train(model, optimizer, 3)
    assert len(caught) == 1
    assert "our own mistake" in scope.report().fault
