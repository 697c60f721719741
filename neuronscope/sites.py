"""Identify and describe a site: its key, its name, and its properties other than counts.

A site is a place in the network where an activation is observed. Its name is built by :class:`SiteKey` only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

__all__ = [
    "INFERENCE",
    "NAMED_TENSOR",
    "NAMES_EXPERTS",
    "IncomingRows",
    "ReaderColumns",
    "SiteDescription",
    "SiteInfo",
    "SiteKey",
    "expert_number",
]


#: The phase of forwards that begin without gradients while the phase is ``train``.
INFERENCE = "inference"
#: The place of a tensor that the user named.
NAMED_TENSOR = "scope.count()"


#: A number in a path that comes after a part named so is the number of an expert: the first one after ``experts``, as
#: an expert may be a list of layers; the last one after ``moe``, which may be a list of mixtures.
NAMES_EXPERTS = re.compile(r"(?:^|[._])(?:(experts?)|moe)(?=[._]|$)")
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def expert_number(layer: str) -> tuple[int, int, int] | None:
    """Return where the number of an expert begins and ends in a layer's path, and the number; ``None`` without one.

    If no part of the path is named as experts are, a number at its end is taken.

    >>> expert_number("layers.2.experts.5.0"), expert_number("mlp.w1.3"), expert_number("layers.2.up")
    ((17, 18, 5), (7, 8, 3), None)
    >>> expert_number("moe.layers.0.experts.5.2")  # the third module of expert 5
    (21, 22, 5)
    """
    for named in reversed([*NAMES_EXPERTS.finditer(layer)]):
        found = [*_NUMBER.finditer(layer, named.end())]
        if found:
            number = found[0 if named[1] else -1]
            break
    else:
        found = [*_NUMBER.finditer(layer)]
        if not found or NAMES_EXPERTS.search(layer) or found[-1].end() < len(layer):
            return None
        number = found[-1]
    return number.start(1), number.end(1), int(number[1])


class SiteKey(NamedTuple):
    """Identify a site: the layer, which of its units, the activation, and a number if several are alike.

    The key does not depend on how often, in which order or by which object a layer or an activation is called. All
    calls of a site add up.

    Attributes:
        layer: Path of the layer; ``a+b`` for two layers whose outputs were joined. If no layer is known, the place of
            the activation: the path of its module, or the function in the module that calls it, ``block.relu()``.
        units: Which units of the layer, as ``0:28``, or of several, as ``a:0:8,b:0:5``; ``""`` for all of them.
        activation: Name of the activation, or of the gated product; ``""`` for an activation without a known layer.
        ordinal: Number among the activations of one name that one call of the layer feeds with the same units.

    >>> SiteKey("layer1.0.bn2", "", "relu", 0).name
    'layer1.0.bn2/relu'
    >>> SiteKey("mlp.gate_up_proj", "0:28", "silu", 1).name
    'mlp.gate_up_proj(0:28)/silu#1'
    >>> SiteKey("features.3", "", "", 0).name
    'features.3'
    """

    layer: str
    units: str
    activation: str
    ordinal: int

    @property
    def name(self) -> str:
        """The site's name, as reports show it and patterns match it."""
        units = f"({self.units})" if self.units else ""
        activation = f"/{self.activation}" if self.activation else ""
        return f"{self.layer}{units}{activation}" + (f"#{self.ordinal}" if self.ordinal else "")


class IncomingRows(NamedTuple):
    """Which rows of a layer lead into which neurons of a site.

    A row is an index of the layer's output: of the first dimension of a linear layer's or convolution's weight, of its
    bias, of a normalisation's entries. Neuron ``neuron + j`` of the site has the row ``row + j * step``.

    Attributes:
        layer: Path of the layer.
        neuron: The first neuron that it leads into.
        neurons: Number of neurons that it leads into.
        row: The row of the first neuron.
        step: Distance of the rows of neighbouring neurons.

    >>> IncomingRows("up_proj", neuron=0, neurons=3, row=8, step=1).of(1)
    9
    """

    layer: str
    neuron: int
    neurons: int
    row: int
    step: int

    def of(self, neuron: int) -> int | None:
        """Return the row that leads into a neuron of the site, or ``None``."""
        place = neuron - self.neuron
        return self.row + place * self.step if 0 <= place < self.neurons else None


