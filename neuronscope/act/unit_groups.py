"""Join what must go together: the rows that lead into a neuron, the columns that read it, and whatever those tie.

A group goes as a whole or stays as a whole. So factors of a product, layers that take units one by one, and all columns
of a flattened channel go together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from neuronscope.act.structure import LayerWeights, Structure
from neuronscope.arrays import IntArray
from neuronscope.sites import IncomingRows, ReaderColumns

__all__ = ["UnitGroup", "UnitGroups"]


class UnitGroup(NamedTuple):
    """Rows, columns and neurons that go together."""

    rows: dict[str, list[int]]  # the rows of each layer
    columns: dict[str, list[int]]  # the columns of each layer that does not take units one by one
    neurons: dict[str, list[int]]  # the neurons of each site
    blocked: str  # why they must stay; ``""`` if they can go


class UnitGroups:
    """Groups of rows, columns and neurons."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._first: dict[tuple[str, str], int] = {}  # of rows, columns or neurons, and their layer or site
        self._nodes = 0
        self._edges: list[tuple[IntArray, IntArray]] = []
        self._blocked: list[tuple[IntArray, str]] = []
        self._read: list[IntArray] = []  # units that a layer takes one by one, and whose layer is known

    def add_site(
        self, site: str, neurons: int, incoming: Iterable[IncomingRows], columns: Iterable[ReaderColumns], blocked: str
    ) -> None:
        """Add the neurons of a site.

        Args:
            site: Its name.
            neurons: Number of its neurons.
            incoming: The rows that lead into them.
            columns: The columns that read them.
            blocked: Why they must stay; ``""`` if they need not.
        """
        first = self._place("neurons", site, neurons)
        for each in incoming:
            layer = self._structure.layer(each.layer)
            if not layer.unknown:
                place = np.arange(each.neurons)
                self._tie(first + each.neuron + place, self._rows(layer) + each.row + place * each.step)
        self._add_columns(first, columns)
        if blocked:
            self._blocked.append((first + np.arange(neurons), blocked))

    def add_layer(self, layer: LayerWeights, columns: Iterable[ReaderColumns], blocked: str) -> None:
        """Add the units of a layer, as far as layers read them before any activation.

        Args:
            layer: The layer.
            columns: The columns that read them.
            blocked: Why they must stay; ``""`` if they need not.
        """
        first = self._rows(layer)
        self._add_columns(first, columns)
        if blocked:
            self._blocked.append((first + np.arange(layer.units), blocked))

    def block_unread(self) -> None:
        """Keep the units that layers take one by one if the layer that gives them is not known."""
        known = np.concatenate([*self._read, np.empty(0, np.int64)])
        for kind, path in list(self._first):
            if kind == "rows" and (layer := self._structure.layer(path)).one_by_one:
                own = self._rows(layer) + np.arange(layer.units)
                self._blocked.append((np.setdiff1d(own, known), f"what `{path}` reads of them is not known"))

    def _add_columns(self, first: int, columns: Iterable[ReaderColumns]) -> None:
        for reader in columns:
            layer = self._structure.layer(reader.layer)
            place = np.arange(reader.neurons)
            if layer.unknown:
                self._blocked.append((first + reader.neuron + place, layer.unknown))
                continue
            start = self._rows(layer) if layer.one_by_one else self._place("columns", layer.path, layer.inputs)
            for number in range(reader.columns):
                read = start + reader.column + place * reader.step + number * reader.column_step
                self._tie(first + reader.neuron + place, read)
                if layer.one_by_one:
                    self._read.append(read)

    def _rows(self, layer: LayerWeights) -> int:
        return self._place("rows", layer.path, layer.units)

    def _place(self, kind: str, name: str, size: int) -> int:
        """Return the number of the first of some rows, columns or neurons."""
        if (kind, name) not in self._first:
            self._first[kind, name] = self._nodes
            self._nodes += size
        return self._first[kind, name]

    def _tie(self, one: IntArray, other: IntArray) -> None:
        self._edges.append((one, other))

    def of(self, neurons: Mapping[str, Iterable[int]]) -> Iterator[UnitGroup]:
        """Yield the groups of some neurons, each group once."""
        labels = self._labels()
        reasons: dict[int, dict[str, None]] = {}
        for nodes, reason in self._blocked:
            for label in np.unique(labels[nodes]).tolist():
                reasons.setdefault(label, {})[reason] = None
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(self._nodes + 1))
        names = list(self._first)  # by rising first node
        firsts = np.array(list(self._first.values()))
        wanted = [self._first["neurons", site] + neuron for site, own in neurons.items() for neuron in own]
        for label in dict.fromkeys(labels[wanted].tolist()):
            held: dict[str, dict[str, list[int]]] = {"rows": {}, "columns": {}, "neurons": {}}
            for node in order[starts[label] : starts[label + 1]].tolist():
                kind, name = names[int(np.searchsorted(firsts, node, side="right")) - 1]
                held[kind].setdefault(name, []).append(node - self._first[kind, name])
            yield UnitGroup(held["rows"], held["columns"], held["neurons"], "; ".join(reasons.get(label, ())))

    def _labels(self) -> IntArray:
        """Return the smallest node that each node is tied to, directly or through others."""
        labels = np.arange(self._nodes)
        one, other = (np.concatenate([np.empty(0, np.int64), *(edge[side] for edge in self._edges)]) for side in (0, 1))
        while True:
            before = labels.copy()
            np.minimum.at(labels, one, labels[other])
            np.minimum.at(labels, other, labels[one])
            labels = labels[labels]
            if np.array_equal(before, labels):
                return labels
