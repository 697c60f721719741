"""Rules of the layers: linear, convolutions, embeddings, recurrent layers, attention and normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from neuronscope.attach.origins import (
    CONSTANT,
    ENDED,
    LOST,
    ROWS,
    UNITS,
    UNKNOWN,
    WEIGHT,
    Cut,
    Operand,
    Origin,
    PickedMatrices,
    combine,
)
from neuronscope.attach.torch_functions import aten, spellings
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, Shape, lose, table
from neuronscope.attach.units import Units, experts_of, place, place_rows

__all__ = ["GROUPED", "LAYERS", "cut_of", "grouped_offsets", "is_weight", "produce", "rows_of_experts"]


def is_weight(value: object) -> bool:
    """Whether an argument is a weight."""
    return isinstance(value, Operand) and value.origin.state == WEIGHT


def produce(
    operation: Operation,
    weight: Operand | None,
    unit_dims: Sequence[int] | None,
    index: int = 0,
    *,
    rows: int | None = None,
    picked_dims: Sequence[int | None] = (),
) -> Origin:
    """Return the origin of a layer's output.

    A weight that is used in both directions, as an autoencoder's decoder uses the encoder's, has two layers: the second
    direction is called ``encoder(transposed)``. Of a module such as ``nn.Linear`` the first direction is its own, and
    otherwise the one that is used first.

    Args:
        operation: The call of the layer.
        weight: The layer's weight.
        unit_dims: The dimensions of the output that index its units, the outermost first; ``None`` if not known.
        index: Index of the output.
        rows: The dimension of the weight that indexes its units, if there is one.
        picked_dims: The dimension of the output that each of the weight's first dimensions indexes, if data picked it
            from a stack; ``None`` for one that the output does not have.
    """
    shape = operation.outputs[index]
    upstream = operation.upstream | 1 << operation.call
    if weight is None or unit_dims is None:
        return Origin.of(LOST, upstream)
    if weight.origin.picked:
        return _produce_rows(operation, weight, unit_dims, shape, rows, picked_dims)
    width = math.prod(shape[dim] for dim in unit_dims)
    layer, cut = cut_of(weight, rows, width)
    if _is_other_side(operation, weight, rows):
        layer = f"{layer}(transposed)"
    run = (layer, 0, width, 1) if cut is None else (layer, *cut)
    units = Units((operation.call,), layer, (run,), 0, place(shape, unit_dims), cut is not None)
    begins = all(each.origin.state in (WEIGHT, CONSTANT) for each in operation.tensors)
    return Origin.of(UNITS, upstream, units=units, layer=layer, begins=begins)


def _is_other_side(operation: Operation, weight: Operand, rows: int | None) -> bool:
    """Whether a call takes another dimension of a weight for units than its module, or the layer's first call, does.

    Args:
        operation: The call.
        weight: The weight.
        rows: The dimension of it that indexes units, if there is one.
    """
    rank = len(weight.shape)
    if rows is None or rank < 2 or operation.sides is None or not weight.origin.layer:
        return False
    side = rows % rank - rank
    if weight.origin.turned and side >= -2:
        side = -3 - side
    return operation.sides.setdefault(weight.origin.layer, side) != side


def _produce_rows(
    operation: Operation,
    weight: Operand,
    unit_dims: Sequence[int],
    shape: Shape,
    rows: int | None,
    picked_dims: Sequence[int | None],
) -> Origin:
    """Return the origin of a layer's output if data picked its weights from a stack; see :func:`produce`."""
    upstream, pick = operation.upstream | 1 << operation.call, weight.origin.picked
    unknown = Origin.of(ROWS, upstream, layer=weight.origin.as_layer().layer)
    if not isinstance(pick, PickedMatrices) or len(picked_dims) < pick.dims:
        return unknown
    row_dims = [dim for dim, size in zip(picked_dims[: pick.dims], weight.shape, strict=False) if size > 1]
    if None in row_dims:
        return unknown
    kept = [dim for dim in row_dims if dim is not None]
    own = [dim for dim in unit_dims if dim not in kept]
    width = math.prod(shape[dim] for dim in own)
    layer, cut = cut_of(weight, rows, width)
    if not layer.startswith(pick.layer):
        return unknown
    part = layer[len(pick.layer) :]
    layers = tuple([f"{pick.layer}.{number}{part}" for number in range(pick.matrices)])
    return rows_of_experts(operation, layer, layers, cut, shape, own, kept)