class ReaderColumns(NamedTuple):
    """Which columns of a layer read which neurons of a site.

    A column is an index of the layer's input: of the last dimension of a linear layer's, a channel of a convolution's.
    Neuron ``neuron + j`` of the site is read by the columns ``column + j * step + k * column_step`` for ``k`` from 0 to
    ``columns - 1``. After a flattening of ``(C, H, W)``, a channel has ``H * W`` columns.

    Attributes:
        layer: Path of the layer that reads.
        neuron: The first neuron that it reads.
        neurons: Number of neurons that it reads.
        column: The first column of the first neuron.
        step: Distance of the first columns of neighbouring neurons.
        columns: Number of columns of a neuron.
        column_step: Distance of the columns of one neuron.

    >>> ReaderColumns("out", neuron=0, neurons=3, column=8, step=4, columns=4, column_step=1).of(1)
    [12, 13, 14, 15]
    """

    layer: str
    neuron: int
    neurons: int
    column: int
    step: int
    columns: int
    column_step: int

    def of(self, neuron: int) -> list[int]:
        """Return the columns that read a neuron of the site; ``[]`` if there are none."""
        place = neuron - self.neuron
        if not 0 <= place < self.neurons:
            return []
        first = self.column + place * self.step
        return [first + number * self.column_step for number in range(self.columns)]


@dataclass(frozen=True, kw_only=True)
class SiteDescription:
    """Describe a site: what reports show of it and actions on its weights need.

    Attributes:
        activation: Name of the activation function (``relu``, ``gelu``, …).
        kind: ``relu-like``, ``smooth``, ``leaky``, ``saturating``, ``gated`` or ``sparse``.
        axis: The dimension of the activation tensor that indexes the neurons, at the first observed call; ≥ 0.
        axis_source: How the axis was found: ``layer (fc)``, ``declared`` or ``assumed (rank)``.
        layer: Path of the layer whose units the neurons are; ``""`` if no layer is known. Branches that were joined
            have both paths, as in ``a+b``.
        units: The units that the neurons are, in their order: (layer, start, stop, step) of each run of units; empty if
            no layer is known.
        output: Whether the layer gives outputs of the network (no other layer reads it) and a function was applied to
            it, as a loss does.
        readers: Paths of the layers that read the site's output as their input.
        reader_columns: Which columns of these layers read which neurons.
        reader_notes: Other ways in which its output is read: ``added in`` (a residual sum), ``mixed by a norm``,
            ``returned by the model``, a function's name, or that the columns of a layer are not known. If there are
            any, ``reader_columns`` do not tell everything.
        incoming: Which rows of which layers lead into which neurons: those of the layer, of the layer that it
            normalises one by one, and of the layers whose outputs multiply the neurons.
        incoming_notes: Why these rows are not all that leads into the neurons, or lead elsewhere too.
        is_norm: Whether the layer is a normalisation.
        normalises: Path of the layer whose units it normalises one by one, so that unit ``i`` of both is one neuron;
            ``""`` if there is no such layer.
    """

    activation: str
    kind: str
    axis: int
    axis_source: str
    layer: str = ""
    units: tuple[tuple[str, int, int, int], ...] = ()
    output: bool = False
    readers: tuple[str, ...] = ()
    reader_columns: tuple[ReaderColumns, ...] = ()
    reader_notes: tuple[str, ...] = ()
    incoming: tuple[IncomingRows, ...] = ()
    incoming_notes: tuple[str, ...] = ()
    is_norm: bool = False
    normalises: str = ""

    def description(self) -> dict[str, Any]:
        """Return the attributes above by name."""
        return {each.name: getattr(self, each.name) for each in fields(SiteDescription)}

    @property
    def weights_unknown(self) -> str:
        """Why it is not known exactly which weights lead into the neurons and which read them; ``""`` if it is."""
        reasons = [*self.incoming_notes, *self.reader_notes]
        if self.assumed:
            reasons.append("its axis is only assumed")
        elif not self.incoming:
            reasons.append("no weight that leads into it was seen")
        elif not self.reader_columns and not reasons:
            reasons.append("no layer was seen to read it")
        return "; ".join(reasons)

    @property
    def assumed(self) -> bool:
        """Whether it was only assumed which dimension indexes the neurons."""
        return self.axis_source.startswith("assumed")

    @property
    def in_headlines(self) -> bool:
        """Whether totals, metrics and alarms include the site: its units are known, and are not outputs."""
        return not (self.assumed or self.output)


@dataclass(frozen=True, kw_only=True)
class SiteInfo(SiteDescription):
    """Describe a site while it is counted: all that is known about it except its counts.

    Attributes:
        linear_when_on: See :class:`neuronscope.attach.activations.Activation`.
        first: If ranks share a layer's neurons, the index of this rank's first neuron in the whole layer; −1 if another
            rank counts the same neurons at the same positions.
        whole: Number of neurons in the whole layer; 0 if the layer is not known to be shared between ranks.
        place: Path of the activation module, or the function in the module that calls it: ``block.relu()``.
    """

    linear_when_on: bool
    first: int = 0
    whole: int = 0
    place: str = ""
