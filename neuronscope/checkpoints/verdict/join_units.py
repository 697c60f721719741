"""Join the evidence of all sources on one key: a unit of a layer.

The weights and the optimizer's state have one row for each unit of a layer. A monitor's record, a traced forward and a
scan have sites, whose neurons are units of layers. A norm that normalises the units of a layer one by one is a layer of
its own, but its unit ``i`` and unit ``i`` of the layer before it are one neuron; it is named after the norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from neuronscope.arrays import BoolArray, IntArray
from neuronscope.checkpoints.verdict.evidence import Evidence
from neuronscope.judge.distinct import SiteUnits
from neuronscope.report.report import SiteReport

__all__ = [
    "LEFT_OUT",
    "JoinedLayer",
    "JoinedLayers",
    "NamedSite",
    "as_in_file",
    "join_units",
    "places_but_gates",
    "renamed",
    "wherever_seen",
]


class NamedSite(SiteUnits, Protocol):
    """What is needed of a site; a :class:`neuronscope.report.report.SiteReport` has it all."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def normalises(self) -> str:
        """Path of the layer that the site's layer normalises, unit by unit; ``""`` if it normalises none."""


#: Why the units of a layer are no neurons of the totals.
LEFT_OUT = {
    "site": "which dimension holds the neurons is only assumed, or a function was applied to outputs of the network",
    "no activation": "no activation follows, so that these are outputs or linear projections and no hidden neurons",
    "output": "the last layer of the file is taken for the network's outputs (a model would tell)",
    "projection": "these have the names of linear projections, which no activation follows (a model would tell)",
}


@dataclass(frozen=True)
class JoinedLayer:
    """One layer of a post-mortem."""

    width: int  # number of its units
    sites: tuple[str, ...] = ()  # names of the sites at which they were seen
    left_out: str = ""  # why totals leave it out, a key of ``LEFT_OUT``; ``""`` if they include it


@dataclass
class JoinedLayers:
    """The layers of a post-mortem."""

    layers: dict[str, JoinedLayer]  # the layers by name, in the order of the report
    norms: dict[str, str]  # the norm of each layer that a norm normalises, unit by unit, by the layer's path
    #: Which units of each layer the neurons of a site are, int64 ``(N,)`` by layer, by the site's name and ``N``; −1 =
    #: of another layer.
    units: dict[tuple[str, int], dict[str, IntArray]]

    def name_of(self, path: str) -> str:
        """Return the name of the layer with this path: that of its norm if it has one."""
        return self.norms.get(path, path)


