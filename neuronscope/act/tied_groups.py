"""Find what a residual sum ties together, with torch-pruning, where it is installed.

torch-pruning follows a model's graph and knows which channels go only together. Which of them go, what constants they
leave, and whether the result is right is decided here, as for all groups.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from neuronscope.act.structure import Structure
from neuronscope.act.unit_groups import UnitGroup
from neuronscope.attach.module_paths import walk

__all__ = ["TiedGroups"]

#: What UnitGroups say of neurons that only a sum keeps.
_ADDED = "added in"


class TiedGroups:
    """Groups of channels that residual sums tie; ``sites`` are the neurons that each row of each layer leads into."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        call: Callable[[nn.Module, Any], Any],
        batch: Any,
        sites: Mapping[tuple[str, int], Iterable[tuple[str, int]]],
    ) -> None:
        self._structure = structure
        self._sites = sites
        self._graph: Any = None
        self._given = model, call, batch
        self._seen: set[tuple[str, int]] = set()
        self._modules: dict[str, nn.Module] = {}

    def resolved(self, groups: Iterable[UnitGroup]) -> Iterator[UnitGroup]:
        """Yield groups; in place of those that only a sum keeps, what the sum ties, if torch-pruning knows it."""
        for group in groups:
            rows = [(layer, row) for layer, own in group.rows.items() for row in own]
            if self._seen.intersection(rows):
                continue  # a part of one that went before
            reasons = group.blocked.split("; ")
            only_added = bool(rows) and all(reason.endswith(_ADDED) for reason in reasons)
            yield (self._tied(group, *rows[0]) if only_added else None) or group

    def _tied(self, group: UnitGroup, layer: str, row: int) -> UnitGroup | None:
        """Return what goes with a row; ``None`` if that is not known."""
        if self._graph is None:
            self._graph, self._modules = _graph_of(*self._given)
        module = self._modules.get(layer)
        if not self._graph or module is None:
            return None
        try:
            pruner = self._graph.get_pruner_of_module(module)
            found = list(self._graph.get_pruning_group(module, pruner.prune_out_channels, [row]))
        except Exception:  # noqa: BLE001, whatever another package raises: then the group stays
            return None
        paths = {id(each): path for path, each in self._modules.items()}
        rows: dict[str, list[int]] = {}
        columns: dict[str, list[int]] = {}
        for dependency, indices in found:
            target = dependency.target.module
            path = paths.get(id(target), "")
            known = self._structure.layer(path)
            gives = self._graph.is_out_channel_pruning_fn(dependency.handler)
            if not path or known.unknown:
                if isinstance(target, nn.Parameter) or any(True for _ in target.parameters()):
                    return None
                continue  # a view, a sum, an activation
            held = rows if gives or known.one_by_one else columns
            held[path] = sorted({*held.get(path, ()), *map(int, indices)})
        neurons: dict[str, list[int]] = {}
        for each in ((path, own) for path, every in rows.items() for own in every):
            self._seen.add(each)
            for site, neuron in self._sites.get(each, ()):
                neurons[site] = sorted({*neurons.get(site, ()), neuron})
        return UnitGroup(rows, columns, neurons or group.neurons, "")


def _graph_of(model: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Any) -> tuple[Any, dict[str, nn.Module]]:
    """Return torch-pruning's graph of a copy of a model, and the copy's modules; ``False`` if it cannot be made."""
    try:
        import torch_pruning

        network = copy.deepcopy(model).eval()
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                network, example_inputs=batch, forward_fn=call, verbose=False
            )
    except Exception:  # noqa: BLE001, it is not installed, or cannot follow the model
        return False, {}
    return graph, {path or "(root)": module for path, module in walk(network)}
