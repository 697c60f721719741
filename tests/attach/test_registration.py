"""Which modules and functions are activations: every class of torch, and what a user registers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.overrides import wrap_torch_function

import neuronscope as ns
from neuronscope.attach.activations import Registry
from neuronscope.errors import UsageError
from tests.agreement.slow_twin import FUNCTIONS, Nobody, Watched, assert_bits, assert_same, state_of
from tests.networks import twin as twins

#: What torch keeps among its activations and is none of a neuron: it mixes them.
NO_SITES = {"Softmax", "Softmin", "Softmax2d", "LogSoftmax", "MultiheadAttention"}
#: Classes that cannot be made without arguments.
ARGUMENTS: dict[str, tuple[Any, ...]] = {"Threshold": (0.1, 0.0), "MultiheadAttention": (6, 2)}

CLASSES = [
    found
    for found in vars(activation).values()
    if inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__ == activation.__name__
]


def test_torch_defines_the_activation_classes_that_we_expect():
    assert {found.__name__ for found in CLASSES} >= {*NO_SITES, "ReLU", "GLU", "Hardtanh", "LogSigmoid", "Tanhshrink"}
    assert len(CLASSES) >= 29


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_every_activation_class_of_torch_is_a_site_and_no_other(found: type[nn.Module]):
    """A class that a later torch adds fails here until it is given its kind, or named among those that are none."""

    class Subclass(found):
        pass

    for made in (found, Subclass):
        known = Registry().of_module(made(*ARGUMENTS.get(found.__name__, ())))
        assert (known is None) == (found.__name__ in NO_SITES)


@wrap_torch_function(lambda x: (x,))
def squared_relu(x: Tensor) -> Tensor:
    """So et al. 2021: what it calls inside is no site of its own."""
    return F.relu(x).square()


class Snake(nn.Module):
    """Ziyin et al. 2020, with a sine inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(x).square()


class Shifted(nn.ReLU):
    """A subclass of torch's own, registered as something else than what it derives from."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.1


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.act, self.relu = nn.Conv1d(3, 6, 1), nn.Linear(6, 6), act, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.act(self.conv(x)).transpose(1, 2))
        return self.act(self.fc(x).transpose(1, 2))


ACTIVATION = ns.Activation("snake", "smooth")
#: What is registered, as what; the first site's name; and what the report calls it.
REGISTERED = {
    "a wrapped function": (squared_relu, "relu-like", "squared_relu()", ("squared_relu", "relu-like")),
    "a function of torch": (torch.sin, "saturating", "sin()", ("sin", "saturating")),
    "a method of Tensor": (Tensor.square, "smooth", "square()", ("square", "smooth")),
    "a class": (Snake, ACTIVATION, "act", ("snake", "smooth")),
    "a class, as one that is known": (Snake, "gelu", "act", ("gelu", "smooth")),
    "a subclass": (Shifted, "leaky", "act", ("shifted", "leaky")),
}


@pytest.mark.parametrize(("target", "value", "name", "known_as"), REGISTERED.values(), ids=REGISTERED)
def test_an_activation_that_a_user_registers_is_counted_exactly(target, value, name, known_as, monkeypatch):
    if isinstance(target, type):
        monkeypatch.setattr(twins, "UNITS", (target.__name__,))
    else:
        monkeypatch.setitem(FUNCTIONS, target, name.removesuffix("()"))
    watched, twin = Watched(activations={target: value}), twins.NetworkTwin({name: 1, "*": 2})
    twin.registry = Registry({target: value})
    states = []
    for watcher in (Nobody(), watched, twin):
        torch.manual_seed(0)
        model = Net(target() if isinstance(target, type) else target)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watcher.attach(model):
            for _ in range(3):
                watcher.backward(model(torch.randn(4, 3, 6)).square().mean())  # as many channels as places
                optimizer.step()
                optimizer.zero_grad()
                watcher.step()
        states.append(state_of(model))
    assert_bits(states[0], states[1])
    census = watched.scope.census()
    first, last = f"conv/{known_as[0]}", f"fc/{known_as[0]}"
    assert list(census) == [first, "conv/relu", last]
    assert {(census[name].activation, census[name].info.kind) for name in (first, last)} == {known_as}
    assert_same(census, twin.tallies())


@pytest.mark.parametrize(
    "function",
    [lambda x: F.relu(x).square(), torch.autograd.function.Function.apply, torch.jit.ScriptFunction],
    ids=["plain Python", "an autograd function", "a class of something else"],
)
def test_a_function_whose_calls_cannot_be_seen_is_refused(function):
    """Silently counting nothing would be worse."""
    with pytest.raises(UsageError, match=r"whose calls torch reports, but got .*wrap_torch_function"):
        ns.watch(Net(F.relu), activations={function: "relu-like"})
