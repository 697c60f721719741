"""The slow twin for networks of others: it knows activation modules by their class, and finds who made their input.

A module whose class is defined where a library keeps its activations is one activation, whatever it calls inside. The
layer whose units its neurons are is found as :mod:`tests.agreement.producers` says.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tests.agreement.producers import GATED, Namer, Site
from tests.agreement.slow_twin import NOT_ONE, Call, CalledFunctions, Twin
from tests.networks.zoo import Experts

#: One dimension, or several that hold neurons together.
Axis = int | tuple[int, ...]

HOMES = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")
UNITS = ("BloomGelu",)  # activations that a model's own file defines
NO_ACTIVATIONS = ("LinearActivation", "Identity")


class NetworkTwin(Twin):
    """The run of a whole network that is counted slowly.

    Args:
        axes: The neurons' dimension, or dimensions, by pattern on where the activation is applied.
        unseen: Patterns of places that are not measured.
        declared: Patterns of places whose neurons are what the user says, whatever layer they come from.
        experts: Activations whose rows are of several experts, by pattern on the place.
    """

    def __init__(
        self,
        axes: Mapping[str, Axis],
        unseen: Iterable[str] = (),
        declared: Iterable[str] = (),
        experts: Mapping[str, Experts] | None = None,
    ) -> None:
        super().__init__({})
        self.experts = experts or {}
        self.arguments: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}  # of the last call of each module
        self.times: dict[str, int] = {}  # calls of each activation of experts in the last call of its module
        self.declared = tuple(declared)
        self.patterns = axes
        self.unseen = tuple(unseen)
        self.behind_functions: dict[str, set[str]] = {}  # layers that others read behind functions that are not linear
        self.unit: list[tuple[nn.Module, Tensor, Call | None]] = []  # the activation module that is running, if one is

    @contextlib.contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        self.stack = []
        self.namer = Namer(model)
        handles = [*self.namer.hook()]
        called = CalledFunctions(self)
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._close(called)))
        try:
            with called:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path == "":
                self.namer.clear()
                self.forward += 1
                self.graded = torch.is_grad_enabled()
                self.examples = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.stack.append((path, module))
            if self.experts:
                self.arguments[path] = module, (*args, *kwargs.values())
                self.times[path] = 0
            kind = type(module)
            own = kind.__name__ in UNITS or (kind.__module__.startswith(HOMES) and kind.__name__ not in NO_ACTIVATIONS)
            if own and not isinstance(module, NOT_ONE) and not self.unit:
                x, known = args[0], self.registry.of_module(module)
                assert known is not None, f"{kind.__name__} is not known as an activation"
                halved = getattr(module, "dim", -1) % x.dim() if kind is nn.GLU else None
                call = self.begin(path or "(root)", known.name, x, halved, is_module=True)
                self.unit.append((module, x, call))

        return enter

    def _close(self, called: CalledFunctions) -> Callable[..., None]:
        def close(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            if self.unit and self.unit[0][0] is module:
                _, x, call = self.unit.pop()
                if call is not None:
                    self.end(call, output)
                    called.outputs.append((x, output, call))

        return close

    def begin(self, place: str, activation: str, x: Tensor, halved: int | None, *, is_module: bool) -> Any:
        known = next((each for pattern, each in self.experts.items() if fnmatch.fnmatchcase(place, pattern)), None)
        if known is None:
            return super().begin(place, activation, x, halved, is_module=is_module)
        holder = place.rpartition(".")[0]
        module, given = self.arguments[f"{holder}.{known.of}" if known.of else holder]
        owners = known.owners(module, given, x, self.times[holder])
        self.times[holder] += 1
        count = len(next(weight for name, weight in module.named_parameters() if weight.dim() == 3))
        layer = f"{holder}.{known.layer}"
        edge = get_gradient_edge(x)
        calls = [
            ExpertCall(
                Site(f"{layer}.{number}({known.units})/{activation}", activation, (), ()),
                self.running_phase,
                self.counter,
                (x.dim() - 1,),
                self.forward,
                self.examples,
                x.detach(),
                edge,
                halved,
                rows=owners == number,
            )
            for number in range(count)
        ]
        return ExpertCalls(calls, known)

    def end(self, call: Any, y: Tensor) -> None:
        if not isinstance(call, ExpertCalls):
            super().end(call, y)
            return
        for each in call.calls:
            each.output = each.part(y.detach()).clone()
            self.keep(each)

    def multiply(self, gate: Any, other: Tensor, output: Tensor) -> Any:
        """Keep a product; return its calls, if it is a SiLU that is written out."""
        if not isinstance(gate, ExpertCalls):
            super().multiply(gate, other, output)
            return None
        swish = gate.experts.swish and gate.calls[0].site.activation == "sigmoid"
        name = "silu" if swish else GATED[gate.calls[0].site.activation]
        found = []
        for each in gate.calls:
            site = Site(f"{each.name.rpartition('/')[0]}/{name}", name, (), ())
            edge = get_gradient_edge(other) if swish else None
            found.append(replace(each, site=site, output=each.part(output.detach()).clone(), edge=edge, gradients=[]))
            if not swish:
                self.gates[site.name] = each.name
            self.keep(found[-1])
        return ExpertCalls(found, gate.experts) if swish else None

    def backward(self, loss: Tensor) -> None:
        self.behind_functions |= self.namer.read_behind_functions(loss)
        super().backward(loss)

    def looks(self) -> bool:
        """Return whether a function that is called now may be an activation: no activation module runs."""
        return bool(self.stack) and not self.unit

    def axes_of(self, place: str, x: Tensor) -> tuple[int, ...]:
        found = next(axis for pattern, axis in self.patterns.items() if fnmatch.fnmatchcase(place, pattern))
        return tuple(axis % x.dim() for axis in ((found,) if isinstance(found, int) else found))

    def name_site(self, place: str, activation: str, *facts: Any, is_module: bool) -> Site | None:
        if any(fnmatch.fnmatchcase(place, pattern) for pattern in self.unseen):
            return None
        if any(fnmatch.fnmatchcase(place, pattern) for pattern in self.declared):
            return Site(place, activation, (), ())
        return super().name_site(place, activation, *facts, is_module=is_module)


@dataclass
class ExpertCall(Call):
    """The part of a call whose rows are of one expert."""

    rows: Tensor | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """The rows of the expert, with as many dimensions as before."""
        found = tensor.flatten(0, -2)[self.rows]
        return found.view(len(found), *[1] * (tensor.dim() - 2), found.shape[-1])


@dataclass
class ExpertCalls:
    """The calls of all experts that one activation is."""

    calls: list[ExpertCall]
    experts: Experts
