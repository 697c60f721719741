"""Rules of products of matrices: with a weight they are layers, without one they sum over a dimension."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from neuronscope.attach.origins import CONSTANT, ENDED, LOST, RAW, ROWS, UNITS, WEIGHT, Operand, Origin, combine
from neuronscope.attach.unit_rules.layer_rules import cut_of, is_weight, produce, rows_of_experts
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, end, integers, lose, table, tensors_in
from neuronscope.attach.units import has_units, positions, resized
from neuronscope.count.neuron_layout import Dims

__all__ = ["PRODUCTS", "is_stack_of_experts"]


def _matrix_product(operation: Operation, left: Operand, right: Operand) -> Origin:
    states = {left.origin.state, right.origin.state}
    if states <= {WEIGHT, CONSTANT}:
        return combine([left, right], operation.outputs[0])
    if is_weight(right):
        return _layer_from_right(operation, left, right)
    if is_weight(left):
        return _layer_from_left(operation, left, right)
    upstream = operation.upstream
    if states <= {CONSTANT, RAW}:
        return Origin.of(RAW)
    if ROWS in states:
        return Origin.of(ROWS, upstream)
    if left.origin.made or right.origin.made:
        return Origin.of(ENDED, upstream)
    return _sum_of_right(operation, left, right) or _sum_of_left(operation, left, right) or Origin.of(ENDED, upstream)


def _layer_from_right(operation: Operation, data: Operand, weight: Operand) -> Origin:
    """Return the origin of ``data @ weight``: the columns of the weight are units, of each matrix of a stack."""
    rank = len(operation.outputs[0])
    if len(weight.shape) == 1:
        return produce(operation, weight, ())
    before = rank - (2 if len(data.shape) > 1 else 1)
    if is_stack_of_experts(weight) and rank >= 3:
        return _every_expert(operation, weight, rank - 1, -1)
    return produce(
        operation, weight, (*_stack(weight, before), rank - 1), rows=-1, picked_dims=_picked_dims(weight, before)
    )


def _layer_from_left(operation: Operation, weight: Operand, data: Operand) -> Origin:
    """Return the origin of ``weight @ data``: the rows of the weight are units, of each matrix of a stack."""
    rank = len(operation.outputs[0])
    if len(weight.shape) == 1:
        return produce(operation, weight, ())
    rows = rank - (2 if len(data.shape) > 1 else 1)
    if is_stack_of_experts(weight) and rank >= 3 and len(data.shape) > 1:
        return _every_expert(operation, weight, rows, -2)
    return produce(operation, weight, (*_stack(weight, rows), rows), rows=-2, picked_dims=_picked_dims(weight, rows))


def _stack(weight: Operand, before: int) -> list[int]:
    """Return the dimensions of a product that index the matrices of a stack of weights.

    Args:
        weight: The weights ``(…, rows, columns)``.
        before: Number of dimensions of the product before those of the matrices.
    """
    sizes = weight.shape[:-2]
    return [before - len(sizes) + place for place, size in enumerate(sizes) if size > 1]


def is_stack_of_experts(weight: Operand) -> bool:
    """Whether a weight is a matrix for each expert of a mixture, as its path says: ``mlp.experts.w1``.

    Of other stacks, such as those of heads, all units together are the units of one layer.

    >>> is_stack_of_experts(Operand((4, 2, 3), Origin.of(WEIGHT, layer="mlp.experts.w1")))
    True
    >>> is_stack_of_experts(Operand((4, 2, 3), Origin.of(WEIGHT, layer="attention.heads")))
    False
    """
    origin, shape = weight.origin, weight.shape
    named = len(shape) == 3 and shape[0] > 1 and not origin.picked and _EXPERT.search(origin.layer) is not None
    return named and (not origin.cuts or origin.cuts[0] is None)


_EXPERT = re.compile(r"(^|[._])experts?([._]|$)")


def _every_expert(operation: Operation, weight: Operand, unit_dim: int, rows: int) -> Origin:
    """Return the origin of the products of all matrices of a stack of experts, each with rows of its own.

    Args:
        operation: The call.
        weight: The stack ``(E, …)``.
        unit_dim: The dimension of the output that indexes the units of an expert, ≥ 0. The others index its rows.
        rows: The dimension of the weight that indexes its units, from the right.
    """
    shape = operation.outputs[0]
    layer, cut = cut_of(weight, rows, shape[unit_dim])
    layers = tuple([f"{layer}.{number}" for number in range(weight.shape[0])])
    row_dims = [dim for dim in range(len(shape)) if dim != unit_dim]
    return rows_of_experts(operation, layer, layers, cut, shape, (unit_dim,), row_dims)


def _picked_dims(weight: Operand, before: int) -> list[int | None]:
    """Return the dimensions of a product that index the matrices of a stack of weights, whatever their sizes.

    Args:
        weight: The weights ``(…, rows, columns)``.
        before: Number of dimensions of the product before those of the matrices.
    """
    count = len(weight.shape) - 2
    return [before - count + place for place in range(count)]


def _sum_of_right(operation: Operation, left: Operand, right: Operand) -> Origin | None:
    """Return the origin of sums over the rows of the right factor; ``None`` if these are units."""
    units = right.origin.units
    row = len(right.shape) - (2 if len(right.shape) > 1 else 1)
    if units is None or has_units(units.dims[row]):
        return None
    kept = [dim for index, dim in enumerate(units.dims) if index != row]
    if len(left.shape) > 1 and len(right.shape) > 1:
        kept.insert(row, ())  # the rows of the left factor take their place
    return _with_dims(operation, right, resized(kept, operation.outputs[0]))


def _sum_of_left(operation: Operation, left: Operand, right: Operand) -> Origin | None:
    """Return the origin of sums over the columns of the left factor; ``None`` if these are units."""
    units = left.origin.units
    if units is None or has_units(units.dims[-1]):
        return None
    kept = [*units.dims[:-1], *([()] if len(right.shape) > 1 else [])]
    return _with_dims(operation, left, resized(kept, operation.outputs[0]))


def _with_dims(operation: Operation, source: Operand, dims: Dims | None) -> Origin:
    """Return the units of a factor with new dimensions; lost if there are none."""
    upstream, units = operation.upstream, source.origin.units
    if dims is None or units is None:
        return Origin.of(LOST, upstream)
    return Origin.of(UNITS, upstream, units=units._replace(dims=dims))


def _product_rule(place: int) -> Rule:
    """Return the rule of a matrix product.

    Args:
        place: Place of its left factor among the arguments; the right one follows.
    """

    def rule(operation: Operation) -> Origin:
        left = operation.argument(place, "input", "batch1", "mat1", "mat")
        right = operation.argument(place + 1, "other", "tensor", "mat2", "batch2", "vec")
        if place and "input" in operation.kwargs:
            left = operation.kwargs.get("mat1", operation.kwargs.get("batch1", operation.kwargs.get("mat")))
        if not isinstance(left, Operand) or not isinstance(right, Operand):
            return lose(operation)
        return _matrix_product(operation, left, right)

    return rule


def _swapped(operation: Operation) -> Origin:
    left, right = operation.args[:2]
    return _matrix_product(operation, right, left)


def _summed_over_batch(operation: Operation) -> Origin:
    """Say what ``addbmm`` gives: sums of products, and of a stack of weights the sum of its layers."""
    return lose(operation)


def _inner(operation: Operation) -> Origin:
    """Say what ``inner`` gives: a sum over the last dimension of both factors."""
    left, right = operation.argument(0, "input"), operation.argument(1, "other")
    if not left.shape or not right.shape:
        return lose(operation)  # a product with a number
    return _contracted(operation, left, right, [len(left.shape) - 1], [len(right.shape) - 1])


def _tensordot(operation: Operation) -> Origin:
    """Say what ``tensordot`` gives: a sum over pairs of dimensions, which are numbers or how many there are."""
    left, right = operation.argument(0, "a"), operation.argument(1, "b")
    dims = operation.argument(2, "dims", default=2)
    if isinstance(dims, int):
        return _contracted(operation, left, right, range(len(left.shape))[len(left.shape) - dims :], range(dims))
    first, second = (dims, operation.args[3]) if len(operation.args) > 3 else dims  # aten has both one by one
    return _contracted(operation, left, right, integers([first]), integers([second]))


def _contracted(
    operation: Operation, left: Operand, right: Operand, left_dims: Sequence[int], right_dims: Sequence[int]
) -> Origin:
    """Return the origin of sums of products over pairs of dimensions, as ``einsum`` would write it."""
    letters = iter(string.ascii_letters)
    terms = [[next(letters) for _ in operand.shape] for operand in (left, right)]
    for one, other in zip(left_dims, right_dims, strict=True):
        terms[1][other] = terms[0][one]
    kept = [letter for term, other in (terms, terms[::-1]) for letter in term if letter not in other]
    equation = f"{''.join(terms[0])},{''.join(terms[1])}->{''.join(kept)}"
    return _einsum(operation._replace(args=(equation, left, right), kwargs={}))


def _attend(operation: Operation) -> Origin:
    """Say what attention gives: weighted sums over the rows of its values."""
    value = operation.argument(2, "value")
    origin, shape = value.origin, operation.outputs[0]
    if origin.units is None:
        return Origin.of(origin.state if origin.state in (ROWS, LOST) else ENDED, operation.upstream)
    if has_units(origin.units.dims[-2]):
        return Origin.of(ENDED, operation.upstream)
    kept = list(origin.units.dims)
    kept[-2] = ()
    return _with_dims(operation, value, resized(kept, shape))


def _einsum(operation: Operation) -> Origin:
    equation, operands = operation.args[0], list(tensors_in(operation.args[1:]))
    if not isinstance(equation, str):
        return lose(operation)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = inputs.replace(",", "")
        output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    repeats = any(len(set(term)) < len(term) for term in terms)
    if len(terms) != len(operands) or ("." in equation and not arrow):
        return lose(operation)
    if all(each.origin.state in (WEIGHT, CONSTANT) for each in operands):
        return combine(operands, operation.outputs[0])
    pairs = list(zip(terms, operands, strict=True))
    weights = [(term, operand) for term, operand in pairs if operand.origin.state == WEIGHT]
    if weights:
        return _einsum_layer(operation, weights, output)
    data = [(term, operand) for term, operand in pairs if operand.origin.state != CONSTANT]
    if repeats or "." in equation:
        return lose(operation)
    return _einsum_sum(operation, data, output)


def _einsum_layer(operation: Operation, weights: Sequence[tuple[str, Operand]], output: str) -> Origin:
    """Return the origin of a product with weights: the letters of the weight that the result has are its units."""
    shape = operation.outputs[0]
    before, dots, after = output.partition("...")
    places = {letter: index for index, letter in enumerate(before)}
    places |= {letter: len(shape) - len(after) + index for index, letter in enumerate(after if dots else "")}
    found = [(term, weight) for term, weight in weights if set(term) & set(places)] or list(weights)[:1]
    term, weight = found[0]
    if len(found) > 1 or any("." in each for each, _ in weights) or len(set(term)) < len(term):
        return produce(operation, None, None)
    picked_dims = [places.get(letter) for letter in term]
    if is_stack_of_experts(weight) and dense_equation(term, before + after if dots else before) and not dots:
        unit = next(letter for letter in term[1:] if letter in places)
        return _every_expert(operation, weight, places[unit], term.index(unit) - len(term))
    own = [letter for letter in term if letter in places]
    rows = term.index(own[0]) - len(term) if len(own) == 1 else None
    return produce(operation, weight, [places[letter] for letter in own], rows=rows, picked_dims=picked_dims)


def dense_equation(weight: str, output: str) -> bool:
    """Whether a product with a stack of matrices keeps its matrices apart, and has one dimension of units.

    Args:
        weight: The letters of the stack.
        output: The letters of the result.

    >>> dense_equation("emh", "ech"), dense_equation("emh", "ch")
    (True, False)
    """
    return weight[0] in output and sum(letter in output for letter in weight[1:]) == 1


def _einsum_sum(operation: Operation, data: Sequence[tuple[str, Operand]], output: str) -> Origin:
    """Return the origin of a product without weights: the units of the one factor that keeps all of them."""
    shape, upstream = operation.outputs[0], operation.upstream
    states = {operand.origin.state for _, operand in data}
    if states <= {RAW}:
        return Origin.of(RAW)
    if ROWS in states:
        return Origin.of(ROWS, upstream)
    candidates = []
    for term, operand in data:
        units = operand.origin.units
        if units is None or operand.origin.made:
            continue
        by_letter = dict(zip(term, units.dims, strict=True))
        if all(letter in output for letter, dim in by_letter.items() if has_units(dim)):
            dims = tuple(
                dim if has_units(dim := by_letter.get(letter, ())) else positions((size,))[0]
                for letter, size in zip(output, shape, strict=True)
            )
            if all(math.prod(size for size, _ in dim) == size for dim, size in zip(dims, shape, strict=True)):
                candidates.append(Origin.of(UNITS, upstream, units=units._replace(dims=dims)))
    if len(candidates) == 1:
        return candidates[0]
    return Origin.of(LOST if candidates else ENDED, upstream) if upstream else Origin.of(RAW)


PRODUCTS: dict[Function, Rule] = {
    **table("matmul mm bmm mv __matmul__", _product_rule(0)),
    **table("__rmatmul__", _swapped),
    **table("addmm baddbmm addmv", _product_rule(1)),
    **table("addbmm", _summed_over_batch),
    **table("einsum", _einsum),
    **table("scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu", _attend),
    **table("inner", _inner),
    **table("tensordot", _tensordot),
    **table("dot vdot outer ger cdist pairwise_distance cosine_similarity", end),
}
