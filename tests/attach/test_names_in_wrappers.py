"""A network bears one set of names in every wrapper: while it is watched, in saved states, and in a post-mortem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import neuronscope as ns


class Net(nn.Module):
    """Its own modules have the names that wrappers use too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.module, self.base_model, self.out = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.base_model(torch.relu(self.module(self.model(x))))))


NAMES = ["model.0/relu", "module/relu", "base_model/tanh"]


class GradSampleModule(nn.Module):
    """As of Opacus."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._module = inner

    def forward(self, x: Tensor) -> Tensor:
        return self._module(x)


class BaseTuner(nn.Module):
    """As of PEFT, and so is the next."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PeftModel(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model = BaseTuner(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)


class Forwarding(nn.Module):
    """As the wrapper of Fabric, which holds the module twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = inner, inner

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_module(x)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def part(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrap(model.get_submodule(name)))
        return model

    return wrapped


SLOW = pytest.mark.slow  # it compiles
WRAPPERS: dict[str, Any] = {
    "none": lambda model: model,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "Opacus": GradSampleModule,
    "PEFT": PeftModel,
    "Fabric": Forwarding,
    "checkpoint of a part": part("model", checkpoint_wrapper),
    "checkpoint of a layer": part("model.0", checkpoint_wrapper),
    "compiled": pytest.param(compiled, marks=SLOW),
    "compiled part": pytest.param(part("model", compiled), marks=SLOW),
    "Fabric of DataParallel of PEFT": lambda model: Forwarding(nn.DataParallel(PeftModel(model))),
    "DataParallel of Opacus": lambda model: nn.DataParallel(GradSampleModule(model)),
    "DataParallel of compiled": pytest.param(lambda model: nn.DataParallel(compiled(model)), marks=SLOW),
    "compiled DataParallel": pytest.param(lambda model: compiled(nn.DataParallel(model)), marks=SLOW),
}
#: Wrappers of which a file tells: its tensors have the names of the wrapped network.
IN_FILES = [name for name in WRAPPERS if "Fabric" not in name]


def watch(model: nn.Module, state: Any = None) -> ns.Scope:
    with ns.watch(model) as scope:
        if state is not None:
            scope.load_state_dict(state)
        model(torch.randn(3, 4)).sum().backward()
        scope.step()
    return scope


def case(name: str) -> Any:
    given = WRAPPERS[name]
    return pytest.param(given, id=name) if callable(given) else pytest.param(*given.values, marks=given.marks, id=name)


@pytest.mark.parametrize("wrap", [case(name) for name in WRAPPERS])
def test_a_watched_network_has_its_own_names_in_every_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    scope = watch(wrap(Net()))
    assert list(scope.census()) == NAMES
    assert [tally.layer for tally in scope.census().values()] == ["model.0", "module", "base_model"]
    assert scope.report().model == "Net"
    assert not scope.report().not_measured


@pytest.mark.parametrize("wrap", [case(name) for name in WRAPPERS])
def test_a_saved_state_goes_on_in_another_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    state = watch(wrap(Net())).state_dict()
    scope = watch(Net(), state)
    assert {name: tally.positions for name, tally in scope.census().items()} == dict.fromkeys(NAMES, 6)


@pytest.mark.parametrize("wrap", [case(name) for name in IN_FILES])
def test_a_post_mortem_of_a_wrapped_networks_file_has_its_own_names(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = wrap(Net())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    report = ns.postmortem(tmp_path / "weights.pt")
    assert [layer.name for layer in report.layers] == ["model.0", "module", "base_model", "out"]


def test_the_attribute_of_a_lightning_module_is_no_wrappers() -> None:
    lightning = pytest.importorskip("pytorch_lightning", exc_type=ImportError)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    assert list(watch(Module()).census()) == [f"model.{name}" for name in NAMES]
