"""Accelerate in one process: a plain loop that is watched before or after ``prepare``, in float32 and bfloat16."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of

ACCUMULATED, STEPS = 2, 3


class Net(nn.Module):
    """An activation module, a functional one, and a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.up, self.last = (
            nn.Linear(5, 12),
            nn.Linear(12, 8),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )
        self.act = nn.ReLU()
        with torch.no_grad():
            self.first.bias[:3] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        return self.last(F.silu(self.second(h)) * self.up(h) + F.relu(self.up(h)))


def train(watcher: Nobody, precision: str, *, before: bool) -> tuple[nn.Module, Any]:
    AcceleratorState._reset_state()  # it has one precision for the whole process
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATED)
    model = Net()
    tables = hook_tables(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerator.backward = watcher.backward
    with contextlib.ExitStack() as stack:
        if before:
            stack.enter_context(watcher.attach(model))
        prepared, optimizer = accelerator.prepare(model, optimizer)
        if not before:
            stack.enter_context(watcher.attach(prepared))
        for _ in range(STEPS * ACCUMULATED):
            with accelerator.accumulate(prepared):
                loss = F.cross_entropy(prepared(torch.randn(6, 5)), torch.randint(3, (6,)))
                accelerator.backward(loss / ACCUMULATED)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                watcher.step()
        saved = io.BytesIO()
        torch.save(prepared.state_dict(), saved)
        again = copy.deepcopy(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
        again(torch.randn(4, 5))  # a copy is not counted
    assert hook_tables(model) == tables
    return model, watcher


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_counts_equal_the_twins_and_weights_those_of_an_unwatched_run(precision: str, before: bool) -> None:
    plain, _ = train(Nobody(), precision, before=before)
    watched, watcher = train(Watched(), precision, before=before)
    _, twin = train(Twin({None: 1}), precision, before=before)
    assert_same(watcher.scope.census(), twin.tallies())
    assert list(watcher.scope.census()) == ["first/relu", "second/silu", "second/swiglu", "up/relu"]
    assert watcher.scope.census()["first/relu"].examples == STEPS * ACCUMULATED * 6
    assert_bits(state_of(watched), state_of(plain))