def rows_of_experts(
    operation: Operation,
    layer: str,
    layers: tuple[str, ...],
    cut: Cut | None,
    shape: Shape,
    unit_dims: Sequence[int],
    row_dims: Sequence[int],
) -> Origin:
    """Return the origin of a layer's output of which each row has the units of one expert.

    Args:
        operation: The call of the layer.
        layer: The name that all experts have together.
        layers: The layer of each expert.
        cut: Which of an expert's units a part of its weight has; ``None`` for all.
        shape: Shape of the output.
        unit_dims: The dimensions that index the units, the outermost first, ≥ 0.
        row_dims: The dimensions that index the rows, likewise.
    """
    width = math.prod(shape[dim] for dim in unit_dims)
    run = (layer, 0, width, 1) if cut is None else (layer, *cut)
    dims, count = place_rows(shape, unit_dims, row_dims), math.prod(shape[dim] for dim in row_dims)
    units = Units((operation.call,), layer, (run,), 0, dims, cut is not None, experts_of(layers), count)
    return Origin.of(UNITS, operation.upstream | 1 << operation.call, units=units, layer=layer)


def cut_of(weight: Operand, rows: int | None, width: int) -> tuple[str, Cut | None]:
    """Return the layer of a weight, and which of the layer's units a part of the weight has; ``None`` for all.

    Args:
        weight: The weight. What is left out of its inputs leaves its units as they are.
        rows: The dimension that indexes its units, if there is one; if it is negative, those before the last two index
            the matrices of a stack.
        width: Number of units.
    """
    origin = weight.origin
    if not any(origin.cuts):
        return origin.layer, None
    cut = None if rows is None else origin.cuts[rows]
    stack = origin.cuts[:-2] if rows is not None and rows < 0 else ()
    if rows is None or any(stack) or (cut is not None and len(range(*cut)) != width):
        return origin.as_layer().layer, None
    return origin.layer, cut


def _is_computed(weight: Operand) -> bool:
    """Whether a weight was computed from data, so that its layer is none of the network's own."""
    return weight.origin.state not in (WEIGHT, CONSTANT, UNKNOWN)


def _layer_rule(slot: int, name: str, from_right: int, rows: int = 0) -> Callable[[Operation], Sequence[Origin]]:
    """Return the rule of a layer whose units lie on a fixed dimension of its first output.

    Other outputs are no units.

    Args:
        slot: Place of the weight among the arguments.
        name: Name of the weight.
        from_right: Dimension of the units, counted from the right (1 = last).
        rows: The dimension of the weight that indexes its units.
    """

    def rule(operation: Operation) -> Sequence[Origin]:
        weight = operation.argument(slot, name)
        if not isinstance(weight, Operand):
            return [lose(operation)] * len(operation.outputs)
        rest = len(operation.outputs) - 1
        if _is_computed(weight):
            return [Origin.of(ENDED, operation.upstream)] * (1 + rest)
        dim = len(operation.outputs[0]) - from_right
        first = produce(operation, weight, (dim,) if dim >= 0 else None, rows=rows)
        return [first, *[Origin.of(ENDED, first.upstream)] * rest]

    return rule


_COLUMNS = _layer_rule(1, "weight", 1)


def _embedding_rule(slot: int) -> Callable[[Operation], Sequence[Origin]]:
    """Return the rule of an embedding; if layers say which of its rows are picked, these may be weights of experts.

    Args:
        slot: Place of the weight among the arguments.
    """
    rule = _layer_rule(slot, "weight", 1, 1)

    def embed(operation: Operation) -> Sequence[Origin]:
        found = rule(operation)
        by_layers = operation.upstream and found[0].state == UNITS
        return [found[0].but(picked=True), *found[1:]] if by_layers else found

    return embed


def _linear(operation: Operation) -> Sequence[Origin]:
    """Say what ``linear`` gives; if its first argument is the weight, as in ``linear(W, x)``, rows are the units.

    A weight that is a vector gives one unit, and no dimension for it.
    """
    first, second = operation.argument(0, "input"), operation.argument(1, "weight")
    if is_weight(first) and isinstance(second, Operand) and _is_computed(second) and len(first.shape) > 1:
        return [produce(operation, first, (len(first.shape) - 2,), rows=0)]
    if is_weight(second) and isinstance(first, Operand) and len(operation.outputs[0]) < len(first.shape):
        return [produce(operation, second, ())]
    return _COLUMNS(operation)


