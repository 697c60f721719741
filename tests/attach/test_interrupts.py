"""Ctrl-C and its like end a forward without a word to any hook: nothing of ours stays, and counts go on right."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from neuronscope.attach.recorder import SiteRecorder


class Interrupting(nn.Module):
    """Raises what it is given, after a function that is counted; else passes its input on."""

    error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if self.error is not None:
            raise self.error
        return x


class InterruptingReLU(nn.ReLU):
    """An activation module that raises what it is given."""

    error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


class Net(nn.Module):
    """Functional activations in the root and in a nested module, and an activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 1)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Interrupting()))
        self.act = InterruptingReLU()
        self.patient = False  # catches an interrupt of its parts, and goes on
        self.error: type[BaseException] | None = None  # raised by the root itself

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        try:
            x = self.inner(x)
        except KeyboardInterrupt:
            if not self.patient:
                raise
        x = self.second(x)
        try:
            x = self.act(x)
        except KeyboardInterrupt:
            if not self.patient:
                raise
        x = torch.tanh(x)
        if self.error is not None:
            raise self.error
        return self.out(x)


SITES = {"first/sigmoid": 6, "inner.0/relu": 6, "second/relu": 5, "second/tanh": 5}
ERRORS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def places(net: Net) -> dict[str, Any]:
    return {"root": net, "nested": net.inner[1][0]}