def join_units(
    evidence: Iterable[Evidence],
    sites: Sequence[NamedSite],
    widths: Mapping[str, int],
    left_out: Mapping[str, str] | None = None,
) -> tuple[list[Evidence], JoinedLayers]:
    """Turn all evidence into evidence on the units of layers, and return it with the layers.

    Args:
        evidence: Evidence of all sources, on sites or on layers.
        sites: The sites of all sources. The neurons of a site that is not in the totals, or whose units are not known
            or not among those of the checkpoint's layer, are a layer of their own, which has the site's name.
        widths: Number of units of each layer of the checkpoint by its path, in order.
        left_out: Layers of the checkpoint that totals leave out unless there is a site of them, with the reason, a key
            of :data:`LEFT_OUT`.

    >>> from types import SimpleNamespace as Site
    >>> site = Site(name="g(1:3)/silu", kind="smooth", neurons=2, units=(("g", 1, 3, 1),), in_headlines=True,
    ...             normalises="")
    >>> one = Evidence("g(1:3)/silu", 2, "scan", "dead", "measured", np.array([1]), np.array([0.1]), "", "Silent.",
    ...                site="g(1:3)/silu")
    >>> found, joined = join_units([one], [site], {"g": 4})
    >>> found[0].layer, found[0].width, found[0].neurons, joined.layers
    ('g', 4, array([2]), {'g': JoinedLayer(width=4, sites=('g(1:3)/silu',), left_out='')})
    """
    units_of = {(site.name, site.neurons): _units_by_layer(site, widths) for site in sites}
    found: dict[str, int] = {}
    for units_by_layer in units_of.values():
        for layer, units in units_by_layer.items():
            found[layer] = max(found.get(layer, 0), int(units.max(initial=-1)) + 1)
    joined = JoinedLayers({}, _norms(sites, widths, found), units_of)
    for path, width in widths.items():
        joined.layers[joined.name_of(path)] = JoinedLayer(width)
    for site in sites:
        for name in units_of[site.name, site.neurons]:
            known = joined.layers.get(name) or JoinedLayer(found[name], left_out="" if site.in_headlines else "site")
            joined.layers[name] = replace(known, sites=tuple(dict.fromkeys((*known.sites, site.name))))
    without = {joined.name_of(path): reason for path, reason in (left_out or {}).items()}
    without = {
        name: reason for name, reason in without.items() if name in joined.layers and not joined.layers[name].sites
    }
    if any(not (layer.left_out or name in without) for name, layer in joined.layers.items()):
        joined.layers |= {name: replace(joined.layers[name], left_out=reason) for name, reason in without.items()}
    placed = []
    for one in evidence:
        units_by_layer = units_of.get((one.site, one.width), {})
        if units_by_layer:
            placed += [_place(one, name, units, joined.layers[name].width) for name, units in units_by_layer.items()]
        else:
            name = joined.name_of(one.layer)
            joined.layers.setdefault(name, JoinedLayer(one.width))
            placed.append(replace(one, layer=name))
    return [one for one in placed if one.neurons.size], joined


def renamed(
    evidence: Iterable[Evidence], sites: Iterable[SiteReport], path: Callable[[str], str]
) -> tuple[list[Evidence], list[SiteReport]]:
    """Return evidence and the sites of records with other paths of layers.

    Args:
        evidence: The evidence.
        sites: The sites.
        path: Returns the new path for a path, and so the new name for the name of a site.
    """
    changed = [replace(one, layer=path(one.layer), site=one.site and path(one.site)) for one in evidence]
    return changed, [
        replace(
            site,
            name=path(site.name),
            units=tuple((path(layer), start, stop, step) for layer, start, stop, step in site.units),
            normalises=site.normalises and path(site.normalises),
        )
        for site in sites
    ]


def as_in_file(
    evidence: Iterable[Evidence], sites: Sequence[SiteReport], widths: Mapping[str, int]
) -> tuple[list[Evidence], list[SiteReport]]:
    """Return evidence and the sites of records with the paths that the file's layers have.

    The network that was watched may be a part of the one that was saved, or the other way round. Then all paths differ
    by a prefix. They stay as they are if no prefix fits, or several fit equally well.

    Args:
        evidence: The evidence of the file: on the sites of records, and on its layers.
        sites: The sites of records.
        widths: Number of units of each layer of the file by its path.
    """
    found = Counter(prefix for site in sites for prefix in _prefixes(site, widths))
    best = [prefix for prefix, count in found.items() if count == max(found.values())]
    if len(best) != 1 or ("", "") in found:
        return list(evidence), list(sites)
    ((surplus, missing),) = best

    def path(name: str) -> str:
        return "+".join(missing + part.removeprefix(surplus) for part in name.split("+"))

    evidence = list(evidence)
    of_records, aligned = renamed([one for one in evidence if one.site], sites, path)
    return [*of_records, *(one for one in evidence if not one.site)], aligned


def _prefixes(site: SiteReport, widths: Mapping[str, int]) -> set[tuple[str, str]]:
    """Return what may be removed from, and added to, the paths of a site's layers to give those of the file."""
    found: set[tuple[str, str]] = set()
    if not site.in_headlines:
        return found
    units = {layer: max(range(*bounds), default=0) for layer, *bounds in site.units}
    for layer, last in {**units, **({site.normalises: site.neurons - 1} if site.normalises else {})}.items():
        for path, width in widths.items():
            if last < width:
                if path == layer:
                    found.add(("", ""))
                elif layer.endswith(f".{path}"):
                    found.add((layer.removesuffix(path), ""))
                elif path.endswith(f".{layer}"):
                    found.add(("", path.removesuffix(layer)))
    return found


