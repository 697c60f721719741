"""Read from a distributed tensor which part of it this rank holds, and so which neurons of a layer.

A ``torch.distributed.tensor.DTensor`` is recognized by its placements, so that nothing of torch's distributed packages
is imported. Nothing here communicates with other ranks.
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
    "local_range",
    "local_tensor",
    "neuron_shard",
    "reshard",
    "sharded_dims",
]


class NeuronShard(NamedTuple):
    """Which neurons of a layer a rank holds.

    Attributes:
        first: Index of the first of them; −1 if another rank holds the same neurons at the same positions.
        whole: Number of neurons of the whole layer; 0 if ranks are not known to share it.
    """

    first: int = 0
    whole: int = 0


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's part of a distributed tensor; never true while ``torch.compile`` traces.

    >>> import torch
    >>> is_distributed(torch.ones(2))
    False
    """
    return _has_placements(tensor) and not is_tracing()


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a distributed tensor that this rank holds, without its graph; any other tensor unchanged.

    >>> import torch
    >>> local_tensor(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    if type(tensor) is Tensor:
        return tensor
    return tensor if not hasattr(tensor, "to_local") else tensor.detach().to_local()  # type: ignore[attr-defined]


def sharded_dims(tensor: Tensor) -> tuple[int | None, ...]:
    """Return for each dimension of the device mesh which dimension of a tensor it shards.

    Returns:
        One entry for each dimension of the mesh, ``None`` if that one shards nothing; ``()`` for a plain tensor.
    """
    if not _has_placements(tensor):
        return ()
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return tuple(placement.dim % tensor.dim() if placement.is_shard() else None for placement in placements)


def is_partial(tensor: Tensor) -> bool:
    """Whether a tensor is the sum of the parts of several ranks, so that one rank's part means nothing by itself."""
    return _has_placements(tensor) and any(placement.is_partial() for placement in tensor.placements)  # type: ignore[attr-defined]


def neuron_shard(tensor: Tensor, axis: int) -> NeuronShard:
    """Return which neurons of a distributed tensor this rank holds.

    Args:
        tensor: A distributed tensor ``(…, N, …)``.
        axis: Dimension of the neurons.
    """
    along = zip(sharded_dims(tensor), _places(tensor), strict=True)
    replicated = any(dimension is None and place > 0 for dimension, (_, place) in along)
    return NeuronShard(-1 if replicated else local_range(tensor, axis).start, tensor.shape[axis])


def local_range(tensor: Tensor, axis: int) -> range:
    """Return which indices of a dimension this rank holds; of a plain tensor, all.

    Sharding gives each rank ``ceil(N / ranks)`` indices as long as any are left, as ``torch.chunk`` does.

    Args:
        tensor: A tensor ``(…, N, …)``.
        axis: The dimension, from 0.

    >>> import torch
    >>> local_range(torch.ones(2, 3), 1)
    range(0, 3)
    """
    start, size = 0, tensor.shape[axis]
    for dimension, (parts, place) in zip(sharded_dims(tensor), _places(tensor), strict=True):
        if dimension == axis:
            each = -(-size // parts)
            before = min(each * place, size)
            start, size = start + before, min(each, size - before)
    return range(start, start + size)


def is_later_shard(weight: Tensor) -> bool:
    """Whether this rank holds a shard of a weight that is not the first; the rank with the first has the same data."""
    return any(
        dimension is not None and place > 0
        for dimension, (_, place) in zip(sharded_dims(weight), _places(weight), strict=True)
    )


def is_tensor_parallel(model: nn.Module | None) -> bool:
    """Whether ranks share the neurons of a model's layers while it runs; FSDP gathers its shards for each run.

    >>> is_tensor_parallel(nn.Linear(2, 2))
    False
    """
    if model is None:
        return False
    gathered = any(map(_is_fsdp, model.modules()))
    return any(len(sharded_dims(weight)) - sharded_dims(weight).count(None) > gathered for weight in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let each rank hold its shards of FSDP's weights again; after a forward without gradients it may hold all.

    >>> reshard(nn.Linear(2, 2))
    """
    for module in filter(_is_fsdp, model.modules()):
        module.reshard()  # type: ignore[operator]


def _is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _places(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Return for each dimension of the mesh the number of ranks along it, and the place of this rank."""
    if not _has_placements(tensor):
        return ()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return tuple((mesh.size(dimension), mesh.get_local_rank(dimension)) for dimension in range(mesh.ndim))


def _has_placements(tensor: Tensor) -> bool:
    """Whether a tensor is of a distributed class. Weights are asked while ``torch.compile`` traces, too."""
    return type(tensor) is not Tensor and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")
