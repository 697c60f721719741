"""Know which expert each row of a layer's output is of, without waiting for the data that says it.

In a graph that ``torch.compile`` traces the tensor that says it is computed in the graph, where the layer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "EveryExpert",
    "InGraph",
    "Joined",
    "JoinedRows",
    "Offsets",
    "Owners",
    "Picked",
    "RowOwners",
    "Weighed",
    "join_numbers",
    "join_owners",
    "owners_by_offsets",
    "owners_of_stack",
    "picked_owners",
    "used_rows",
]


#: The number of each row's expert, int64 ``(R,)``; one that is the number of experts says that the row is of none. Or,
#: where rows of several layers were joined, the number of each part's layer, and how many rows the part has.
Owners = Tensor | tuple[tuple[int, int], ...]


class RowOwners(Protocol):
    """Says which expert each row is of."""

    def owners(self) -> Owners | None:
        """Return which expert each row is of; ``None`` if that is not known any more."""


class Weighed(NamedTuple):
    """The index by which data picked weights from a stack.

    Attributes:
        picked_by: The index, of any shape.
        version: How often it had been changed in place by then.
        matrices: Number of matrices in the stack.
    """

    picked_by: Tensor
    version: int
    matrices: int

    @classmethod
    def of(cls, index: Tensor, matrices: int) -> Weighed:
        """Return an index as it is now.

        Args:
            index: The index.
            matrices: Number of matrices in the stack.
        """
        return cls(index, _version(index), matrices)


class Picked(NamedTuple):
    """Rows whose weights data picked.

    Attributes:
        weighed: The index that picked them.
    """

    weighed: Weighed

    def owners(self) -> Owners | None:
        """Return the number of each row's expert; ``None`` if the index was changed in place."""
        index, version, matrices = self.weighed
        return picked_owners(index, matrices) if _version(index) == version else None


class Offsets(NamedTuple):
    """Rows that are sorted by experts.

    Attributes:
        ends: Where the rows of each expert end, integers ``(E,)``.
        version: How often they had been changed in place by then.
        rows: Number of rows.
    """

    ends: Tensor
    version: int
    rows: int

    @classmethod
    def of(cls, ends: Tensor, rows: int) -> Offsets:
        """Return offsets as they are now.

        Args:
            ends: Where the rows of each expert end.
            rows: Number of rows.
        """
        return cls(ends, _version(ends), rows)

    def owners(self) -> Owners | None:
        """Return the number of each row's expert; ``None`` if the offsets were changed in place.

        >>> Offsets.of(torch.tensor([2, 2, 3]), 4).owners().tolist()
        [0, 0, 2, 3]
        """
        return owners_by_offsets(self.ends, self.rows) if _version(self.ends) == self.version else None


class EveryExpert(NamedTuple):
    """Rows of a product with all matrices of a stack, of which each expert has its own.

    Attributes:
        used: Which rows the experts were given something in; see :func:`used_rows`.
        dim: The dimension of that which indexes the experts.
        experts: Number of experts.
    """

    used: Tensor
    dim: int
    experts: int

    def owners(self) -> Owners | None:
        """Return the number of each row's expert, or the number of experts for a row of zeros.

        >>> EveryExpert(torch.tensor([[True, False], [True, True]]), 0, 2).owners().tolist()
        [0, 2, 1, 1]
        """
        return owners_of_stack(*self)


class Joined(NamedTuple):
    """Rows of several layers that were joined.

    Attributes:
        parts: The number of the layer of each part, and the number of its rows.
    """

    parts: tuple[tuple[int, int], ...]

    def owners(self) -> Owners | None:
        """Return the parts."""
        return self.parts


class JoinedRows(NamedTuple):
    """Rows that were joined, of parts that are of one expert each, which data says.

    Attributes:
        parts: What says the expert of each part, and the number of its rows.
    """

    parts: tuple[tuple[RowOwners, int], ...]

    def owners(self) -> Owners | None:
        """Return the number of each row's expert; ``None`` if that of a part is not known any more.

        >>> two, none = (Picked(Weighed.of(torch.tensor(number), 3)) for number in (2, 0))
        >>> JoinedRows(((two, 2), (none, 1))).owners().tolist()
        [2, 2, 0]
        """
        found = []
        for owner, rows in self.parts:
            number = owner.owners()
            if not isinstance(number, Tensor):
                return None
            found.append(number.expand(rows))
        return torch.cat(found)


