"""Names the number of each metric and layer with a tag that every logger accepts and that never changes during a run.

The metric comes first and the layer second (``neuronscope.dead_pct/layer1.0.bn2/relu``): TensorBoard makes a group of
the text before the first ``/``, and hundreds of groups with one chart each are of no help.
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
_FUNCTION, _PART = "-fn", "-"

# A layer's path, which of its units, the activation (several words for some gated products), and the ordinal.
_SITE = re.compile(r"([\w.]+)(?:\((\d+)(?::(\d+))?\))?/(\w+(?: [a-z]\w*)*)(?:#(\d+))?", re.ASCII)
# The place of an activation without a known layer: a module's path, or a function in one.
_PLACE = re.compile(r"([\w.]+)(\(\))?(?:#(\d+))?", re.ASCII)


def safe(name: str) -> str:
    """Return a layer's name in letters, digits, ``_``, ``.``, ``-`` and ``/``.

    Which units of a layer a site has, and its ordinal, follow a ``-``; the ``()`` of a function becomes ``-fn``. If
    anything else is replaced, a checksum of the true name keeps different names different.

    >>> safe("layer1.0.bn2/relu"), safe("mlp.gate_up_proj(0:28)/silu"), safe("fc/relu#1")
    ('layer1.0.bn2/relu', 'mlp.gate_up_proj-0-28/silu', 'fc/relu-1')
    >>> safe("block.relu()"), safe("a+b/relu")
    ('block.relu-fn', 'a_b/relu-d479c46a')
    """
    site, place = _SITE.fullmatch(name), _PLACE.fullmatch(name)
    if len(name) <= _LONGEST and site:
        layer, first, last, activation, ordinal = site.groups()
        return f"{_joined(layer, first, last)}/{_joined(activation.replace(' ', _PART), ordinal)}"
    if len(name) <= _LONGEST and place:
        path, function, ordinal = place.groups()
        return _joined(path + (_FUNCTION if function else ""), ordinal)
    layer, _, activation = name.rpartition("/")
    replaced = "/".join(re.sub(r"[^\w.-]", "_", part, flags=re.ASCII) for part in (layer, activation) if part)
    if len(replaced) > _LONGEST:
        replaced = f"{replaced[:40]}--{replaced[-60:]}"
    return f"{replaced or 'root'}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def _joined(*parts: str | None) -> str:
    return _PART.join(part for part in parts if part is not None)


def metric(name: str, phase: str) -> str:
    """Return a metric's name in a phase: unchanged in training, else with the phase before it.

    Args:
        name: The metric.
        phase: The phase.

    >>> metric("dead_pct", "train"), metric("dead_pct", "val")
    ('dead_pct', 'val_dead_pct')
    """
    return name if phase == "train" else f"{safe(phase).replace('/', _PART)}_{name}"


def groups(names: Sequence[str]) -> list[Group]:
    """Return what gets a chart of its own: every layer, or groups if there are more than :data:`MOST_CHARTS`."""
    return group_sites(names, MOST_CHARTS)


def group_tag(group: Group) -> str:
    """Return the last part of the tag of a layer or a group of layers.

    >>> from neuronscope.writers.grouping import Group
    >>> group_tag(Group("layers.0", "layers.3", ("layers.0.fc/relu", "layers.3.fc/relu"), False))
    'layers.0--to--layers.3'
    """
    if group.single:
        return safe(group.first)
    if group.last is None:
        return f"{safe(group.first)}--all"
    return f"{safe(group.first)}--to--{safe(group.last)}"
