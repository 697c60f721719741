"""Say which weights lead into the neurons of a site, and whether these are all and lead nowhere else.

A site's neurons are units of a layer. If that layer is a normalisation that takes units one by one, the layer before it
has them too; and so has each layer whose output multiplies the site's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.sites import IncomingRows, ReaderColumns

__all__ = ["Incoming"]

Runs = Iterable[tuple[str, int, int, int]]


class Incoming:
    """The weights that lead into one site.

    Args:
        flow: What is known of all layers and sites.
        site: Key of the site.
        runs_of: Returns the units that the neurons of a site are, and those of the other half of a GLU, by its key.

    Attributes:
        rows: Which rows of which layers lead into which neurons; without doubles.
        notes: Why these are not all, or why they do not lead to the site alone; empty if neither is so.
    """

    def __init__(self, flow: NeuronFlow, site: Any, runs_of: Callable[[Any], tuple[Runs, Runs]]) -> None:
        self.rows: dict[IncomingRows, None] = {}
        self.notes: dict[str, None] = {}
        self._flow = flow
        self._runs_of = runs_of
        self._columns = [each for each in flow.readers.get(site, ()) if not isinstance(each, str)]
        beside = list(self._beside(site))
        self._family = {site, *(key for key, _ in beside)}
        self._add_site(site, 0)
        for key, neuron in beside:
            if isinstance(key, str):
                (columns,) = (each for each in flow.readers[key] if each in self._aligned(self._columns, key))
                self._add_run(key, neuron, columns.neuron, columns.neuron + columns.neurons, 1)
            else:
                self._add_site(key, neuron)
                self._check_factor(key)
        for other in flow.activations.get(site, ()):
            self.notes[f"it goes through `{other.name}` next"] = None

    def _beside(self, site: Any) -> Iterable[tuple[Any, int]]:
        """Yield the layers and sites that multiply the site's neurons one by one, and the first neuron that each does.

        What multiplies the neurons in another order is noted.

        Args:
            site: The site.
        """
        own = {(each.layer, column) for each in self._columns for column in _span(each)}
        for key, readers in self._flow.readers.items():
            found = [each for each in readers if isinstance(each, ReaderColumns)]
            if key == site or not any((each.layer, column) in own for each in found for column in _span(each)):
                continue
            aligned = self._aligned(self._columns, key)
            if len(aligned) == len(found) == len(self._columns) == 1:
                yield key, self._columns[0].neuron
            else:
                self.notes[f"`{key if isinstance(key, str) else key.name}` is read in the same columns"] = None

    def _aligned(self, columns: Iterable[ReaderColumns], key: Any) -> list[ReaderColumns]:
        """Return the columns that read a layer or site and lie as columns of the site do, one by one."""
        places = set(map(_place, columns))
        return [each for each in self._flow.readers[key] if isinstance(each, ReaderColumns) and _place(each) in places]

    def _add_site(self, site: Any, neuron: int) -> None:
        """Add the units that the neurons of a site are, from one of its neurons on that is the first of ours."""
        own, gating = map(list, self._runs_of(site))
        if not own:
            self.notes["the units of its layer are not known"] = None
        for runs in (own, gating):
            place = neuron
            for layer, start, stop, step in runs:
                self._add_run(layer, place, start, stop, step)
                place += len(range(start, stop, step))

    def _add_run(self, layer: str, neuron: int, start: int, stop: int, step: int) -> None:
        """Add a run of units of a layer, and what lies before it if it is a norm."""
        rows = IncomingRows(layer, neuron, len(range(start, stop, step)), start, step)
        if rows in self.rows:
            return
        self.rows[rows] = None
        self._check(layer)
        units = range(start, stop, step)
        for other in self._flow.activations.get(layer, ()):
            if other not in self._family and any(
                _meet(units, range(*run[1:])) for runs in self._runs_of(other) for run in runs if run[0] == layer
            ):
                self.notes[f"the same units go through `{other.name}` too"] = None
        for each in self._flow.readers.get(layer, ()):
            if isinstance(each, str):
                self.notes[f"`{each}` reads `{layer}` too"] = None
            elif _meet(units, range(each.neuron, each.neuron + each.neurons)) and not self._is_own(each):
                self.notes[f"`{each.layer}` reads the same units of `{layer}` too"] = None
        before = self._flow.normalised.get(layer)
        if before is None:
            return
        if not before:
            self.notes[f"`{layer}` normalises what is no layer's units alone"] = None
            return
        self.rows[rows._replace(layer=before)] = None
        self._check(before)
        others = [each if isinstance(each, str) else each.layer for each in self._flow.readers.get(before, ())]
        others += [each.name for each in self._flow.activations.get(before, ())]
        for name in others:
            if name != layer:
                self.notes[f"`{name}` reads `{before}` too"] = None

    def _check(self, layer: str) -> None:
        """Note whatever else is made of the units of a layer."""
        for note in self._flow.reader_notes.get(layer, ()):
            self.notes[f"`{layer}`: {note}"] = None
        if reason := self._flow.applied_elsewhere(layer):
            self.notes[f"`{layer}` {reason}"] = None

    def _check_factor(self, site: Any) -> None:
        """Note whatever reads another site's output elsewhere than in the product."""
        for note in self._flow.reader_notes.get(site, ()):
            self.notes[f"`{site.name}`: {note}"] = None
        for other in self._flow.activations.get(site, ()):
            self.notes[f"`{site.name}` goes through `{other.name}` too"] = None

    def _is_own(self, columns: ReaderColumns) -> bool:
        """Whether columns are those that read the site."""
        return _place(columns) in map(_place, self._columns)


def _place(columns: ReaderColumns) -> tuple[object, ...]:
    """Return which columns these are, whatever they read."""
    return (columns.layer, *columns[2:])


def _span(columns: ReaderColumns) -> range | set[int]:
    """Return all columns that read any of the neurons."""
    if columns.columns == 1:
        return range(columns.column, columns.column + columns.neurons * columns.step, columns.step)
    return {column for place in range(columns.neurons) for column in columns.of(columns.neuron + place)}


def _meet(one: range, other: range) -> bool:
    """Whether two ranges have a number in common."""
    if not one or not other or one[-1] < other[0] or other[-1] < one[0]:
        return False
    return not set(one).isdisjoint(other)