class InGraph(NamedTuple):
    """Rows of a graph that is traced.

    Attributes:
        numbers: The fake tensor of the number of each row's expert.
    """

    numbers: Tensor


def picked_owners(index: Tensor, matrices: int) -> Tensor:
    """Return the number of each row's expert, int64 ``(R,)``.

    Args:
        index: The index by which data picked the matrix of each row, of any shape.
        matrices: Number of matrices in the stack.

    >>> picked_owners(torch.tensor([[0, -1], [2, 1]]), 3).tolist()
    [0, 2, 2, 1]
    """
    return index.reshape(-1).long() % matrices


def owners_by_offsets(ends: Tensor, rows: int | Tensor) -> Tensor:
    """Return the number of each row's expert, int64 ``(R,)``, of rows that are sorted by experts.

    Args:
        ends: Where the rows of each expert end, integers ``(E,)``.
        rows: Number of rows, or a tensor that has so many.
    """
    count = rows.shape[0] if isinstance(rows, Tensor) else rows
    return torch.searchsorted(ends, torch.arange(count, device=ends.device, dtype=ends.dtype), right=True)


def used_rows(data: Tensor, given: str, letters: str, expert: str) -> Tensor:
    """Return the rows in which experts were given something: a mixture with a fixed number of them fills up with zeros.

    Args:
        data: What a product with a stack of matrices was given.
        given: A letter for each of its dimensions, as in ``einsum``.
        letters: Those of the dimensions of the rows.
        expert: That of the stack's first dimension. If the data has it not, all experts are given the same rows.

    Returns:
        bool, with a dimension for each letter, of size 1 if the data has it not.

    >>> used_rows(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "eh", "te", "e").tolist()
    [[True, False]]
    """
    summed = [dim for dim, letter in enumerate(given) if letter not in letters]
    used = data.detach().ne(0)
    used = used.any(dim=summed) if summed else used
    if expert not in given:
        used = torch.ones_like(used)
    kept = [letter for letter in given if letter in letters]
    used = used.permute([kept.index(letter) for letter in letters if letter in kept])
    for dim, letter in enumerate(letters):
        if letter not in kept:
            used = used.unsqueeze(dim)
    return used


def owners_of_stack(used: Tensor, dim: int, count: int) -> Tensor:
    """Return the number of each row's expert, int64 ``(R,)``, of a product with all matrices of a stack.

    Args:
        used: As :func:`used_rows` gives it.
        dim: The dimension of it that indexes the experts.
        count: Number of experts, which also stands for a row that is of none.
    """
    numbers = torch.arange(count, device=used.device)
    numbers = numbers.reshape([count if each == dim else 1 for each in range(used.dim())])
    return torch.where(used, numbers, count).reshape(-1)


def join_numbers(numbers: Sequence[int], dim: int, *parts: Tensor) -> Tensor:
    """Return the number of each row's layer, int64 ``(R,)``, of rows of several layers that were joined.

    Args:
        numbers: The number of the layer of each part.
        dim: The dimension along which they were joined.
        parts: The parts.

    >>> join_numbers([1, 0], 0, torch.ones(2, 4), torch.ones(1, 4)).tolist()
    [1, 1, 0]
    """
    each = zip(numbers, parts, strict=True)
    return torch.cat([torch.full((part.shape[dim],), number, device=part.device) for number, part in each])


def join_owners(dim: int, *tensors: Tensor) -> Tensor:
    """Return the number of each row's expert, int64 ``(R,)``, of rows that were joined and are of one expert a part.

    Args:
        dim: The dimension along which they were joined.
        tensors: The parts, and then the number of the expert of each, int64 ``(1,)``.
    """
    half = len(tensors) // 2
    each = zip(tensors[half:], tensors[:half], strict=True)
    return torch.cat([owner.expand(part.shape[dim]) for owner, part in each])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
