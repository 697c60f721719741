"""Tell whether a forward without gradients goes on with the tokens of the last one: generation without a cache.

Each such forward is given the tokens of the last one and one more; or, where the model takes no longer text, the same
number of tokens, of which the first is gone. What the forward is given besides, such as the text that is translated,
is the same object each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neuronscope.attach.dtensor import local_tensor

__all__ = ["Generation"]

#: How many rows and columns of the last tokens are kept, to see whether they have moved by one column.
_ROWS, _COLUMNS = 8, 64


class Generation:
    """Compares the tokens of each forward with those of the last one.

    >>> generation, model = Generation(), nn.Linear(1, 1)
    >>> [generation.goes_on(model, [torch.tensor([text])]) for text in ([1, 2], [1, 2, 3], [2, 3, 4], [7, 8, 9])]
    [False, True, True, False]
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

        Whether tokens have moved is read on the CPU alone. On a device, which would have to be waited for, they have if
        the forwards before gave one more each.

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

    __slots__ = ("first", "reference", "shape")

    def __init__(self, tokens: Tensor) -> None:
        local = local_tensor(tokens)
        self.reference = weakref.ref(tokens)
        self.shape = local.shape
        self.first = local[:_ROWS, :_COLUMNS].clone() if local.is_cpu else None

    def go_on_in(self, tokens: Tensor, grew: bool) -> bool:
        """Whether other tokens are these and one more column, maybe without the first one.

        Args:
            tokens: The other tokens ``(B, T)``.
            grew: Whether these had gone on with those before them.
        """
        local = local_tensor(tokens)
        if local.shape != self.shape:
            return local.shape == (self.shape[0], self.shape[1] + 1)
        if self.first is None or not local.is_cpu:
            return grew
        now, columns = local[:_ROWS, :_COLUMNS], self.first.shape[1] - 1
        moved = columns > 0 and torch.equal(now[:, :columns], self.first[:, 1:])
        return moved and not torch.equal(now, self.first)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested
