"""Rules of products of matrices: with a weight they are layers, without one they sum over a dimension."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from neuronscope.attach.origins import CONSTANT, ENDED, LOST, RAW, ROWS, UNITS, WEIGHT, Operand, Origin, combine
from neuronscope.attach.unit_rules.layer_rules import is_weight, produce
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, end, integers, lose, table, tensors_in
from neuronscope.attach.units import has_units, positions, resized
from neuronscope.count.neuron_layout import Dims

__all__ = ["PRODUCTS"]


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
    return _sum_of_right(operation, left, right) or _sum_of_left(operation, left, right) or Origin.of(ENDED, upstream)


def _layer_from_right(operation: Operation, data: Operand, weight: Operand) -> Origin:
    """Return the origin of ``data @ weight``: the columns of the weight are units, of each matrix of a stack."""
    rank = len(operation.outputs[0])
    if len(weight.shape) == 1:
        return produce(operation, weight, ())
    stack = _stack(weight, rank - (2 if len(data.shape) > 1 else 1))
    return produce(operation, weight, (*stack, rank - 1), rows=-1)


def _layer_from_left(operation: Operation, weight: Operand, data: Operand) -> Origin:
    """Return the origin of ``weight @ data``: the rows of the weight are units, of each matrix of a stack."""
    rank = len(operation.outputs[0])
    if len(weight.shape) == 1:
        return produce(operation, weight, ())
    rows = rank - (2 if len(data.shape) > 1 else 1)
    return produce(operation, weight, (*_stack(weight, rows), rows), rows=-2)


def _stack(weight: Operand, before: int) -> list[int]:
    """Return the dimensions of a product that index the matrices of a stack of weights.

    Args:
        weight: The weights ``(…, rows, columns)``.
        before: Number of dimensions of the product before those of the matrices.
    """
    sizes = weight.shape[:-2]
    return [before - len(sizes) + place for place, size in enumerate(sizes) if size > 1]


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
    return produce(operation, weight, [places[letter] for letter in term if letter in places])


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
        if units is None:
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