@contextmanager
def interrupted(part: Any, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """What runs inside is ended by an interrupt in ``part``."""
    part.error = error
    try:
        with pytest.raises(error):
            yield
    finally:
        part.error = None


def stack_depth() -> int:
    return torch.overrides._len_torch_function_stack()


def use_another_network() -> None:
    """Other code in the same thread; after the first of it that we can see no mode of ours is on the stack."""
    other = nn.Sequential(nn.Linear(4, 9), nn.ReLU())
    F.silu(other(torch.ones(100, 4)))
    assert stack_depth() == 0
    torch.tanh(other[0].weight)
    assert sys.getprofile() is None


def counted(scope: ns.Scope, phase: str = "train") -> dict[str, tuple[int, int]]:
    return {name: (tally.neurons, tally.positions) for name, tally in scope.census(phase).items()}


def expected(**positions: int) -> dict[str, tuple[int, int]]:
    """Sites of ``Net`` with as many positions each: of ``all``, and other numbers for some parts of it."""
    every = positions.pop("all")
    return {name: (neurons, positions.get(re.split("[./]", name)[0], every)) for name, neurons in SITES.items()}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["root", "nested"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_network_run_after_an_interrupt_is_not_counted(
    place: str, error: type[BaseException], gradients: bool
) -> None:
    net, phase = Net(), "train" if gradients else "inference"
    with ns.watch(net) as scope, torch.set_grad_enabled(gradients):
        net(torch.ones(2, 4))
        with interrupted(places(net)[place], error):
            net(torch.ones(2, 4))
        use_another_network()
        behind = 4 if place == "root" else 2
        assert counted(scope, phase) == expected(first=4, inner=4, all=behind)
        net(torch.ones(3, 4))  # the same step goes on
        scope.step()
        net(torch.ones(1, 4))
        assert counted(scope, phase) == expected(first=8, inner=8, all=behind + 4)
        assert scope.phases == (phase,)
        assert not scope.report(phase).not_measured
        use_another_network()


def test_functions_outside_of_any_module_are_not_counted_after_an_interrupt() -> None:
    net, weight = Net(), torch.randn(7, 4)
    with ns.watch(net) as scope:
        with interrupted(net.inner[1][0]):
            net(torch.ones(2, 4))
        hidden = F.relu(F.linear(torch.ones(3, 4), weight))
        assert stack_depth() == 0
        torch.nn.functional.gelu(hidden * hidden)
        assert counted(scope) == {"first/sigmoid": (6, 2), "inner.0/relu": (6, 2)}


def test_operators_alone_are_not_counted_after_an_interrupt() -> None:
    """Where nothing is called or returns, the mode has no chance to go; nothing is counted all the same."""
    net, x = Net(), torch.ones(3, 4)
    with ns.watch(net) as scope:
        with interrupted(net.inner[1][0]):
            net(torch.ones(2, 4))
        x = x * x + x * x - x
        F.relu(x)
        assert stack_depth() == 0
        assert counted(scope) == {"first/sigmoid": (6, 2), "inner.0/relu": (6, 2)}


@pytest.mark.parametrize("part", ["inner", "act"])
def test_parts_of_the_network_run_alone_are_counted_after_an_interrupt(part: str) -> None:
    """What is called next is no part of the forward that was ended."""
    net, plain = Net(), Net()
    sizes = {"inner": 6, "act": 5}
    found = []
    for model in (net, plain):
        with ns.watch(model) as scope:
            if model is net:
                with interrupted(net.inner[1][0]):
                    net(torch.ones(2, 4))
                before = counted(scope)
            getattr(model, part)(torch.ones(3, sizes[part]))
            after = counted(scope)
            if model is net:
                assert stack_depth() == 0
        found.append(after)
    ((name, (neurons, positions)),) = found[1].items()
    earlier = before.get(name, (neurons, 0))[1]
    assert found[0][name] == (neurons, positions + earlier)


def test_a_model_that_catches_the_interrupt_itself_is_followed_to_its_end() -> None:
    net = Net()
    net.patient = True
    with ns.watch(net) as scope:
        net.inner[1][0].error = net.act.error = KeyboardInterrupt
        net(torch.ones(2, 4))
        assert stack_depth() == 0
        net.inner[1][0].error = net.act.error = None
        net(torch.ones(3, 4))
        scope.step()
        assert counted(scope) == expected(all=5, second=3)  # right behind an activation nobody tells us to go on


def test_an_interrupt_is_handled_with_two_watched_models_and_with_nested_ones() -> None:
    inner, sibling = Net(), Net()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lead, self.net = nn.Linear(4, 4), inner

        def forward(self, x: Tensor) -> Tensor:
            return self.net(F.relu(self.lead(x)))

    outer = Outer()
    with ns.watch(outer) as wide, ns.watch(inner) as narrow, ns.watch(sibling) as beside:
        sibling(torch.ones(2, 4))
        with interrupted(inner.inner[1][0]):
            outer(torch.ones(2, 4))
        sibling(torch.ones(2, 4))  # the first that runs next is watched by another
        assert stack_depth() == 0
        use_another_network()
        outer(torch.ones(2, 4))
        assert counted(beside) == expected(all=4)
        assert counted(narrow) == expected(all=2, first=4, inner=4)
        assert counted(wide) == {
            "lead/relu": (4, 4),
            **{f"net.{name}": counts for name, counts in counted(narrow).items()},
        }


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_interrupt_in_the_recomputation_of_a_checkpoint_is_handled(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lead, self.net, self.runs = nn.Linear(4, 4), Net(), 0

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, self.lead(x), use_reentrant=reentrant)

    model = Checkpointed()
    with ns.watch(model) as scope:
        loss = model(torch.ones(2, 4)).sum()
        with interrupted(model.net.inner[1][0]):
            loss.backward()
        use_another_network()
        model(torch.ones(2, 4)).sum().backward()
        scope.step()
        counts = {name: (tally.positions, tally.gradient_positions) for name, tally in scope.census().items()}
        assert {positions for positions, _ in counts.values()} == {4}
        assert counts["net.second/relu"] == (4, 2)
    assert stack_depth() == 0


def test_an_interrupt_in_a_generator_that_runs_the_model_is_handled() -> None:
    net = Net()

    def outputs() -> Iterator[Tensor]:
        while True:
            yield net(torch.ones(2, 4))

    with ns.watch(net) as scope:
        running = outputs()
        next(running)
        with interrupted(net.inner[1][0]):
            next(running)
        use_another_network()
        next(outputs())
        assert counted(scope) == expected(all=4, first=6, inner=6)


def in_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_an_interrupt_that_ends_a_thread_is_handled() -> None:
    """The next forward runs in this thread, or in a new one that may bear the dead one's number."""
    net = Net()

    def dies() -> None:
        with interrupted(net.inner[1][0], SystemExit):
            net(torch.ones(2, 4))

    with ns.watch(net) as scope:
        in_thread(dies)
        net(torch.ones(2, 4))
        in_thread(dies)
        in_thread(lambda: net(torch.ones(2, 4)))
        scope.step()
        assert counted(scope) == expected(all=4, first=8, inner=8)
        assert not scope.report().not_measured
        use_another_network()


def test_an_interrupt_in_a_thread_that_continues_is_handled() -> None:
    net, depths = Net(), []

    def lives() -> None:
        with interrupted(net.inner[1][0]):
            net(torch.ones(2, 4))
        F.relu(torch.ones(2, 9))
        depths.append(stack_depth())

    with ns.watch(net) as scope:
        in_thread(lives)
        assert counted(scope) == {"first/sigmoid": (6, 2), "inner.0/relu": (6, 2)}
    assert depths == [0]


class Theirs(TorchFunctionMode):
    """A mode of somebody else's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_function_mode_entered_after_an_interrupt_stays() -> None:
    net = Net()
    with ns.watch(net) as scope:
        with interrupted(net.inner[1][0]):
            net(torch.ones(2, 4))
        with Theirs() as theirs:
            F.relu(torch.ones(2, 9))
            assert torch.overrides._get_current_function_mode_stack() == [theirs]
        assert stack_depth() == 0
        assert counted(scope)["inner.0/relu"] == (6, 2)


def test_another_profiler_is_left_alone() -> None:
    """Then the mode stays until the profiler is gone, and counts nothing."""
    net, events = Net(), []

    def profiler(*event: Any) -> None:
        events.append(event)

    with ns.watch(net) as scope:
        with interrupted(net.inner[1][0]):
            net(torch.ones(2, 4))
        sys.setprofile(profiler)
        try:
            F.relu(torch.ones(2, 9))
            assert sys.getprofile() is profiler
        finally:
            sys.setprofile(None)
        assert counted(scope)["inner.0/relu"] == (6, 2)
        use_another_network()
        assert counted(scope)["inner.0/relu"] == (6, 2)


def test_a_function_that_fails_after_an_interrupt_raises_its_own_error() -> None:
    net = Net()
    with ns.watch(net):
        with interrupted(net.inner[1][0]):
            net(torch.ones(2, 4))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            torch.ones(2, 3) @ torch.ones(2, 3)
        assert stack_depth() == 0


def test_a_function_behind_an_interrupt_that_came_while_an_output_was_counted_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model catches it, and goes on with what it had."""
    net, end = Net(), SiteRecorder.end
    net.patient = True

    def interrupted(self: SiteRecorder, call: Any, x: Any, y: Any) -> None:
        if call.key.name == "second/relu":
            raise KeyboardInterrupt
        end(self, call, x, y)

    with ns.watch(net) as scope:
        net(torch.ones(2, 4)).sum().backward()
        scope.step()
        with monkeypatch.context() as patch:
            patch.setattr(SiteRecorder, "end", interrupted)
            net(torch.ones(2, 4)).sum().backward()
        scope.step()
    assert torch._C._len_torch_function_stack() == 0
    assert {name: tally.positions for name, tally in scope.census().items()} == {
        "first/sigmoid": 4,
        "inner.0/relu": 4,
        "second/relu": 2,
        "second/tanh": 4,
    }


@pytest.mark.parametrize("ends", [ns.Scope.close_step, ns.Scope.detach])
def test_a_step_that_ends_within_its_backward_pass_leaves_no_mode(ends: Callable[[ns.Scope], None]) -> None:
    """Torch has taken the mode off for ``backward``, and puts it back."""
    net = Net()
    with ns.watch(net) as scope:
        scope.open_step()
        y = net(torch.ones(2, 4))
        y.register_hook(lambda _: ends(scope))
        y.sum().backward()
        assert torch.overrides._len_torch_function_stack() == 0
        assert scope._hooks.entered.threads == []
