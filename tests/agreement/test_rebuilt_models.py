"""A watched model is copied, saved, scripted, traced, exported, fused and quantised as an unwatched one."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization
from torch.fx.experimental.proxy_tensor import make_fx

import neuronscope as ns
from neuronscope.attach import scripting
from tests.agreement.slow_twin import hook_tables

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Everything that hooks are put on, and a shape that quantisation can fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act, self.fc = Block(), nn.Hardswish(), nn.Linear(6, 4)
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.block(x)).mean((2, 3))
        return self.tail(F.gelu(self.fc(x)))


FUSED = [["block.conv", "block.norm", "block.relu"], ["tail.0", "tail.1"]]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def script(model: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.script(model)(x)


def exported(model: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(model, (x,), strict=False).module()(x)


def fused(model: nn.Module, x: Tensor, inplace: bool = True) -> Tensor:
    return quantization.fuse_modules(model, FUSED, inplace=inplace)(x)


def prepared(model: nn.Module, x: Tensor, inplace: bool = True) -> Tensor:
    """Fused, trained with fake quantisation for a forward, and converted."""
    model = model.train() if inplace else copy.deepcopy(model).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    model = quantization.fuse_modules_qat(model, FUSED, inplace=True)
    model = quantization.prepare_qat(model, inplace=True)
    model(x)
    return model(x)


def calibrated(model: nn.Module, x: Tensor) -> Tensor:
    """Quantised after training: the module of an activation is replaced too, and torch moves its hooks."""
    model.act.qconfig = model.tail.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(model, inplace=True)
    return model(x)


ACTIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "scripted": script,
    "copied and scripted": lambda model, x: script(copy.deepcopy(model), x),
    "saved and scripted": lambda model, x: script(saved(model), x),
    "pickled and scripted": lambda model, x: script(pickle.loads(pickle.dumps(model)), x),
    "a part of it scripted": lambda model, x: script(model.block, x),
    "scripted and saved": lambda model, x: torch.jit.script(model).save_to_buffer() and script(model, x),
    "traced": lambda model, x: torch.jit.trace(model, x)(x),
    "symbolically traced": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "exported": exported,
    "exported, strict": lambda model, x: torch.export.export(model, (x,), strict=True).module()(x),
    "fused": fused,
    "fused, a copy": lambda model, x: fused(model, x, inplace=False),
    "prepared for quantised training": prepared,
    "prepared for quantised training, a copy": lambda model, x: prepared(model, x, inplace=False),
    "prepared for quantisation": calibrated,
}


@pytest.fixture(autouse=True)
def _one_backend() -> Iterator[None]:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


def hooks_by_class(model: nn.Module) -> dict[str, list[str]]:
    """The classes of the hooks on each module, which are there or not in the fused models too."""
    return {
        path: [
            getattr(hook, "__qualname__", type(hook).__name__)
            for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        ]
        for path, m in model.named_modules()
    }


@pytest.mark.parametrize("ran", [False, True], ids=["before the first step", "between steps"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_watched_model_is_rebuilt_as_an_unwatched_one(action: str, ran: bool) -> None:
    torch.manual_seed(0)
    x, outputs, tables = torch.randn(5, 3, 4, 4), [], []
    unwatched = Net()
    for model in (unwatched, copy.deepcopy(unwatched)):
        torch.manual_seed(1)
        scope = None if model is unwatched else ns.watch(model)
        if ran:
            model(x).sum().backward()
            if scope is not None:
                scope.step()
        model.eval()
        outputs.append(ACTIONS[action](model, x))
        outputs.append(model(x))
        if scope is not None:
            assert scope._hooks.failure is None
            scope.step()
            assert not [item for item in scope.report().not_measured if "Proxy" in item.reason]
            scope.detach()
        tables.append(hooks_by_class(model))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert tables[0] == tables[1]


@pytest.mark.parametrize("action", ["scripted", "traced", "exported", "fused, a copy"])
def test_counts_go_on_after_a_watched_model_was_rebuilt(action: str) -> None:
    model, x = Net(), torch.randn(5, 3, 4, 4)
    with ns.watch(model) as scope:
        for _ in range(2):
            model.train()
            model(x).sum().backward()
            scope.step()
            model.eval()
            ACTIONS[action](model, x)
        positions = {name: tally.positions for name, tally in scope.census("train").items()}
        not_measured = scope.report().not_measured
    assert positions == {"block.norm/relu": 160, "block.norm/hardswish": 160, "fc/gelu": 10, "tail.0/relu": 10}
    assert not not_measured


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_watched_model_bears_no_hook_and_no_name_of_ours(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    before = hook_tables(model)
    with ns.watch(model):
        handle = model.fc.register_forward_hook(print)  # a hook of the user's is copied as ever
        copy_ = copied(model)
        assert b"neuronscope.attach" not in pickle.dumps(model)
        handle.remove()
    assert copy_.fc._forward_hooks.popitem()[1] is print
    for module in copy_.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert hook_tables(model) == before


def test_hooks_of_a_copy_are_called_as_they_were_registered_whatever_their_numbers() -> None:
    """Torch's keys are numbers that another process gives again; ours are left among a copied model's flags."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with ns.watch(model):
        loaded = saved(model)
    assert not any(isinstance(key, int) for m in loaded.modules() for key in m._forward_pre_hooks_with_kwargs)
    calls: list[int] = []
    loaded[1].register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    loaded(torch.ones(1, 2))
    assert calls == [1]


