"""Tell whether a forward without gradients goes on with the tokens of the last one: generation without a cache.

Each such forward is given the tokens of the last one and one more; or, where the model takes no longer text, the same
number of tokens, of which the first is gone. A search with beams takes rows from others of the last ones. What the
forward is given besides, such as the text that is translated, is the same object each time.

Batches that are sorted by length grow by one token too. So the tokens themselves are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neuronscope.attach.dtensor import local_tensor

__all__ = ["Generation"]

#: How many rows of the tokens are compared with how many of the last ones, and how many of their last columns.
_ROWS, _LAST_ROWS, _COLUMNS = 8, 64, 64


class Generation:
    """Compares the tokens of each forward with those of the last one.

    >>> generation, model = Generation(), nn.Linear(1, 1)
    >>> [generation.goes_on(model, [torch.tensor([text])]) for text in ([1, 2], [1, 2, 3], [2, 3, 4], [7, 8, 9])]
    [False, True, True, False]
    >>> generation.goes_on(model, [torch.tensor([[4, 5, 6, 7]])])
    False
    """

    def __init__(self) -> None:
        self._module = 0  # of the last forward
        self._tokens: list[_Tokens] = []
        self._others: list[weakref.ref[Tensor]] = []
        self._grew = False

    def forget(self) -> None:
        """Forget the last forward, because another one has run that was given no tokens, or had gradients."""
        self._tokens, self._grew = [], False

    def goes_on(self, module: nn.Module, tensors: Sequence[Tensor]) -> bool:
        """Return whether a forward without gradients goes on with the last one, and remember its tokens.

        Tokens are read on the CPU alone. A device would have to be waited for: there, one more token goes on with the
        last ones, whatever they are, and the same number does if the last forward did.

        Args:
            module: The module that is called.
            tensors: What it is given. Tokens are integers ``(B, T)``; tensors of more dimensions are other inputs.
        """
        given = [each for each in tensors if each.dim() == 2 and not each.is_floating_point() and _is_dense(each)]
        others = [each for each in tensors if each.dim() > 2]
        same = self._module == id(module) and len(self._others) == len(others) and len(self._tokens) == len(given)
        same = same and all(old() is new for old, new in zip(self._others, others, strict=True))
        pairs = zip(self._tokens, given, strict=True) if same else ()
        changed = next(((old, new) for old, new in pairs if old.reference() is not new), None)
        self._grew = changed is not None and changed[0].go_on_in(changed[1], self._grew)
        self._module = id(module)
        self._tokens, self._others = [_Tokens(each) for each in given], [weakref.ref(each) for each in others]
        return self._grew


class _Tokens:
    """Tokens ``(B, T)`` that a forward was given.

    Args:
        tokens: The tokens.
    """

    __slots__ = ("last", "reference", "shape")

    def __init__(self, tokens: Tensor) -> None:
        local = local_tensor(tokens)
        self.reference = weakref.ref(tokens)
        self.shape = local.shape
        self.last = local[:_LAST_ROWS, -_COLUMNS:].clone() if local.is_cpu else None

    def go_on_in(self, tokens: Tensor, grew: bool) -> bool:
        """Whether other tokens are these and one more column, maybe without the first one.

        Args:
            tokens: The other tokens ``(B, T)``.
            grew: Whether these had gone on with those before them.
        """
        local = local_tensor(tokens)
        (rows, columns), before = local.shape, self.shape[1]
        if rows != self.shape[0] or columns not in (before, before + 1):
            return False
        if self.last is None or not local.is_cpu:
            return grew or columns > before
        if columns > before:
            return _are_among(local[:_ROWS, :-1], self.last)
        if columns < 2 or torch.equal(local[:_ROWS, -_COLUMNS:], self.last[:_ROWS]):
            return False
        return _are_among(local[:_ROWS, :-1], self.last[:, 1:] if columns <= _COLUMNS else self.last)


def _are_among(rows: Tensor, others: Tensor) -> bool:
    """Whether each row ends with one of some other rows, most often with the one at its own place.

    Args:
        rows: Tokens ``(R, T)``.
        others: Tokens ``(S, C)``, ``C ≤ T``.
    """
    ends = rows[:, rows.shape[1] - others.shape[1] :]
    if torch.equal(ends, others[: len(ends)]):
        return True
    return bool((ends[:, None] == others).all(-1).any(-1).all())


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested
