"""Say what each torch function does to the units of its arguments: a table of functions, each with its rule.

A rule sees shapes and origins, and no tensor. It says what the results are: see :mod:`neuronscope.attach.origins`. A
function that has no rule gives results that are *lost*, never wrong units. To teach the flow a function, add its name
to the list of a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.attach.origins import (
    CONSTANT,
    ENDED,
    LOST,
    RAW,
    ROWS,
    UNITS,
    UNKNOWN,
    WEIGHT,
    Operand,
    Origin,
    combine,
)
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.units import (
    Units,
    has_units,
    place,
    positions,
    reduce,
    reshape,
    select,
    slice_dim,
)

__all__ = ["Index", "Operation", "Rule", "rule_of", "tensors_in"]

Shape = tuple[int, ...]


class Index(NamedTuple):
    """A slice, which cannot be a key of a dictionary itself.

    Attributes:
        start: As of a slice.
        stop: As of a slice.
        step: As of a slice.
    """

    start: Any
    stop: Any
    step: Any


class Operation(NamedTuple):
    """One call of a torch function.

    Attributes:
        function: The function.
        args: The positional arguments: tensors as :class:`Operand`, lists as tuples, slices as :class:`Index`.
        kwargs: The keyword arguments, likewise.
        outputs: The shapes of the tensors that it returned.
        call: The number that it has if it is a call of a layer.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Shape, ...]
    call: int

    def argument(self, place: int, *names: str, default: Any = None) -> Any:
        """Return an argument by its place or by one of its names.

        Args:
            place: Its place among the positional arguments.
            names: Its names.
            default: What to return if it was not given.
        """
        if len(self.args) > place:
            return self.args[place]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def tensors(self) -> list[Operand]:
        """All tensors among the arguments, in their order."""
        return list(tensors_in((self.args, tuple(self.kwargs.values()))))

    @property
    def first(self) -> Operand:
        """The first tensor among the arguments.

        Raises:
            LookupError: There is none.
        """
        for found in tensors_in((self.args, tuple(self.kwargs.values()))):
            return found
        raise LookupError("no tensor")


#: Returns the origin of each output of an operation, or one for all.
Rule = Callable[[Operation], "Sequence[Origin] | Origin"]


def tensors_in(values: Any) -> Iterable[Operand]:
    """Yield the operands in nested tuples."""
    if isinstance(values, Operand):
        yield values
    elif isinstance(values, tuple):
        for value in values:
            yield from tensors_in(value)


_RULES: dict[Callable[..., Any], Rule] = {}


def rule_of(function: Callable[..., Any]) -> Rule:
    """Return the rule of a torch function; that of an unknown function says that units are lost."""
    found = _RULES.get(function)
    if found is not None:
        return found
    owner = getattr(function, "__self__", None)
    if getattr(function, "__name__", "") == "__get__" and owner is not None:
        return _ATTRIBUTES.get(owner, _lose)
    return _lose


def _register(names: str, rule: Rule, *, in_place: bool = False) -> None:
    for function in spellings(*names.split(), in_place=in_place):
        _RULES[function] = rule


def _upstream(operation: Operation) -> int:
    upstream = 0
    for each in operation.tensors:
        upstream |= each.origin.upstream
    return upstream


def _lose(operation: Operation) -> Origin:
    """Say that units are lost, if there were any: the rule of every function without one."""
    tensors = operation.tensors
    states = {each.origin.state for each in tensors}
    if states <= {CONSTANT, WEIGHT}:
        return combine(tensors, ())
    upstream = _upstream(operation)
    if ROWS in states:
        return Origin.of(ROWS, upstream)
    if upstream:
        return Origin.of(LOST, upstream)
    return Origin.of(UNKNOWN)


def _end(operation: Operation) -> Origin:
    """Say that the results are no units: the rule of losses, distances, and functions that sort or count."""
    tensors = operation.tensors
    if all(each.origin.state in (CONSTANT, WEIGHT) for each in tensors):
        return combine(tensors, ())
    return Origin.of(ENDED, _upstream(operation))


# ---- layers


def _produce(operation: Operation, weight: Operand | None, unit_dims: Sequence[int] | None, index: int = 0) -> Origin:
    """Return the origin of a layer's output.

    Args:
        operation: The call.
        weight: The layer's weight.
        unit_dims: The dimensions of the output that index its units; ``None`` if that is not known.
        index: Index of the output.
    """
    shape = operation.outputs[index]
    upstream = _upstream(operation) | 1 << operation.call
    if weight is None or unit_dims is None:
        return Origin.of(LOST, upstream)
    if weight.origin.picked:
        return Origin.of(ROWS, upstream, layer=weight.origin.layer)
    dims = place(shape, unit_dims)
    layer = weight.origin.layer
    width = math.prod(shape[dim] for dim in unit_dims)
    units = Units((operation.call,), layer, ((layer, 0, width, 1),), 0, dims)
    return Origin.of(UNITS, upstream, units=units, layer=layer)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Operand) and value.origin.state == WEIGHT


def _layer_rule(slot: int, name: str, from_right: int) -> Rule:
    """Return the rule of a layer whose units lie on a fixed dimension of its output.

    Args:
        slot: Place of the weight among the arguments.
        name: Name of the weight.
        from_right: Dimension of the units, counted from the right (1 = last); 0 = dimension 1.
    """

    def rule(operation: Operation) -> Sequence[Origin]:
        weight = operation.argument(slot, name)
        if isinstance(weight, tuple):  # the list of weights of a recurrent layer
            weight = next(iter(tensors_in(weight)), None)
        if not isinstance(weight, Operand):
            return [_lose(operation)] * len(operation.outputs)
        if weight.origin.state not in (WEIGHT, CONSTANT, UNKNOWN):  # a weight that was computed from data
            return [Origin.of(ENDED, _upstream(operation))] * len(operation.outputs)
        found = []
        for index, shape in enumerate(operation.outputs):
            dim = len(shape) - from_right if from_right else 1
            found.append(_produce(operation, weight, (dim,) if 0 <= dim < len(shape) else None, index))
        return found

    return rule


for _n in (1, 2, 3):
    _register(f"conv{_n}d conv_transpose{_n}d", _layer_rule(1, "weight", _n + 1))
_register("linear", _layer_rule(1, "weight", 1))
_register("bilinear", _layer_rule(2, "weight", 1))
_register("embedding embedding_bag", _layer_rule(1, "weight", 1))
_register("torch_embedding", _layer_rule(0, "weight", 1))
_register("lstm gru rnn_tanh rnn_relu", _layer_rule(2, "params", 1))
_register("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", _layer_rule(2, "w_ih", 1))
_register("grouped_mm _grouped_mm", lambda operation: _grouped(operation))
_register("multi_head_attention_forward", lambda operation: _multi_head(operation))
_register("_native_multi_head_attention", _layer_rule(7, "proj_weight", 1))
_register("scaled_dot_product_attention", lambda operation: _attend(operation))


def _multi_head(operation: Operation) -> Sequence[Origin]:
    weight = operation.argument(11, "out_proj_weight")
    first = _produce(operation, weight if isinstance(weight, Operand) else None, (len(operation.outputs[0]) - 1,))
    rest = Origin.of(ENDED, first.upstream)
    return [first, *[rest] * (len(operation.outputs) - 1)]


def _grouped(operation: Operation) -> Origin:
    weights = [each for each in operation.tensors if _is_weight(each)]
    layer = weights[0].origin.layer if weights else ""
    return Origin.of(ROWS, _upstream(operation) | 1 << operation.call, layer=layer)


def _attend(operation: Operation) -> Origin:
    value = operation.argument(2, "value")
    return _weighted_sum(operation, value, operation.outputs[0], len(operation.outputs[0]) - 2)


def _weighted_sum(operation: Operation, value: Operand, shape: Shape, summed: int) -> Origin:
    """Return the origin of sums over a dimension of positions, as attention computes of its values."""
    upstream = _upstream(operation)
    origin = value.origin
    if origin.units is None:
        return Origin.of(origin.state if origin.state in (ROWS, LOST) else ENDED, upstream)
    dims = origin.units.dims
    if len(dims) > len(shape) or has_units(dims[summed - len(shape) + len(dims)]):
        return Origin.of(ENDED, upstream)
    kept = list(dims)
    kept[summed - len(shape) + len(dims)] = ()
    found = _placed(kept, shape)
    if found is None:
        return Origin.of(LOST, upstream)
    return Origin.of(UNITS, upstream, units=origin.units._replace(dims=found))


def _placed(dims: Sequence[Any], shape: Shape) -> Any:
    """Return dimensions for a shape: those that index units as they are, all others as positions of its sizes."""
    new = len(shape) - len(dims)
    found = [*positions(shape[:new])]
    for dim, size in zip(dims, shape[new:], strict=True):
        if has_units(dim):
            if math.prod(length for length, _ in dim) != size:
                return None
            found.append(dim)
        else:
            found.append(positions((size,))[0])
    return tuple(found)


def _norm_rule(weight_slot: int, unit_place: int, statistics_slot: int | None = None) -> Rule:
    """Return the rule of a normalisation: a layer if it has a weight or statistics of its own.

    Args:
        weight_slot: Place of its weight among the arguments.
        unit_place: The dimension of its units, ≥ 0; −1 if its weight covers the last dimensions.
        statistics_slot: Place of its running mean, if it can have one.
    """

    def rule(operation: Operation) -> Origin:
        shape = operation.outputs[0]
        weight = operation.argument(weight_slot, "weight")
        if not isinstance(weight, Operand) and statistics_slot is not None:
            weight = operation.argument(statistics_slot, "running_mean")
        if not isinstance(weight, Operand) or operation.first.origin.state == WEIGHT:
            return combine([operation.first], shape)  # a weight that is standardised stays a weight
        if unit_place < 0:
            return _produce(operation, weight, tuple(range(len(shape) - len(weight.shape), len(shape))))
        return _produce(operation, weight, (min(unit_place, len(shape) - 1),))

    return rule


_register("batch_norm", _norm_rule(3, 1, 1))
_register("instance_norm", _norm_rule(3, 1, 1))
_register("group_norm", _norm_rule(2, 1))
_register("layer_norm rms_norm", _norm_rule(2, -1))


# ---- products of matrices


def _matrix_product(operation: Operation, left: Operand, right: Operand) -> Origin:
    shape = operation.outputs[0]
    weights = _is_weight(left), _is_weight(right)
    if (
        all(weights)
        or (left.origin.state == CONSTANT and weights[1])
        or (right.origin.state == CONSTANT and weights[0])
    ):
        return combine([left, right], shape)
    if weights[1]:
        return _product_layer(operation, right, last=len(right.shape) > 1, rows=False)
    if weights[0]:
        return _product_layer(operation, left, last=False, rows=len(left.shape) > 1, column=len(right.shape) > 1)
    upstream = left.origin.upstream | right.origin.upstream
    if {left.origin.state, right.origin.state} <= {CONSTANT, RAW}:
        return Origin.of(CONSTANT if left.origin.state == right.origin.state == CONSTANT else RAW)
    if ROWS in (left.origin.state, right.origin.state):
        return Origin.of(ROWS, upstream)
    contracted_right = len(right.shape) - (2 if len(right.shape) > 1 else 1)
    contracted_left = len(left.shape) - 1
    for operand, contracted, own_left in ((right, contracted_right, False), (left, contracted_left, True)):
        units = operand.origin.units
        if units is None or has_units(units.dims[contracted]):
            continue
        kept = [dim for index, dim in enumerate(units.dims) if index != contracted]
        if own_left:
            target = shape[: len(shape) - 1] if len(right.shape) > 1 else shape
            last = positions(shape[len(shape) - 1 :]) if len(right.shape) > 1 else ()
        else:
            has_rows = len(left.shape) > 1 and len(right.shape) > 1
            if has_rows:
                kept.insert(len(kept) - 1, ())
            target, last = shape, ()
        if len(kept) > len(target):
            continue
        found = _placed(kept, target)
        if found is not None:
            return Origin.of(UNITS, upstream, units=units._replace(dims=(*found, *last)))
    return Origin.of(ENDED, upstream)


def _product_layer(operation: Operation, weight: Operand, *, last: bool, rows: bool, column: bool = True) -> Origin:
    """Return the origin of a product with a weight, or with a stack of weights.

    Args:
        operation: The product.
        weight: The weight.
        last: Whether the last dimension of the result indexes units.
        rows: Whether the last dimension but one does, or the last one if the other factor is a vector.
        column: Whether the other factor has columns.
    """
    rank = len(operation.outputs[0])
    own = rank - 1 if last or not column else rank - 2
    matrix_dims = 2 if column else 1
    stack = [
        rank - matrix_dims - depth
        for depth in range(1, len(weight.shape) - 1)
        if weight.shape[-2 - depth] > 1 and rank - matrix_dims - depth >= 0
    ]
    return _produce(operation, weight, (*reversed(stack), *((own,) if last or rows else ())))


def _two(first: int) -> Rule:
    def rule(operation: Operation) -> Origin:
        left, right = (
            operation.argument(first, "input", "batch1", "mat1", "mat"),
            operation.argument(first + 1, "other", "mat2", "batch2", "vec"),
        )
        if not isinstance(left, Operand) or not isinstance(right, Operand):
            return _lose(operation)
        return _matrix_product(operation, left, right)

    return rule


def _swapped(operation: Operation) -> Origin:
    left, right = operation.args[:2]
    return _matrix_product(operation, right, left)


_register("matmul mm bmm mv __matmul__", _two(0))
_register("__rmatmul__", _swapped)
_register("addmm addbmm baddbmm addmv", _two(1))
_register("dot vdot inner outer ger cdist pairwise_distance cosine_similarity", _end)


def _einsum(operation: Operation) -> Origin:
    equation, operands = operation.args[0], list(tensors_in(operation.args[1:]))
    shape = operation.outputs[0]
    upstream = _upstream(operation)
    if not isinstance(equation, str):
        return _lose(operation)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(operands):
        return _lose(operation)
    weights = [(term, operand) for term, operand in zip(terms, operands, strict=True) if operand.origin.state == WEIGHT]
    data = [(t, o) for t, o in zip(terms, operands, strict=True) if o.origin.state not in (WEIGHT, CONSTANT)]
    if not data:
        return combine(operands, shape)
    if weights:
        term, weight = weights[0]
        if "." in term:
            return Origin.of(LOST, upstream | 1 << operation.call)
        before, dots, after = output.partition("...")
        places = {letter: index for index, letter in enumerate(before)}
        places |= {letter: len(shape) - len(after) + index for index, letter in enumerate(after if dots else "")}
        return _produce(operation, weight, [places[letter] for letter in term if letter in places])
    candidates = []
    for term, operand in data:
        units = operand.origin.units
        if units is None or "." in equation:
            continue
        if all(letter in output for letter, dim in zip(term, units.dims, strict=True) if has_units(dim)):
            by_letter = dict(zip(term, units.dims, strict=True))
            found = tuple(
                dim if has_units(dim := by_letter.get(letter, ())) else positions((size,))[0]
                for letter, size in zip(output, shape, strict=True)
            )
            candidates.append(Origin.of(UNITS, upstream, units=units._replace(dims=found)))
    if len(candidates) == 1:
        return candidates[0]
    state = LOST if "." in equation or candidates else ENDED
    return Origin.of(state, upstream) if upstream else Origin.of(RAW)


_register("einsum", _einsum)


# ---- elementwise functions

_LINEAR = """
add sub subtract rsub mul multiply div divide true_divide neg negative positive addcmul addcdiv lerp where masked_fill
dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__
__div__ __rdiv__ __neg__ __pos__ masked_fill_ clone contiguous detach to float double half bfloat16 cpu cuda type
type_as requires_grad_ alias nan_to_num fill_diagonal copy_ zero_ fill_ bernoulli normalize
quantize_per_tensor fake_quantize_per_tensor_affine fake_quantize_per_channel_affine dequantize int long bool
resolve_conj conj eq ne lt le gt ge greater less not_equal logical_and logical_or
logical_not logical_xor isnan isinf isfinite __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__
__invert__ __iand__ __ior__ bitwise_and bitwise_or bitwise_not signbit pin_memory retain_grad
"""
_NOT_LINEAR = """
abs absolute maximum minimum fmax fmin clamp clip clamp_min clamp_max exp exp2 expm1 log log2 log10 log1p sqrt rsqrt
square pow float_power reciprocal sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh arcsin arccos arctan
erf erfc erfinv sigmoid sign sgn floor ceil round trunc frac fmod remainder floor_divide __pow__ __rpow__ __ipow__
__mod__ __floordiv__ __abs__ atan2 arctan2 hypot logaddexp logaddexp2 xlogy sinc logit heaviside copysign
relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign tanhshrink hardtanh hardswish
hardsigmoid hardshrink softshrink threshold logsigmoid
"""


def _elementwise(operation: Operation) -> Origin:
    return combine(operation.tensors, operation.outputs[0])


def _bending(operation: Operation) -> Origin:
    return combine(operation.tensors, operation.outputs[0], bent=getattr(operation.function, "__name__", "") or "?")


_register(_LINEAR, _elementwise, in_place=True)
_register(_NOT_LINEAR, _bending, in_place=True)
for _function in (torch.special.expit, torch.special.erf):
    _RULES[_function] = _bending


def _like_first(operation: Operation) -> Origin:
    """Return the origin of the first tensor: the others only say what to do with it."""
    first = operation.first
    return combine([first], operation.outputs[0]) if tuple(first.shape) == operation.outputs[0] else _lose(operation)


_register("normalize renorm local_response_norm ", _like_first)
_FACTORIES = """
zeros ones empty full arange linspace logspace eye rand randn randint randperm tensor as_tensor from_numpy
zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
new_tensor tril_indices triu_indices meshgrid
"""
_register(_FACTORIES, lambda operation: Origin.of(CONSTANT))


# ---- views

_Move = Callable[[Operation, Units, Shape, Shape], "Units | None"]


def _move_rule(move: _Move) -> Rule:
    """Return the rule of a function that only rearranges one tensor.

    Args:
        move: Returns the units after it from those before it and from both shapes; ``None`` if they are lost.
    """

    def rule(operation: Operation) -> Origin:
        operand = operation.first
        origin = operand.origin
        if origin.units is None:
            return origin
        units = move(operation, origin.units, operand.shape, operation.outputs[0])
        return Origin.of(LOST, origin.upstream) if units is None else origin.but(units=units)

    return rule


