"""Follow which rows of a tensor are padding, where data picked, repeated or parted the rows of a batch.

A mask ``(B, T)`` fits every tensor that begins with those dimensions, or with both as one. An expert is given other
rows: some of them, or each of them several times. What happens to the rows of a batch happens to the mask too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuronscope.attach.compiling import traced_modules, write_call
from neuronscope.attach.operators import is_grouped
from neuronscope.attach.plain_sizes import plain_shape
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unit_rules.elementwise_rules import ELEMENTWISE

__all__ = ["RowMasks"]

_INDEX = spellings("__getitem__")
_SELECT = spellings("index_select")
_REPEAT = spellings("repeat_interleave")
_TILE = spellings("repeat")
_PARTS = spellings("split", "chunk", "tensor_split")
_JOINS = spellings("cat", "concat", "concatenate")
_PRODUCTS = spellings("matmul", "mm", "bmm", "__matmul__")
#: They give the rows of their input in their order, whatever they do to each.
_SAME_ROWS = (
    frozenset(ELEMENTWISE)
    | spellings("linear", "addmm", "baddbmm", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
    | spellings("contiguous", "clone", "detach", "to", "type_as", "softmax", "layer_norm", "rms_norm")
)
_EINSUM = spellings("einsum")
_CHANGES = _INDEX | _SELECT | _REPEAT | _TILE


class RowMasks:
    """Knows the masks of tensors whose rows are not those of the batch.

    Attributes:
        mask: The mask of the running forward, bool ``(B, T)``; ``None`` = all positions count.
        known: Whether any tensor of this forward has a mask of its own.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.known = False
        self._masks: TensorMap[Tensor] = TensorMap()  # bool ``(R, 1)``: which rows are kept

    def clear(self) -> None:
        """Forget all tensors, because a forward begins or a step is over."""
        if self.known:
            self._masks.clear()
            self.known = False

    def concern(self, function: Callable[..., Any]) -> bool:
        """Whether a call of a function may give a tensor a mask of its own, in a forward that has one.

        Args:
            function: The function.
        """
        return self.known or function in _CHANGES or function in _EINSUM

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return which rows of a tensor are kept, bool ``(R, 1)``, if it has a mask of its own; else ``None``.

        Args:
            tensor: The tensor, whose first dimensions have ``R`` indices.
        """
        return self._masks.get(tensor) if self.known else None

    def pass_on(self, x: Any, y: Any) -> None:
        """Note that a tensor has the rows of another one.

        Args:
            x: The other one.
            y: The tensor.
        """
        if self.known and isinstance(x, Tensor) and isinstance(y, Tensor) and y is not x:
            mask = self.of(x)
            if mask is not None:
                self._note(y, mask)

    def follow(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note the masks of the results of a torch function.

        Args:
            function: The function.
            args: The positional arguments of its call.
            kwargs: The keyword arguments.
            result: What it returned.
        """
        if function in _CHANGES:
            self._change(function, args, kwargs, result)
        elif function in _EINSUM:
            self._multiply(args, result)
        elif not self.known:
            return
        elif function in _PARTS:
            self._part(args, kwargs, result)
        elif function in _JOINS:
            self._join(args, kwargs, result)
        elif function in _PRODUCTS:
            self.pass_on(args[1] if self.of(args[0]) is None and args[1].dim() > 2 else args[0], result)
        elif function in _SAME_ROWS or is_grouped(function):
            found = next((each for each in args if isinstance(each, Tensor) and self.of(each) is not None), None)
            self.pass_on(found, result)

    def _note(self, tensor: Tensor, mask: Tensor | None) -> None:
        """Note the mask of a tensor, if its first dimensions have as many indices as that has rows."""
        if mask is not None and _begins_with(plain_shape(tensor), plain_shape(mask)[0]):
            self._masks.put(tensor, mask)
            self.known = True

    def _mask_of(self, x: Any) -> Tensor | None:
        """Return which rows of a tensor are kept, bool ``(R, 1)``, also of one that has those of the batch."""
        if not isinstance(x, Tensor) or x.dim() < 2:
            return None
        own = self.of(x)
        if own is not None:
            return own if plain_shape(own)[0] == plain_shape(x)[0] else None
        mask = self.mask
        return None if mask is None or plain_shape(x)[0] != math.prod(plain_shape(mask)) else _do(_as_rows, mask)

    def _change(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Do to the mask of a tensor what a call does to its rows."""
        mask = self._mask_of(args[0]) if args and isinstance(result, Tensor) else None
        if mask is None:
            return
        changed = None
        if function in _INDEX:
            index = _index_of_rows(args[1], cuts=self.of(args[0]) is not None)
            changed = None if index is None else _do(Tensor.__getitem__, mask, index)
        elif function in _TILE:
            times = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            if len(times) == args[0].dim() and all(type(each) is int and each == 1 for each in times[1:]):
                changed = _do(Tensor.repeat, mask, (times[0], 1))
        else:
            place, name = (1, 2) if function in _SELECT else (2, 1)
            dim = args[place] if len(args) > place else kwargs.get("dim")
            by = args[name] if len(args) > name else kwargs.get("index", kwargs.get("repeats"))
            if dim == 0 and function in _SELECT:
                changed = _do(Tensor.index_select, mask, 0, by)
            elif dim == 0:
                changed = _do(Tensor.repeat_interleave, mask, by, 0)
        self._note(result, changed)

    def _multiply(self, args: Sequence[Any], result: Any) -> None:
        """Note that the result of ``einsum`` has the rows of a factor, if the first dimension of both is the same."""
        if isinstance(args[0], str) and "->" in args[0]:
            terms, output = args[0].replace(" ", "").split("->")
            for term, factor in zip(terms.split(","), args[1:], strict=False):
                mask = self._mask_of(factor)
                if term[:1] == output[:1]:
                    self._note(result, mask)

    def _part(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        mask = self.of(args[0]) if args and isinstance(args[0], Tensor) else None
        if mask is None:
            return
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        before: list[Tensor] = []
        for part in result:
            if dim % args[0].dim():
                self._note(part, mask)
            elif plain_shape(mask)[0] == plain_shape(args[0])[0]:
                self._note(part, _do(_part_of, mask, part, *before))
                before.append(part)

    def _join(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        parts: Sequence[Any] = args[0] if args else ()
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        masks = [self._mask_of(part) for part in parts]
        found = [each for each in masks if each is not None]
        if dim == 0 and found and len(found) == len(masks):
            self._note(result, _do(_join, *found))
        elif dim and found:
            self.pass_on(parts[0], result)


def _do(function: Callable[..., Tensor], mask: Tensor, *args: Any) -> Tensor | None:
    """Do something to a mask; if ``torch.compile`` traces, the graph does it, if it can."""
    if traced_modules() is None:
        return function(mask, *args)
    return None if any(isinstance(each, (torch.SymInt, slice)) for each in args) else write_call(function, mask, *args)


def _as_rows(mask: Tensor) -> Tensor:
    return mask.reshape(-1, 1)


def _part_of(mask: Tensor, part: Tensor, *before: Tensor) -> Tensor:
    """Return the rows of a mask that belong to a part of a tensor, which lies behind others."""
    return mask.narrow(0, sum(each.shape[0] for each in before), part.shape[0])


def _join(*masks: Tensor) -> Tensor:
    return torch.cat(masks)


def _index_of_rows(index: Any, *, cuts: bool) -> Any:
    """Return the part of an index that picks rows; ``None`` if it does anything else to the first dimension.

    Args:
        index: The index.
        cuts: Whether a slice picks rows too.
    """
    first, *rest = index if isinstance(index, tuple) else (index,)
    if any(isinstance(each, Tensor) or not (each is None or each is Ellipsis or each == slice(None)) for each in rest):
        return None
    if isinstance(first, slice):
        return first if cuts else None
    return first if isinstance(first, Tensor) and first.dim() == 1 else None


def _begins_with(shape: Sequence[int], rows: int) -> bool:
    """Whether the first dimensions of a shape have so many indices, and at least one dimension follows.

    >>> _begins_with((2, 3, 5), 6), _begins_with((6, 5), 6), _begins_with((5, 6), 6)
    (True, True, False)
    """
    return any(math.prod(shape[:dims]) == rows for dims in range(1, len(shape)))
