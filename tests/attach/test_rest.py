"""Between observed steps the hooks are off the model: it is then as unwatched, and nothing that is counted changes.

What ``torch.compile`` may trace keeps its hooks, and what it traced without them is said to be missed.
"""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.options import WatchOptions
from neuronscope.scope import Scope
from tests.agreement.slow_twin import Twin, Watched, assert_same, hook_tables
from tests.compiled.compiler_marks import COMPILES


class Net(nn.Module):
    """Module, functional, gated and reused sites."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.up, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.relu, self.silu = nn.ReLU(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.second(x))
        return self.head(F.gelu(self.silu(self.second(x)) * self.up(x)))


def step(model: nn.Module, scope: ns.Scope, size: int = 4) -> None:
    model(torch.randn(size, 3)).sum().backward()
    scope.step()


def bears_hooks(model: nn.Module) -> bool:
    return any(hooks for tables in hook_tables(model).values() for hooks in tables.values())


def test_hooks_are_on_the_model_at_observed_steps_only():
    model = Net()
    with ns.watch(model, every_n_steps=5) as scope:
        seen = []
        for _ in range(11):
            seen.append(bears_hooks(model))
            step(model, scope)
        # Steps 0, 5 and 10 are observed.
        assert seen == [number % 5 == 0 for number in range(11)]
    assert scope.census()["first/relu"].positions == 3 * 4


class Wakeful(Scope):
    """A scope that looks at every step what is due, also where it knows that nothing is."""

    _quiet_until = property(lambda _: 0, lambda *_: None)  # type: ignore[assignment]


@pytest.mark.parametrize("seed", range(8))
def test_a_scope_that_rests_does_what_a_wakeful_one_does(seed: int):
    """Whatever the loop does between observed steps: phases, pauses, steps that are left out or told again."""
    draw = random.Random(seed)
    options = WatchOptions(
        every_n_steps=draw.choice((3, 5, 20)),
        window_steps=draw.choice((2, 7, 10)),
        policy=ns.Policy(max_rate=draw.choice((0.95, 0.2, 0.05))),
    )
    models = [Net()] * 2
    models[1] = copy.deepcopy(models[0])
    scopes = [kind(model, options) for kind, model in zip((Scope, Wakeful), models, strict=True)]
    states: list[dict[str, object]] = []
    for _ in range(100):
        kind, jump, x = draw.choice("......vpjbls"), draw.randrange(1, 12), torch.randn(4, 3)
        seen = []
        for number, (scope, net) in enumerate(zip(scopes, models, strict=True)):
            known: list[object] = [scope.observing]
            with contextlib.ExitStack() as inside:
                if kind == "v":
                    inside.enter_context(scope.phase("val"))
                elif kind == "p":
                    inside.enter_context(scope.paused())
                net(x).sum().backward()
                if kind in "vp" and jump % 2:
                    known.append(scope.step())
            if kind == "l" and states:
                scope.load_state_dict(states[number])
            told = {"j": scope.global_step + jump, "b": max(scope.global_step - jump, 0)}.get(kind)
            known += [scope.step(told), scope.observing, scope.global_step]
            seen.append(known)
        assert seen[0] == seen[1], (kind, jump)
        if kind == "s" and not states:
            states = [scope.state_dict() for scope in scopes]
    first, second = ({name: scope.census(name) for name in scope.phases} for scope in scopes)
    assert first.keys() == second.keys()
    for name, census in first.items():
        assert {site: tally.zero_outputs.tolist() for site, tally in census.items()} == {
            site: tally.zero_outputs.tolist() for site, tally in second[name].items()
        }
    for scope in scopes:
        scope.detach()


@pytest.mark.parametrize("every", [1, 2, 4])
def test_hooks_stay_attached_when_the_unobserved_steps_are_few(every):
    model = Net()
    with ns.watch(model, every_n_steps=every) as scope:
        for _ in range(5):
            step(model, scope)
            assert bears_hooks(model)


@pytest.mark.parametrize(("apart", "stay"), [(1, True), (3, True), (4, False)])
def test_hooks_stay_if_something_has_them_put_back_soon_each_time(apart: int, stay: bool):
    """Taking them off and putting them back costs more than a few steps with them."""
    model = Net()
    with ns.watch(model, every_n_steps=50) as scope:
        for number in range(1, 5 * apart):
            step(model, scope)
            if number % apart == 0:
                with scope.phase("val"):
                    model(torch.randn(5, 3))
        step(model, scope)
        assert bears_hooks(model) == stay


def test_hooks_come_off_between_evaluations_on_many_sets():
    model = Net()
    with ns.watch(model, every_n_steps=50) as scope:
        for number in range(1, 40):
            step(model, scope)
            if number % 10 == 0:
                for name in ("val", "test", "shifted", "small", "large"):
                    with scope.phase(name):
                        model(torch.randn(5, 3))
        assert not bears_hooks(model)


def test_hooks_stay_until_the_model_has_run():
    """A model whose first forward is compiled may not have been called yet when the first steps are told."""
    model = Net()
    with ns.watch(model, every_n_steps=10) as scope:
        scope.step()
        assert bears_hooks(model)


def test_counts_with_unobserved_steps_phases_and_pauses_equal_the_twins():
    watched, twin = Watched(every_n_steps=7), Twin({None: 1}, every=7)
    for watcher in (watched, twin):
        torch.manual_seed(0)
        model = Net()
        with watcher.attach(model):
            for number in range(24):
                watcher.backward(model(torch.randn(5, 3)).square().sum())
                if number % 4 == 1:
                    with watcher.phase("val"), torch.no_grad():
                        model(torch.randn(3, 3))
                watcher.step()
    for phase in ("train", "val"):
        assert_same(watched.scope.census(phase), twin.tallies(phase))


def test_hooks_are_put_back_in_their_old_order():
    """A hook that was there before ours still runs before it, one that came later still after it."""
    model, order = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), []

    def note(name: str, **options: bool) -> None:
        model[1].register_forward_pre_hook(lambda module, args: order.append(name), **options)

    note("before")
    with ns.watch(model, every_n_steps=5) as scope:
        before = scope._hooks.before
        scope._hooks.before = lambda *args: (order.append("ours"), before(*args))[1]
        note("after")
        note("first", prepend=True)
        for number in range(6):
            step(model, scope)
            if number == 2:  # while ours are off
                note("late")
    assert order[:4] == ["first", "before", "ours", "after"]
    assert order[4:7] == ["first", "before", "after"]
    assert order[-5:] == ["first", "before", "ours", "after", "late"]


def test_two_scopes_may_observe_different_steps():
    model = Net()
    before = hook_tables(model)
    with ns.watch(model, every_n_steps=5) as one, ns.watch(model, every_n_steps=7) as two:
        for _ in range(15):
            model(torch.randn(4, 3)).sum().backward()
            one.step()
            two.step()
    # Steps 0, 5, 10 and steps 0, 7, 14, of 4 examples.
    assert (one.census()["first/relu"].positions, two.census()["first/relu"].positions) == (12, 12)
    assert hook_tables(model) == before


def test_a_model_may_be_copied_detached_or_fail_while_the_hooks_are_off():
    model = Net()
    before = hook_tables(model)
    with pytest.raises(ZeroDivisionError), ns.watch(model, every_n_steps=50) as scope:
        step(model, scope)
        twin = copy.deepcopy(model)
        assert hook_tables(twin).keys() == before.keys()
        assert not bears_hooks(twin)
        raise ZeroDivisionError
    assert hook_tables(model) == before
    assert scope.detached


def test_a_module_removed_while_the_hooks_are_off_does_no_harm():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    with ns.watch(model, every_n_steps=5) as scope:
        step(model, scope)
        del model[3]
        for _ in range(5):
            step(model, scope)
    assert scope._hooks.failure is None
    assert scope.census()["0/relu"].positions == 8
    assert scope.census()["2/relu"].positions == 4


# --- torch.compile


def with_marks(marks: list) -> object:
    def mark(test: object) -> object:
        for each in marks:
            test = each(test)
        return test

    return mark


@with_marks(COMPILES)
@pytest.mark.parametrize("way", ["compile", "in place", "part"])
def test_a_compiled_model_keeps_its_hooks_and_is_counted(way):
    model = Net()
    if way == "part":
        model.head = torch.compile(model.head, backend="eager")
    elif way == "in place":
        model.compile(backend="aot_eager")
    run = torch.compile(model, backend="aot_eager") if way == "compile" else model
    with ns.watch(model, every_n_steps=5) as scope:
        for _ in range(11):
            run(torch.randn(4, 3)).sum().backward()
            scope.step()
            assert bears_hooks(model)
    # Steps 0, 5 and 10 of 4 examples
    counts = {name: (tally.positions, tally.gradient_positions) for name, tally in scope.census().items()}
    assert counts == {
        **dict.fromkeys(("first/relu", "second/relu", "second/silu", "second/swiglu", "second/gelu"), (12, 12))
    }
    assert not scope.report().not_measured


@with_marks(COMPILES)
@pytest.mark.parametrize("way", ["model", "function"])
def test_code_compiled_while_the_hooks_are_off_is_reported_as_missed(way):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    run = torch.compile(model if way == "model" else lambda x: model(x), backend="aot_eager")
    with ns.watch(model, every_n_steps=5) as scope:
        step(model, scope)
        for _ in range(10):
            run(torch.randn(4, 3)).sum().backward()
            scope.step()
        assert scope.census()["0/relu"].positions == 4
        (missing,) = scope.report().not_measured
        assert missing.name == "0/relu"
        assert "torch.compile ran while nothing was observed, and at step 5 this site was not seen" in missing.reason
        torch._dynamo.reset()  # what the reason advises
        for _ in range(5):
            run(torch.randn(4, 3)).sum().backward()
            scope.step()
        assert scope.census()["0/relu"].positions == 8  # step 15 too


@with_marks(COMPILES)
def test_a_model_with_hooks_outside_of_the_graph_is_traced_again():
    """They enter our function mode, and that makes the compiler look again at what it traced without it."""
    model = Net()
    run = torch.compile(model, backend="aot_eager")
    with ns.watch(model, every_n_steps=5) as scope:
        step(model, scope)
        for _ in range(10):
            run(torch.randn(4, 3)).sum().backward()
            scope.step()
    # Steps 0, 5 and 10 of 4 examples
    assert {tally.positions for tally in scope.census().values()} == {12}
    assert not scope.report().not_measured


@with_marks(COMPILES)
def test_another_model_compiled_while_the_hooks_are_off_is_not_reported():
    model, other = Net(), torch.compile(nn.Linear(3, 3), backend="eager")
    with ns.watch(model, every_n_steps=5) as scope:
        for number in range(11):
            step(model, scope)
            if number == 1:
                other(torch.randn(2, 3))
    assert scope.census()["first/relu"].positions == 12
    assert not scope.report().not_measured
