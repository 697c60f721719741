"""One rule for each torch function: how intervals pass through it, which inputs it needs, what it does to neurons.

:mod:`~neuronscope.checkpoints.model.bounds.propagate`, :mod:`~neuronscope.checkpoints.model.examine_model` and
:mod:`~neuronscope.checkpoints.model.batchnorm_evidence` read the same table, :data:`OPERATORS`. A function that is not
in it has an unbounded output and needs all of its inputs, and no layer is traced back through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.model import needed_inputs as needed
from neuronscope.checkpoints.model.bounds import elementwise_ops as elementwise
from neuronscope.checkpoints.model.bounds import shape_ops as shape
from neuronscope.checkpoints.model.bounds import weighted_ops as weighted
from neuronscope.checkpoints.model.bounds.interval import Rule
from neuronscope.checkpoints.model.traced_graph import Step

__all__ = ["DROPOUT", "OPERATORS", "OperatorRule", "step_kind"]

#: Functions that drop elements in training.
DROPOUT = spellings(
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"),
    in_place=True,
)

#: What a function does to neurons: ``same`` returns its input (copies, casts, dropout), ``moves`` moves elements,
#: ``scales`` adds or multiplies element by element, ``mixes`` multiplies by a weight (or looks up its rows), ``norm``
#: normalises, ``other`` does anything else.
Kind = Literal["same", "moves", "scales", "mixes", "norm", "other"]


@dataclass(frozen=True)
class OperatorRule:
    """What is known of one torch function."""

    kind: Kind
    bounds: Rule  # the rule of its interval
    needed_inputs: needed.NeededInputs | None  # ``None`` = all inputs are needed


#: Torch function → what is known of it.
OPERATORS: dict[Callable[..., Any], OperatorRule] = {}


def step_kind(step: Step | None) -> str:
    """Return what a step does to neurons: the ``kind`` of its operator's rule, or ``other``."""
    rule = OPERATORS.get(step.function) if step is not None else None
    return "other" if rule is None else rule.kind


def _functions(*names: str, in_place: bool = False) -> list[Callable[..., Any]]:
    """Return the functions of these names, but for operators of aten: some have their arguments in another order."""
    found = spellings(*names, in_place=in_place)
    return [function for function in found if not isinstance(function, (OpOverload, OpOverloadPacket))]


def _register(kind: Kind, bounds: Rule, needs: needed.NeededInputs | None, *names: str, in_place: bool = False) -> None:
    OPERATORS.update(dict.fromkeys(_functions(*names, in_place=in_place), OperatorRule(kind, bounds, needs)))


def _monotone(kind: Kind, needs: needed.NeededInputs | None, *names: str, rounds: bool = False) -> None:
    for function in _functions(*names):
        OPERATORS[function] = OperatorRule(kind, shape.monotone(function, rounds=rounds), needs)


def _elementwise(bounds: Rule, *names: str, scales: bool = False) -> None:
    _register("scales" if scales else "other", bounds, needed.by_elementwise, *names, in_place=True)


def _increasing(*names: str, **options: Any) -> None:
    for name in names:
        _elementwise(elementwise.increasing(getattr(F, name, None) or getattr(torch, name), **options), name)


# Functions that return their input, element by element, in evaluation mode or in another type.
_register(
    "same",
    shape.same(keeps_rows=True),
    needed.by_same,
    *("contiguous", "clone", "detach", "positive", "requires_grad_"),
)
_register(
    "same",
    shape.same(keeps_rows=False),
    needed.by_same,
    *("to", "float", "double", "half", "bfloat16", "type_as", "cpu"),
)
_register(
    "same",
    shape.dropout,
    needed.by_same,
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("dropout_", "alpha_dropout_", "feature_dropout", "feature_dropout_"),
)

