"""Which operator ended the flow of units before an activation: a count of what the rules do not carry on.

It looks into Neuronscope, and is no test of it: the page ``docs/coverage.md`` says what it finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._pytree import tree_leaves

from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.origins import ENDED, LOST, ROWS, UNITS
from neuronscope.attach.site_finder import SiteFinder
from neuronscope.attach.tensor_map import TensorMap

WITHOUT_UNITS = (ENDED, LOST, ROWS)


@contextlib.contextmanager
def ending_operators() -> Iterator[dict[str, str]]:
    """Yield a mapping that fills while models are watched: place of an activation → operator that ended its flow."""
    found: dict[str, str] = {}
    ended_by: TensorMap[str] = TensorMap()
    follow, find = NeuronFlow.follow, SiteFinder._find_anew

    def following(flow: NeuronFlow, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        fresh = any(flow.origin(tensor).state == UNITS for tensor in given)
        before = [name for tensor in given if (name := ended_by.get(tensor)) is not None]
        follow(flow, function, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and flow.origin(tensor).state in WITHOUT_UNITS:
                name = getattr(function, "__name__", "?") if fresh else next(iter(before), None)
                if name is not None:
                    ended_by.put(tensor, name)

    def finding(finder: SiteFinder, phase: str, applied: Any, x: Tensor, origin: Any, **more: Any):  # type: ignore[no-untyped-def]
        if origin.state in WITHOUT_UNITS:
            found[applied.place] = ended_by.get(x) or "?"
        return find(finder, phase, applied, x, origin, **more)

    with mock.patch.object(NeuronFlow, "follow", following), mock.patch.object(SiteFinder, "_find_anew", finding):
        yield found