def _recurrent(operation: Operation) -> Sequence[Origin]:
    """Say what a recurrent layer returns: its output has units; its last states do too if there is one of them."""
    weight = next((each for each in operation.tensors if is_weight(each)), None)
    found = []
    for index, shape in enumerate(operation.outputs):
        one = index == 0 or shape[0] == 1
        known = produce(operation, weight, (len(shape) - 1,), index)
        found.append(known if one else known.without_units())
    return found


def _recurrent_cell(operation: Operation) -> Sequence[Origin]:
    weight = operation.argument(2, "w_ih")
    given = weight if isinstance(weight, Operand) else None
    return [produce(operation, given, (len(shape) - 1,), index) for index, shape in enumerate(operation.outputs)]


def grouped_offsets(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return where the rows of each expert end, of the arguments of a grouped product; ``None`` if they do not say it.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
    """
    return args[2] if len(args) > 2 else kwargs.get("offs")


def _grouped(operation: Operation) -> Origin:
    """Say what a grouped product gives: of a stack of weights, each row has the units of the expert that it is of."""
    weight, shape = operation.argument(1, "mat_b", "mat2", "weight"), operation.outputs[0]
    if not is_weight(weight):
        return lose(operation)
    layer, cut = cut_of(weight, -1, shape[-1])
    if weight.origin.picked or len(weight.shape) != 3 or len(shape) != 2:
        return Origin.of(ROWS, operation.upstream | 1 << operation.call, layer=layer)
    layers = tuple([f"{layer}.{number}" for number in range(weight.shape[0])])
    return rows_of_experts(operation, layer, layers, cut, shape, (1,), (0,))


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
        if not isinstance(weight, Operand) or _is_computed(weight) or is_weight(operation.first):
            return combine([operation.first], shape)  # a weight that is standardised stays a weight
        if unit_place < 0:
            return produce(operation, weight, tuple(range(len(shape) - len(weight.shape), len(shape))))
        return produce(operation, weight, (min(unit_place, len(shape) - 1),))

    return rule


def _in_torch(names: str, rule: Rule) -> dict[Function, Rule]:
    """Return a rule by each function of ``torch`` and operator of ``torch.ops.aten`` that it is for."""
    return dict.fromkeys([*(getattr(torch, name) for name in names.split()), *aten(*names.split())], rule)


def _convolution(operation: Operation) -> Origin:
    transposed = operation.argument(6, "transposed", default=False)
    return produce(operation, operation.argument(1, "weight"), (1,), rows=1 if transposed else 0)


#: Products of matrices whose rows belong to the experts of a stack of weights, by the offsets at which each one's end.
GROUPED = spellings("grouped_mm", "_grouped_mm")
LAYERS: dict[Function, Rule] = {
    **table("conv1d", _layer_rule(1, "weight", 2)),
    **table("conv2d", _layer_rule(1, "weight", 3)),
    **table("conv3d", _layer_rule(1, "weight", 4)),
    **table("conv_transpose1d", _layer_rule(1, "weight", 2, 1)),
    **table("conv_transpose2d", _layer_rule(1, "weight", 3, 1)),
    **table("conv_transpose3d", _layer_rule(1, "weight", 4, 1)),
    **table("linear", _linear),
    **table("bilinear", _layer_rule(2, "weight", 1)),
    **table("embedding embedding_bag", _embedding_rule(1)),
    # In these, the weight comes before the indices.
    **_in_torch("embedding embedding_bag", _embedding_rule(0)),
    **table("lstm gru rnn_tanh rnn_relu", _recurrent),
    **table("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", _recurrent_cell),
    **dict.fromkeys(GROUPED, _grouped),
    **table("multi_head_attention_forward", _layer_rule(11, "out_proj_weight", 1)),
    **table("_native_multi_head_attention", _layer_rule(7, "proj_weight", 1)),
    **table("batch_norm instance_norm", _norm_rule(3, 1, 1)),
    **_in_torch("batch_norm instance_norm", _norm_rule(1, 1, 3)),
    **table("group_norm", _norm_rule(2, 1)),
    **table("layer_norm rms_norm native_layer_norm", _norm_rule(2, -1)),
    # What graphs of torch.export call after `run_decompositions`.
    **table("convolution", _convolution),
    **table("native_group_norm", _norm_rule(1, 1)),
    **table(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
        "_native_batch_norm_legit_no_training _batch_norm_with_update",
        _norm_rule(1, 1, 3),
    ),
}
