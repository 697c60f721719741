"""Run a part of a forward again: put another tensor in the place of one that was made, and stop at another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from neuronscope.attach.examples import all_tensors
from neuronscope.attach.tensor_map import nested_tensors
from neuronscope.linear.affine_flow import Affine
from neuronscope.running import map_tensors

__all__ = ["Replayed", "replay"]

#: Gives what stands in the place of a source: called with the source, it returns a tensor of its shape.
Replace = Callable[[Tensor], Tensor]


class Replayed(NamedTuple):
    """What a part of a forward gave."""

    source: Tensor  # what stood in the source's place
    result: Tensor  # what the map gave
    #: The arguments of the call in which attention mixed positions, by position and by name.
    mixing: tuple[tuple[Any, ...], Mapping[str, Any]]
    heads: int  # number of heads of the values that attention mixes; 1 if they are not apart


def replay(
    run: Callable[[Any], Any], inputs: Any, affine: Affine, replace: Replace, head: int | None = None
) -> Replayed:
    """Run a model up to the end of a map, with gradients.

    Args:
        run: Runs the model on inputs.
        inputs: The inputs, nested.
        affine: The map.
        replace: See :data:`Replace`.
        head: If given, attention's mixture of positions is left out, and of its values only this head is kept.

    Raises:
        RuntimeError: The model did not come from the source to the end of the map.
    """
    piece = _Piece(affine, replace, head)
    if affine.source.call == -1:
        inputs = piece.with_source(inputs, all_tensors(inputs)[affine.source.output])
    try:
        with torch.enable_grad(), piece:
            run(inputs)
    except _StopForward:
        pass
    if piece.source is None or piece.result is None:
        raise RuntimeError("the model ran otherwise than before")
    return Replayed(piece.source, piece.result, piece.mixing, piece.heads)


class _StopForward(Exception):  # noqa: N818, no error: the rest of the forward is not needed
    """Ends a forward."""


class _Piece(TorchFunctionMode):
    """Replaces the source of a map, and keeps the source and what the map gives; see :func:`replay`."""

    def __init__(self, affine: Affine, replace: Replace, head: int | None) -> None:
        super().__init__()
        self.source: Tensor | None = None
        self.result: Tensor | None = None
        self.mixing: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.heads = 1
        self._affine = affine
        self._replace = replace
        self._head = head
        self._call = -1

    def with_source(self, value: Any, source: Tensor) -> Any:
        """Return nested inputs or outputs with the source, which is one of their tensors, replaced."""
        return map_tensors(lambda tensor: self._replacement(tensor) if tensor is source else tensor, value)

    def _replacement(self, source: Tensor) -> Tensor:
        if self.source is None:
            self.source = self._replace(source.detach())
        return self.source

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._call += 1
        if self._call == self._affine.mixing:
            self.mixing = args, kwargs
            if self._head is not None:
                return self._one_head(func, args, kwargs)
        result = func(*args, **kwargs)
        if self._call == self._affine.source.call:
            return self.with_source(result, list(nested_tensors(result))[self._affine.source.output])
        if self._call == self._affine.end.call:
            self.result = list(nested_tensors(result))[self._affine.end.output]
            raise _StopForward
        return result

    def _one_head(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the values that attention mixes, unmixed, and zero but for one head."""
        grouped = func.__name__ == "scaled_dot_product_attention"
        values: Tensor
        if grouped:
            values = args[2] if len(args) > 2 else kwargs["value"]
        else:
            values = list(nested_tensors((args, dict(kwargs))))[1]
        if values.dim() != 4:
            return values.clone()
        heads = (args[0] if args else kwargs["query"]).shape[1] if grouped else values.shape[1]
        if values.shape[1] < heads:  # several query heads read one head of values
            values = values.repeat_interleave(heads // values.shape[1], 1)
        self.heads = values.shape[1]
        kept = torch.zeros(self.heads, dtype=values.dtype, device=values.device)
        kept[self._head] = 1
        return values * kept[:, None, None]
