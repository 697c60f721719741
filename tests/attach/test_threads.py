"""A network that several threads run: one thread is counted exactly, the others run as if unwatched, and it is said."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.thread_frames import frames_of_threads
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of

STEPS, ROWS = 30, 4
AXES: dict[str | None, int] = {None: 1}


class Net(nn.Module):
    """A module activation, a function, a gated product, and one activation whose input is a leaf's view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b, self.up = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        return self.out(F.silu(self.b(x)) * self.up(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(number: int, step: int) -> Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1000 * number + step))


@pytest.fixture(autouse=True)
def _short_turns() -> Iterator[None]:
    """Python changes the thread after every few operations, and collects garbage as often as by itself."""
    before, threads, collects = sys.getswitchinterval(), torch.get_num_threads(), gc.get_threshold()
    sys.setswitchinterval(1e-5)
    gc.set_threshold(700, 10, 10)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ns.NeuronscopeWarning)
        yield
    sys.setswitchinterval(before)
    gc.set_threshold(*collects)
    torch.set_num_threads(threads)


def train(model: nn.Module, watcher: Nobody, number: int = 0, *, begun: Callable[[], object] = lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        watcher.backward(model(batch(number, step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()
        if step == 0:
            begun()


@contextlib.contextmanager
def beside(*works: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Run each function again and again in a thread of its own until the block ends; raise what one of them raised.

    Yields a function that says whether one of them has ended, which is to say failed.
    """
    over, begun = threading.Event(), threading.Barrier(len(works) + 1)

    def run(work: Callable[[], object]) -> None:
        begun.wait()
        while not over.is_set():
            work()

    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        runs = [pool.submit(run, work) for work in works]
        try:
            begun.wait()
            yield lambda: any(each.done() for each in runs)
        finally:
            over.set()
    for each in runs:
        each.result()


def not_measured(scope: ns.Scope) -> dict[str, str]:
    return {missing.name: missing.reason for missing in scope.report().not_measured}


def trained_alone() -> tuple[dict[str, Tensor], Twin]:
    """Return the weights after training that nobody watches, and what the slow twin counts of it."""
    plain, counted, twin = net(), net(), Twin(AXES)
    train(plain, Nobody())
    with twin.attach(counted):
        train(counted, twin)
    return state_of(plain), twin


def rollout(scope: ns.Scope, model: Net) -> None:
    with torch.no_grad():
        model(batch(1, 0))


def call_parts(scope: ns.Scope, model: Net) -> None:
    with torch.no_grad():
        F.relu(model.b(model.relu(model.a(batch(2, 0)))))


def differentiate(scope: ns.Scope, model: Net) -> None:
    with contextlib.suppress(RuntimeError):  # torch's own, if the training changes a weight meanwhile
        torch.autograd.grad(model(batch(3, 0)).sum(), list(model.parameters()))


def validate(scope: ns.Scope, model: Net) -> None:
    with scope.phase("val"), torch.no_grad():
        model(batch(4, 0))


def pause(scope: ns.Scope, model: Net) -> None:
    with scope.paused():
        rollout(scope, model)


def read(scope: ns.Scope, model: Net) -> None:
    scope.report()
    scope.census()
    scope.state_dict()
    scope.not_neurons()


WORKS = (rollout, call_parts, differentiate, validate, pause, read)


@pytest.mark.parametrize(
    ("work", "first"),
    # Of threads with gradients, the one that begins is counted.
    [(work, first) for work in WORKS for first in (True, False) if first or work is not differentiate],
    ids=lambda value: value.__name__ if callable(value) else "training begins" if value else "the others begin",
)
def test_training_is_counted_exactly_beside_threads_that_run_the_same_model(work: Callable[..., None], first: bool):
    weights, twin = trained_alone()
    model, watched = net(), Watched(window_steps=5, policy=ns.Policy(max_rate=0.9))
    before = hook_tables(model)
    with watched.attach(model), contextlib.ExitStack() as others:

        def begin() -> None:
            others.enter_context(beside(*[lambda: work(watched.scope, model)] * 3))

        if not first:
            begin()
        train(model, watched, begun=begin if first else lambda: None)
    assert hook_tables(model) == before
    assert watched.scope._hooks.failure is None
    assert_bits(weights, state_of(model))
    assert_same(watched.scope.census(), twin.tallies())
    assert watched.scope.census("val") == {} or not first
    reason = not_measured(watched.scope).get("(root)", "")
    assert ("only what the thread MainThread ran was counted" in reason) == (work is not read)


def test_eight_threads_that_train_count_as_one_of_them():
    """Which one is chance: the first that runs the model."""
    expected = {}
    for number in range(8):
        counted, twin = net(), Twin(AXES)
        with twin.attach(counted):
            train_elsewhere(counted, twin, number)
        expected[number] = twin.tallies()
    model, watched = net(), Watched()
    before = state_of(model)
    begin, done = threading.Barrier(8), threading.Barrier(8)  # a thread that ended could be replaced by another

    def run(number: int) -> None:
        begin.wait()
        try:
            train_elsewhere(model, watched if number == 3 else Unstepped(), number)
        except BaseException:
            done.abort()  # the others do not wait for it
            raise
        done.wait()

    with watched.attach(model), concurrent.futures.ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(run, number) for number in range(8)]:
            each.result()
    census = watched.scope.census()
    assert_bits(before, state_of(model))
    assert watched.scope._hooks.failure is None
    assert torch.overrides._len_torch_function_stack() == 0
    assert {tally.positions for tally in census.values()} == {STEPS * ROWS}
    assert counts_of(census) in [counts_of(truth) for truth in expected.values()]
    assert "several threads at once" in not_measured(watched.scope)["(root)"]


def counts_of(tallies: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Return the zeros of each site, of a census or of the twin's tallies."""
    parts = {name: vars(tally) if isinstance(tally, ns.Tally) else tally for name, tally in tallies.items()}
    return {name: [part["zero_outputs"].tolist(), part["zero_gradients"].tolist()] for name, part in parts.items()}


class Unstepped(Nobody):
    """One of several threads; another one of them takes the steps."""


def train_elsewhere(model: nn.Module, watcher: Nobody, number: int) -> None:
    """Differentiate, and leave the weights alone."""
    for step in range(STEPS):
        loss = model(batch(number, step)).square().mean()
        if isinstance(watcher, Twin):
            watcher.backward(loss)
            model.zero_grad()
        else:
            torch.autograd.grad(loss, list(model.parameters()))
        watcher.step()


def in_thread(work: Callable[[], object]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_threads_that_run_the_model_one_after_another_are_all_counted():
    """As where a first pass checks the model, and a thread that lives on trains it."""
    weights, twin = trained_alone()
    model, watched = net(), Watched()
    with watched.attach(model), concurrent.futures.ThreadPoolExecutor(1) as pool:
        model(batch(1, 0))
        pool.submit(train, model, watched).result()
    assert not watched.scope.report().not_measured
    assert_bits(weights, state_of(model))
    assert watched.scope.census()["a/relu"].positions == ROWS + STEPS * ROWS
    assert watched.scope.census()["a/relu"].gradient_positions == twin.tallies()["a/relu"]["gradient_positions"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_in_another_thread_is_counted(reentrant: bool):
    """Also if it runs a part of the forward again, while the thread of the forward waits."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lead, self.net = nn.Linear(8, 8), Net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, self.lead(x), use_reentrant=reentrant)

    def counts(backward: Callable[[Tensor], object]) -> dict[str, tuple[list[int], int]]:
        torch.manual_seed(0)
        model = Checkpointed()
        with ns.watch(model) as scope:
            for step in range(4):
                backward(model(batch(0, step)).square().mean())
                scope.step()
        assert not scope.report().not_measured
        return {name: (each.zero_gradients.tolist(), each.gradient_positions) for name, each in scope.census().items()}

    expected = counts(Tensor.backward)
    assert {positions for _, positions in expected.values()} == {4 * ROWS}
    assert counts(lambda loss: in_thread(loss.backward)) == expected


def test_steps_of_another_thread_do_not_disturb_a_forward():
    """Steps end between a forward and its backward pass, and in the middle of a forward."""
    weights, twin = trained_alone()
    model = net()
    with ns.watch(model, window_steps=3, policy=ns.Policy(max_rate=0.9)) as scope, contextlib.ExitStack() as others:
        train(model, Nobody(), begun=lambda: others.enter_context(beside(scope.step, scope.step)))
    assert scope._hooks.failure is None
    assert_bits(weights, state_of(model))
    for name, truth in twin.tallies().items():
        tally = scope.census()[name]
        assert tally.zero_outputs.tolist() == truth["zero_outputs"].tolist()
        assert tally.zero_gradients.tolist() == truth["zero_gradients"].tolist()
        assert (tally.positions, tally.gradient_positions) == (STEPS * ROWS, STEPS * ROWS)


def test_steps_of_another_thread_leave_no_half_of_a_forward():
    """Some steps are observed and others are not, while forwards run."""
    model = net()
    with ns.watch(model, every_n_steps=7) as scope, contextlib.ExitStack() as others:
        train(model, Nobody(), begun=lambda: others.enter_context(beside(scope.step)))
    assert scope._hooks.failure is None
    assert len({tally.positions for tally in scope.census().values()}) == 1


def test_training_takes_the_place_of_a_thread_without_gradients_in_the_middle_of_its_forward():
    waits, goes_on = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                waits.set()
                while not goes_on.is_set():
                    self.turn(x)
            return x

        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Sequential(nn.Linear(6, 6))  # of modules without weights, no hook says that they run

    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Waiting(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))

    def act() -> list[str]:
        try:
            with torch.no_grad():
                model(batch(1, 0))
        finally:
            waits.set()
        return [type(mode).__name__ for mode in torch.overrides._get_current_function_mode_stack()]

    with ns.watch(model) as scope, concurrent.futures.ThreadPoolExecutor(1) as pool:
        actor = pool.submit(act)
        waits.wait()
        try:
            for step in range(3):
                model(batch(0, step)).sum().backward()
                scope.step()
        finally:
            goes_on.set()
        assert actor.result() == []
    assert {name: tally.gradient_positions for name, tally in scope.census().items()} == {
        "0/relu": 3 * ROWS,
        "3/gelu": 3 * ROWS,
    }
    assert "MainThread" in not_measured(scope)["(root)"]


def test_replicas_in_threads_run_as_if_unwatched():
    """As :class:`torch.nn.DataParallel` runs them: copies that share the hooks, each in a thread of its own."""
    plain, model = net(), net()

    class Parallel(nn.Module):
        def __init__(self, inner: Net) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            replicas = []
            for _ in range(2):
                replica = self.inner._replicate_for_data_parallel()
                for name, child in self.inner.named_children():
                    setattr(replica, name, child)
                replicas.append(replica)
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                return torch.cat([*pool.map(lambda replica, part: replica(part), replicas, x.chunk(2))])

    parallel = Parallel(model)
    with ns.watch(parallel) as outside, ns.watch(model) as inside:
        for step in range(5):
            y = parallel(batch(0, step))
            assert y.equal(torch.cat([plain(part) for part in batch(0, step).chunk(2)]))
            y.sum().backward()
            with pytest.warns(ns.NeuronscopeWarning, match="No activation") if step == 0 else contextlib.nullcontext():
                outside.step()
            inside.step()
    assert outside._hooks.failure is inside._hooks.failure is None
    assert outside.census() == {}
    assert "in several threads" in not_measured(outside)["(root)"]
    for tally in inside.census().values():  # both parts of a forward, if their threads ran one after another
        assert 5 * ROWS // 2 <= tally.positions == tally.gradient_positions <= 5 * ROWS
        assert tally.positions == 5 * ROWS or "in several threads" in not_measured(inside)["(root)"]


def test_training_in_a_thread_is_counted_beside_an_evaluation_in_the_thread_that_watches():
    weights, twin = trained_alone()
    model, watched = net(), Watched()
    trains, over = threading.Event(), threading.Event()

    def work() -> None:
        try:
            train(model, watched, begun=trains.set)
        finally:  # also if it fails, so that the test ends
            trains.set()
            over.set()

    with watched.attach(model), concurrent.futures.ThreadPoolExecutor(1) as pool:
        training = pool.submit(work)
        trains.wait()
        while not over.is_set():
            validate(watched.scope, model)
            pause(watched.scope, model)
        training.result()
    assert_bits(weights, state_of(model))
    assert_same(watched.scope.census(), twin.tallies())
    assert watched.scope.census("val") == {}


def test_an_evaluation_in_threads_that_the_watching_thread_starts_has_its_phase():
    model = net()
    with ns.watch(model) as scope:
        with scope.phase("val"):
            in_thread(lambda: model(batch(0, 0)))
        model(batch(0, 1)).sum().backward()
        scope.step()
    assert scope.census("val")["a/relu"].positions == scope.census("train")["a/relu"].positions == ROWS


def test_a_watch_that_ends_in_the_middle_of_another_threads_forward_leaves_nothing_behind():
    model = net()
    before = hook_tables(model)
    for _ in range(10):
        scope = ns.watch(model)
        with beside(functools.partial(differentiate, scope, model)) as failed:
            while not (scope.phases or failed()):
                pass
            scope.detach()
        assert scope._hooks.failure is None
        assert hook_tables(model) == before
        assert torch.overrides._len_torch_function_stack() == 0


ASK = """
import faulthandler, gc, sys, threading, time
from neuronscope.attach.thread_frames import frames_of_threads

class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        for _ in range(50):  # Python may change the thread here
            pass

def ask():
    while time.monotonic() < end:
        Cycle()
        assert threading.get_ident() in frames_of_threads()

faulthandler.dump_traceback_later(100, exit=True)
sys.setswitchinterval(1e-6)
gc.set_threshold(5)
end = time.monotonic() + 2
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert gc.isenabled()
"""


def test_threads_that_ask_for_frames_never_wait_for_each_other_for_ever():
    """``sys._current_frames`` in place of ours hangs here within two seconds, before Python 3.12."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_while_frames_are_read_leaves_the_garbage_collector_on(monkeypatch: pytest.MonkeyPatch):
    disable = gc.disable

    def interrupted() -> None:
        disable()
        raise KeyboardInterrupt

    monkeypatch.setattr(gc, "disable", interrupted)
    with contextlib.suppress(KeyboardInterrupt):  # from Python 3.12 on the collector is left alone
        frames_of_threads()
    assert gc.isenabled()


def test_a_garbage_collector_that_is_off_stays_off_when_frames_are_read():
    gc.disable()
    try:
        assert threading.get_ident() in frames_of_threads()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_a_forward_returns_is_noted_before_another_thread_may_begin_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be noted of the other thread's tensors. No mode of ours is on the stack by then."""
    seen, note_outputs = [], NeuronFlow.note_outputs

    def noted(self: NeuronFlow, values: Any) -> None:
        seen.append((scope._hooks.thread.in_forward, torch._C._len_torch_function_stack()))
        note_outputs(self, values)

    monkeypatch.setattr(NeuronFlow, "note_outputs", noted)
    with ns.watch(net := nn.Sequential(nn.Linear(4, 3), nn.ReLU())) as scope:
        net(torch.ones(2, 4)).sum().backward()
        scope.step()
    assert seen == [(threading.get_ident(), 0)]
    assert scope._hooks.thread.in_forward is None
