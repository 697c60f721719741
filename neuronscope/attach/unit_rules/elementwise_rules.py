"""Rules of functions that work on each element, of casts and copies, and of functions that make new tensors."""

from __future__ import annotations

import torch

from neuronscope.attach.origins import CONSTANT, Origin, combine
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, end, lose, table

__all__ = ["ELEMENTWISE", "bending", "like_first"]

# A zero stays a zero under these, or they are linear.
_LINEAR = """
add sub subtract rsub div divide true_divide neg negative positive addcmul addcdiv lerp
dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout
__add__ __radd__ __sub__ __rsub__ __truediv__ __rtruediv__ __div__ __rdiv__ __neg__ __pos__
__iadd__ __isub__ __itruediv__ __idiv__
clone contiguous detach float double half bfloat16 int long bool cpu cuda requires_grad_ pin_memory
nan_to_num fill_diagonal_ resolve_conj conj dequantize bernoulli tril triu
eq ne not_equal logical_and logical_or logical_not logical_xor
__eq__ __ne__ __and__ __or__ __xor__ __invert__ __iand__ __ior__ __ixor__
bitwise_and bitwise_or bitwise_not bitwise_xor
"""
# A mask that one of these gives guards against NaN and infinity: it selects no units.
_GUARDS = "isnan isinf isfinite isposinf isneginf isreal"
_MULTIPLYING = "mul multiply __mul__ __rmul__ __imul__"
_NOT_LINEAR = """
abs absolute maximum minimum fmax fmin clamp clip clamp_min clamp_max exp exp2 expm1 log log2 log10 log1p sqrt rsqrt
square pow float_power reciprocal sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh arcsin arccos arctan
arcsinh arccosh arctanh erf erfc erfinv sigmoid sign sgn floor ceil round trunc fix frac fmod remainder floor_divide
__pow__ __rpow__ __ipow__ __mod__ __rmod__ __floordiv__ __rfloordiv__ __abs__ atan2 arctan2 hypot logaddexp logaddexp2
xlogy sinc logit heaviside copysign
relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign tanhshrink hardtanh hardswish
hardsigmoid hardshrink softshrink threshold logsigmoid
lt le gt ge greater greater_equal less less_equal __lt__ __le__ __gt__ __ge__ signbit
"""
_LIKE_FIRST = """
to type type_as normalize renorm local_response_norm quantize_per_tensor quantize_per_channel
fake_quantize_per_tensor_affine fake_quantize_per_channel_affine alias _to_copy lift_fresh_copy
"""
_FACTORIES = """
ones empty full arange linspace logspace eye rand randn randint randperm from_numpy tril_indices triu_indices
ones_like empty_like rand_like randn_like randint_like new_ones new_empty
"""
_ZEROS = "zeros zeros_like new_zeros zero_"


def _elementwise(operation: Operation) -> Origin:
    return combine(operation.tensors, operation.outputs[0])


def _multiplying(operation: Operation) -> Origin:
    return combine(operation.tensors, operation.outputs[0], product=True)


def bending(operation: Operation) -> Origin:
    """Say what a function that is not linear gives, element by element."""
    return combine(operation.tensors, operation.outputs[0], bent=getattr(operation.function, "__name__", "") or "?")


def like_first(operation: Operation) -> Origin:
    """Return the origin of the first tensor: the others only say what to do with it."""
    first = operation.first
    return combine([first], operation.outputs[0]) if tuple(first.shape) == operation.outputs[0] else lose(operation)


def _masked(operation: Operation) -> Origin:
    """Say what a mask leaves, which never decides beside what it masks: the mask is the second tensor."""
    tensors = operation.tensors
    mask = operation.argument(1, "mask")
    found = combine([each for each in tensors if each is not mask] or tensors, operation.outputs[0])
    return found.but(upstream=operation.upstream) if operation.upstream != found.upstream else found


def _where(operation: Operation) -> Origin:
    """Say what ``where`` picks; the condition decides only if it picks between numbers or weights."""
    if len(operation.args) + len(operation.kwargs) < 2:
        return end(operation)  # the indices of what is true
    shape = operation.outputs[0]
    condition = operation.args[0] if operation.args else operation.kwargs.get("condition")
    if "condition" not in operation.kwargs and getattr(operation.function, "__objclass__", None) is not None:
        condition = operation.argument(1, "condition")  # x.where(condition, y)
    picked = combine([each for each in operation.tensors if each is not condition], shape)
    if picked.state == CONSTANT:
        return combine(operation.tensors, shape)
    return picked.but(upstream=operation.upstream) if operation.upstream != picked.upstream else picked


def _overwritten(operation: Operation) -> Origin:
    """Say what a tensor is after all its elements were written."""
    return combine(operation.tensors[1:], operation.outputs[0])


def _made(operation: Operation) -> Origin:
    """Say what is made of numbers, or of the tensors among them."""
    tensors = operation.tensors
    if any(tuple(each.shape) != operation.outputs[0] for each in tensors):
        return lose(operation)
    return combine(tensors, operation.outputs[0])


def _grid(operation: Operation) -> list[Origin]:
    """Say what ``meshgrid`` gives: grids of numbers, and nothing that has units."""
    found = end(operation)
    return [found] * len(operation.outputs)


ELEMENTWISE: dict[Function, Rule] = {
    **table(_LINEAR, _elementwise, in_place=True),
    **table(_MULTIPLYING, _multiplying, in_place=True),
    **table(_NOT_LINEAR, bending, in_place=True),
    torch.special.expit: bending,
    torch.special.erf: bending,
    **table(_LIKE_FIRST, like_first, in_place=True),
    **table(_GUARDS, end),
    **table("masked_fill", _masked, in_place=True),
    **table("where", _where),
    **table(_FACTORIES, lambda _: Origin.of(CONSTANT)),
    **table(_ZEROS, lambda _: Origin.of(CONSTANT, zeros=True)),
    **table("copy_ fill_ full_like new_full new_tensor", _overwritten),
    **table("tensor as_tensor asarray", _made),
    **table("meshgrid", _grid),
}
