"""Shards: which part of a distributed tensor this rank holds, and so which of a layer's neurons.

A ``torch.distributed.tensor.DTensor`` is known by its placements; to look for them imports nothing of torch's
distributed packages, and none of this talks to another rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from neuronscope.attach.compiling import is_tracing

__all__ = [
    "NeuronShard",
    "is_distributed",
    "is_later_shard",
    "is_partial",
    "is_tensor_parallel",
    "local_tensor",
    "neuron_shard",
    "sharded_dims",
]


class NeuronShard(NamedTuple):
    """Which of a layer's neurons a rank holds.

    Attributes:
        first: The first of them; −1 where another rank holds the very same at the same positions.
        whole: Neurons of the whole layer; 0 where it is not known to be shared.
    """

    first: int = 0
    whole: int = 0


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a rank's share of one that is spread over several; never while ``torch.compile`` traces.

    >>> import torch
    >>> is_distributed(torch.ones(2))
    False
    """
    return (
        type(tensor) is not Tensor
        and not is_tracing()
        and hasattr(tensor, "placements")
        and hasattr(tensor, "device_mesh")
    )


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that this rank holds, without its graph; any other tensor as it is.

    >>> import torch
    >>> local_tensor(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    if type(tensor) is Tensor:
        return tensor
    return tensor if not hasattr(tensor, "to_local") else tensor.detach().to_local()  # type: ignore[attr-defined]


def sharded_dims(tensor: Tensor) -> tuple[int | None, ...]:
    """Along which dimension each dimension of the mesh cuts a tensor, ``None`` where it does not; ``()`` if plain."""
    if not is_distributed(tensor):
        return ()
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return tuple(placement.dim % tensor.dim() if placement.is_shard() else None for placement in placements)


def is_partial(tensor: Tensor) -> bool:
    """Whether a tensor is the sum of what several ranks hold, so that no rank's part says anything by itself."""
    return is_distributed(tensor) and any(placement.is_partial() for placement in tensor.placements)  # type: ignore[attr-defined]


def neuron_shard(tensor: Tensor, axis: int) -> NeuronShard:
    """This rank's part of a distributed tensor's neurons, which lie along ``axis``.

    Each cut gives every rank ``ceil(N / ranks)`` neurons as long as there are any left, as ``torch.chunk`` does.
    """
    start, size, again = 0, tensor.shape[axis], False
    for dimension, (parts, place) in zip(sharded_dims(tensor), _places(tensor), strict=True):
        if dimension == axis:
            each = -(-size // parts)
            before = min(each * place, size)
            start, size = start + before, min(each, size - before)
        elif dimension is None:
            again |= place > 0
    return NeuronShard(-1 if again else start, tensor.shape[axis])


def is_later_shard(weight: Tensor) -> bool:
    """Whether this rank holds a part of a weight that is not the first: then a rank with the first has our data."""
    return any(
        dimension is not None and place > 0
        for dimension, (_, place) in zip(sharded_dims(weight), _places(weight), strict=True)
    )


def is_tensor_parallel(model: nn.Module | None) -> bool:
    """Whether ranks share the neurons of a model's layers while it runs; FSDP's cut is mended for each run.

    >>> is_tensor_parallel(nn.Linear(2, 2))
    False
    """
    if model is None:
        return False
    gathered = any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__)
    return any(len(sharded_dims(weight)) - sharded_dims(weight).count(None) > gathered for weight in model.parameters())


def _places(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Of each dimension of the mesh, how many ranks lie along it and which one this is."""
    if not is_distributed(tensor):
        return ()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return tuple((mesh.size(dimension), mesh.get_local_rank(dimension)) for dimension in range(mesh.ndim))
