"""Tags: one name for each number and each site, safe in every logger, and the same over a whole run.

A metric comes first and a site second (``neuronscope.dead_pct/features.3``): TensorBoard makes a group of the text
before the first ``/``, and hundreds of groups with one chart each help nobody.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from neuronscope.writers.grouping import Group, group_sites

__all__ = ["MOST_CHARTS", "group_tag", "groups", "metric", "safe"]

#: Charts that one metric gets at most; more sites are put together by their place in the network.
MOST_CHARTS = 40

_LONGEST = 120
_FUNCTION, _CALL = "-fn", "-"


def safe(name: str) -> str:
    """A site's name in letters, digits, ``_``, ``.`` and ``-``.

    A functional site's ``()`` becomes ``-fn`` and a later call's ``#1`` becomes ``-1``. Where anything else has to be
    replaced, a checksum of the true name keeps two names apart.

    >>> safe("layer1.0.relu#1"), safe("block.relu()")
    ('layer1.0.relu-1', 'block.relu-fn')
    >>> safe("odd/näme")
    'odd_n_me-c971d6ca'
    """
    plain = re.fullmatch(r"([\w.]+)(\(\))?(?:#(\d+))?", name, re.ASCII)
    if plain and len(name) <= _LONGEST:
        path, function, call = plain.groups()
        return path + (_FUNCTION if function else "") + (f"{_CALL}{call}" if call else "")
    replaced = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    if len(replaced) > _LONGEST:
        replaced = f"{replaced[:40]}--{replaced[-60:]}"
    return f"{replaced or 'root'}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def metric(name: str, phase: str) -> str:
    """A metric's name in a phase: bare in training, else with the phase before it.

    >>> metric("dead_pct", "train"), metric("dead_pct", "val")
    ('dead_pct', 'val_dead_pct')
    """
    return name if phase == "train" else f"{safe(phase)}_{name}"


def groups(names: Sequence[str]) -> list[Group]:
    """What gets a chart of its own: every site, or, above :data:`MOST_CHARTS` sites, groups of them."""
    return group_sites(names, MOST_CHARTS)


def group_tag(group: Group) -> str:
    """The last part of the tag of a site or a group of sites.

    >>> from neuronscope.writers.grouping import Group
    >>> group_tag(Group("layers.0", "layers.3", ("layers.0.act", "layers.3.act"), False))
    'layers.0--to--layers.3'
    """
    if group.single:
        return safe(group.first)
    if group.last is None:
        return f"{safe(group.first)}--all"
    return f"{safe(group.first)}--to--{safe(group.last)}"
