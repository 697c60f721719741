"""Find the mask of the positions of a batch that are no padding.

A mask ``(B, T)`` says which positions of the network's input are real. It is applied at the sites whose tensor begins
with those dimensions, or with both as one: see :mod:`neuronscope.count.positions`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.attach.call_arguments import CallArguments, inputs_only
from neuronscope.attach.compiling import is_tracing, unwatched
from neuronscope.attach.examples import continues_earlier, first_tensor
from neuronscope.errors import NeuronscopeWarning
from neuronscope.options import Mask

__all__ = ["PositionMask", "kept"]

#: Arguments of which the length of the decoder's tensors follows, in a model with an encoder and a decoder.
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


class PositionMask:
    """Finds the mask that a forward is given.

    Args:
        option: The option ``mask`` of :func:`neuronscope.watch`.
        arguments: Names the arguments of the model's forwards.
    """

    def __init__(self, option: Mask, arguments: CallArguments) -> None:
        self._option = option
        self._eager_option = torch.compiler.disable(option) if callable(option) else None
        self._arguments = arguments
        self._warned = False

    def find(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the mask of a forward. Call it once when an outermost forward begins.

        Args:
            module: The outermost module that is called.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.

        Returns:
            Which positions are kept, bool ``(B, T)``; ``None`` if all are. A mask with more dimensions, such as a
            causal one, is no mask of positions and is ignored. Where a key-value cache holds earlier positions, ``T``
            is the number of new ones. Where the decoder's tensors are as long as the encoder's, the mask of an encoder
            is ignored: the tensors cannot be told apart.
        """
        option = self._option
        if option is None:
            return None
        with unwatched():
            if callable(option):
                return self._ask(option, args, kwargs)
            return self._find(option, module, self._arguments.named(module, args, kwargs))

    def _find(self, option: str, module: nn.Module, named: Mapping[str, Any]) -> Tensor | None:
        mask = named.get(option)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if "decoder_input_ids" in self._arguments.names(module):
            for name in _DECODER_INPUTS:
                if _length(named.get(name)) == mask.size(1):
                    return None
            return kept(mask)
        if continues_earlier(named):
            inputs = inputs_only(named)
            inputs.pop(option, None)
            tensor = first_tensor(inputs)
            if tensor is not None and tensor.dim() > 1 and tensor.size(1) < mask.size(1):
                mask = mask[:, mask.size(1) - tensor.size(1) :]
        return kept(mask)

    def _ask(self, option: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return what the user's function says; ``None`` with one warning if that is no mask."""
        if is_tracing():
            answer = option(args, kwargs)
            return kept(answer) if isinstance(answer, Tensor) and answer.dim() == 2 else None
        try:
            answer = self._eager_option(args, kwargs) if self._eager_option else None
            problem = f"it returned {_describe(answer)}"
        except Exception as error:  # noqa: BLE001  # the training goes on
            answer, problem = False, f"it raised {error!r}"
        if answer is None:
            return None
        if isinstance(answer, Tensor) and answer.dim() == 2:
            return kept(answer)
        if not self._warned:
            self._warned = True
            warnings.warn(
                "Expected the function of argument `mask` to return a tensor of shape (B, T), or None, "
                f"but {problem}: all positions of this forward are counted.",
                NeuronscopeWarning,
                stacklevel=2,
            )
        return None


def kept(mask: Tensor) -> Tensor:
    """Return which positions a mask keeps.

    Args:
        mask: ``(B, T)``: true or 1 for a position that is kept. A mask of floats may also be one that is added to
            scores: 0 for a position that is kept, a negative number otherwise.

    Returns:
        bool ``(B, T)``.

    >>> kept(torch.tensor([[1, 1, 0]])).tolist(), kept(torch.tensor([[0.0, 0.0, -1e9]])).tolist()
    ([[True, True, False]], [[True, True, False]])
    """
    mask = mask.detach()
    if mask.dtype is torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask > 0
    return torch.where((mask < 0).any(), mask == 0, mask > 0)


def _length(value: Any) -> int:
    return value.size(1) if isinstance(value, Tensor) and value.dim() > 1 else -1


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
