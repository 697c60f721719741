"""Every activation class that transformers and timm define or hand out is a site, and counted as the twin counts it.

The classes are read off the packages' own tables, so that one that comes with a later version and that Neuronscope does
not know fails here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, assert_same, state_of
from tests.networks.twin import NetworkTwin

#: In the packages' tables, and no activation.
NO_SITES = {"LinearActivation", "Identity"}
#: Classes that cannot be made without options.
OPTIONS = {"ClippedGELUActivation": {"min": -10, "max": 10}}
#: timm's functions whose sites do not bear their own name. One that is written out shows what it is written with.
TIMM_FUNCTIONS = {
    "hard_mish": "clamp",
    "quick_gelu": "sigmoid",
    "gelu_tanh": "gelu",
    "swish": "silu",
    "hard_sigmoid": "hardsigmoid",
    "hard_swish": "hardswish",
}


def _module(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own, when they are loaded
            return importlib.import_module(name)
    except ImportError:
        return None


def _defined(module: Any) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name, found in vars(module).items():
        if inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__ == module.__name__:
            yield name, functools.partial(found, **OPTIONS.get(name, {}))


def _makers() -> dict[str, Callable[[], nn.Module]]:
    """What each of the packages' tables makes, by package and name."""
    makers: dict[str, Callable[[], nn.Module]] = {}
    activations = _module("transformers.activations")
    if activations is not None:
        makers |= {f"transformers {name}": made for name, made in _defined(activations)}
        for name, entry in activations.ACT2CLS.items():
            found, options = entry if isinstance(entry, tuple) else (entry, {})
            makers[f"ACT2FN {name}"] = functools.partial(found, **options)
    for home in ("activations", "activations_me"):
        if (module := _module(f"timm.layers.{home}")) is not None:
            makers |= {f"timm {name}": made for name, made in _defined(module)}
    if (create := _module("timm.layers.create_act")) is not None:
        for table in (create._ACT_LAYER_DEFAULT, create._ACT_LAYER_ME):
            makers |= {f"create_act {name}": made for name, made in table.items()}
    return makers


MAKERS = _makers()


def test_transformers_and_timm_define_the_activations_that_we_expect() -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("timm", exc_type=ImportError)
    some = {"ACT2FN gelu_10", "ACT2FN relu2", "ACT2FN xielu", "timm HardMishMe", "create_act quick_gelu"}
    assert some <= MAKERS.keys()


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 6), act, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc(x * 3)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_each_activation_class_is_a_site_and_counted_exactly(name: str) -> None:
    act = MAKERS[name]()
    if type(act).__name__ in NO_SITES:
        return
    watched, twin = Watched(), NetworkTwin({"*": 1})
    states = []
    for watcher in (Nobody(), watched, twin):
        torch.manual_seed(0)
        model = Net(MAKERS[name]())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watcher.attach(model):
            for _ in range(2):
                watcher.backward(model(torch.randn(5, 4)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                watcher.step()
        states.append(state_of(model))
    assert_bits(states[0], states[1])
    assert [tally.info.place for tally in watched.scope.census().values()] == ["act"]
    assert_same(watched.scope.census(), twin.tallies())


def test_the_activation_functions_of_timm_are_counted() -> None:
    create = pytest.importorskip("timm.layers.create_act", exc_type=ImportError)
    functions = [*create._ACT_FN_DEFAULT.items(), *create._ACT_FN_ME.items()]
    seen = []
    for _, function in functions:
        model = Net(function)
        with ns.watch(model) as scope:
            model(torch.randn(5, 4)).sum().backward()
            scope.step()
        seen.append(list(scope.census()))
    assert seen == [[f"fc/{TIMM_FUNCTIONS.get(name, name)}"] for name, _ in functions]
