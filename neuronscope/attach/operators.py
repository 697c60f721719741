"""Say what each torch function does to the units of its arguments: a table of functions, each with its rule.

A rule sees shapes and origins, and no tensor. It says what the results are: see :mod:`neuronscope.attach.origins`. A
function that has no rule gives results that are *lost*, never wrong units. To teach the flow a function, add its name
to the list of a rule in :mod:`neuronscope.attach.unit_rules`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neuronscope.attach.activations import Registry
from neuronscope.attach.origins import CONSTANT, ENDED, LOST, ROWS, SCORES, UNITS, WEIGHT, Origin
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unit_rules.elementwise_rules import ELEMENTWISE, bending
from neuronscope.attach.unit_rules.join_rules import JOINS
from neuronscope.attach.unit_rules.layer_rules import GROUPED, LAYERS, grouped_offsets
from neuronscope.attach.unit_rules.operation import (
    Function,
    Index,
    Listed,
    Operation,
    Rule,
    end,
    lose,
    table,
    tensors_in,
)
from neuronscope.attach.unit_rules.part_rules import PARTS
from neuronscope.attach.unit_rules.product_rules import PRODUCTS
from neuronscope.attach.unit_rules.reduction_rules import REDUCTIONS, summed_factors
from neuronscope.attach.unit_rules.resizing_rules import RESIZING
from neuronscope.attach.unit_rules.view_rules import ATTRIBUTES, VIEWS
from neuronscope.attach.unit_rules.writing_rules import WRITING, set_item
from neuronscope.attach.units import fits

__all__ = [
    "LAYERS",
    "RULES",
    "Index",
    "Listed",
    "Operation",
    "Rule",
    "acted_read",
    "grouped_offsets",
    "is_elementwise",
    "is_grouped",
    "keeps_zero",
    "lose",
    "may_bend",
    "origins_of",
    "rule_of",
    "set_item",
    "tensors_in",
]

_ENDING = """
mse_loss l1_loss smooth_l1_loss huber_loss cross_entropy nll_loss binary_cross_entropy
binary_cross_entropy_with_logits kl_div margin_ranking_loss triplet_margin_loss cosine_embedding_loss
hinge_embedding_loss ctc_loss gaussian_nll_loss poisson_nll_loss soft_margin_loss multi_margin_loss
multilabel_margin_loss multilabel_soft_margin_loss triplet_margin_with_distance_loss bincount histc unique
unique_consecutive nonzero one_hot searchsorted bucketize stft istft
"""
_FOURIER = " ".join(name for name in torch.fft.__all__ if "freq" not in name)

#: The rule of each function that has one.
RULES: dict[Function, Rule] = {
    **LAYERS,
    **PRODUCTS,
    **ELEMENTWISE,
    **VIEWS,
    **PARTS,
    **JOINS,
    **REDUCTIONS,
    **RESIZING,
    **WRITING,
    **table(_ENDING, end),
    **{getattr(torch.fft, name): end for name in _FOURIER.split()},
}


def rule_of(function: Function) -> Rule:
    """Return the rule of a torch function; that of an unknown function says that units are lost."""
    found = RULES.get(function)
    if found is not None:
        return found
    if is_grouped(function):
        return RULES[torch._grouped_mm]
    owner = getattr(function, "__self__", None)
    if getattr(function, "__name__", "") == "__get__" and owner is not None:
        return ATTRIBUTES.get(owner, lose)
    return lose


def is_grouped(function: Function) -> bool:
    """Whether a function multiplies the rows of each expert by the expert's matrix."""
    return function in GROUPED or getattr(function, "_qualified_op_name", "") == _GROUPED_BY_TRANSFORMERS


#: What transformers calls where torch has no such product for the type of the weights.
_GROUPED_BY_TRANSFORMERS = "transformers::grouped_mm_fallback"


def may_bend(node: str) -> bool:
    """Whether a node of autograd's graph may be of a function that is not linear, by its name.

    >>> may_bend("MeanBackward1"), may_bend("ReluBackward0"), may_bend("MySwishBackward")
    (False, True, True)
    """
    rule = _BY_NODE.get(node.partition("Backward")[0].lower(), bending)
    return rule in (bending, lose)


# Elementwise functions that turn zero into zero, whatever the other arguments are, as long as these are finite.
_ZERO_KEEPING = """
div divide true_divide neg negative positive dropout dropout1d dropout2d dropout3d feature_dropout native_dropout
__truediv__ __div__ __neg__ __pos__ __itruediv__ __idiv__ clone contiguous detach float double half bfloat16
int long cpu cuda requires_grad_ pin_memory resolve_conj conj tril triu mul multiply __mul__ __rmul__ __imul__
to type type_as alias _to_copy lift_fresh_copy
abs absolute __abs__ sqrt square sin tan asin atan sinh tanh asinh atanh arcsin arctan arcsinh arctanh erf expm1
log1p sign sgn floor ceil round trunc fix relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softsign
tanhshrink hardswish hardshrink softshrink
"""
_KEEP_ZERO = spellings(*_ZERO_KEEPING.split(), in_place=True)


