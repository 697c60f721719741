"""Follow which expert each row of a tensor is of, through the calls that pick weights, multiply and join."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from neuronscope.attach.compiling import is_in_graph, traced_modules, write_call
from neuronscope.attach.operators import grouped_offsets, is_grouped
from neuronscope.attach.origins import CONSTANT, WEIGHT, Origin, PickedMatrices
from neuronscope.attach.row_owners import (
    EveryExpert,
    InGraph,
    Joined,
    JoinedRows,
    Offsets,
    Owners,
    Picked,
    RowOwners,
    Weighed,
    join_numbers,
    join_owners,
    owners_by_offsets,
    owners_of_stack,
    picked_owners,
    used_rows,
)
from neuronscope.attach.tensor_map import TensorMap, nested_tensors
from neuronscope.attach.units import Units, has_rows

__all__ = ["ExpertRows"]

Rows = RowOwners | InGraph
#: A layer and the numbers of its calls, which alone may be those that other calls had in another forward.
Place = tuple[str, tuple[int, ...]]


class ExpertRows:
    """Knows which expert each row of the layers of experts is of.

    Args:
        origin_of: Returns what a tensor is.

    Attributes:
        noted: Whether any rows may be known.
        last_owners: The number of the expert of each row that the last call of eager code gave, int64 ``(R,)``;
            ``None`` as long as no graph uses it.
    """

    def __init__(self, origin_of: Callable[[Tensor], Origin]) -> None:
        self.noted = False
        self.last_owners: Owners | None = None
        self._last: Place | None = None  # of the call that gave them
        self._origin_of = origin_of
        self._gives_owners = False  # whether a graph uses `last_owners`
        self._weighed: TensorMap[Weighed | InGraph] = TensorMap()  # of weights that data picked
        self._rows: dict[Place, Rows] = {}  # of the calls of layers of experts, and of joined ones

    def clear(self) -> None:
        """Forget all rows, because a forward begins or a step is over."""
        self.noted = False
        self._last = self.last_owners = None
        self._weighed.clear()
        self._rows.clear()

    def note(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
        origin: Origin,
        is_layer: bool,
    ) -> None:
        """Note what says which experts the rows of an output are of, or which weights it is.

        Args:
            function: The function.
            args: The positional arguments of its call.
            kwargs: The keyword arguments.
            output: What it returned.
            origin: What that is.
            is_layer: Whether it is the call of a layer.
        """
        self.noted = True
        values = (*args, *kwargs.values())
        tensors = [*nested_tensors(values)]
        weighed = next((found for each in tensors if (found := self._weighed.get(each)) is not None), None)
        if isinstance(origin.picked, PickedMatrices):
            if weighed is None and len(tensors) > 1:
                weighed = _weighed_by(tensors[1], origin.picked.matrices)
            if weighed is not None:
                self._weighed.put(output, weighed)
            return
        units = origin.units
        rows: Rows | None = None
        if units is None or units.experts is None:
            return
        if is_grouped(function):
            offsets = grouped_offsets(args, kwargs)
            if isinstance(offsets, Tensor):
                rows = _rows_by_offsets(offsets, output, units)
        elif not is_layer:
            rows = self._joined_rows(tensors, output, units)
        elif weighed is not None:
            rows = weighed if isinstance(weighed, InGraph) else Picked(weighed)
        else:
            if function is Tensor.__rmatmul__:
                tensors.reverse()
            rows = self._rows_of_every_expert(values, tensors, output)
        if rows is not None:
            self._rows[_place(units)] = rows
            if not isinstance(rows, InGraph):
                self._last = _place(units)
                self.last_owners = rows.owners() if self._gives_owners else None

    def _rows_of_every_expert(self, values: tuple[Any, ...], tensors: Sequence[Tensor], output: Tensor) -> Rows | None:
        """Return what says which rows of a product with a whole stack are of which expert.

        Args:
            values: All arguments of the product.
            tensors: The tensors among them.
            output: What it returned.
        """
        weights = [each for each in tensors if self._origin_of(each).state == WEIGHT]
        data = [each for each in tensors if self._origin_of(each).state not in (WEIGHT, CONSTANT)]
        if len(weights) != 1 or len(data) != 1:
            return None
        equation = values[0] if isinstance(values[0], str) else ""
        if not equation:
            is_left = data[0] is tensors[-2]  # x @ W
            equation = _matrix_equation(data[0].dim(), output.dim(), is_left=is_left)
        terms, _, result = equation.replace(" ", "").partition("->")
        stack, given = terms.split(",")
        if next(each for each in tensors if each is weights[0] or each is data[0]) is data[0]:
            stack, given = given, stack
        letters = "".join([letter for letter in result if letter not in stack[1:]])
        dim, count = letters.index(stack[0]), weights[0].shape[0]
        if traced_modules() is None:
            return EveryExpert(used_rows(data[0], given, letters, stack[0]), dim, count)
        used = write_call(used_rows, data[0], given, letters, stack[0])
        return None if used is None else _in_graph(write_call(owners_of_stack, used, dim, count))

    def _joined_rows(self, tensors: Sequence[Tensor], output: Tensor, units: Units) -> Rows | None:
        """Return what says which expert each part of a concatenation is of.

        Args:
            tensors: The parts.
            output: The concatenation.
            units: Its units.
        """
        dim = next(place for place, each in enumerate(units.dims) if has_rows(each))
        own = [self._origin_of(each).units for each in tensors]
        if traced_modules() is not None:
            return self._joined_rows_in_graph(tensors, own, dim if output.dim() == tensors[0].dim() else None, units)
        sizes = [each.shape[dim] if each.dim() == output.dim() else 1 for each in tensors]
        parts = [(each, size) for each, size in zip(own, sizes, strict=True) if each is not None and size]
        if units.experts is not None and units.experts.joined:
            numbers = {layer: number for number, layer in enumerate(units.experts.layers)}
            return Joined(tuple([(numbers[each.layer], size) for each, size in parts]))
        rows = [(self._rows.get(_place(each)), size) for each, size in parts]
        known = [(each, size) for each, size in rows if each is not None and not isinstance(each, InGraph)]
        return JoinedRows(tuple(known)) if len(known) == len(parts) else None

    def _joined_rows_in_graph(
        self, tensors: Sequence[Tensor], own: Sequence[Units | None], dim: int | None, units: Units
    ) -> InGraph | None:
        """Do what :meth:`_joined_rows` does in a graph that is traced.

        Args:
            tensors: The parts.
            own: Their units.
            dim: The dimension along which they were joined; ``None`` if they were stacked.
            units: The units of the concatenation.
        """
        known = [each for each in own if each is not None]
        if dim is None or len(known) < len(own) or units.experts is None:
            return None
        if units.experts.joined:
            numbers = {layer: number for number, layer in enumerate(units.experts.layers)}
            return _in_graph(write_call(join_numbers, [numbers[each.layer] for each in known], dim, *tensors))
        rows = [self._rows.get(_place(each)) for each in known]
        owners = [each.numbers for each in rows if isinstance(each, InGraph)]
        return _in_graph(write_call(join_owners, dim, *tensors, *owners)) if len(owners) == len(rows) else None

    def are_last(self, units: Units) -> bool:
        """Whether units are of the last call of eager code, so that ``last_owners`` says which expert each row is of.

        Args:
            units: The units, which have experts.
        """
        return self._last == _place(units)

    def owners(self, units: Units) -> Owners | None:
        """Return which expert each row of a tensor is of. It waits for no device.

        It is not known, and ``None``, where the rows were made in another graph, or before the graph that is traced by
        a call that was not the last one of eager code.

        Args:
            units: The units of the tensor, which have experts.
        """
        found = self._rows.get(_place(units))
        if traced_modules() is None:
            return None if found is None or isinstance(found, InGraph) else found.owners()
        if isinstance(found, InGraph):
            return found.numbers if is_in_graph(found.numbers) else None
        if found is None or not self.are_last(units):
            return None
        self._gives_owners = True
        self.last_owners = found.owners() if self.last_owners is None else self.last_owners
        return self.last_owners if isinstance(self.last_owners, Tensor) else None


def _weighed_by(index: Tensor, matrices: int) -> Weighed | InGraph | None:
    """Return what says which matrices of a stack an index picks.

    Args:
        index: The index.
        matrices: Number of matrices in the stack.
    """
    if traced_modules() is None:
        return Weighed.of(index, matrices)
    return _in_graph(write_call(picked_owners, index, matrices))


def _rows_by_offsets(ends: Tensor, output: Tensor, units: Units) -> Rows | None:
    """Return what says which rows of a grouped product are of which expert.

    Args:
        ends: Where the rows of each expert end.
        output: What the product returned.
        units: Its units.
    """
    if traced_modules() is None:
        return Offsets.of(ends, units.rows)
    return _in_graph(write_call(owners_by_offsets, ends, output))


def _place(units: Units) -> Place:
    return units.layer, units.call


def _in_graph(numbers: Tensor | None) -> InGraph | None:
    return None if numbers is None else InGraph(numbers)


def _matrix_equation(rank: int, result: int, *, is_left: bool) -> str:
    """Return the product of a tensor and a stack of matrices ``(E, …, …)`` as ``einsum`` writes it.

    Args:
        rank: Number of dimensions of the tensor.
        result: Number of dimensions of the product.
        is_left: Whether the tensor is the left factor.

    >>> _matrix_equation(3, 3, is_left=True), _matrix_equation(3, 3, is_left=False)
    ('etk,ekf->etf', 'efk,ekt->eft')
    """
    outer = "abcd"[: result - 3] + "e"
    if is_left:
        return f"{(outer + 'tk')[-rank:]},ekf->{outer}tf"
    return f"efk,{(outer + 'kt')[-rank:]}->{outer}ft"
