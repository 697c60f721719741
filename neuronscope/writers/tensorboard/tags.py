"""Names the number of each metric and layer with a tag that every logger accepts and that never changes during a run.

The metric comes first and the layer second (``neuronscope.dead_pct/features.3``): TensorBoard makes a group of the text
before the first ``/``, and hundreds of groups with one chart each are of no help.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from neuronscope.writers.grouping import Group, group_sites

__all__ = ["MOST_CHARTS", "group_tag", "groups", "metric", "safe"]

#: Most charts of one metric; more layers are grouped by their place in the network.
MOST_CHARTS = 40

_LONGEST = 120
_FUNCTION, _CALL = "-fn", "-"


def safe(name: str) -> str:
    """Return a layer's name in letters, digits, ``_``, ``.`` and ``-``.

    The ``()`` of a function call becomes ``-fn`` and the ``#1`` of a later call becomes ``-1``. If anything else is
    replaced, a checksum of the true name keeps different names different.

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
    """Return a metric's name in a phase: unchanged in training, else with the phase before it.

    Args:
        name: The metric.
        phase: The phase.

    >>> metric("dead_pct", "train"), metric("dead_pct", "val")
    ('dead_pct', 'val_dead_pct')
    """
    return name if phase == "train" else f"{safe(phase)}_{name}"


def groups(names: Sequence[str]) -> list[Group]:
    """Return what gets a chart of its own: every layer, or groups if there are more than :data:`MOST_CHARTS`."""
    return group_sites(names, MOST_CHARTS)


def group_tag(group: Group) -> str:
    """Return the last part of the tag of a layer or a group of layers.

    >>> from neuronscope.writers.grouping import Group
    >>> group_tag(Group("layers.0", "layers.3", ("layers.0.act", "layers.3.act"), False))
    'layers.0--to--layers.3'
    """
    if group.single:
        return safe(group.first)
    if group.last is None:
        return f"{safe(group.first)}--all"
    return f"{safe(group.first)}--to--{safe(group.last)}"
