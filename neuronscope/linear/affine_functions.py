"""Say of each torch function in which way it is affine in the tensors that it is given, if it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from neuronscope.attach.activations import Registry
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unit_rules.view_rules import ATTRIBUTES, VIEWS

__all__ = [
    "ACTIVATION",
    "FUSED_ATTENTION",
    "IN_PLACE_ORDER",
    "JOIN",
    "LAYER",
    "MATRIX_PRODUCT",
    "MOVING",
    "OTHER",
    "PRODUCT",
    "QUOTIENT",
    "SUM",
    "attention_arguments",
    "is_norm",
    "kind_of_call",
]

Function = Callable[..., Any]

#: A sum or difference: affine if its terms are affine in one tensor.
SUM = "sum"
#: A product, element by element: affine if all factors but one are constants.
PRODUCT = "product"
#: A quotient: affine if its divisor is a constant.
QUOTIENT = "quotient"
#: Linear in its first tensor; each element keeps its place.
IN_PLACE_ORDER = "in place order"
#: Linear in its first tensor; elements are moved, left out, repeated or added up.
MOVING = "moving"
#: Puts tensors side by side: affine if they are affine in one tensor.
JOIN = "join"
#: A layer that is affine in its first argument.
LAYER = "layer"
#: A product of matrices: affine if all factors but one are constants; attention mixes positions so.
MATRIX_PRODUCT = "matrix product"
#: Attention together with its projections, in one call.
FUSED_ATTENTION = "fused attention"
#: An activation function that works on each element by itself.
ACTIVATION = "activation"
#: Everything else: not affine, or not known to be.
OTHER = "other"

_BATCH_NORM = spellings("batch_norm")
_NORMS = _BATCH_NORM | spellings("layer_norm", "group_norm", "instance_norm", "rms_norm")
_DROPOUT = spellings(
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), in_place=True
)
_ATTRIBUTES = frozenset(ATTRIBUTES)
_REGISTRY = Registry()
_ATTENTION = inspect.signature(functional.multi_head_attention_forward)

_KINDS: dict[Function, str] = {
    **dict.fromkeys(_REGISTRY.functions, ACTIVATION),
    **dict.fromkeys(spellings("add", "sub", "subtract", "rsub", in_place=True), SUM),
    **dict.fromkeys(spellings("__add__", "__radd__", "__sub__", "__rsub__", "__iadd__", "__isub__"), SUM),
    **dict.fromkeys(spellings("mul", "multiply", in_place=True), PRODUCT),
    **dict.fromkeys(spellings("__mul__", "__rmul__", "__imul__"), PRODUCT),
    **dict.fromkeys(spellings("div", "divide", "true_divide", in_place=True), QUOTIENT),
    **dict.fromkeys(spellings("__truediv__", "__div__", "__itruediv__", "__idiv__"), QUOTIENT),
    **dict.fromkeys(spellings("neg", "negative", "positive", "__neg__", "__pos__", in_place=True), IN_PLACE_ORDER),
    **dict.fromkeys(spellings("to", "type", "type_as", "double", "float", "half", "bfloat16"), IN_PLACE_ORDER),
    **dict.fromkeys(spellings("alias", "clone", "contiguous", "cpu", "cuda", "detach", "_to_copy"), IN_PLACE_ORDER),
    **dict.fromkeys(_DROPOUT, IN_PLACE_ORDER),
    **dict.fromkeys(VIEWS, MOVING),
    **dict.fromkeys(spellings("__getitem__", "index", "slice", "select", "narrow", "index_select"), MOVING),
    **dict.fromkeys(spellings("chunk", "split", "tensor_split", "split_with_sizes", "vsplit", "hsplit"), MOVING),
    **dict.fromkeys(spellings("unbind", "mean", "sum", "cumsum", "diff", "tril", "triu"), MOVING),
    **dict.fromkeys(spellings("pad", "constant_pad_nd", "interpolate", "pixel_shuffle", "pixel_unshuffle"), MOVING),
    **dict.fromkeys(spellings("avg_pool1d", "avg_pool2d", "avg_pool3d", "channel_shuffle", "fold"), MOVING),
    **dict.fromkeys(spellings("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), MOVING),
    **dict.fromkeys(spellings("cat", "concat", "concatenate", "stack", "hstack", "vstack"), JOIN),
    **dict.fromkeys(spellings("linear", "conv1d", "conv2d", "conv3d"), LAYER),
    **dict.fromkeys(spellings("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), LAYER),
    **dict.fromkeys(_BATCH_NORM, LAYER),
    **dict.fromkeys(spellings("matmul", "mm", "bmm", "mv", "__matmul__", "einsum"), MATRIX_PRODUCT),
    **dict.fromkeys(spellings("addmm", "baddbmm", "addmv"), MATRIX_PRODUCT),
    **dict.fromkeys(spellings("scaled_dot_product_attention"), MATRIX_PRODUCT),
    functional.multi_head_attention_forward: FUSED_ATTENTION,
}


def is_norm(function: Function) -> bool:
    """Whether a function is a normalisation."""
    return function in _NORMS


def attention_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``multi_head_attention_forward`` by name.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
    """
    return _ATTENTION.bind(*args, **kwargs).arguments


def kind_of_call(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return in which way a call of a torch function is affine: one of the constants of this module.

    Args:
        function: The function.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.

    >>> kind_of_call(functional.relu, (torch.ones(1),), {}), kind_of_call(torch.sum, (torch.ones(1),), {})
    ('activation', 'moving')
    >>> kind_of_call(functional.dropout, (torch.ones(1),), {"training": True})  # it draws a mask
    'other'
    """
    if kwargs.get("out") is not None:
        return OTHER
    kind = _KINDS.get(function, OTHER)
    if kind == OTHER and getattr(function, "__name__", "") == "__get__":
        return MOVING if getattr(function, "__self__", None) in _ATTRIBUTES else OTHER
    if kind == ACTIVATION:
        activation = _REGISTRY.of_call(function, args, kwargs)
        return OTHER if activation is None or activation.halves else ACTIVATION
    if function in _DROPOUT:
        return OTHER if kwargs.get("training", args[2] if len(args) > 2 else True) else IN_PLACE_ORDER
    if function in _BATCH_NORM:
        return OTHER if kwargs.get("training", args[5] if len(args) > 5 else False) else LAYER
    types = any(isinstance(each, torch.dtype) for each in (*args[1:], *kwargs.values()))
    return OTHER if (types and function in VIEWS) or kwargs.get("rounding_mode") else kind
