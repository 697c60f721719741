"""What watching adds to the work of the compiler: traced frames of our Python, and operators of the graphs."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.symbolic_convert import InstructionTranslatorBase

import neuronscope as ns
from neuronscope.attach.neuron_flow import NeuronFlow
from tests.compiled.compiler_marks import COMPILES

pytestmark = COMPILES

OURS = str(Path(ns.__file__).parent)


class Chain(nn.Module):
    """One ReLU, after a number of calls of torch functions that are followed only."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls, self.fc, self.last, self.act = calls, nn.Linear(4, 6), nn.Linear(6, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for _ in range(self.calls):
            x = torch.add(x, 0.5)
        return self.last(self.act(x))


def test_a_function_that_is_only_followed_costs_the_compiler_one_traced_frame_of_ours(monkeypatch):
    frames: Counter[str] = Counter()
    run = InstructionTranslatorBase.run

    def counting(self):
        if self.f_code.co_filename.startswith(OURS):
            frames[self.f_code.co_name] += 1
        return run(self)

    monkeypatch.setattr(InstructionTranslatorBase, "run", counting)
    traced = []
    for calls in (1, 5):
        torch._dynamo.reset()
        frames.clear()
        model = Chain(calls)
        with ns.watch(model) as scope:
            torch.compile(model, backend="eager", fullgraph=True)(torch.ones(3, 4))
            assert [*scope.census()] == ["fc/relu"]
        traced.append(frames.copy())
    assert traced[1] - traced[0] == Counter({"__torch_function__": 4})


class Largest(torch.autograd.Function):
    """Adds the largest of each row, which a call gives together with its place. No function mode sees that call."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        largest, _ = x.max(dim=-1, keepdim=True)
        return x + torch.zeros_like(largest) + largest

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last, self.act = nn.Linear(4, 6), nn.Linear(6, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Largest.apply(self.act(self.fc(x))))


def test_one_of_several_results_of_a_call_that_no_mode_sees_is_looked_for_once(monkeypatch):
    """Each result leads to the call, and not to the other results: that search had no end."""
    followed, follow = [], NeuronFlow.follow

    def counting(self, *call):
        followed.append(call[0])
        assert len(followed) < 100
        return follow(self, *call)

    monkeypatch.setattr(NeuronFlow, "follow", counting)
    model = Rows()
    with ns.watch(model) as scope:
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(3, 4))
        assert [*scope.census()] == ["fc/relu"]
    assert Tensor.max in followed


def test_a_site_adds_few_operators_to_the_graphs():
    def operators(*, watched: bool) -> list[int]:
        torch._dynamo.reset()
        found: list[int] = []

        def keep(graph, _):
            found.append(sum(node.op == "call_function" for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        model = Chain(0)
        with ns.watch(model) if watched else contextlib.nullcontext():
            torch.compile(model, backend=backend, fullgraph=True)(torch.ones(3, 4)).sum().backward()
        return found

    forward, backward = (one - two for one, two in zip(operators(watched=True), operators(watched=False), strict=True))
    assert forward <= 19
    assert backward <= 8
