"""Tell which neurons of a layer a rank holds where ranks share it by hand, in plain tensors, as the user says.

A distributed tensor says by itself what part it is (:mod:`neuronscope.attach.dtensor`); a plain one of a hand-written
column-parallel or row-parallel layer does not.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch.distributed as dist

from neuronscope.attach.dtensor import NeuronShard
from neuronscope.options import Shards

__all__ = ["HandSplit"]


class HandSplit:
    """The layers that ranks share by hand, and this rank's place among them.

    Args:
        shards: What the user says; ``None`` = no layer is shared so.

    >>> split = HandSplit(Shards(units="*.fc1", inputs="*.fc2"))
    >>> split.shard("block.fc1", 8), split.shard("block.norm", 8), split.holds("block.fc2")
    (NeuronShard(first=0, whole=8), None, True)
    """

    def __init__(self, shards: Shards | None) -> None:
        self._shards = shards

    def holds(self, layer: str) -> bool:
        """Whether this rank has a part of a layer's weights, which differs from that of other ranks.

        Args:
            layer: Path of the layer.
        """
        shards = self._shards
        return shards is not None and any(fnmatchcase(layer, each) for each in (*shards.units, *shards.inputs))

    def shard(self, layer: str, neurons: int) -> NeuronShard | None:
        """Return which neurons of a layer this rank has; ``None`` if its units are not shared by hand.

        Args:
            layer: Path of the layer.
            neurons: How many it has.
        """
        shards = self._shards
        if shards is None or not any(fnmatchcase(layer, each) for each in shards.units):
            return None
        place, ranks = self._place()
        return NeuronShard(place * neurons, ranks * neurons)

    @property
    def duplicate(self) -> bool:
        """Whether another rank has the same data, and counts for both what is not shared."""
        return self._place()[0] > 0

    def _place(self) -> tuple[int, int]:
        """Return the place of this rank among those that share layers, and how many these are."""
        if self._shards is None or not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        group = self._shards.process_group
        group = group() if callable(group) else group
        return dist.get_rank(group), dist.get_world_size(group)