def is_elementwise(function: Function) -> bool:
    """Whether a function works on each element."""
    return function in ELEMENTWISE


def keeps_zero(operation: Operation) -> bool:
    """Whether a neuron that is zero is zero in the result too, of functions that are no layers.

    Args:
        operation: The call of the function.
    """
    function = operation.function
    if function in RESIZING and "pad" in getattr(function, "__name__", ""):
        return not any(
            isinstance(each, (int, float)) and each for each in (*operation.args, *operation.kwargs.values())
        )
    return function not in ELEMENTWISE or function in _KEEP_ZERO


_BY_NODE = {getattr(function, "__name__", "").replace("_", ""): rule for function, rule in RULES.items()}


def _lost_by_function(operation: Operation, lost: Origin) -> Origin:
    """Return what an unknown function gives; if it keeps the shape, it may be an activation of the layer."""
    units, name = operation.first.origin.units, getattr(operation.function, "__name__", "")
    if units is None or not name or any(tuple(shape) != tuple(operation.first.shape) for shape in operation.outputs):
        return lost
    return lost.but(bends=((units.layer, name),))


#: Functions whose rules say whether the first dimensions of a weight are still those by which data picked it.
_KEEP_PICKED = frozenset((*ELEMENTWISE, *VIEWS, *PARTS))


def _rows_unless_known(origin: Origin) -> Origin:
    """Return what is made of rows of experts: rows still, of which it is not known any more whose they are.

    What data picked of them may be put back where it was.
    """
    known = origin.picks is not None or (origin.units is not None and origin.units.has_all_rows)
    return origin if known or origin.state not in (UNITS, ENDED, LOST) else Origin.of(ROWS, origin.upstream)


_REGISTRY = Registry()
_SOFTMAX = spellings("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "gumbel_softmax")


def _applied(operation: Operation, found: Origin) -> Origin:
    """Return what a function gives, with its name if it is an activation of what has no units any more."""
    if found.state != ENDED:
        return found
    if operation.function in _SOFTMAX:
        return found.but(acted=(SCORES,))
    if operation.first.origin.state != ENDED:
        return found
    activation = _REGISTRY.of_call(operation.function, operation.args, operation.kwargs)
    return found if activation is None else found.after(activation.name)


def acted_read(operation: Operation, result: Origin) -> tuple[tuple[int, str], ...]:
    """Return the activations whose results a function reads as a layer does, with weights that data made or picked.

    So do the later layers of a network whose weights another one makes. Attention does not: it sums over positions. A
    sum of products reads as a product of matrices does.

    Args:
        operation: The call of a function that is no layer.
        result: What it gives; see :attr:`Origin.acted`.
    """
    factors = operation.tensors
    by_data = any(each.origin.picked for each in factors)
    if not by_data and result.state == ENDED and rule_of(operation.function) is not end:
        factors = factors if _multiplies(operation) else summed_factors(operation)
        by_data = len(factors) > 1 and any(each.origin.state == UNITS for each in factors)
    return tuple(dict.fromkeys(key for each in factors for key in each.origin.acted)) if by_data else ()


def _multiplies(operation: Operation) -> bool:
    """Whether a function sums products of data with data."""
    data = [each for each in operation.tensors if each.origin.state not in (CONSTANT, WEIGHT)]
    return len(data) > 1 and (operation.function in PRODUCTS or operation.function in LAYERS)


def origins_of(operation: Operation) -> tuple[Origin, ...]:
    """Return what each output of an operation is; what does not fit its shape is lost.

    Args:
        operation: The call of a torch function.

    Raises:
        ValueError: The rule speaks of another number of outputs.
    """
    rule = rule_of(operation.function)
    found: Origin | Sequence[Origin] = rule(operation)
    if rule is lose and isinstance(found, Origin) and found.state == LOST:
        found = _lost_by_function(operation, found)
    origins = (found,) * len(operation.outputs) if isinstance(found, Origin) else tuple(found)
    found = [
        origin if origin.units is None or fits(origin.units.dims, shape) else Origin.of(LOST, origin.upstream)
        for origin, shape in zip(origins, operation.outputs, strict=True)
    ]
    tensors = operation.tensors
    if not (operation.function in _KEEP_PICKED or rule in ATTRIBUTES.values()):
        found = [each.but(picked=True) if each.picked else each for each in found]
    if rule is not end and any(each.origin.units is not None and each.origin.units.experts for each in tensors):
        found = [_rows_unless_known(each) for each in found]
    if operation.function not in ELEMENTWISE:
        found = [each.but(factors=()) if each.factors else each for each in found]
    found = [each if each.upstream >> operation.call & 1 else each.inherit(tensors) for each in found]
    if any(each.acted for each in found) and _multiplies(operation):
        return tuple(each.but(acted=()) for each in found)
    return tuple(_applied(operation, each) for each in found)