# Functions that move elements, leave some out, repeat some, or put constants between them.
_monotone(
    "moves",
    needed.by_move,
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"),
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint"),
    *("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "roll", "flip"),
    *("narrow", "select", "chunk", "split", "tensor_split", "unbind", "index_select", "__getitem__"),
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "pad"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold"),
)
for _transpose in (getattr(Tensor, name).__get__ for name in ("T", "mT")):
    OPERATORS[_transpose] = OperatorRule("moves", shape.monotone(_transpose), needed.by_move)

# Functions that choose among elements, and functions that add them up with positive weights.
for _n in (1, 2, 3):
    _monotone("other", needed.by_pooling(_n), f"max_pool{_n}d", f"adaptive_max_pool{_n}d")
    _monotone("other", needed.by_pooling(_n), f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d", rounds=True)
    _monotone("other", None, f"max_pool{_n}d_with_indices")
_monotone("other", needed.by_reduction, "amax", "amin")
_monotone("other", needed.by_reduction, "mean", "sum", rounds=True)
_monotone("other", None, "maximum", "minimum", "max", "min", "cummax")
_monotone("other", None, "cumsum", rounds=True)
_register("other", shape.interpolate, None, "interpolate")

# Elementwise functions. Non-decreasing functions of one tensor are called on the bounds.
_increasing("relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max", "hardshrink", rounds=False)
_increasing("tanh", "selu", "logsigmoid", "softshrink", "expm1", "atan", "erf")
_increasing("sigmoid", "hardsigmoid", "exp", floor=0.0)
_increasing("softplus", floor=0.0, positive=True)
_increasing("elu", "celu", positive=True)
OPERATORS[torch.special.expit] = OPERATORS[torch.sigmoid]
# GELU is exactly zero below −15 in float32, however it is computed: x·Φ(x) at −15 is −6e-50, and half the least
# denormal is 7e-46. SiLU and Mish come to x·eˣ there, which at −110 is −2e-46.
_elementwise(elementwise.falling_then_rising(F.gelu, -0.1701, -15.0), "gelu")
_elementwise(elementwise.falling_then_rising(F.silu, -0.2785, -110.0), "silu")
_elementwise(elementwise.falling_then_rising(F.mish, -0.3089, -110.0), "mish")
_elementwise(elementwise.falling_then_rising(F.hardswish, -0.3751, -3.0, only_short=False), "hardswish")
_elementwise(elementwise.threshold_function, "threshold")
_elementwise(elementwise.leaky_relu, "leaky_relu", "prelu")
_elementwise(elementwise.add, "add", "__add__", "__radd__", "__iadd__", scales=True)
_elementwise(elementwise.subtract, "sub", "subtract", "__sub__", "__isub__", scales=True)
_elementwise(elementwise.swapped(elementwise.subtract), "rsub", "__rsub__")
_elementwise(elementwise.multiply, "mul", "multiply", "__mul__", "__rmul__", "__imul__", scales=True)
_elementwise(elementwise.divide, "div", "divide", "true_divide", "__truediv__", "__itruediv__", scales=True)
_elementwise(elementwise.swapped(elementwise.divide), "__rtruediv__", "__rdiv__")
_elementwise(elementwise.power, "pow", "__pow__")
_elementwise(elementwise.square, "square")
_elementwise(elementwise.absolute, "abs", "absolute")
_elementwise(elementwise.negative, "neg", "negative", scales=True)
_elementwise(elementwise.between(-1.0, 1.0), "sin", "cos")

# Functions whose arguments decide rather than pass on, or that mix the elements of a row.
_register("other", elementwise.between(0.0, 1.0), None, "softmax", in_place=True)
_register("other", elementwise.between(-1.0, 1.0), None, "normalize")
_register("other", elementwise.masked_fill, None, "masked_fill", in_place=True)
OPERATORS[torch.where] = OperatorRule("other", elementwise.where, None)  # Tensor.where has another order of arguments

# Functions of a layer's weight.
_register("mixes", weighted.linear, needed.by_linear, "linear")
_register("mixes", weighted.matmul, needed.by_matmul, "matmul", "mm", "__matmul__")
_register("mixes", weighted.addmm, needed.by_matmul, "addmm")
for _n in (1, 2, 3):
    for _name, _transposed in ((f"conv{_n}d", False), (f"conv_transpose{_n}d", True)):
        _convolution = weighted.convolution(_n, transposed=_transposed)
        _register("mixes", _convolution, needed.by_convolution(transposed=_transposed), _name)
_register("mixes", weighted.embedding, None, "embedding")
_register("mixes", weighted.attention, None, "scaled_dot_product_attention")
_register("norm", weighted.batch_norm, needed.by_batch_norm, "batch_norm")
for _norm in (weighted.layer_norm, weighted.rms_norm, weighted.group_norm, weighted.instance_norm):
    _register("norm", _norm, None, _norm.__name__)
# These functions of `torch` take their arguments in another order than those of `torch.nn.functional`.
for _function in (torch.batch_norm, torch.embedding, torch.instance_norm):
    OPERATORS.pop(_function)
