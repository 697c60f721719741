"""Recognize activations: which modules and functions apply one, and what it does to its neurons.

To add an activation, add one row to :data:`ROWS`, wherever the activation comes from. What a user adds for one run is
an argument of :class:`Registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

from neuronscope.attach.torch_functions import spellings
from neuronscope.errors import UsageError

__all__ = ["KINDS", "ROWS", "Activation", "ActivationRow", "Registry"]

#: What an activation function does to its neurons; see ``docs/definitions.md``.
KINDS = ("relu-like", "smooth", "leaky", "saturating", "gated", "sparse")


@dataclass(frozen=True)
class Activation:
    """An activation function: what must be known of it to judge its neurons.

    Attributes:
        name: Lower-case name, as in ``relu``.
        kind: One of :data:`KINDS`.
        linear_when_on: The function is the identity wherever its output is not zero.
        halves: The input is split in two along a dimension and the second half gates the first (GLU).
        gated_name: Name of the product that it gates, as in ``swiglu``; ``""`` stands for ``gated <name>``.

    Raises:
        UsageError: ``kind`` is not one of :data:`KINDS`.

    >>> Activation("squared_relu", "relu-like").kind
    'relu-like'
    """

    name: str
    kind: str
    linear_when_on: bool = False
    halves: bool = False
    gated_name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"Expected activation `kind` to be one of {', '.join(KINDS)}, but got {self.kind!r}.")


#: Returns the activation that a call applies, or ``None``, from the call's positional and keyword arguments.
Chooser = Callable[[tuple[Any, ...], Mapping[str, Any]], "Activation | None"]


class ActivationRow(NamedTuple):
    """One activation and everything that applies it.

    Attributes:
        activation: The activation.
        modules: Classes of ``torch.nn``; their subclasses count too.
        functions: Names of torch functions, for :func:`~neuronscope.attach.torch_functions.spellings`. Functions that
            end in an underscore count too.
        others: Functions that have the name of no torch function or tensor method.
        packaged: Classes of packages that need not be installed: the package → names of its classes.
        choose: Decides for each call of the functions; ``None`` if every call applies the activation.
    """

    activation: Activation
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[str, ...] = ()
    others: tuple[Callable[..., Any], ...] = ()
    packaged: Mapping[str, tuple[str, ...]] = {}
    choose: Chooser | None = None

    def all_functions(self) -> Iterator[Callable[..., Any]]:
        """Yield every function of the row, as a function mode receives it."""
        yield from spellings(*self.functions, in_place=True)
        yield from self.others


_CLAMP = Activation("clamp", "relu-like", linear_when_on=True)
_CLAMP_ON_BOTH_SIDES = Activation("clamp", "relu-like")


def _clamp_at_zero(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation | None:
    """Return the ReLU that a call is if it clamps from below at exactly zero, else ``None``; it may clamp above too."""
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    if isinstance(low, bool) or not isinstance(low, (int, float)) or low != 0:
        return None
    return _CLAMP if high is None else _CLAMP_ON_BOTH_SIDES


#: Settings of the slope below zero, in the order of a call, each with its default. Where all are zero, it is a ReLU.
_SLOPES: Mapping[str, Mapping[str, float]] = {
    "leaky_relu": {"negative_slope": 0.01},
    "rrelu": {"lower": 1 / 8, "upper": 1 / 3},
}


def _sloped(name: str) -> tuple[Activation, Chooser]:
    """Return an activation with a slope below zero, and what says of a call whether it has that slope.

    Args:
        name: Its name, which is in :data:`_SLOPES`.
    """
    activation = Activation(name, "leaky")

    def choose(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
        given = args[1 : len(_SLOPES[name]) + 1]
        named = [kwargs.get(setting, default) for setting, default in _SLOPES[name].items()]
        return _with_slope(activation, [*given, *named[len(given) :]])

    return activation, choose


def _with_slope(activation: Activation, slopes: Sequence[Any]) -> Activation:
    """Return an activation that has a slope below zero; one of the same name that has none, if all slopes are zero.

    Args:
        activation: The activation.
        slopes: Its settings.
    """
    if not slopes or any(type(slope) not in (int, float) or slope for slope in slopes):
        return activation
    return Activation(activation.name, "relu-like", linear_when_on=True)


_LEAKY_RELU, _choose_leaky_relu = _sloped("leaky_relu")
_RRELU, _choose_rrelu = _sloped("rrelu")

#: Every activation that is known without being registered.
ROWS: tuple[ActivationRow, ...] = (
    ActivationRow(Activation("relu", "relu-like", linear_when_on=True, gated_name="reglu"), (nn.ReLU,), ("relu",)),
    ActivationRow(Activation("relu6", "relu-like"), (nn.ReLU6,), ("relu6",)),
    ActivationRow(Activation("hardtanh", "relu-like"), (nn.Hardtanh,), ("hardtanh",)),
    ActivationRow(
        Activation("hardswish", "relu-like"),
        (nn.Hardswish,),
        ("hardswish",),
        packaged={"timm": ("HardSwish", "HardSwishMe", "HardSwishJit")},
    ),
    ActivationRow(Activation("hardmish", "relu-like"), packaged={"timm": ("HardMish", "HardMishMe", "HardMishJit")}),
    ActivationRow(Activation("threshold", "relu-like"), (nn.Threshold,), ("threshold",)),
    ActivationRow(Activation("hardshrink", "relu-like"), (nn.Hardshrink,), ("hardshrink",)),
    ActivationRow(Activation("softshrink", "relu-like"), (nn.Softshrink,), ("softshrink",)),
    ActivationRow(_CLAMP, functions=("clamp", "clip", "clamp_min"), choose=_clamp_at_zero),
    ActivationRow(Activation("relu_squared", "relu-like"), packaged={"transformers": ("ReLUSquaredActivation",)}),
    ActivationRow(_LEAKY_RELU, (nn.LeakyReLU,), ("leaky_relu",), choose=_choose_leaky_relu),
    ActivationRow(Activation("prelu", "leaky"), (nn.PReLU,), ("prelu",), packaged={"timm": ("PReLU",)}),
    ActivationRow(_RRELU, (nn.RReLU,), ("rrelu",), choose=_choose_rrelu),
    ActivationRow(Activation("xielu", "leaky"), packaged={"transformers": ("XIELUActivation",)}),
    ActivationRow(
        Activation("gelu", "smooth", gated_name="geglu"),
        (nn.GELU,),
        ("gelu",),
        packaged={
            "transformers": (
                *("GELUActivation", "GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation"),
                *("QuickGELUActivation", "ClippedGELUActivation", "AccurateGELUActivation", "BloomGelu"),
            ),
            "timm": ("GELU", "GELUTanh", "QuickGELU"),
        },
    ),
    ActivationRow(
        Activation("silu", "smooth", gated_name="swiglu"),
        (nn.SiLU,),
        ("silu",),
        packaged={"transformers": ("SiLUActivation",), "timm": ("Swish", "SwishMe", "SwishJit")},
    ),
    ActivationRow(
        Activation("mish", "smooth"),
        (nn.Mish,),
        ("mish",),
        packaged={"transformers": ("MishActivation",), "timm": ("Mish", "MishMe", "MishJit")},
    ),
    ActivationRow(Activation("elu", "smooth"), (nn.ELU,), ("elu",)),
    ActivationRow(Activation("selu", "smooth"), (nn.SELU,), ("selu",)),
    ActivationRow(Activation("celu", "smooth"), (nn.CELU,), ("celu",)),
    ActivationRow(Activation("softplus", "smooth"), (nn.Softplus,), ("softplus",)),
    ActivationRow(Activation("logsigmoid", "smooth"), (nn.LogSigmoid,), ("logsigmoid",)),
    ActivationRow(Activation("tanhshrink", "smooth"), (nn.Tanhshrink,), ("tanhshrink",)),
    ActivationRow(Activation("sqrt_softplus", "smooth"), packaged={"transformers": ("SqrtSoftplusActivation",)}),
    ActivationRow(
        Activation("sigmoid", "saturating", gated_name="glu"),
        (nn.Sigmoid,),
        ("sigmoid",),
        others=(torch.special.expit,),
        packaged={"timm": ("Sigmoid",)},
    ),
    ActivationRow(Activation("tanh", "saturating"), (nn.Tanh,), ("tanh",), packaged={"timm": ("Tanh",)}),
    ActivationRow(
        Activation("hardsigmoid", "saturating"),
        (nn.Hardsigmoid,),
        ("hardsigmoid",),
        packaged={"timm": ("HardSigmoid", "HardSigmoidMe", "HardSigmoidJit")},
    ),
    ActivationRow(Activation("softsign", "saturating"), (nn.Softsign,), ("softsign",)),
    ActivationRow(Activation("laplace", "saturating"), packaged={"transformers": ("LaplaceActivation",)}),
    ActivationRow(Activation("glu", "gated", halves=True), (nn.GLU,), ("glu",)),
)


class Registry:
    """The modules and functions that apply an activation: :data:`ROWS` and one user's additions.

    Args:
        additions: The user's own module classes or functions, each with its :class:`Activation`. A kind or the name of
            a known activation is a shorthand for one.

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
        self._by_name = {row.activation.name: row.activation for row in ROWS}
        self._modules = {cls: row.activation for row in ROWS for cls in row.modules}
        self._packaged = {
            (package, name): row.activation
            for row in ROWS
            for package in row.packaged
            for name in row.packaged[package]
        }
        self._functions: dict[Callable[..., Any], Activation | Chooser] = {
            function: row.choose or row.activation for row in ROWS for function in row.all_functions()
        }
        for target, value in (additions or {}).items():
            self._add(target, self._resolve(target, value))

    def _add(self, target: Any, activation: Activation) -> None:
        if isinstance(target, type) and issubclass(target, nn.Module):
            self._modules[target] = activation
        elif not callable(target):
            raise UsageError(f"Expected an activation to be a module class or a function, but got {target!r}.")
        elif not _is_seen_by_modes(target):
            raise UsageError(
                "Expected an activation to be a module class or a function whose calls torch reports, but got "
                f"{target!r}, whose calls it does not report. Decorate a function of your own with "
                "`@torch.overrides.wrap_torch_function(lambda x: (x,))`, or register the class of a module that "
                "calls it."
            )
        else:
            self._functions[target] = activation

    def _resolve(self, target: Any, value: Activation | str) -> Activation:
        if isinstance(value, Activation):
            return value
        if isinstance(value, str) and value in self._by_name:
            return self._by_name[value]
        return Activation(getattr(target, "__name__", str(target)).lower(), value)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """All functions that apply an activation."""
        return tuple(self._functions)

    def of_module(self, module: nn.Module) -> Activation | None:
        """Return the activation that ``module`` applies, or ``None``; a subclass counts as its base class."""
        for cls in type(module).__mro__:
            found = self._modules.get(cls) or self._packaged.get((cls.__module__.partition(".")[0], cls.__name__))
            if found is not None:
                sloped = found in (_LEAKY_RELU, _RRELU)
                return _with_slope(found, _slopes_of(module, found.name)) if sloped else found
        return None

    def of_call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Activation | None:
        """Return the activation that a call of a torch function applies, or ``None``.

        Args:
            function: The function.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
        """
        found = self._functions.get(function)
        return found if found is None or isinstance(found, Activation) else found(args, kwargs)

    def finds_nothing(self, model: nn.Module, functional: bool) -> bool:
        """Whether no activation of ``model`` can be seen, as far as that is certain before the model runs.

        Args:
            model: The model.
            functional: Whether functional activations are watched too.
        """
        modules = list(model.modules())
        if any(self.of_module(module) is not None for module in modules):
            return False
        return not functional or all(type(module) in _WITHOUT_FUNCTIONS for module in modules)


def _slopes_of(module: nn.Module, name: str) -> list[Any]:
    """Return the settings of a module's slope below zero.

    Args:
        module: A module that applies such an activation.
        name: Name of the activation.
    """
    return [getattr(module, setting, None) for setting in _SLOPES[name]]


def _is_seen_by_modes(function: Callable[..., Any]) -> bool:
    """Whether a function mode sees the calls of a function: torch's own, and any that follows torch's protocol."""
    if isinstance(function, FunctionType):
        return "handle_torch_function" in function.__code__.co_names
    return isinstance(function, _SEEN)


# Types of functions whose calls a function mode sees.
_SEEN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, OpOverload, OpOverloadPacket)
# Modules that call no activation function themselves.
_WITHOUT_FUNCTIONS = (nn.Linear, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Dropout)
