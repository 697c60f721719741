"""In the steady state an observed step keeps nothing, whatever the network: neither tensors nor Python's objects.

What it allocates for a moment is little: the tensors that wait are counted in buffers that were made before.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.profiler import ProfilerActivity, profile

import neuronscope as ns

#: Sites of each network; steps after which as much waits as before (small tensors by 32, rows of counts by 64, outputs
#: and gradients in turn); steps that are profiled.
SITES, ROUND, PROFILED = 12, 192, 64


class Functions(nn.Module):
    """Functional activations, a reused module and a gated product, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.silu = nn.ModuleList(nn.Linear(8, 8) for _ in range(SITES // 4)), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = F.relu(y) + self.silu(y) * x + torch.tanh(y).flip(0)  # relu(), silu, silu.gated, tanh()
        return x


def modules() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(SITES) for layer in (nn.Linear(8, 8), nn.ReLU())))


def maps() -> nn.Module:
    return nn.Sequential(
        *(layer for _ in range(SITES) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)))
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "modules": (modules, (4, 8)),
    "functions": (Functions, (4, 8)),
    "maps": (maps, (4, 8, 3, 3)),
    "too large to wait": (modules, (1024, 8)),
}


def training(model: nn.Module, shape: tuple[int, ...], scope: ns.Scope | None = None) -> Callable[[], None]:
    x = torch.randn(shape, requires_grad=True)

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()
        x.grad = None
        if scope is not None:
            scope.step()

    return step


@pytest.fixture(autouse=True)
def _all_objects() -> None:
    """The garbage collector's list has all objects, also those that it is spared (tests/conftest.py)."""
    gc.unfreeze()


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_a_repeated_step_keeps_no_memory(build: Callable[[], nn.Module], shape: tuple[int, ...]):
    model = build()
    with ns.watch(model, window_steps=10**9) as scope:
        step = training(model, shape, scope)
        kept = []
        for _ in range(3):
            for _ in range(ROUND):
                step()
            kept.append((tensors(), sys.getallocatedblocks()))
        assert len(scope.census()) == SITES
    (_, _), (tensors_before, objects_before), (tensors_after, objects_after) = kept
    assert tensors_after == tensors_before
    # The open window notes each step: one integer. One object a step and site would be 12 more a step.
    assert objects_after - objects_before < 2 * ROUND


def test_a_report_between_two_steps_keeps_no_buffer():
    model = modules()
    with ns.watch(model, window_steps=10**9) as scope:
        step = training(model, (4, 8), scope)
        for _ in range(ROUND):
            step()
        held = storage()
        for _ in range(20):  # of 32 that may wait
            step()
        assert {tally.positions for tally in scope.census().values()} == {4 * (ROUND + 20)}
        # One buffer a site would be 64 kB at least.
        assert storage() - held < 1 << 16


def storage() -> int:
    """Bytes of all plain tensors that live, each memory once; the wrappers of transforms have none."""
    gc.collect()
    plain = [each for each in gc.get_objects() if type(each) is Tensor and not _is_wrapper(each)]
    living = [each.untyped_storage() for each in plain if each.device.type == "cpu"]
    return sum({each._cdata: each.nbytes() for each in living}.values())


def _is_wrapper(tensor: Tensor) -> bool:
    return torch._is_functional_tensor(tensor) or is_functorch_wrapped_tensor(tensor)


@pytest.mark.parametrize("name", ["modules", "functions"])
def test_the_temporary_memory_of_a_repeated_step_is_bounded(name: str):
    build, shape = NETWORKS[name]
    plain, watched = build(), build()
    with ns.watch(watched, window_steps=10**9) as scope:
        ours, theirs = (operators(each) for each in (training(watched, shape, scope), training(plain, shape)))
    more = {key: (ours[key] - theirs[key]) / PROFILED for key in ours}
    gradients = SITES - (SITES // 4 if name == "functions" else 0)  # a gated product has none of its own
    # An output and a gradient are copied to where they wait. Counting them, 32 at a time, copies and allocates a little
    # more: by far less than once a site, and counting each as it comes would be several times.
    assert SITES + gradients <= more["copies"] < SITES + gradients + SITES / 4
    assert more["detachments"] == SITES  # of outputs; gradients bear no graph
    assert more["allocations"] < SITES


def operators(step: Callable[[], None]) -> dict[str, int]:
    """What some steps call, and how often they allocate memory for a tensor."""
    for _ in range(2 * PROFILED):
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(PROFILED):
            step()
    counts = {each.key: each.count for each in profiler.key_averages()}
    memory = (each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]")
    return {
        "copies": counts.get("aten::copy_", 0),
        "detachments": counts.get("aten::detach", 0),
        "allocations": sum(each.nbytes() > 0 for each in memory),
    }