def _ints(values: Iterable[Any]) -> list[int]:
    found: list[int] = []
    for value in values:
        if isinstance(value, tuple):
            found.extend(_ints(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
    return found


def _reshaped(_: Operation, units: Units, __: Shape, after: Shape) -> Units | None:
    dims = reshape(units.dims, after)
    return None if dims is None else units._replace(dims=dims)


def _permuted(units: Units, order: Sequence[int]) -> Units:
    return units._replace(dims=tuple(units.dims[place] for place in order))


def _transposed(operation: Operation, units: Units, before: Shape, _: Shape) -> Units:
    rank = len(before)
    one = operation.argument(1, "dim0", "axis0") % rank
    other = operation.argument(2, "dim1", "axis1") % rank
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    return _permuted(units, order)


def _permute(operation: Operation, units: Units, before: Shape, _: Shape) -> Units:
    order = _ints(operation.args[1:]) or _ints(operation.kwargs.values())
    return _permuted(units, [place % len(before) for place in order])


def _reversed(_: Operation, units: Units, before: Shape, __: Shape) -> Units:
    return _permuted(units, list(reversed(range(len(before)))))


def _last_two(_: Operation, units: Units, before: Shape, __: Shape) -> Units:
    order = list(range(len(before)))
    order[-2:] = reversed(order[-2:])
    return _permuted(units, order)


def _moved(operation: Operation, units: Units, before: Shape, _: Shape) -> Units:
    rank = len(before)
    sources = [place % rank for place in _ints([operation.argument(1, "source")])]
    targets = [place % rank for place in _ints([operation.argument(2, "destination")])]
    order: list[int] = [-1] * rank
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    rest = iter(place for place in range(rank) if place not in sources)
    return _permuted(units, [next(rest) if place < 0 else place for place in order])


def _expanded(_: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    new = len(after) - len(before)
    if any(size not in (1, after[new + place]) for place, size in enumerate(before)):
        return None
    dims = (dim or positions(after[new + place :][:1])[0] for place, dim in enumerate(units.dims))
    return units._replace(dims=(*positions(after[:new]), *dims))


def _repeated(operation: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    new = len(after) - len(before)
    dims = [*positions(after[:new])]
    for place, dim in enumerate(units.dims):
        if before[place] != after[new + place] and has_units(dim):
            return None
        dims.append(dim if before[place] == after[new + place] else positions(after[new + place :][:1])[0])
    return units._replace(dims=tuple(dims))


def _selected(operation: Operation, units: Units, before: Shape, _: Shape) -> Units | None:
    dim, index = operation.argument(1, "dim") % len(before), operation.argument(2, "index")
    return select(units, dim, index % before[dim]) if isinstance(index, int) else None


def _narrowed(operation: Operation, units: Units, before: Shape, _: Shape) -> Units | None:
    dim, start = operation.argument(1, "dim") % len(before), operation.argument(2, "start")
    length = operation.argument(3, "length")
    return slice_dim(units, dim, start % before[dim], length) if isinstance(start, int) else None


def _flipped(operation: Operation, units: Units, before: Shape, _: Shape) -> Units | None:
    dims = [place % len(before) for place in _ints(operation.args[1:])] or _ints(operation.kwargs.values())
    return None if any(has_units(units.dims[dim]) for dim in dims) else units


def _unfolded(operation: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    dim = operation.argument(1, "dimension") % len(before)
    if has_units(units.dims[dim]):
        return None
    dims = [*units.dims, positions(after[-1:])[0]]
    dims[dim] = positions(after[dim : dim + 1])[0]
    return units._replace(dims=tuple(dims))


_register(
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel squeeze_ unsqueeze_",
    _move_rule(_reshaped),
)
_register("transpose swapaxes swapdims transpose_ swapaxes_ swapdims_", _move_rule(_transposed))
_register("permute", _move_rule(_permute))
_register("t t_ adjoint", _move_rule(_last_two))
_register("movedim moveaxis", _move_rule(_moved))
_register("expand expand_as broadcast_to", _move_rule(_expanded))
_register("repeat tile repeat_interleave", _move_rule(_repeated))
_register("narrow", _move_rule(_narrowed))
_register("flip fliplr flipud roll rot90", _move_rule(_flipped))
_register("unfold", lambda operation: _unfold(operation))
_ATTRIBUTES: dict[Any, Rule] = {
    Tensor.T: _move_rule(_reversed),
    Tensor.mT: _move_rule(_last_two),
    Tensor.H: _move_rule(_last_two),
    Tensor.mH: _move_rule(_last_two),
    Tensor.data: _elementwise,
}


def _unfold(operation: Operation) -> Sequence[Origin] | Origin:
    method = isinstance(operation.argument(1, "dimension"), int) and len(operation.args) > 2
    return _move_rule(_unfolded)(operation) if method else _lose(operation)


# ---- parts


def _select_rule(operation: Operation) -> Origin:
    return _indexed(operation, operation.first, _selection(operation))


def _selection(operation: Operation) -> tuple[Any, ...]:
    dim, index = operation.argument(1, "dim"), operation.argument(2, "index")
    return (*[Index(None, None, None)] * (dim % len(operation.first.shape)), index)


_register("select", _select_rule)


def _index_rule(operation: Operation) -> Origin:
    index = operation.args[1]
    return _indexed(operation, operation.first, index if type(index) is tuple else (index,))


_register("__getitem__", _index_rule)


def _indexed(operation: Operation, operand: Operand, index: tuple[Any, ...]) -> Origin:
    """Return the origin of ``operand[index]``."""
    origin, shape = operand.origin, operation.outputs[0]
    if origin.state == WEIGHT:
        return _part_of_weight(operand, index)
    if origin.units is None:
        return origin
    units = _index_units(origin.units, operand.shape, index, shape)
    if units is ENDED:
        return Origin.of(ENDED, origin.upstream, layer=origin.units.layer)
    return origin.but(units=units) if isinstance(units, Units) else Origin.of(LOST, origin.upstream)


def _part_of_weight(operand: Operand, index: tuple[Any, ...]) -> Origin:
    """Return the origin of a part of a weight: a matrix of a stack bears its number."""
    origin = operand.origin
    by_data = any(isinstance(part, (Operand, tuple)) and not isinstance(part, Index) for part in index)
    if by_data and len(operand.shape) > 2:
        return origin.but(picked=True)
    if len(operand.shape) > 2 and index and isinstance(index[0], int) and not isinstance(index[0], bool):
        return origin.but(layer=f"{origin.layer}.{index[0] % operand.shape[0]}")
    return origin


def _index_units(units: Units, shape: Shape, index: tuple[Any, ...], after: Shape) -> Units | str | None:
    """Return the units after an index; :data:`ENDED` if data picked some of them; ``None`` if they are lost."""
    taken = sum(_dims_of(part) for part in index)
    if any(part is Ellipsis for part in index):
        place = next(number for number, part in enumerate(index) if part is Ellipsis)
        full = [Index(None, None, None)] * (len(shape) - taken)
        index = (*index[:place], *full, *index[place + 1 :])
    dim = 0  # of the units that are left
    picked: list[int] = []  # dimensions of the result that data picks
    current = units
    sizes = list(shape)
    for part in index:
        if part is None:
            current = current._replace(dims=(*current.dims[:dim], (), *current.dims[dim:]))
            sizes.insert(dim, 1)
            dim += 1
        elif isinstance(part, Index):
            start, stop, step = slice(*part).indices(sizes[dim])
            if step < 1:
                return None
            length = len(range(start, stop, step))
            if length == 0:
                return None
            found = slice_dim(current, dim, start, length, step)
            if found is None:
                return None
            current, sizes[dim] = found, length
            dim += 1
        elif isinstance(part, int) and not isinstance(part, bool):
            current = select(current, dim, part % sizes[dim])
            del sizes[dim]
        elif isinstance(part, (Operand, tuple)):
            for _ in range(_dims_of(part)):
                if has_units(current.dims[dim]):
                    return ENDED
                picked.append(dim)
                dim += 1
        else:
            return None
    if not picked:
        return current
    return _picked_rows(current, picked, after)


def _dims_of(part: Any) -> int:
    """Return how many dimensions of a tensor a part of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Operand) and part.boolean:
        return len(part.shape)
    return 1


def _picked_rows(units: Units, picked: Sequence[int], after: Shape) -> Units | None:
    """Return the units after dimensions of positions were picked by data: new dimensions take their place."""
    kept = [dim for place, dim in enumerate(units.dims) if place not in picked]
    new = len(after) - len(kept)
    if new < 0:
        return None
    together = list(picked) == list(range(picked[0], picked[0] + len(picked)))
    place = picked[0] if together else 0
    dims = [*kept[:place], *positions(after[place : place + new]), *kept[place:]]
    found = _placed(dims, after)
    return None if found is None else units._replace(dims=found)


def _split_rule(operation: Operation) -> Sequence[Origin]:
    operand = operation.first
    origin, rank = operand.origin, len(operand.shape)
    if origin.units is None:
        return [origin] * len(operation.outputs)
    dim = operation.argument(2, "dim", "axis", default=0) % rank
    found, start = [], 0
    for shape in operation.outputs:
        part = slice_dim(origin.units, dim, start, shape[dim])
        found.append(Origin.of(LOST, origin.upstream) if part is None else origin.but(units=part))
        start += shape[dim]
    return found


def _unbind_rule(operation: Operation) -> Sequence[Origin]:
    operand = operation.first
    origin = operand.origin
    dim = operation.argument(1, "dim", "axis", default=0) % len(operand.shape)
    if origin.units is None:
        if origin.state == WEIGHT and dim == 0 and len(operand.shape) > 2:
            return [origin.but(layer=f"{origin.layer}.{number}") for number in range(len(operation.outputs))]
        return [origin] * len(operation.outputs)
    return [origin.but(units=select(origin.units, dim, index)) for index in range(len(operation.outputs))]


_register("chunk split tensor_split split_with_sizes", _split_rule)
_register("unbind __iter__", _unbind_rule)


def _index_select(operation: Operation) -> Origin:
    operand = operation.first
    dim = operation.argument(1, "dim", "axis") % len(operand.shape)
    index = operation.argument(2, "index", "indices")
    return _indexed(operation, operand, (*[Index(None, None, None)] * dim, index))


_register("index_select", _index_select)


def _take_along(operation: Operation) -> Origin:
    """Say what ``gather`` picks along a dimension."""
    operand = operation.first
    origin, rank = operand.origin, len(operand.shape)
    if origin.units is None:
        return origin
    dim = operation.argument(1, "dim", "axis")
    if not isinstance(dim, int) or has_units(origin.units.dims[dim % rank]):
        return Origin.of(ENDED, _upstream(operation), layer=origin.units.layer)
    found = _placed(origin.units.dims, operation.outputs[0])
    return Origin.of(LOST, origin.upstream) if found is None else origin.but(units=origin.units._replace(dims=found))


_register("gather", _take_along)


# ---- joins


def _cat_rule(operation: Operation) -> Origin:
    parts = list(tensors_in(operation.args[:1] or (operation.kwargs.get("tensors"),)))
    shape = operation.outputs[0]
    dim = operation.argument(1, "dim", "axis", default=0)
    if not parts or not isinstance(dim, int):
        return _lose(operation)
    return _join([each for each in parts if math.prod(each.shape) or len(parts) == 1], dim % len(shape), shape)


def _join(parts: Sequence[Operand], dim: int, shape: Shape) -> Origin:
    """Return the origin of tensors that were joined along a dimension, which each of them has."""
    if not parts:
        return Origin.of(CONSTANT)
    upstream = 0
    for each in parts:
        upstream |= each.origin.upstream
    data = [each for each in parts if each.origin.state not in (CONSTANT, WEIGHT, RAW)]
    if not data:
        return combine(parts, ()) if not any(each.origin.state == RAW for each in parts) else Origin.of(RAW)
    states = {each.origin.state for each in data}
    if states != {UNITS}:
        state = next(state for state in (ROWS, LOST, UNKNOWN, ENDED) if state in states)
        return Origin.of(state if upstream else UNKNOWN, upstream)
    first = data[0].origin.units
    assert first is not None
    if any(has_units(each.origin.units.dims[dim]) for each in data if each.origin.units is not None):
        return _join_units(parts, data, dim, upstream)
    same = {(each.origin.units.layer, each.origin.units.first) for each in data if each.origin.units is not None}
    if len(same) > 1:
        return Origin.of(ROWS, upstream)
    found = _placed(first.dims, shape)
    if found is None:
        return Origin.of(LOST, upstream)
    sites = {each.origin.site for each in data}
    site = data[0].origin.site if len(sites) == 1 else None
    return Origin.of(UNITS, upstream, units=first._replace(dims=found), site=site, bent=data[0].origin.bent)


def _join_units(parts: Sequence[Operand], data: Sequence[Operand], dim: int, upstream: int) -> Origin:
    """Return the origin of tensors whose units were put side by side."""
    if len(data) != len(parts):
        return Origin.of(LOST, upstream)
    everything = [each.origin.units for each in data if each.origin.units is not None]
    for units in everything:
        single = len(units.dims[dim]) <= 1 and all(
            not has_units(other) for place, other in enumerate(units.dims) if place != dim
        )
        if not single or not (has_units(units.dims[dim]) or units.size == 1):
            return Origin.of(LOST, upstream)
    runs = merge_all(run for units in everything for run in units.tensor_runs())
    layers = dict.fromkeys(layer for layer, *_ in runs)
    calls = tuple(dict.fromkeys(call for units in everything for call in units.call))
    width = sum(units.size for units in everything)
    dims = list(everything[0].dims)
    dims[dim] = ((width, 1),)
    sites = tuple(each.origin.site for each in data)
    site = sites if all(each is not None for each in sites) else None
    return Origin.of(UNITS, upstream, units=Units(calls, "+".join(layers), tuple(runs), 0, tuple(dims)), site=site)


def merge_all(runs: Iterable[Any]) -> list[Any]:
    """Return runs with neighbours of one layer made one where the second goes on where the first ends.

    Args:
        runs: As of :class:`~neuronscope.attach.units.Units`.
    """
    found: list[Any] = []
    for layer, start, stop, step in runs:
        last = found[-1] if found else None
        if last is not None and last[0] == layer and last[3] == step and last[2] == start:
            found[-1] = (layer, last[1], stop, step)
        else:
            found.append((layer, start, stop, step))
    return found


_register("cat concat concatenate", _cat_rule)


def _stack_rule(operation: Operation) -> Origin:
    parts = list(tensors_in(operation.args[:1] or (operation.kwargs.get("tensors"),)))
    shape = operation.outputs[0]
    dim = operation.argument(1, "dim", "axis", default=0) % len(shape)
    widened = []
    for each in parts:
        units = each.origin.units
        shaped = (*each.shape[:dim], 1, *each.shape[dim:])
        origin = each.origin
        if units is not None:
            origin = origin.but(units=units._replace(dims=(*units.dims[:dim], (), *units.dims[dim:])))
        widened.append(Operand(shaped, origin))
    layers = {each.origin.units.layer if each.origin.units else None for each in widened}
    if len(layers) > 1:  # a stack of several layers
        upstream = _upstream(operation)
        return Origin.of(ENDED if upstream else RAW, upstream)
    return _join(widened, dim, shape)


_register("stack", _stack_rule)


def _joined_by(dim: Callable[[int], int]) -> Rule:
    def rule(operation: Operation) -> Origin:
        parts = list(tensors_in(operation.args[:1]))
        shape = operation.outputs[0]
        if not parts or any(len(each.shape) != len(shape) for each in parts):
            return _lose(operation)
        return _join(parts, dim(len(shape)), shape)

    return rule


_register("hstack column_stack", _joined_by(lambda rank: min(1, rank - 1)))
_register("vstack row_stack", _joined_by(lambda rank: 0))


# ---- reductions, and functions along one dimension


def _reduce_rule(operation: Operation) -> Sequence[Origin]:
    operand = operation.first
    origin, rank = operand.origin, len(operand.shape)
    others = [each for each in operation.tensors if each is not operand]
    if (
        others
        and operation.outputs
        and tuple(operation.outputs[0]) == tuple(max((operand.shape, *(each.shape for each in others)), key=math.prod))
    ):
        return [_bending(operation)] * len(operation.outputs)  # max(a, b), min(a, b)
    if origin.units is None:
        return [origin] * len(operation.outputs)
    given = operation.argument(1, "dim", "axis")
    axes = [axis % rank for axis in _ints([given])] or list(range(rank))
    keepdim = bool(operation.outputs) and len(operation.outputs[0]) == rank
    dims = reduce(origin.units.dims, axes, keepdim=keepdim)
    if dims is None or (operation.outputs and len(dims) != len(operation.outputs[0])):
        return [Origin.of(ENDED, origin.upstream)] * len(operation.outputs)
    return [origin.but(units=origin.units._replace(dims=dims))] * len(operation.outputs)


def _along_rule(place: int, default: int | None = None, *, picks: bool = False) -> Rule:
    """Return the rule of a function along one dimension, such as softmax.

    Args:
        place: Place of the dimension among the arguments.
        default: The dimension if none is given; ``None`` stands for all.
        picks: Whether the results are some of the elements, in an order that depends on the data.
    """

    def rule(operation: Operation) -> Sequence[Origin]:
        operand = operation.first
        origin, rank = operand.origin, len(operand.shape)
        if origin.units is None:
            return [origin] * len(operation.outputs)
        dim = operation.argument(place, "dim", "axis", default=default)
        along = [dim % rank] if isinstance(dim, int) and not isinstance(dim, bool) and rank else range(rank)
        if any(has_units(origin.units.dims[axis]) for axis in along):
            layer = origin.units.layer if picks else ""
            return [Origin.of(ENDED, origin.upstream, layer=layer)] * len(operation.outputs)
        found = []
        for shape in operation.outputs:
            dims = _placed(origin.units.dims, shape) if len(shape) == rank else None
            found.append(
                Origin.of(LOST, origin.upstream)
                if dims is None
                else Origin.of(UNITS, origin.upstream, units=origin.units._replace(dims=dims), bent=origin.bent)
            )
        return found

    return rule


_register(
    "mean sum amax amin max min logsumexp std var prod nanmean nansum norm all any count_nonzero argmax argmin "
    "std_mean var_mean median nanmedian mode quantile",
    _reduce_rule,
)
_register("softmax log_softmax softmin gumbel_softmax cumsum cumprod logcumsumexp cummax cummin diff", _along_rule(1))
_register("sort argsort", _along_rule(1, -1, picks=True))
_register("topk kthvalue", _along_rule(2, -1, picks=True))


# ---- pooling, padding, resizing: they change sizes of positions


def _resize_rule(operation: Operation) -> Sequence[Origin]:
    """Say that dimensions of units stay where their size does, and that the others are positions."""
    operand = operation.first
    origin = operand.origin
    if origin.units is None:
        return [origin] * len(operation.outputs)
    found = []
    for shape in operation.outputs:
        dims = _placed(origin.units.dims, shape) if len(shape) == len(operand.shape) else None
        found.append(
            Origin.of(LOST, origin.upstream) if dims is None else origin.but(units=origin.units._replace(dims=dims))
        )
    return found


def _pool_rule(dims: int) -> Rule:
    def rule(operation: Operation) -> Sequence[Origin]:
        units = operation.first.origin.units
        if units is not None and any(has_units(dim) for dim in units.dims[-dims:]):
            return [Origin.of(ENDED, operation.first.origin.upstream)] * len(operation.outputs)
        return _resize_rule(operation)

    return rule


for _n in (1, 2, 3):
    _pools = " ".join(
        f"{kind}{_n}d{suffix}"
        for kind in (
            *("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool", "fractional_max_pool"),
            "max_unpool",
        )
        for suffix in ("", "_with_indices")
    )
    _register(_pools, _pool_rule(_n))
_register("interpolate upsample upsample_nearest upsample_bilinear pad grid_sample constant_pad_nd", _resize_rule)


# ---- writes into a tensor by data


def _scatter_rule(operation: Operation) -> Origin:
    """Say what a tensor is after rows of another one were written, or added, into it along a dimension."""
    target, source = operation.first, operation.argument(3, "src", "source", "value")
    dim = operation.argument(1, "dim", "axis")
    upstream = _upstream(operation)
    if not isinstance(source, Operand) or source.origin.state in (CONSTANT, WEIGHT, RAW):
        if target.origin.units is not None:
            return target.origin.but(upstream=upstream, site=None)
        return Origin.of(ENDED, upstream) if upstream else target.origin
    units = source.origin.units
    if units is None or not isinstance(dim, int):
        return Origin.of(source.origin.state, upstream) if units is None else _lose(operation)
    if len(source.shape) != len(operation.outputs[0]) or has_units(units.dims[dim % len(source.shape)]):
        return Origin.of(ENDED, upstream)
    return _written(target, source, operation.outputs[0], upstream)


def _written(target: Operand, source: Operand, shape: Shape, upstream: int) -> Origin:
    """Return the origin of a tensor into which rows of another one were written."""
    units = source.origin.units
    if units is None:
        return Origin.of(LOST, upstream) if upstream else target.origin
    dims = _placed(units.dims, shape) if len(units.dims) <= len(shape) else None
    if dims is None:
        return Origin.of(LOST, upstream)
    if target.origin.state == ROWS:
        return Origin.of(ROWS, upstream)
    before = target.origin.units
    if before is not None and (before.layer, before.first) != (units.layer, units.first):
        return Origin.of(ROWS, upstream)
    return Origin.of(UNITS, upstream, units=units._replace(dims=dims), site=source.origin.site)


_register("scatter scatter_add scatter_reduce index_add index_copy index_reduce", _scatter_rule, in_place=True)


def set_item(target: Operand, index: tuple[Any, ...], value: Operand) -> Origin:
    """Return what a tensor is after ``target[index] = value``.

    Args:
        target: The tensor before it.
        index: The index.
        value: What was written.
    """
    upstream = target.origin.upstream | value.origin.upstream
    units = value.origin.units
    if units is None:
        return (
            target.origin if value.origin.state in (CONSTANT, WEIGHT, RAW) else combine([target, value], target.shape)
        )
    if target.origin.state in (CONSTANT, RAW, WEIGHT, UNKNOWN) and len(value.shape) == len(target.shape):
        return _written(target, value, target.shape, upstream)
    if target.origin.units is not None and target.origin.units.layer == units.layer:
        return target.origin.but(upstream=upstream)
    by_rows = len(value.shape) == len(target.shape) and not any(has_units(dim) for dim in units.dims[: len(index)])
    return Origin.of(ROWS if by_rows else LOST, upstream)


_register(
    "mse_loss l1_loss smooth_l1_loss huber_loss cross_entropy nll_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits kl_div margin_ranking_loss triplet_margin_loss cosine_embedding_loss "
    "hinge_embedding_loss ctc_loss gaussian_nll_loss poisson_nll_loss soft_margin_loss multi_margin_loss "
    "multilabel_margin_loss multilabel_soft_margin_loss triplet_margin_with_distance_loss bincount histc unique "
    "nonzero one_hot searchsorted bucketize allclose equal item",
    _end,
)
