"""While an activation module runs, our function mode is off the stack: nobody else's is, and it comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import neuronscope as ns


class Names(TorchFunctionMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def modes() -> list[Any]:
    return [torch._C._get_function_stack_at(depth) for depth in range(torch._C._len_torch_function_stack())]


class Spying(nn.ReLU):
    """Notes which modes are on the stack while it runs; fails if it is told to."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.modes: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes = modes()
        if self.fails:
            raise ArithmeticError
        return super().forward(x)


class Net(nn.Module):
    """A module, a functional activation after it, and perhaps a mode entered in between."""

    def __init__(self, act: nn.Module, mode: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.fc, self.act, self.mode = nn.Linear(4, 3), act, mode

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.mode is None:
            x = self.act(x)
        else:
            with self.mode():
                x = self.act(x)
        return F.relu(x - 0.1)


def test_inside_an_activation_no_mode_of_ours_is_active_and_later_functions_are_counted():
    net = Net(Spying())
    with ns.watch(net) as scope:
        net(torch.ones(2, 4))
        scope.step()
        census = scope.census("train")
    assert net.act.modes == []
    assert set(census) == {"fc/relu", "fc/relu#1"}
    assert modes() == []


def test_a_function_mode_around_the_model_sees_the_same_calls():
    net, plain = Net(nn.ReLU()), Net(nn.ReLU())
    with Names() as expected:
        plain(torch.ones(2, 4))
    with ns.watch(net), Names() as seen:
        net(torch.ones(2, 4))
    assert seen.names == expected.names


def test_a_mode_entered_in_the_forward_stays_above_ours():
    inner = Names()
    net = Net(Spying(), lambda: inner)
    with ns.watch(net) as scope:
        net(torch.ones(2, 4))
        scope.step()
        assert set(scope.census("train")) == {"fc/relu", "fc/relu#1"}
    assert net.act.modes[-1] is inner
    assert "relu" in inner.names
    assert modes() == []


def test_after_an_activation_fails_functions_are_counted_again():
    net = Net(Spying(fails=True))
    with ns.watch(net) as scope:
        with pytest.raises(ArithmeticError):
            net(torch.ones(2, 4))
        assert modes() == []
        net.act.fails = False
        net(torch.ones(2, 4))
        scope.step()
        assert scope.census("train")["fc/relu"].positions == 2
    assert modes() == []


def test_detaching_while_an_activation_runs_restores_the_stack_of_modes():
    """Who detaches in a hook of his own finds the stack as he left it."""
    net = Net(nn.ReLU())
    scope = ns.watch(net)
    net.act.register_forward_hook(lambda module, args, output: scope.detach())
    with Names() as theirs:
        net(torch.ones(2, 4))
        assert modes() == [theirs]
    assert modes() == []


class Phases(nn.Module):
    """An activation module and an activation function; a mode may be entered between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)
        self.between: TorchFunctionMode | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.between is None:
            return F.relu(self.second(self.act(h)))
        with self.between:
            return F.relu(self.second(self.act(h)))


@pytest.mark.parametrize("place", ["forward", "between", "backward"])
def test_a_mode_that_is_on_in_some_steps_only_sees_nothing_of_ours_in_any(place: str):
    """Our arithmetic is hidden only where a mode would see it, and each step is asked anew."""

    def run(watched: bool) -> tuple[list[list[str]], list[int]]:
        torch.manual_seed(0)
        net, x, seen = Phases(), torch.randn(5, 4), []
        scope = ns.watch(net) if watched else None
        for step in range(6):
            mode = Names()
            on = step % 3 > 0
            net.between = mode if on and place == "between" else None
            with mode if on and place == "forward" else contextlib.nullcontext():
                loss = net(x).sum()
            with mode if on and place == "backward" else contextlib.nullcontext():
                loss.backward()
            seen.append(mode.names)
            if scope is not None:
                scope.step()
        if scope is None:
            return seen, []
        scope.detach()
        assert all(tally.gradient_positions == 30 for tally in scope.census().values())
        return seen, [tally.positions for tally in scope.census().values()]

    seen, positions = run(watched=True)
    assert positions == [30, 30]
    assert seen == run(watched=False)[0]
    assert any(seen)
