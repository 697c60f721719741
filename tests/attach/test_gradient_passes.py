"""Gradients that come more than once to one output: each backward pass counts, as by brute force, and it is said.

A pass is one run of autograd that reaches the pre-activation. The slow twin asks autograd for the gradient at every
pre-activation before each of these runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, state_of

ROWS, STEPS = 4, 5


def network() -> nn.Module:
    """ReLU has no second derivative, and SiLU has one."""
    first, second, third = nn.ReLU(), nn.SiLU(), nn.ReLU()
    return nn.Sequential(nn.Linear(3, 8), first, nn.Linear(8, 8), second, nn.Linear(8, 8), third, nn.Linear(8, 1))


def data(step: int) -> Tensor:
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(step)).requires_grad_()


def twice_over_one_graph(model: nn.Module, watcher: Nobody, step: int) -> None:
    y = model(data(step))
    watcher.backward(y.square().mean(), again=True)
    watcher.backward(y.relu().sum())  # some rows give no gradient


def r1(model: nn.Module, watcher: Nobody, step: int) -> None:
    """The penalty on the gradient at real data, of a discriminator."""
    real = data(step)
    y = model(real)
    (gradient,) = watcher.grad(y.sum(), [real])
    watcher.backward((1 - y).relu().mean() + gradient.square().sum(1).mean())


def gradient_penalty(model: nn.Module, watcher: Nobody, step: int) -> None:
    """WGAN-GP: two forwards whose gradients come once, and one whose gradients come twice."""
    between = data(2 * step + 1)
    (gradient,) = watcher.grad(model(between).sum(), [between])
    loss = model(data(step)).mean() - model(data(step + 100)).mean()
    watcher.backward(loss + (gradient.norm(dim=1) - 1).square().mean())


def inner_step(model: nn.Module, watcher: Nobody, step: int) -> None:
    """MAML: the loss of one task after a step of gradient descent, differentiated through that step."""
    weights = dict(model.named_parameters())
    gradients = watcher.grad(model(data(step)).square().mean(), [*weights.values()])
    fast = {name: weight - 0.1 * gradient for (name, weight), gradient in zip(weights.items(), gradients, strict=True)}
    watcher.backward(torch.func.functional_call(model, fast, (data(step + 100),)).square().mean())


PROGRAMS = (twice_over_one_graph, r1, gradient_penalty, inner_step)


def run(program: Callable[[nn.Module, Nobody, int], None], watcher: Nobody) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watcher.attach(model):
        for step in range(STEPS):
            program(model, watcher, step)
            optimizer.step()
            optimizer.zero_grad()
            watcher.step()
    return state_of(model)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_each_pass_of_gradients_counts_as_by_brute_force(program: Callable[[nn.Module, Nobody, int], None]) -> None:
    watched, twin = Watched(), Twin({None: 1})
    plain, weights, _ = (run(program, watcher) for watcher in (Nobody(), watched, twin))
    assert_bits(plain, weights)
    assert watched.scope._hooks.failure is None
    assert_same(watched.scope.census(), twin.tallies())
    tallies = [*watched.scope.census().values()]
    assert all(tally.gradient_positions > tally.positions for tally in tallies) or program is inner_step
    assert any(0 < fraction < 1 for tally in tallies for fraction in tally.zero_gradient_fraction)
    for tally in tallies:
        assert ((tally.zero_gradient_fraction >= 0) & (tally.zero_gradient_fraction <= 1)).all()


def test_a_report_says_where_gradients_came_more_than_once() -> None:
    once, twice = Watched(), Watched()
    run(lambda model, watcher, step: watcher.backward(model(data(step)).mean()), once)
    run(twice_over_one_graph, twice)
    assert not [note for note in once.scope.report().notes if "more than once" in note]
    (note,) = [note for note in twice.scope.report().notes if "more than once" in note]
    assert "at 0/relu (and 2 more), in 40 positions for 20 of outputs" in note
    assert note in str(twice.scope.report()).replace("\n  ", " ") or "more than once" in str(twice.scope.report())


class MinimalGate(nn.Module):
    """A recurrent cell by hand whose first state is zeros: a gate multiplies it, and that is no product of two layers.

    All gradients of the gate, of that step too, are the gradients of both of its products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(4, 16), nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 8)
        for now in x.unbind(1):
            gate, new = (self.x(now) + self.h(state)).chunk(2, 1)
            gate, new = torch.sigmoid(gate), torch.relu(new)
            state = (1 - gate) * new + gate * state
        return state


