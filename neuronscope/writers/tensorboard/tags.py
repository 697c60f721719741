"""Name the number of each metric and layer with a tag that every logger accepts and that never changes during a run.

The metric comes first and the layer second (``neuronscope.dead_pct/layer1.0.bn2--relu``): TensorBoard makes a group of
the text before the first ``/``, and hundreds of groups with one chart each are of no help.
"""

from __future__ import annotations

import re
import zlib

from neuronscope.writers.grouping import Group

__all__ = ["MOST_CHARTS", "PLUGIN_NAME", "TAB_TAG", "card_name", "group_tag", "metric", "network_tag", "safe"]

PLUGIN_NAME = "neuronscope"
#: Last part of the tags of the tab's reports, after a phase that is not training.
TAB_TAG = "report"
#: Most charts of one metric; more layers are grouped by their place in the network.
MOST_CHARTS = 40

#: The network's numbers in the first group. What is zero in most runs would fill that with empty charts.
_FIRST = ("dead_pct", "deaths_total", "dormant_pct", "worst_layer_dead_pct", "revived_total")

_LONGEST = 120
#: Characters that a card's title shows of what follows the last ``/``, beside a beginning that is cut.
_ON_CARD = 23
#: Stands where a ``/`` would make TensorBoard cut the name before it; no safe name that is shorter has it.
_JOINT = "--"
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


def network_tag(name: str, phase: str) -> str:
    """Return the tag of one of the network's numbers: in the first group what matters most, in a second what is left.

    Args:
        name: The metric.
        phase: The phase.

    >>> network_tag("dead_pct", "val"), network_tag("not_finite_pct", "train")
    ('neuronscope/val_dead_pct', 'neuronscope.more/not_finite_pct')
    """
    return f"neuronscope{'' if name in _FIRST else '.more'}/{metric(name, phase)}"


def group_tag(group: Group) -> str:
    """Return the last part of the tag of a layer or a group of layers; see :func:`card_name`.

    >>> from neuronscope.writers.grouping import Group
    >>> group_tag(Group("layers.0", "layers.3", ("layers.0.fc/relu", "layers.3.fc/relu"), False))
    'layers.0--to--3'
    """
    if group.single:
        return card_name(group.first)
    if group.last is None:
        return card_name(group.first, f"{_JOINT}all")
    return card_name(group.first, f"{_JOINT}to{_JOINT}{safe(group.short_last)}")


def card_name(name: str, ending: str = "") -> str:
    """Return a layer's name for the tag of a chart or a picture, so that the titles of cards can be told apart.

    Of a long title, TensorBoard shows the beginning and what follows the last ``/``. So the one ``/`` stands where the
    rest just fits on a card.

    Args:
        name: The layer's name.
        ending: Stands behind it.

    >>> card_name("model.decoder.layers.11.mlp.fc1/relu"), card_name("layer1.0.bn2/relu")
    ('model.decoder/layers.11.mlp.fc1--relu', 'layer1.0.bn2--relu')
    """
    layer, _, activation = safe(name).rpartition("/")
    whole = f"{layer}{_JOINT}{activation}{ending}" if layer else f"{activation}{ending}"
    dots = [at for at, char in enumerate(layer or activation) if char == "."]
    if len(whole) <= _ON_CARD or not dots:
        return whole
    cut = next((at for at in dots if len(whole) - at - 1 <= _ON_CARD), dots[-1])
    return f"{whole[:cut]}/{whole[cut + 1 :]}"
