"""Group layers by their place in the network, if there are too many to show each.

The groups depend only on the names of the layers, so that they stay the same over a run whatever the neurons do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Group", "group_sites", "shared_prefix"]


@dataclass(frozen=True)
class Group:
    """Layers that are shown as one."""

    first: str  # the layer's name; for several, the path that they share (or the first of several such paths)
    last: str | None  # the last of several paths; ``None`` if there is only one
    sites: tuple[str, ...]  # names of its layers
    single: bool  # whether it is one layer under its own name

    @property
    def label(self) -> str:
        """Its name for people.

        >>> Group("layers.0", "layers.3", ("layers.0.fc/relu", "layers.3.fc/relu"), False).label
        'layers.0 ... 3'
        """
        if self.single:
            return self.first
        if self.last is None:
            return f"{self.first}.*"
        return f"{self.first} ... {self.short_last}"

    @property
    def short_last(self) -> str:
        """The last path without the parts at its beginning that the first one has too; empty if there is only one."""
        if self.last is None:
            return ""
        paths = [_path_parts(self.first), _path_parts(self.last)]
        return ".".join(paths[1][len(_shared_parents(paths)) :])


def group_sites(names: Sequence[str], most: int) -> list[Group]:
    """Group layers until there are at most ``most`` groups.

    Layers with the same beginning of their path form a group; the beginning is as long as possible. If that is
    too coarse (80 layers under one ``model.layers``), neighbours with a longer common beginning form groups instead.

    Args:
        names: Names of the layers, in the order in which they ran.
        most: Most groups, ≥ 1.
    """
    if len(names) <= most:
        return [Group(name, None, (name,), True) for name in names]
    parts = [_path_parts(name) for name in names]
    deepest = max(len(part) for part in parts)
    finer = _by_prefix(names, parts, deepest)
    for depth in range(deepest, 0, -1):
        coarser = _by_prefix(names, parts, depth)
        if len(coarser) <= most:
            if len(coarser) >= most / 3:
                return [_group(path, sites) for path, sites in coarser.items()]
            break
        finer = coarser
    runs = _neighbours(list(finer), most)
    return [
        _group(run[0], [site for path in run for site in finer[path]], run[-1] if len(run) > 1 else None)
        for run in runs
    ]


def shared_prefix(labels: Sequence[str]) -> str:
    """Return the path parts that all labels begin with, and a dot; empty if leaving them out would save little.

    >>> shared_prefix(["model.layers.0.fc/relu", "model.layers.1.fc/relu"])
    'model.layers.'
    """
    if len(labels) < 2:
        return ""
    prefix = ".".join(_shared_parents([_path_parts(label) for label in labels]))
    return f"{prefix}." if len(prefix) > 8 else ""


def _path_parts(name: str) -> list[str]:
    """Return the parts of a layer's path; what follows the path belongs to the last one.

    >>> _path_parts("model.attn.qkv(0:8,24:32,...,72:80)/relu")
    ['model', 'attn', 'qkv(0:8,24:32,...,72:80)/relu']
    """
    path = re.split(r"[(/]", name, maxsplit=1)[0]
    *parents, last = path.split(".")
    return [*parents, last + name[len(path) :]]


def _by_prefix(names: Sequence[str], parts: Sequence[list[str]], depth: int) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, part in zip(names, parts, strict=True):
        groups.setdefault(".".join(part[:depth]), []).append(name)
    return groups


def _neighbours(paths: Sequence[str], most: int) -> list[list[str]]:
    """Return at most ``most`` runs of neighbouring paths; a run stays within one parent if possible."""
    parents: dict[str, list[str]] = {}
    for path in paths:
        parents.setdefault(".".join(_path_parts(path)[:-1]), []).append(path)
    families = list(parents.values()) if len(parents) <= most else [list(paths)]
    apart = 1
    while sum(-(-len(family) // apart) for family in families) > most:
        apart += 1
    return [family[i : i + apart] for family in families for i in range(0, len(family), apart)]


def _group(path: str, sites: Sequence[str], last: str | None = None) -> Group:
    return Group(path, last, tuple(sites), len(sites) == 1 and sites[0] == path and last is None)


def _shared_parents(paths: Sequence[list[str]]) -> list[str]:
    """Return the parts that all paths begin with; the last part of none is among them."""
    levels = zip(*(path[:-1] for path in paths), strict=False)
    return [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
