"""Steps captured in a CUDA graph by hand, on the CPU: each operation is noted while it runs, and run again at a replay.

As on CUDA, what is captured is of no effect until it is replayed, a replay runs no Python, and its numbers are those of
the capture: what Python passed to an operation then is what the operation gets at each replay.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neuronscope as ns
from neuronscope.count import backends
from neuronscope.count.backends import Backend
from neuronscope.count.captured_graphs import StepClock, _kept
from neuronscope.errors import NeuronscopeWarning

BATCH = 6


class Graph(TorchDispatchMode):
    """Notes operations, and runs them again. What they change is put back when the capture ends."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Sees our own arithmetic too, which is hidden from modes of users."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.data_ptr() not in self._before:
                self._before[leaf.data_ptr()] = leaf.detach(), leaf.detach().clone()
        result = function(*args, **kwargs)
        self._calls.append((function, args, kwargs, result))
        return result

    def end(self) -> None:
        for tensor, before in self._before.values():
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[Graph]]:
    """Tensors of the CPU go the way of those on a GPU; returns what captures."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backends, "_used", {"cpu": Backend("cpu")})

    @contextlib.contextmanager
    def capturing() -> Iterator[Graph]:
        graph = Graph()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with graph:
            yield graph
        graph.end()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    return capturing


class Net(nn.Module):
    """A reused ReLU in place, a gated product, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.up, self.head = (nn.Linear(5, 5) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        return self.relu(self.head(F.silu(self.gate(h)) * self.up(h)))


def stepper(net: nn.Module, mask: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    x = torch.randn(BATCH, 4, 5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        net(x, attention_mask=mask).square().mean().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("every", [1, 5])
def test_replays_are_counted_as_the_same_steps_without_a_graph(capture: Any, every: int, masked: bool) -> None:
    mask = torch.ones(BATCH, 4, dtype=torch.bool)
    mask[2:, 3] = False
    net = Net()
    plain = copy.deepcopy(net)
    option = "attention_mask" if masked else None
    torch.manual_seed(1)
    with ns.watch(net, every_n_steps=every, mask=option) as scope:
        step = stepper(net, mask)
        step()
        scope.step(every)  # the next one that is observed
        with capture() as graph:
            step()
        for number in range(1, 8):
            graph.replay()
            scope.step(every + number)
    torch.manual_seed(1)
    with ns.watch(plain, mask=option) as truth:
        step = stepper(plain, mask)
        step()
        truth.step(every)
        for number in range(1, 8):
            step()
            truth.step(every + number)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not scope.report().not_measured
    census, expected = scope.census(), truth.census()
    assert list(census) == list(expected) == ["first/relu", "gate/silu", "gate/swiglu", "head/relu"]
    for name, tally in expected.items():
        for field in ("zero_outputs", "zero_gradients", "last_active_step", "first_active_step", "abs_sum"):
            assert getattr(census[name], field).tolist() == getattr(tally, field).tolist(), (name, field)
        for field in ("positions", "gradient_positions", "examples"):
            assert getattr(census[name], field) == getattr(tally, field), (name, field)
    # eight steps; the mask leaves out one position of four of the six examples
    assert census["head/relu"].positions == 8 * (BATCH * 4 - 4 * masked)
    assert 0 < census["head/relu"].zero_outputs.sum() < census["head/relu"].positions * 5
    assert census["head/relu"].last_active_step.max() == every + 6


def test_a_capture_without_a_watched_step_before_it_is_listed(capture: Any) -> None:
    net, mask = Net(), torch.ones(BATCH, 4, dtype=torch.bool)
    with ns.watch(net) as scope:
        step = stepper(net, mask)
        with capture() as graph:
            step()
        graph.replay()
        with pytest.warns(NeuronscopeWarning, match="nothing is measured so far"):
            scope.step()
    missing = {item.name: item.reason for item in scope.report().not_measured}
    assert set(missing) == {"first/relu", "gate/silu", "gate/swiglu", "head/relu"}
    assert all(reason.startswith("it was captured in a CUDA graph") for reason in missing.values())
    assert not scope.census()


def test_a_capture_for_which_nothing_is_ready_is_listed(capture: Any) -> None:
    """A kernel would be compiled in the capture: it was never launched for such a tensor."""

    class Cold:
        def is_warm(self, *args: Any) -> bool:
            return False

        def count(self, *args: Any) -> None:
            pass

    backends._used["cpu"] = Backend("cpu", Cold())
    net, mask = Net(), torch.ones(BATCH, 4, dtype=torch.bool)
    with ns.watch(net) as scope:
        step = stepper(net, mask)
        step()
        scope.step()
        with capture() as graph:
            step()
        graph.replay()
        scope.step()
    missing = {item.name: item.reason for item in scope.report().not_measured}
    assert set(missing) == {"first/relu", "gate/silu", "gate/swiglu", "head/relu"}
    assert set(missing.values()) == {backends.NOT_WARM}
    assert {tally.positions for tally in scope.census().values()} == {BATCH * 4}


def test_what_a_graph_writes_to_outlives_the_watch(capture: Any) -> None:
    net, mask = Net(), torch.ones(BATCH, 4, dtype=torch.bool)
    with ns.watch(net) as scope:
        step = stepper(net, mask)
        step()
        scope.step()
        with capture():
            step()
        sites = [counters for _, counters in scope._phases.record("train")._counters.values()]
    held = {each.data_ptr() for counters in sites for each in counters.tensors}
    assert len(held) == 4 * 8
    assert held <= {tensor.data_ptr() for tensor in _kept.values()}


def test_replays_of_a_step_that_was_captured_unobserved_are_told() -> None:
    """The hooks were off the model then, so that nobody saw the capture."""
    net, mask = Net(), torch.ones(BATCH, 4, dtype=torch.bool)
    with ns.watch(net, every_n_steps=5) as scope:
        scope._hooks.recorder.clock.on(torch.device("meta"))  # stands for a GPU on which something was counted
        step = stepper(net, mask)
        for number in range(12):
            if number < 7:  # afterwards a graph runs it
                step()
            scope.step()
    # of the steps 0, 5 and 10 the last one
    assert [note for note in scope.report().notes if "CUDA graph" in note] == [
        "The model was not called at 1 of the observed steps. If a CUDA graph ran it there, that was not counted: "
        "capture a step that is observed, as all are with every_n_steps=1."
    ]


@pytest.mark.slow
def test_nothing_keeps_a_compiled_graph_from_being_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes no CUDA graph that changes an input which may move, or that reads a tensor of the CPU."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def on_the_device(clock: StepClock, device: torch.device) -> Tensor:
        return clock.devices.setdefault(device, torch.full((), clock.step, dtype=torch.int64))

    monkeypatch.setattr(StepClock, "on", on_the_device)
    changed: list[int] = []

    def compile_and_look(graph: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        written = {
            place
            for place, node in enumerate(places)
            if any(user.target is torch.ops.aten.copy_.default and user.args[0] is node for user in node.users)
        }
        assert written <= set(settings["static_input_idxs"])
        changed.append(len(written))
        return compile_fx_inner(graph, inputs, **settings)

    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    run = torch.compile(net, backend=lambda *made: compile_fx(*made, inner_compile=compile_and_look), fullgraph=True)
    with ns.watch(net) as scope:
        for _ in range(3):
            run(torch.randn(BATCH, 6)).square().sum().backward()
            scope.step()
        clock = scope._hooks.recorder.clock
        assert [counters.clock for _, counters in scope._phases.record("train")._counters.values()] == [
            clock.devices[torch.device("cpu")]
        ] * 2
    # of two sites six counters in the forward graph, and two in the backward graph
    assert changed == [12, 4]
    assert {tally.positions for tally in scope.census().values()} == {3 * BATCH}
    assert all(tally.last_active_step.max() == 2 for tally in scope.census().values())
