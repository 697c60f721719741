"""Know which expert each row of a layer's output is of, without waiting for the data that says it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["EveryExpert", "Joined", "JoinedRows", "Offsets", "Owners", "Picked", "RowOwners", "Weighed"]


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
        return index.reshape(-1).long() % matrices if _version(index) == version else None


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
        if _version(self.ends) != self.version:
            return None
        rows = torch.arange(self.rows, device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, rows, right=True)


class EveryExpert(NamedTuple):
    """Rows of a product with all matrices of a stack, of which each expert has its own.

    Attributes:
        used: Which rows the experts were given something in, bool, of the shape of the rows but for dimensions that are
            left out or of size 1. A mixture with a fixed number of rows for each expert fills up with zeros.
        shape: The shape of the rows.
        dim: The dimension of that which indexes the experts.
    """

    used: Tensor
    shape: tuple[int, ...]
    dim: int

    def owners(self) -> Owners | None:
        """Return the number of each row's expert, or the number of experts for a row of zeros.

        >>> EveryExpert(torch.tensor([[True, False], [True, True]]), (2, 2), 0).owners().tolist()
        [0, 2, 1, 1]
        """
        count = self.shape[self.dim]
        numbers = torch.arange(count, device=self.used.device)
        numbers = numbers.reshape([count if dim == self.dim else 1 for dim in range(len(self.shape))])
        return torch.where(self.used, numbers, count).expand(self.shape).reshape(-1)


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


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
