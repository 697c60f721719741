"""Say of each torch function in which way it is affine in the tensors that it is given, if it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch.nn import functional

from neuronscope.attach.activations import Registry
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unit_rules.view_rules import ATTRIBUTES, VIEWS

__all__ = ["Function", "Kind", "attention_arguments", "is_norm", "kind_of_call"]

Function = Callable[..., Any]


class Kind(Enum):
    """In which way a call of a torch function is affine in the tensors that it is given."""

    SUM = "a sum or difference: affine if its terms are affine in one tensor"
    PRODUCT = "a product, element by element: affine if all factors but one are constants"
    QUOTIENT = "a quotient: affine if its divisor is a constant"
    IN_PLACE_ORDER = "linear in its first tensor; each element keeps its place"
    MOVING = "linear in its first tensor; elements are moved, left out, repeated or added up"
    JOIN = "puts tensors side by side: affine if they are affine in one tensor"
    LAYER = "a layer that is affine in its first argument"
    MATRIX_PRODUCT = "a product of matrices: affine if all factors but one are constants; attention mixes positions so"
    FUSED_ATTENTION = "attention together with its projections, in one call"
    ACTIVATION = "an activation function that works on each element by itself"
    OTHER = "everything else: not affine, or not known to be"


_BATCH_NORM = spellings("batch_norm")
_NORMS = _BATCH_NORM | spellings("layer_norm", "group_norm", "instance_norm", "rms_norm")
_DROPOUT = spellings(
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), in_place=True
)
_ATTRIBUTES = frozenset(ATTRIBUTES)
_REGISTRY = Registry()
_ATTENTION = inspect.signature(functional.multi_head_attention_forward)

_FUNCTIONS: dict[Kind, Iterable[Function]] = {
    Kind.ACTIVATION: _REGISTRY.functions,
    Kind.SUM: spellings("add", "sub", "subtract", "rsub", in_place=True)
    | spellings("__add__", "__radd__", "__sub__", "__rsub__", "__iadd__", "__isub__"),
    Kind.PRODUCT: spellings("mul", "multiply", in_place=True) | spellings("__mul__", "__rmul__", "__imul__"),
    Kind.QUOTIENT: spellings("div", "divide", "true_divide", in_place=True)
    | spellings("__truediv__", "__div__", "__itruediv__", "__idiv__"),
    Kind.IN_PLACE_ORDER: spellings("neg", "negative", "positive", "__neg__", "__pos__", in_place=True)
    | spellings("to", "type", "type_as", "double", "float", "half", "bfloat16")
    | spellings("alias", "clone", "contiguous", "cpu", "cuda", "detach", "_to_copy")
    | _DROPOUT,
    Kind.MOVING: frozenset(VIEWS)
    | spellings("__getitem__", "index", "slice", "select", "narrow", "index_select")
    | spellings("chunk", "split", "tensor_split", "split_with_sizes", "vsplit", "hsplit")
    | spellings("unbind", "mean", "sum", "cumsum", "diff", "tril", "triu")
    | spellings("pad", "constant_pad_nd", "interpolate", "pixel_shuffle", "pixel_unshuffle")
    | spellings("avg_pool1d", "avg_pool2d", "avg_pool3d", "channel_shuffle", "fold")
    | spellings("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    Kind.JOIN: spellings("cat", "concat", "concatenate", "stack", "hstack", "vstack"),
    Kind.LAYER: spellings("linear", "conv1d", "conv2d", "conv3d")
    | spellings("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    | _BATCH_NORM,
    Kind.MATRIX_PRODUCT: spellings("matmul", "mm", "bmm", "mv", "__matmul__", "einsum")
    | spellings("addmm", "baddbmm", "addmv", "scaled_dot_product_attention"),
    Kind.FUSED_ATTENTION: [functional.multi_head_attention_forward],
}
_KINDS = {function: kind for kind, functions in _FUNCTIONS.items() for function in functions}


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


def kind_of_call(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kind:
    """Return in which way a call of a torch function is affine.

    Args:
        function: The function.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.

    >>> kind_of_call(functional.relu, (torch.ones(1),), {}).name, kind_of_call(torch.sum, (torch.ones(1),), {}).name
    ('ACTIVATION', 'MOVING')
    >>> kind_of_call(functional.dropout, (torch.ones(1),), {"training": True}).name  # it draws a mask
    'OTHER'
    """
    if kwargs.get("out") is not None:
        return Kind.OTHER
    kind = _KINDS.get(function, Kind.OTHER)
    if kind == Kind.OTHER and getattr(function, "__name__", "") == "__get__":
        return Kind.MOVING if getattr(function, "__self__", None) in _ATTRIBUTES else Kind.OTHER
    if kind == Kind.ACTIVATION:
        activation = _REGISTRY.of_call(function, args, kwargs)
        return Kind.OTHER if activation is None or activation.halves else Kind.ACTIVATION
    if function in _DROPOUT:
        return Kind.OTHER if kwargs.get("training", args[2] if len(args) > 2 else True) else Kind.IN_PLACE_ORDER
    if function in _BATCH_NORM:
        return Kind.OTHER if kwargs.get("training", args[5] if len(args) > 5 else False) else Kind.LAYER
    types = any(isinstance(each, torch.dtype) for each in (*args[1:], *kwargs.values()))
    return Kind.OTHER if (types and function in VIEWS) or kwargs.get("rounding_mode") else kind