def places_but_gates(sites: Sequence[NamedSite]) -> dict[str, BoolArray]:
    """Return which neurons of one source's sites are judged, bool ``(N,)`` by site: not gates that have a product."""
    products: dict[str, IntArray] = {}
    for site in sites:
        if site.kind == "gated":
            for layer, units in _units_by_layer(site).items():
                products[layer] = np.union1d(products.get(layer, units), units)
    return {site.name: _none_of(site, {} if site.kind == "gated" else products) for site in sites}


def wherever_seen(
    masks: Mapping[str, BoolArray], judged: Mapping[str, BoolArray], sites: Sequence[NamedSite]
) -> dict[str, BoolArray]:
    """Return which neurons of a mask are in the masks of all sites at which they are judged, bool ``(N,)`` by site.

    Args:
        masks: A mask for each site, bool ``(N,)``.
        judged: What :func:`places_but_gates` returned for them.
        sites: The sites of one source.
    """
    outside: dict[str, IntArray] = {}
    for site in sites:
        for layer, units in _units_by_layer(site).items():
            missed = units[judged[site.name] & ~masks[site.name]]
            outside[layer] = np.union1d(outside.get(layer, missed), missed)
    return {site.name: masks[site.name] & _none_of(site, outside) for site in sites}


def _none_of(site: NamedSite, others: Mapping[str, IntArray]) -> BoolArray:
    """Return which neurons of a site are none of some units of layers, bool ``(N,)``."""
    mask = np.ones(site.neurons, dtype=np.bool_)
    for layer, units in _units_by_layer(site).items():
        mask &= (units < 0) | ~np.isin(units, others.get(layer, ()))
    return mask


def _units_by_layer(site: NamedSite, widths: Mapping[str, int] | None = None) -> dict[str, IntArray]:
    """Return which unit of each layer the neurons of a site are, int64 ``(N,)`` by layer; −1 = of another layer."""
    own = {site.name: np.arange(site.neurons, dtype=np.int64)}
    if not site.in_headlines or sum(len(range(*run[1:])) for run in site.units) != site.neurons:
        return own
    found: dict[str, IntArray] = {}
    start = 0
    for layer, *bounds in site.units:
        units = np.arange(*bounds, dtype=np.int64)
        found.setdefault(layer, np.full(site.neurons, -1, dtype=np.int64))[start : start + units.size] = units
        start += units.size
    outside = any(units.max(initial=-1) >= (widths or {}).get(layer, np.inf) for layer, units in found.items())
    return own if outside else found


def _norms(sites: Sequence[NamedSite], widths: Mapping[str, int], found: Mapping[str, int]) -> dict[str, str]:
    """Return the norm of each layer of the checkpoint that exactly one norm normalises, unit by unit."""
    norms: dict[str, set[str]] = {}
    for site in sites:
        if site.normalises and site.in_headlines:
            norms.setdefault(site.normalises, set()).update(layer for layer, *_ in site.units)
    return {
        path: norm
        for path, (norm, *others) in norms.items()
        if not others and widths.get(path) == found.get(norm) and norm not in widths
    }


def _place(one: Evidence, layer: str, units: IntArray, width: int) -> Evidence:
    """Return the part of a site's evidence that is about one layer, by the unit of each of its neurons; −1 = none."""
    places = np.flatnonzero(units[one.neurons] >= 0)
    places = places[np.argsort(units[one.neurons[places]])]
    since = None if one.since is None else one.since[places]
    neurons = units[one.neurons[places]]
    return replace(one, layer=layer, width=width, neurons=neurons, numbers=one.numbers[places], since=since)
