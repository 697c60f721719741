"""Choose which groups of rows and columns go, and what constants their readers take over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from neuronscope.act.column_ranges import ColumnRanges
from neuronscope.act.structure import Structure
from neuronscope.act.unit_groups import UnitGroup

__all__ = ["Choice", "Chosen"]


class Chosen(NamedTuple):
    """A group that goes."""

    group: UnitGroup
    #: Of each layer that read it and got a constant other than zero: the value of each column.
    constants: dict[str, list[float]]


class Choice:
    """Chooses the groups that go, and says why others stay, and how many of the idle neurons that a report names.

    Without ranges of what each layer read in each column, there was no data.
    """

    def __init__(self, structure: Structure, ranges: ColumnRanges | None, idle: Mapping[str, Iterable[int]]) -> None:
        self.chosen: list[Chosen] = []
        self.kept: Counter[str] = Counter()
        self._structure = structure
        self._ranges = ranges
        self._idle = {(site, neuron) for site, neurons in idle.items() for neuron in neurons}

    def add(self, groups: Iterable[UnitGroup]) -> None:
        """Choose those of some groups that can go."""
        for group in groups:
            constants: dict[str, list[float]] = {}
            reason = group.blocked or self._find_constants(group, constants)
            if reason:
                self.keep(group, reason)
            else:
                self.chosen.append(Chosen(group, constants))

    def keep(self, group: UnitGroup, reason: str) -> None:
        """Note that the idle neurons of a group stay.

        Args:
            group: The group.
            reason: Why.
        """
        own = [sum((site, neuron) in self._idle for neuron in neurons) for site, neurons in group.neurons.items()]
        if number := max(own, default=0):  # a gate and its product are one neuron
            self.kept[reason] += number

    def _find_constants(self, group: UnitGroup, found: dict[str, list[float]]) -> str:
        """Find the constants that the columns of a group had; return why it must stay, ``""`` if it can go."""
        if not group.columns:
            return "no layer was seen to read them"
        for path, columns in group.columns.items():
            values = [0.0] * len(columns) if self._ranges is None else self._ranges.constants(path, columns)
            if self._ranges is not None and not self._ranges.measured_at(path):
                return f"what `{path}` reads was not seen, since its weight is used and the layer is not called"
            if values is None:
                return f"what `{path}` reads of them changes on the data"
            if any(values):
                if not _takes_constants(self._structure.layer(path).module):
                    return f"`{path}` reads a constant other than zero, of which its padding makes no constant"
                found[path] = values
        return ""

    def level(self) -> None:
        """Keep as many neurons more as it takes for layers that only a number tells apart to stay equally wide."""
        rows = self._chosen_rows()
        fewest: dict[str, int] = {}
        for layer in self._structure.known():
            family = _family(layer.path)
            fewest[family] = min(fewest.get(family, rows[layer.path]), rows[layer.path])
        left = {path: fewest[_family(path)] for path in rows}
        level = []
        for each in self.chosen:
            if all(left[path] >= len(own) for path, own in each.group.rows.items()):
                left.update({path: left[path] - len(own) for path, own in each.group.rows.items()})
                level.append(each)
            else:
                self.keep(each.group, "other layers of their kind have fewer that can go")
        self.chosen = level

    def leave_one(self) -> None:
        """Keep one neuron of each layer that would be left without any."""
        empty = {path for path, number in self._chosen_rows().items() if number >= self._structure.layer(path).units}
        left = []
        for each in self.chosen:
            if empty.intersection(each.group.rows):
                empty.difference_update(each.group.rows)
                self.keep(each.group, "one neuron of a layer must stay")
            else:
                left.append(each)
        self.chosen = left

    def _chosen_rows(self) -> Counter[str]:
        """Return how many rows of each layer go."""
        rows: Counter[str] = Counter()
        for group, _ in self.chosen:
            rows.update({path: len(own) for path, own in group.rows.items()})
        return rows


def _family(path: str) -> str:
    """Return the path of a layer without its numbers, which layers of one kind share."""
    return re.sub(r"\d+", "#", path)


def _takes_constants(module: nn.Module) -> bool:
    """Whether a constant in a column has the same effect at each position, so that the bias can take it over."""
    if getattr(module, "transposed", False):
        return False
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return True
    padding = getattr(module, "padding", 0)
    return padding == "valid" or not (
        isinstance(padding, str) or any(padding if isinstance(padding, tuple) else [padding])
    )
