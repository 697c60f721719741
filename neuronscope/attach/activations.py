"""Recognise activations: which modules and functions apply one, and of which kind it is.

The registry of activation functions is a constant; what a user adds lives on a :class:`Registry` instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverloadPacket

from neuronscope.errors import UsageError

__all__ = ["KINDS", "Activation", "Registry"]

#: What an activation function does to its neurons; see ``docs/definitions.md``.
KINDS = ("relu-like", "smooth", "leaky", "saturating", "gated")


@dataclass(frozen=True)
class Activation:
    """An activation function, as far as judging its neurons goes.

    Attributes:
        name: Lower-case name, as in ``relu``.
        kind: One of :data:`KINDS`.
        linear_when_on: The function is the identity wherever its output is not zero.
        halves: The input is split in two along a dimension and the second half gates the first (GLU).

    >>> Activation("squared_relu", "relu-like").kind
    'relu-like'
    """

    name: str
    kind: str
    linear_when_on: bool = False
    halves: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"Expected activation `kind` to be one of {', '.join(KINDS)}, but got {self.kind!r}.")


_RELU = Activation("relu", "relu-like", linear_when_on=True)
_GLU = Activation("glu", "gated", halves=True)

_BY_NAME = {
    activation.name: activation
    for activation in (
        _RELU,
        _GLU,
        *(
            Activation(name, "relu-like")
            for name in ("relu6", "hardtanh", "hardswish", "threshold", "hardshrink", "softshrink", "hardmish")
        ),
        *(Activation(name, "leaky") for name in ("leaky_relu", "prelu", "rrelu")),
        *(
            Activation(name, "smooth")
            for name in ("gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "logsigmoid", "tanhshrink")
        ),
        *(Activation(name, "saturating") for name in ("sigmoid", "tanh", "hardsigmoid", "softsign")),
    )
}

_TORCH_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: _RELU,
    nn.ReLU6: _BY_NAME["relu6"],
    nn.Hardtanh: _BY_NAME["hardtanh"],
    nn.Hardswish: _BY_NAME["hardswish"],
    nn.Threshold: _BY_NAME["threshold"],
    nn.Hardshrink: _BY_NAME["hardshrink"],
    nn.Softshrink: _BY_NAME["softshrink"],
    nn.LeakyReLU: _BY_NAME["leaky_relu"],
    nn.PReLU: _BY_NAME["prelu"],
    nn.RReLU: _BY_NAME["rrelu"],
    nn.GELU: _BY_NAME["gelu"],
    nn.SiLU: _BY_NAME["silu"],
    nn.Mish: _BY_NAME["mish"],
    nn.ELU: _BY_NAME["elu"],
    nn.SELU: _BY_NAME["selu"],
    nn.CELU: _BY_NAME["celu"],
    nn.Softplus: _BY_NAME["softplus"],
    nn.LogSigmoid: _BY_NAME["logsigmoid"],
    nn.Tanhshrink: _BY_NAME["tanhshrink"],
    nn.Sigmoid: _BY_NAME["sigmoid"],
    nn.Tanh: _BY_NAME["tanh"],
    nn.Hardsigmoid: _BY_NAME["hardsigmoid"],
    nn.Softsign: _BY_NAME["softsign"],
    nn.GLU: _GLU,
}

# Classes of packages that need not be installed, by the package and class name that a class bears itself.
_PACKAGED_MODULES: dict[tuple[str, str], Activation] = {
    **{
        ("transformers", name): _BY_NAME["gelu"]
        for name in (
            "GELUActivation",
            "GELUTanh",
            "PytorchGELUTanh",
            "NewGELUActivation",
            "FastGELUActivation",
            "QuickGELUActivation",
            "ClippedGELUActivation",
            "AccurateGELUActivation",
            "BloomGelu",
        )
    },
    ("transformers", "SiLUActivation"): _BY_NAME["silu"],
    ("transformers", "MishActivation"): _BY_NAME["mish"],
    ("transformers", "LaplaceActivation"): Activation("laplace", "saturating"),
    ("transformers", "ReLUSquaredActivation"): Activation("relu_squared", "relu-like"),
    ("transformers", "SqrtSoftplusActivation"): Activation("sqrt_softplus", "smooth"),
    ("transformers", "XIELUActivation"): Activation("xielu", "leaky"),
    **{("timm", name): _BY_NAME["silu"] for name in ("Swish", "SwishMe", "SwishJit")},
    **{("timm", name): _BY_NAME["mish"] for name in ("Mish", "MishMe", "MishJit")},
    **{("timm", name): _BY_NAME["gelu"] for name in ("GELU", "GELUTanh", "QuickGELU")},
    **{("timm", name): _BY_NAME["hardswish"] for name in ("HardSwish", "HardSwishMe", "HardSwishJit")},
    **{("timm", name): _BY_NAME["hardsigmoid"] for name in ("HardSigmoid", "HardSigmoidMe", "HardSigmoidJit")},
    **{("timm", name): _BY_NAME["hardmish"] for name in ("HardMish", "HardMishMe", "HardMishJit")},
    ("timm", "Sigmoid"): _BY_NAME["sigmoid"],
    ("timm", "Tanh"): _BY_NAME["tanh"],
    ("timm", "PReLU"): _BY_NAME["prelu"],
}


def _callables() -> Iterator[tuple[Callable[..., Any], Activation]]:
    """Every torch function, in-place or not, that applies an activation, as a function mode sees it."""
    for name, activation in _BY_NAME.items():
        for home in (F, torch, torch.Tensor):
            for spelling in (name, name + "_"):
                function = getattr(home, spelling, None)
                if callable(function):
                    yield function, activation
    yield torch.special.expit, _BY_NAME["sigmoid"]


_FUNCTIONS: dict[Callable[..., Any], Activation] = dict(_callables())

# A clamp from below at exactly zero is a ReLU; with a ceiling too it is a bounded one.
_CLAMPS = frozenset(
    getattr(home, name)
    for home in (torch, torch.Tensor)
    for name in ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
)
_BOUNDED_RELU = Activation("clamp", "relu-like")
_CLAMP = Activation("clamp", "relu-like", linear_when_on=True)


def _clamp(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | None:
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    if isinstance(low, bool) or not isinstance(low, (int, float)) or low != 0:
        return None
    return _CLAMP if high is None else _BOUNDED_RELU


class Registry:
    """Which modules and functions apply an activation: the built-in constants and one user's additions.

    Args:
        additions: Module classes or functions of one's own, each with its :class:`Activation`, or with a kind or a
            known activation's name as a shorthand.

    Raises:
        UsageError: An addition is neither a module class nor a function that a function mode can see, or its
            activation is unknown.
    """

    def __init__(self, additions: Mapping[Any, Activation | str] | None = None) -> None:
        if additions is not None and not isinstance(additions, Mapping):
            raise UsageError(
                "Expected argument `activations` to map module classes or functions to activations, "
                f"but got {additions!r}."
            )
        self._modules = dict(_TORCH_MODULES)
        self.functions = dict(_FUNCTIONS)
        for target, value in (additions or {}).items():
            activation = self._resolve(target, value)
            if isinstance(target, type) and issubclass(target, nn.Module):
                self._modules[target] = activation
            elif not callable(target):
                raise UsageError(f"Expected an activation to be a module class or a function, but got {target!r}.")
            elif not _is_told_of(target):
                raise UsageError(
                    "Expected an activation to be a module class or a function whose calls torch tells of, but got "
                    f"{target!r}, of which it does not. Decorate a function of your own with "
                    "`@torch.overrides.wrap_torch_function(lambda x: (x,))`, or register the class of a module that "
                    "calls it."
                )
            else:
                self.functions[target] = activation

    @staticmethod
    def _resolve(target: Any, value: Activation | str) -> Activation:
        if isinstance(value, Activation):
            return value
        if isinstance(value, str) and value in _BY_NAME:
            return _BY_NAME[value]
        return Activation(getattr(target, "__name__", str(target)).lower(), value)

    def of_module(self, module: nn.Module) -> Activation | None:
        """The activation that ``module`` applies, or ``None``; subclasses count as what they derive from."""
        for cls in type(module).__mro__:
            found = self._modules.get(cls) or _PACKAGED_MODULES.get((cls.__module__.partition(".")[0], cls.__name__))
            if found is not None:
                return found
        return None

    def of_call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Activation | None:
        """The activation that a torch function applies when called like this, or ``None``."""
        found = self.functions.get(function)
        if found is None and function in _CLAMPS:
            return _clamp(args, kwargs)
        return found

    def finds_nothing(self, model: nn.Module, functional: bool) -> bool:
        """Whether it is certain, before anything runs, that no activation of ``model`` can be seen.

        Args:
            model: The model.
            functional: Whether functional activations are watched too.
        """
        modules = list(model.modules())
        if any(self.of_module(module) is not None for module in modules):
            return False
        return not functional or all(type(module) in _WITHOUT_FUNCTIONS for module in modules)


def _is_told_of(function: Callable[..., Any]) -> bool:
    """Whether a function mode sees the calls of a function: torch's own, and any that follows torch's protocol."""
    if isinstance(function, FunctionType):
        return "handle_torch_function" in function.__code__.co_names
    return isinstance(function, (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, OpOverloadPacket))


# Modules that call no activation function of their own.
_WITHOUT_FUNCTIONS = (nn.Linear, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Dropout)
