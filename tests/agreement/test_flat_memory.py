"""A long run holds no more than a short one: not with its steps, and not with the names of its evaluations."""

from __future__ import annotations

import gc
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.count.counters import SiteCounters, add_gradients, add_outputs
from neuronscope.count.cpu_kernels import ScratchBuffers
from neuronscope.errors import UsageError
from neuronscope.tally import history


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.up, self.out = nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.fc(x))
        return self.out(F.silu(self.up(x)) * x)


def data(number: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(number))


def evaluate(scope: ns.Scope, model: nn.Module, number: int, name: str) -> None:
    with scope.phase(name), torch.no_grad():
        model(data(number))


def held_bytes(scope: object) -> tuple[int, int]:
    """Return the bytes of all tensors and arrays that an object holds, and the number of objects but for integers."""
    queue: list[Any] = [scope]
    seen: dict[int, Any] = {}
    storages: dict[int, int] = {}
    while queue:
        each = queue.pop()
        if id(each) in seen or isinstance(each, (int, ModuleType, FunctionType, type, nn.Module)):
            continue
        seen[id(each)] = each
        if isinstance(each, Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, np.ndarray):
            storages[each.ctypes.data if each.base is None else id(each)] = each.nbytes
        queue.extend(gc.get_referents(each))
    return sum(storages.values()), len(seen)


def held_by_counters(scope: ns.Scope) -> int:
    """Return the bytes of the running counts of all phases that a scope watches."""
    return sum(held_bytes(counters)[0] for counters in scope._hooks.recorder.sites.all_counters())


def test_running_counts_take_twenty_bytes_a_neuron_in_one_phase_and_in_64() -> None:
    """Counts in 32 bits, steps in 16; a phase that does not run holds nothing. Of these widths no rows wait."""
    neurons = 20_000
    model = nn.Sequential(nn.Linear(2, neurons), nn.ReLU(), nn.Linear(neurons, 2))
    some = 100  # of numbers that a site has but once
    with ns.watch(model) as scope:
        for number in range(64):
            for _ in range(3):
                model(torch.randn(5, 2)).sum().backward()
                scope.step()
            assert 20 * neurons <= held_by_counters(scope) <= 20 * neurons + 10 * some
            with scope.phase(f"val_{number}"), torch.no_grad():
                model(torch.randn(5, 2))
                assert 40 * neurons <= held_by_counters(scope) <= 40 * neurons + 10 * some
    assert len(scope.phases) == 65


def test_running_counts_of_ten_million_neurons_take_twenty_bytes_each() -> None:
    counters, scratch = SiteCounters(10**7, torch.device("cpu")), ScratchBuffers()
    y = torch.ones(1, 10**7)
    y[:, ::2] = 0
    add_outputs(counters, y, 1, 1, 5, scratch, 0.0)
    add_gradients(counters, y, 1, scratch)
    assert 20 * 10**7 <= held_bytes(counters)[0] <= 20 * 10**7 + 100
    window = counters.window
    assert window is not None
    assert [int(each.sum()) for each in window.tensors[:2]] == [5 * 10**6] * 2


@pytest.mark.filterwarnings("ignore:More than 64 phases")
def test_memory_does_not_grow_with_the_number_of_phases() -> None:
    torch.manual_seed(0)
    model = Net()
    with ns.watch(model) as scope:
        held = []
        for number in range(800):
            evaluate(scope, model, number, f"val_epoch_{number}")
            if number + 1 in (100, 800):
                held.append(held_bytes(scope))
    assert len(scope.phases) == 64
    assert held[1] == pytest.approx(held[0], rel=0.01)
    assert held[0][0] < 64 * 3 * 64 * 500  # 500 bytes for each neuron, site and phase


def test_memory_does_not_grow_with_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one step fill a short history at once, which then keeps as many as it may."""
    monkeypatch.setattr(history, "MAX_WINDOWS", 64)
    torch.manual_seed(0)
    model, x, held = Net(), data(0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with ns.watch(model, window_steps=1, policy=ns.Policy(max_rate=0.99)) as scope:
        for step in range(750):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
            if step % 2:
                evaluate(scope, model, 0, "val")
            if step + 1 in (150, 750):
                gc.collect()
                held.append((*held_bytes(scope), len(gc.get_objects())))
    (bytes_before, ours_before, all_before), (bytes_after, ours_after, all_after) = held
    assert bytes_after <= bytes_before * 1.05
    assert ours_after <= ours_before * 1.1
    assert all_after <= all_before + 200


def test_the_newest_phases_keep_their_counts_and_the_forgotten_ones_are_named() -> None:
    torch.manual_seed(0)
    model = Net()
    with ns.watch(model) as scope:
        with pytest.warns(ns.NeuronscopeWarning, match="64 phases .*'val_epoch_0' first. Use one name") as warned:
            for number in range(70):
                model(data(number)).sum().backward()
                scope.step()
                evaluate(scope, model, number, f"val_epoch_{number}")
                evaluate(scope, model, number, "val")
        with pytest.raises(UsageError, match=r"'val_epoch_3'. The counts of \d older phases are no longer kept"):
            scope.census("val_epoch_3")
    assert [each.filename for each in warned] == [__file__]
    zeros = [(F.relu(model.fc(data(number))) == 0).sum(0) for number in range(70)]
    for number in range(10, 70):
        tally = scope.census(f"val_epoch_{number}")["fc/relu"]
        assert (tally.positions, tally.zero_outputs.tolist()) == (3, zeros[number].tolist())
    assert scope.census("val")["fc/relu"].zero_outputs.tolist() == sum(zeros).tolist()
    assert scope.census("train")["fc/relu"].zero_outputs.tolist() == sum(zeros).tolist()
    assert len(scope.state_dict()["phases"]) == 65


def test_a_phase_that_runs_again_after_many_others_goes_on() -> None:
    """Its buffers were freed meanwhile; outputs, gradients and the gated product count as before."""
    torch.manual_seed(0)
    model = Net()
    with ns.watch(model) as scope:
        for number in range(3):
            with scope.phase("again"):
                model(data(number)).sum().backward()
            for other in range(12):
                evaluate(scope, model, other, f"other_{other}")
    expected = sum((F.relu(model.fc(data(number))) == 0).sum(0) for number in range(3))
    assert scope.census("again")["fc/relu"].zero_outputs.tolist() == expected.tolist()
    for tally in scope.census("again").values():
        assert (tally.positions, tally.gradient_positions, tally.examples) == (9, 9, 9)
    assert scope.report("again").window.name == "last"
    assert {tally.positions for name in scope.phases if name != "again" for tally in scope.census(name).values()} == {9}
