"""Counts on a GPU, exact: each test has a device, and what runs there where one is at hand runs here on the CPU.

Two truths. In eager mode the slow twin, in a run of its own, which gives the same bits since the device is told to be
deterministic. In compiled mode, where no two runs need agree in their last bits, the same run: the network gives its
activations out, and a probe of zeros is added to each pre-activation, whose gradient is that of the pre-activation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.setups import MIXED, Mixed, adam, batches
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of

pytestmark = [
    # The compiler's own: it warns of its deprecations and of this machine's limits.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
STEPS, BATCH = 6, 4


@pytest.fixture(autouse=True)
def _same_bits_each_time() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch._dynamo.reset()


class Everything(nn.Module):
    """Channels and last axis, in-place and functional, ReLU, GELU, SiLU and a gated product."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        self.trunk = Mixed(checkpointing)
        self.gate, self.up, self.head = nn.Linear(2, 9), nn.Linear(2, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.head(F.relu(self.gate(x)) * self.up(x))


AXES = {f"trunk.{name}" if name else None: axis for name, axis in MIXED.items()}
#: In the order in which they run: a ReLU of the trunk, one in its block behind two layers, and the rest.
NAMES = [
    *("trunk.norm/relu", "trunk.block.conv1/relu", "trunk.block.conv2/relu", "trunk.fc/gelu", "trunk.fc/silu"),
    *("gate/relu", "gate/reglu"),
]


def train(model: nn.Module, watcher: Nobody, device: str, *, bfloat16: bool, micro_batches: int) -> None:
    optimizer = adam(model)
    for number, (x, y) in enumerate(batches(STEPS * micro_batches, BATCH)):
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
        watcher.backward(loss / micro_batches)
        if number % micro_batches == micro_batches - 1:
            optimizer.step()
            optimizer.zero_grad()
            watcher.step()


@on_each_device
@pytest.mark.parametrize(
    ("bfloat16", "micro_batches", "checkpointing"),
    list(product((False, True), (1, 4), ("", "plain", "reentrant"))),
)
def test_eager_counts_equal_the_twins_and_weights_those_of_an_unwatched_run(
    device: str, bfloat16: bool, micro_batches: int, checkpointing: str
) -> None:
    nobody, watched, twin = Nobody(), Watched(), Twin(AXES)
    states = {}
    for watcher in (nobody, watched, twin):
        torch.manual_seed(0)
        model = Everything("" if watcher is twin else checkpointing).to(device)
        before = hook_tables(model)
        with watcher.attach(model):
            train(model, watcher, device, bfloat16=bfloat16, micro_batches=micro_batches)
        assert hook_tables(model) == before
        states[watcher] = state_of(model)
    assert_bits(states[nobody], states[watched])
    census = watched.scope.census()
    assert list(census) == NAMES
    assert_same(census, twin.tallies())
    for tally in census.values():
        assert tally.examples == STEPS * micro_batches * BATCH
        assert tally.gradient_positions == tally.positions
    assert not watched.scope.report().not_measured
    assert {weight.device.type for weight in model.parameters()} == {device}


class Probed(nn.Module):
    """Gives its activations out; takes zeros that are added to its pre-activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.up, self.head = nn.Conv1d(3, 8, 3, padding=1), *(nn.Linear(8, 8) for _ in range(3))
        self.relu, self.act = nn.ReLU(inplace=True), nn.GELU()

    def forward(self, x: Tensor, channels: Tensor, last: Tensor) -> tuple[Tensor, list[Tensor]]:
        pre = self.conv(x)
        first = self.relu(pre + channels.to(pre.dtype))  # (B, C, L)
        pre = self.gate(first.transpose(1, 2))
        second = F.relu(pre + last.to(pre.dtype))  # (B, L, D)
        gated = second * self.up(first.transpose(1, 2))
        third = self.act(self.head(gated))
        return third.square().mean(), [first, second, gated, third]


#: By site: which output it is, and which probe has its gradient; and the neurons' axis.
PROBED = {"conv/relu": (0, 0, 1), "gate/relu": (1, 1, 2), "gate/reglu": (2, 1, 2), "head/gelu": (3, None, 2)}
#: Options of ``torch.compile``; the last makes CUDA graphs where there is CUDA.
COMPILERS = {
    "aot_eager": {"backend": "aot_eager"},
    "inductor": {},
    "graphs": {"mode": "reduce-overhead"},
}


def recorded(run: Any, model: nn.Module, device: str, after: Any, *, bfloat16: bool) -> dict[str, dict[str, Any]]:
    """Train, and count what the network gives out and what its probes are given."""
    optimizer = adam(model)
    shapes = ((BATCH, 8, 6), (BATCH, 6, 8))
    truth: dict[str, dict[str, Any]] = {
        name: {"zero_outputs": np.zeros(8, int), "zero_gradients": np.zeros(8, int), "positions": 0} for name in PROBED
    }
    for x, _ in batches(STEPS, BATCH):
        probes = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss, outputs = run(x.to(device), *probes)
        kept = [output.detach().clone() for output in outputs]  # a CUDA graph writes the next step's over these
        loss.backward()
        for name, (output, probe, axis) in PROBED.items():
            y = np.moveaxis(kept[output].cpu().double().numpy(), axis, 0).reshape(8, -1)
            truth[name]["zero_outputs"] += (y == 0).sum(1)
            truth[name]["positions"] += y.shape[1]
            if probe is not None:
                gradient = np.moveaxis(probes[probe].grad.cpu().numpy(), axis, 0).reshape(8, -1)
                truth[name]["zero_gradients"] += (gradient == 0).sum(1)
        optimizer.step()
        optimizer.zero_grad()
        after()
    return truth


@on_each_device
@pytest.mark.parametrize(
    ("compiler", "bfloat16"),
    [
        (None, False),
        (None, True),
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        *(pytest.param(compiler, True, marks=pytest.mark.slow) for compiler in COMPILERS),
    ],
)
def test_counts_equal_those_of_the_activations_that_the_same_run_returned(
    device: str, compiler: str | None, bfloat16: bool
) -> None:
    model = Probed().to(device)
    with ns.watch(model) as scope:
        run = model if compiler is None else torch.compile(model, fullgraph=True, **COMPILERS[compiler])
        truth = recorded(run, model, device, scope.step, bfloat16=bfloat16)
    census = scope.census()
    assert list(census) == list(PROBED)
    for name, counts in truth.items():
        tally = census[name]
        # STEPS batches of BATCH examples of 6 positions
        assert tally.positions == tally.gradient_positions == counts["positions"] == STEPS * BATCH * 6
        assert tally.zero_outputs.tolist() == counts["zero_outputs"].tolist(), name
        if PROBED[name][1] is not None:
            assert tally.zero_gradients.tolist() == counts["zero_gradients"].tolist(), name
    assert 0 < truth["conv/relu"]["zero_outputs"].sum() < 8 * truth["conv/relu"]["positions"]
    assert 0 < truth["gate/relu"]["zero_gradients"].sum() < 8 * truth["gate/relu"]["positions"]
    assert not scope.report().not_measured


@contextlib.contextmanager
def raising_at_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each_device
def test_an_observed_step_waits_for_no_device(device: str) -> None:
    """On CUDA torch raises where one would; on the CPU there is nothing to wait for, and the loop is the same."""
    model = Everything().to(device)
    data = [(x.to(device), y.to(device)) for x, y in batches(STEPS, BATCH)]
    with ns.watch(model) as scope:
        for number, (x, y) in enumerate(data):
            with raising_at_waits() if device == "cuda" and number else contextlib.nullcontext():
                F.cross_entropy(model(x), y).backward()
                scope.step()
    assert scope.census()["trunk.norm/relu"].examples == STEPS * BATCH


@pytest.mark.gpu
def test_a_step_that_is_captured_and_replayed_on_cuda() -> None:
    """Every replay is counted, at its step; `tests/count/test_captured.py` has more, on the CPU."""
    from benchmarks.captured import REPLAYS, WARM, replayed

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).cuda()
    x = torch.randn(BATCH, 3, device="cuda")
    scope = replayed(model, x, torch.zeros(BATCH, dtype=torch.int64, device="cuda"))
    assert not scope.report().not_measured
    for tally in scope.census().values():
        steps = WARM + REPLAYS
        assert (tally.examples, tally.positions, tally.gradient_positions) == (steps * BATCH,) * 3
        assert tally.last_active_step.max() == WARM + REPLAYS  # the capture took a step, and counted nothing


@pytest.mark.gpu
def test_the_kernels_count_on_cuda_as_the_slow_twin() -> None:
    """With the same bits in the sums each time, also on another stream."""
    from neuronscope.count.backends import backend_for
    from tests.count.device_cases import case, check, moved

    backend = backend_for("cuda")
    assert backend.kernels is not None, backend.reason
    for number in range(600):
        one = moved(case(number), "cuda")
        sums = check(backend.kernels, one, captured=number % 3 == 0)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            again = check(backend.kernels, one)
        torch.cuda.current_stream().wait_stream(aside)
        assert torch.equal(sums, again), str(one)
        check(backend._plain, one)


@pytest.mark.gpu
def test_subnormal_numbers_are_not_zeros_on_cuda() -> None:
    from neuronscope.count.backends import backend_for
    from neuronscope.count.counters import SiteCounters
    from neuronscope.count.neuron_layout import NeuronLayout
    from neuronscope.count.pieces import TensorToCount

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        y = torch.full((64, 32), torch.finfo(dtype).smallest_normal, dtype=dtype).div_(4).cuda()
        counters = SiteCounters(32, y.device)
        backend_for("cuda").count(counters.tensors, TensorToCount(y, NeuronLayout(1), 0, 0.0))
        assert counters.tensors.zero_outputs.tolist() == [0] * 32


@pytest.mark.gpu
def test_memory_on_cuda_does_not_grow_with_the_activation() -> None:
    from neuronscope.count.backends import backend_for
    from neuronscope.count.counters import SiteCounters
    from neuronscope.count.neuron_layout import NeuronLayout
    from neuronscope.count.pieces import Pieces, TensorToCount

    for counting, most in ((backend_for("cuda").kernels, 4 << 20), (Pieces(), 32 << 20)):
        for shape, axis in (((1 << 16, 4096), 1), ((64, 256, 112, 112), 1), ((4096, 2048, 7, 7), 1)):
            y = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
            counters = SiteCounters(shape[axis], y.device).tensors
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            counting.count(counters, TensorToCount(y, NeuronLayout(axis), 0, 0.0))
            assert torch.cuda.max_memory_allocated() - before <= most + 100 * shape[axis]