def test_scripting_is_torchs_own_again_after_the_last_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = scripting._original
    monkeypatch.setattr(scripting, "_watches", weakref.WeakSet())  # another test may have left a watch
    monkeypatch.setattr(torch.jit._recursive, "create_script_module", before)
    model = Net()
    first, second = ns.watch(model), ns.watch(model)
    assert torch.jit._recursive.create_script_module is not before
    first.detach()
    torch.jit.script(model)
    second.detach()
    assert torch.jit._recursive.create_script_module is before


def test_what_torch_records_of_a_watched_model_is_the_graph_of_an_unwatched_one() -> None:
    x = torch.randn(5, 3, 4, 4)
    model = Net().eval()

    def recorded() -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced = torch.jit.trace(model, x)
        return [
            [node.kind() for node in traced.inlined_graph.nodes()],
            torch.jit.script(model).code,
            torch.fx.symbolic_trace(model).code,
            make_fx(model)(x).code,
            torch.export.export(model, (x,), strict=False).module().code,
        ]

    expected = recorded()
    with ns.watch(model) as scope:
        assert recorded() == expected
        scope.step()
        assert not scope.census("train")
        assert not scope.report().not_measured


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="this torch cannot run it")
def test_a_watched_model_is_converted_to_integers_as_an_unwatched_one() -> None:
    """Torch moves the hooks of a module to the quantised one, whose tensors cannot be counted."""

    class Quantised(Net):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
            self.qconfig = quantization.get_default_qconfig("x86")

        def forward(self, x: Tensor) -> Tensor:
            return self.dequant(self.tail(self.fc(self.act(self.block(self.quant(x))).mean((2, 3)))))

    x, outputs = torch.randn(5, 3, 4, 4), []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Quantised().eval()
        scope = ns.watch(model) if watched else None
        quantization.fuse_modules(model, FUSED, inplace=True)
        quantization.prepare(model, inplace=True)
        model(x)
        quantization.convert(model, inplace=True)
        outputs.append(model(x))
        if scope is not None:
            assert scope._hooks.failure is None
            assert {item.name: "quint8" in item.reason for item in scope.report().not_measured} == {"act": True}
            scope.detach()
            assert not any(hooks_by_class(model).values())
    assert torch.equal(*outputs)


def test_a_warning_of_a_scope_names_the_line_of_the_user() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with ns.watch(model, sites="none") as scope, pytest.warns(ns.NeuronscopeWarning) as caught:
        model(torch.ones(1, 2))
        scope.step()
    assert {warning.filename for warning in caught} == {__file__}
