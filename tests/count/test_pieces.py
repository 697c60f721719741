"""Counting by the plain formula in pieces: exact in every layout, in bounded memory, and without float64."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neuronscope as ns
from neuronscope.count import backends, pieces
from neuronscope.count.backends import Backend
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.count.pieces import Pieces, TensorToCount
from neuronscope.errors import NeuronscopeWarning
from tests.count.device_cases import KINDS, case, check

MB = 1 << 20


@pytest.mark.parametrize("first", range(len(KINDS)), ids=KINDS)
def test_random_tensors_are_counted_as_by_the_slow_twin(first: int) -> None:
    for number in range(first, 25 * len(KINDS), len(KINDS)):
        check(Pieces(), case(number), captured=number % 3 == 0)


@pytest.mark.parametrize("bytes_of_a_piece", [4, 40, 1000])
def test_any_number_of_pieces_gives_the_same(bytes_of_a_piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one, ten and 250 numbers, or of one position: positions are cut, in one dimension or in all."""
    monkeypatch.setattr(pieces, "_BYTES", bytes_of_a_piece)
    numbers = [number for number in range(3 * len(KINDS)) if case(number).tensor.numel() < 500 * bytes_of_a_piece]
    assert len(numbers) > 5
    for number in numbers:
        check(Pieces(), case(number))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64, torch.bool], ids=str)
def test_outputs_of_other_types_are_counted_too(dtype: torch.dtype) -> None:
    y = torch.tensor([[0, 3], [0, 0], [4, 0]]).to(dtype)
    if dtype.is_complex:
        y = y * (0.6 + 0.8j)  # of magnitude 1
    counters = SiteCounters(2, y.device).tensors
    Pieces().count(counters, TensorToCount(y, NeuronLayout(1), 0, 0.0))
    assert counters.zero_outputs.tolist() == [2, 2]
    assert counters.not_finite.tolist() == [0, 0]
    assert counters.abs_sum.tolist() == pytest.approx([1, 1] if dtype is torch.bool else [4, 3])


def test_a_sum_beyond_float32_is_finite() -> None:
    """Each number is; their sum is not in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.full((40, 2), 3e38, dtype=dtype)
        counters = SiteCounters(2, y.device).tensors
        Pieces().count(counters, TensorToCount(y, NeuronLayout(1), 0, 0.0))
        assert counters.abs_sum.tolist() == [40 * y[0, 0].item()] * 2


class Allocations(TorchDispatchMode):
    """Adds up the memory of all tensors that are made, and follows how much of it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self._known:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        size, which = storage.nbytes(), storage._cdata
        self._known.add(which)
        self.made += size
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._forget, size, which)

    def _forget(self, size: int, which: int) -> None:
        self._known.discard(which)
        self.alive -= size


SHAPES = {
    "many positions": ((6000, 2048), 1),
    "many neurons": ((40, 300_000), 1),
    "maps": ((12, 64, 128, 128), 1),
    "one neuron": ((1, 12_000_000), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_temporaries_are_bounded_whatever_the_activation(name: str, dtype: torch.dtype) -> None:
    """At most 32 MB are made in all, beside some numbers for each neuron; the activations have 12 million numbers."""
    shape, axis = SHAPES[name]
    y = torch.ones((), dtype=dtype).expand(shape)  # what is read must not take memory here
    counters = SiteCounters(shape[axis], y.device).tensors
    for tolerance in (0.0, None):
        with Allocations() as memory:
            Pieces().count(counters, TensorToCount(y, NeuronLayout(axis), 0, tolerance))
        assert 4 * MB < memory.made <= 32 * MB + 100 * shape[axis], memory.made
    positions = y.numel() // shape[axis]
    assert counters.abs_sum.tolist()[:2] == [positions] * min(shape[axis], 2)


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64, as MPS does."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if leaf is torch.float64 or (isinstance(leaf, Tensor) and leaf.dtype is torch.float64):
                raise TypeError(f"this device has no float64: {function}")
        return result

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Sees our own arithmetic too, which is hidden from modes of users."""
        return True


@pytest.fixture
def off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors of the CPU go the way of those of a device that has no kernels and no float64."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    monkeypatch.setattr(backends, "_used", {"cpu": Backend("cpu")})
    monkeypatch.setattr("neuronscope.count.counter_tensors.has_float64", lambda device_type: False)
    monkeypatch.setattr("neuronscope.count.counter_tensors._SEEN_BY_HOST", "nowhere")
    yield
    monkeypatch.undo()


def train(scope: ns.Scope, net: nn.Module) -> None:
    """Three steps, of 5 examples each, and a pass of validation."""
    for _ in range(3):
        F.cross_entropy(net(torch.randn(5, 3, 8, 8)), torch.arange(5) % 4).backward()
        scope.step()
    with scope.phase("val"), torch.inference_mode():
        net(torch.randn(7, 3, 8, 8))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten()),
        *(nn.Linear(8 * 36, 16), nn.GELU(), nn.Linear(16, 12), nn.GLU(), nn.Linear(6, 4)),
    )


def test_a_network_on_a_device_without_float64_has_the_counts_of_the_cpu(request: pytest.FixtureRequest) -> None:
    net = network()
    with ns.watch(net) as here:
        train(here, net)
    counted = here.census(), here.census("val")
    request.getfixturevalue("off_the_cpu")
    net = network()
    with WithoutFloat64(), ns.watch(net) as there:
        train(there, net)
        first = next(iter(there._phases.record("train")._counters.values()))[1]
        assert first.tensors.abs_sum.dtype is torch.float32
    for expected, census in zip(counted, (there.census(), there.census("val")), strict=True):
        assert list(census) == list(expected) == ["1/relu", "4/gelu", "6/glu"]
        for name, tally in census.items():
            for field in ("zero_outputs", "zero_gradients", "last_active_step", "first_active_step"):
                assert getattr(tally, field).tolist() == getattr(expected[name], field).tolist(), (name, field)
            for field in ("positions", "gradient_positions", "examples", "not_finite"):
                assert getattr(tally, field) == getattr(expected[name], field), (name, field)
            sums = map(torch.from_numpy, (tally.abs_sum, expected[name].abs_sum))
            torch.testing.assert_close(*sums, rtol=1e-6, atol=0)
        assert 0 < expected["1/relu"].zero_outputs.sum() < expected["1/relu"].positions * 8
    assert not there.report().not_measured


class Broken:
    """Kernels that do not compile."""

    def count(self, *args: Any) -> None:
        raise RuntimeError("no ptxas\nand so on")


def test_kernels_that_fail_are_one_warning_and_the_plain_formula(
    off_the_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends._used, "cpu", Backend("cpu", Broken()))
    net = network()
    with ns.watch(net) as scope, pytest.warns(NeuronscopeWarning, match="no ptxas") as warned:
        train(scope, net)
    assert len(warned) == 1
    tally = scope.census()["1/relu"]
    assert tally.positions == tally.gradient_positions == 3 * 5 * 36
    report = scope.report()
    assert report.fault == ""
    assert [note for note in report.notes if "plain formula" in note] == [
        "Tensors on cpu are counted by the plain formula in pieces, which takes longer than kernels would: a kernel "
        "failed (RuntimeError: no ptxas)."
    ]


def test_which_device_is_counted_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_used", {})
    assert backends.backend_for("mps").kernels is None
    assert backends.backend_notes() == []
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.backend_for("cuda").kernels is None
    assert backends.backend_notes() == [
        "Tensors on cuda are counted by the plain formula in pieces, which takes longer than kernels would: triton is "
        "not installed."
    ]
