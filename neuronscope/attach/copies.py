"""Tell whether the ranks of a distributed run hold copies of one network.

Data-parallel ranks do, also where they average their weights only now and then: they begin with the same weights.
Stages of a pipeline, members of an ensemble, an actor and a learner do not.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuronscope.attach.module_paths import walk

__all__ = ["NetworkDigest", "WeightDigest"]

_MAX_NOTES = 8


class NetworkDigest(NamedTuple):
    """Identify the network that a rank holds.

    Attributes:
        layout: A number for the names, whole shapes and dtypes of its weights.
        weights: A number for their values, without those that are spread over ranks, each time that they were noted.
    """

    layout: int
    weights: frozenset[int]


class WeightDigest:
    """Note the weights of a model, to compare them with those of other ranks.

    Buffers are left out: running statistics of copies differ where nobody averages them.

    Args:
        model: The model. It is not kept alive.
        is_split: Returns whether ranks share a layer by hand, by its path: its weights are not compared then.
    """

    def __init__(self, model: nn.Module, is_split: Callable[[str], bool] = lambda _: False) -> None:
        self._model = weakref.ref(model)
        self._is_split = is_split
        self._sums: list[list[Tensor]] = []

    @property
    def noted(self) -> bool:
        """Whether the weights were noted."""
        return bool(self._sums)

    def note(self) -> None:
        """Note the weights as they are now, unless that was done often before. Does not synchronize with a device."""
        if len(self._sums) == _MAX_NOTES:
            return
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
            self._sums.append(
                [
                    _sum_of_bits(weight)
                    for path, name, weight in self._weights()
                    if _is_comparable(weight) and not (self._is_split(path) or self._is_split(f"{path}.{name}"))
                ]
            )

    def digest(self) -> NetworkDigest:
        """Return what is compared. Synchronizes with the devices of the weights."""
        layout = [
            (f"{path}.{name}", tuple(weight.shape), str(weight.dtype))
            for path, name, weight in self._weights()
            if _is_whole(weight)
        ]
        weights = frozenset(_number([each.item() for each in sums]) for sums in self._sums)
        return NetworkDigest(_number(layout), weights)

    def _weights(self) -> Iterator[tuple[str, str, Tensor]]:
        model = self._model()
        for path, module in () if model is None else walk(model):
            for name, weight in module.named_parameters(recurse=False):
                yield path, name, weight


def _number(values: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 2


def _is_whole(weight: Tensor) -> bool:
    """Whether a weight has the shape of the whole layer: FSDP's flat parameters have that of a shard."""
    flat = hasattr(weight, "_fsdp_flattened") or type(weight).__name__ == "FlatParameter"
    return not (flat or nn.parameter.is_lazy(weight))


def _is_comparable(weight: Tensor) -> bool:
    """Whether copies of a weight have the same bits here: it is no part of a distributed tensor."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and not weight.is_meta
    captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    return plain and _is_whole(weight) and not captured


def _sum_of_bits(weight: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as int64; it does not depend on the order of addition."""
    flat = weight.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size // 8 * 8 // size
    if flat.storage_offset() * size % 8:
        flat = flat.clone()
    bits = flat[:whole].view(torch.int64).sum()
    return bits + flat[whole:].contiguous().view(torch.uint8).sum(dtype=torch.int64)