def test_a_gate_that_ran_more_often_than_its_product_got_each_gradient_once() -> None:
    model = MinimalGate()
    with ns.watch(model) as scope:
        model(torch.randn(3, 5, 4)).sum().backward()
        scope.step()
    positions = {name: (each.positions, each.gradient_positions) for name, each in scope.census().items()}
    assert positions["x(0:8)/sigmoid"] == (15, 15)
    assert positions["x(0:8)/glu#1"] == (12, 15)
    assert not [note for note in scope.report().notes if "more than once" in note]
    with ns.watch(model) as scope:
        y = model(torch.randn(3, 5, 4)).sum()
        y.backward(retain_graph=True)
        y.backward()
        scope.step()
    assert [note for note in scope.report().notes if "(and 3 more), in 30 positions for 15 of outputs" in note]


def test_a_neuron_without_gradient_in_one_of_two_passes_is_not_cut_off() -> None:
    """Its zero-gradient fraction is one half, over both passes."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    nn.init.constant_(model[0].weight, 1.0)
    with ns.watch(model) as scope:
        y = model(torch.ones(4, 2))
        y[:, 0].sum().backward(retain_graph=True)
        y[:, :1].add(y).sum().backward()
        scope.step()
    tally = scope.census()["0/relu"]
    assert (tally.positions, tally.gradient_positions) == (4, 8)
    assert tally.zero_gradient_fraction.tolist() == [0.0, 0.5]
    assert scope.report().cut_off == 0


class Solve(torch.autograd.Function):
    """An adjoint solver: it keeps no graph, and runs its function again, backward in time, for the gradients."""

    @staticmethod
    def forward(ctx: Any, function: nn.Module, x: Tensor, steps: int, back: int, *weights: Tensor) -> Tensor:
        ctx.function, ctx.back = function, back
        for _ in range(steps):
            x = x + 0.1 * function(x)
        ctx.save_for_backward(x, *weights)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        found = [torch.zeros_like(weight) for weight in weights]
        for _ in range(ctx.back):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = ctx.function(x)
                first, *others = torch.autograd.grad(y, [x, *weights], 0.1 * gradient)
            x, gradient = x - 0.1 * y, gradient + first
            found = [each + other for each, other in zip(found, others, strict=True)]
        return None, gradient, None, None, *found


class Solving(nn.Module):
    def __init__(self, steps: int, back: int) -> None:
        super().__init__()
        self.steps, self.back = steps, back
        self.function = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return Solve.apply(self.function, x, self.steps, self.back, *self.function.parameters())


@pytest.mark.parametrize("back", [2, 3, 7], ids=["fewer steps back", "as many", "more"])
def test_each_step_back_of_an_adjoint_solver_is_a_pass(back: int) -> None:
    torch.manual_seed(0)
    model = Solving(3, back)
    gradients: list[Tensor] = []

    def keep(module: nn.Module, args: Any, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(gradients.append)

    model.function[0].register_forward_hook(keep)
    with ns.watch(model) as scope:
        for step in range(STEPS):
            model(data(step)).relu().sum().backward()
            scope.step()
    (tally,) = scope.census().values()
    assert (tally.positions, tally.gradient_positions) == (3 * STEPS * ROWS, back * STEPS * ROWS)
    assert tally.zero_gradients.tolist() == (torch.cat(gradients) == 0).sum(0).tolist()


class Halves(nn.Module):
    """A network whose second half runs in its forward, or is called with what the first half returned."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, *rest = network()
        self.second = nn.Sequential(*rest)
        self.apart = apart

    def forward(self, x: Tensor, second: Callable[[Tensor], Tensor]) -> Tensor:
        return second(self.first(x))

    def run(self, x: Tensor, second: Callable[[Tensor], Tensor]) -> Tensor:
        return self.forward(x, second) if self.apart else self(x, second)


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "in its forward"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_part_of_a_retained_graph_gives_each_pass(reentrant: bool, apart: bool) -> None:
    def counts(checkpointed: bool) -> dict[str, tuple[list[int], int]]:
        model = Halves(apart=apart)

        def second(x: Tensor) -> Tensor:
            return checkpoint(model.second, x, use_reentrant=reentrant) if checkpointed else model.second(x)

        with ns.watch(model) as scope:
            for step in range(STEPS):
                y = model.run(data(step), second)
                y.relu().sum().backward(retain_graph=True)
                y.square().sum().backward()
                scope.step()
        return {name: (each.zero_gradients.tolist(), each.gradient_positions) for name, each in scope.census().items()}

    expected, found = counts(checkpointed=False), counts(checkpointed=True)
    assert [positions for _, positions in expected.values()] == [2 * STEPS * ROWS] * 3
    assert list(found.values()) == list(expected.values())
    if not (apart and reentrant):  # then a graph of autograd or a function mode tells the layers
        assert list(found) == list(expected)
