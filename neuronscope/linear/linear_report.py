"""Hold what was found of layers that act as one linear map, and say it in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from neuronscope.judge.verdicts import rate_bound
from neuronscope.writers.formatting import at_most, count, listed, percent, plural, visible

__all__ = ["LinearLayers", "LinearReport"]

_LEVEL = 0.95


@dataclass(frozen=True)
class LinearLayers:
    """Two or more layers that compute one affine map.

    Attributes:
        layers: Paths of the layers, norms included, in the order of their calls.
        through: Names of the activations between them, each of which acts linear on the data.
        source: What the map is applied to: ``the input``, or the name of what gives it.
        only_folds: Whether all layers but one are norms, which a deployed network can fold into that one.
        through_attention: Whether attention mixes positions between them: then it is one map for each head, and
            nothing is saved by putting one layer in their place.
        basis: ``proved`` if it holds for every input (behind attention: while attention's weights stay), ``measured``
            if it was seen on the data.
        parameters: Number of parameters of the layers.
        inputs: Number of inputs of the map: features, channels, or all elements of an example; −1 if not known.
        outputs: Number of outputs, likewise.
        rank: Rank of the map's matrix, or the largest of the heads' ranks; −1 if it was not computed.
        heads: Number of maps: one, or one for each head of attention.
        kernel: Sizes of the kernel, if the map is a convolution.
        parameters_of_one: Number of parameters of one layer that computes the map; −1 if not known.
        difference: Largest difference between the layers' output and the map's, as a share of the largest output;
            ``None`` if it was not computed.
        border_share: Share of the positions of a map of channels at which the one convolution gives something else than
            the layers: near the borders, if a layer pads what another one gave. 0 if the map is no convolution.
        matrix: The map's matrix, ``(outputs, inputs)``, or ``(outputs, inputs · kernel)`` of a convolution; ``None``
            if it was not computed, or if there are several heads.
        offset: What the map adds, ``(outputs,)``; where each position is mapped, at the first one.
    """

    layers: tuple[str, ...]
    through: tuple[str, ...]
    source: str
    only_folds: bool
    through_attention: bool
    basis: str
    parameters: int
    inputs: int
    outputs: int
    rank: int
    heads: int
    kernel: tuple[int, ...]
    parameters_of_one: int
    difference: float | None
    border_share: float
    matrix: npt.NDArray[np.floating[Any]] | None = field(default=None, repr=False, compare=False)
    offset: npt.NDArray[np.floating[Any]] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data, without the map itself."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("matrix", "offset")}

    @property
    def size(self) -> str:
        """The map's size and rank, in words; ``""`` if they are not known."""
        if self.inputs < 0:
            return ""
        heads = f"{plural(self.heads, 'head')}, each " if self.through_attention else ""
        kernel = f", kernel {'×'.join(map(str, self.kernel))}" if self.kernel else ""
        rank = "" if self.rank < 0 else f", rank {count(self.rank)}"
        return f"{heads}{count(self.inputs)} → {count(self.outputs)}{kernel}{rank}"

    def __str__(self) -> str:
        names = " → ".join(f"`{visible(name)}`" for name in self.layers)
        source = self.source if self.source == "the input" else f"what `{visible(self.source.strip('`'))}` gives"
        lines = [f"{names} are one linear map of {source}."]
        if self.size:
            saved = f"{plural(self.parameters, 'parameter')}, where one layer needs {count(self.parameters_of_one)}"
            lines.append(f"{self.size}{'' if self.through_attention else f': {saved}'}.")
        if self.through:
            lines.append(f"Between them {listed(self.through)} {'acts' if len(self.through) == 1 else 'act'} linear.")
        if self.difference is not None:
            near = f"The map gives what the layers give, to within {self.difference:.1e} of the largest output"
            unlike = (
                f", but not at {percent(100 * self.border_share)} of the positions, near the borders: there a layer"
                " pads what another one gave"
            )
            lines.append(f"{near}{unlike if self.border_share else ''}.")
        return " ".join(lines)


@dataclass(frozen=True)
class LinearReport:
    """What :func:`neuronscope.check_linear` found.

    Attributes:
        model: Class name of the model.
        examples: Number of examples that it ran on.
        reads_out: Whether the model's code read numbers out of tensors, or wrote through ``.data``, so that it may
            compute otherwise for other inputs; then nothing is proved.
        stretches: The layers that compute one map together, in the order of the forward.
        acting_linear: Activations that act linear on the data: the number of their neurons, and how many of these
            give a constant (a ReLU that is never on).
    """

    model: str
    examples: int
    reads_out: bool
    stretches: tuple[LinearLayers, ...]
    acting_linear: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def rate_bound(self) -> float:
        """Rate of other examples on which what was measured may not hold, at most (95 % confidence)."""
        return rate_bound(self.examples, _LEVEL)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**plain, "stretches": [each.to_dict() for each in self.stretches], "rate_bound": self.rate_bound}

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        found = [each for each in self.stretches if not each.only_folds]
        folds = [each for each in self.stretches if each.only_folds]
        lines = [f"{visible(self.model)}, {plural(self.examples, 'example')}"]
        if not found:
            lines.append("No two layers were found that act as one.")
        for each in found:
            if not each.through_attention:
                lines += ["", str(each), self._how_sure(each)]
        lines += self._attention([each for each in found if each.through_attention])
        if self.acting_linear:
            lines += ["", "Activations that act linear on this data (each neuron keeps one slope and one offset):"]
            lines += [
                f"  {visible(name)}: {plural(neurons, 'neuron')}, {count(off)} of them constant"
                for name, (neurons, off) in self.acting_linear.items()
            ]
        if folds:
            norms = sum(len(each.layers) - 1 for each in folds)
            lines += ["", f"{plural(norms, 'norm')} can be folded into the layers beside them, as is usual."]
        return "\n".join(lines)

    def _attention(self, found: list[LinearLayers]) -> list[str]:
        """Return the lines on value and output projections, which are alike in most blocks."""
        if not found:
            return []
        names = listed([" → ".join(each.layers) for each in found])
        sizes = dict.fromkeys(each.size for each in found)
        text = f"Attention is linear in its values. Head by head these are one map, meant so: {names}"
        return ["", f"{text} ({'; '.join(filter(None, sizes))})."]

    def _how_sure(self, each: LinearLayers) -> str:
        if each.basis == "proved":
            return "Proved: no function between them is nonlinear, whatever the input."
        reason = "" if each.through else ", because the model's code reads numbers out of its tensors"
        return (
            f"Measured{reason}: true of all {plural(self.examples, 'example')}; of other examples it may be untrue of "
            f"{at_most(self.examples, _LEVEL)} at most (95 % confidence)."
        )
