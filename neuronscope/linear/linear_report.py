"""Hold what was found of layers that act as one linear map, and say it in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from neuronscope.judge.verdicts import rate_bound
from neuronscope.writers.formatting import at_most, count, listed, plural, visible

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
        basis: ``proved`` if it holds for every input, ``measured`` if it was seen on the data.
        parameters: Number of parameters of the layers.
        inputs: Number of inputs of the map: features, channels, or all elements of an example; −1 if not known.
        outputs: Number of outputs, likewise.
        rank: Rank of the map's matrix, or the largest of the heads' ranks; −1 if it was not computed.
        heads: Number of maps: one, or one for each head of attention.
        kernel: Sizes of the kernel, if the map is a convolution.
        parameters_of_one: Number of parameters of one layer that computes the map; −1 if not known.
        difference: Largest difference between the layers' output and the map's, as a share of the largest output;
            ``None`` if it was not computed.
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

    def __str__(self) -> str:
        names = " → ".join(f"`{visible(name)}`" for name in self.layers)
        source = self.source if self.source == "the input" else f"what `{visible(self.source.strip('`'))}` gives"
        if self.through_attention:
            lines = [f"{names}: attention lies between them, which is linear in its values, head by head."]
        else:
            lines = [f"{names} compute one linear map of {source}."]
        if self.inputs >= 0:
            lines.append(self._size())
        if self.through:
            lines.append(f"Between them {listed(self.through)} {'acts' if len(self.through) == 1 else 'act'} linear.")
        if self.difference is not None:
            lines.append(f"That map gives their outputs to within {self.difference:.1e} of the largest.")
        return " ".join(lines)

    def _size(self) -> str:
        kernel = f", kernel {'×'.join(map(str, self.kernel))}" if self.kernel else ""
        rank = "" if self.rank < 0 else f", rank {count(self.rank)}"
        if self.through_attention:
            each = f"{plural(self.heads, 'head')}, each {count(self.inputs)} → {count(self.outputs)}{rank}"
            return f"{each}: a factorisation that is meant so."
        size = f"{count(self.inputs)} → {count(self.outputs)}{kernel}{rank}"
        return f"{size}: {plural(self.parameters, 'parameter')}, where one layer needs {count(self.parameters_of_one)}."


@dataclass(frozen=True)
class LinearReport:
    """What :func:`neuronscope.check_linear` found.

    Attributes:
        model: Class name of the model.
        examples: Number of examples that it ran on.
        reads_out: Whether the model's code read numbers out of tensors, so that it may compute otherwise for other
            inputs; then nothing is proved.
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
        return {**json.loads(json.dumps(asdict(self))), "rate_bound": self.rate_bound}

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        found = [each for each in self.stretches if not each.only_folds]
        folds = [each for each in self.stretches if each.only_folds]
        lines = [f"{visible(self.model)}, {plural(self.examples, 'example')}"]
        if not found:
            lines.append("No two layers act as one: a nonlinearity lies between all of them, and bends on this data.")
        for each in found:
            lines += ["", str(each), self._how_sure(each)]
        if self.acting_linear:
            lines += ["", "Activations that act linear on this data (each neuron always on, or always off):"]
            lines += [
                f"  {visible(name)}: {plural(neurons, 'neuron')}, {count(off)} of them always off"
                for name, (neurons, off) in self.acting_linear.items()
            ]
        if folds:
            norms = sum(len(each.layers) - 1 for each in folds)
            lines += ["", f"{plural(norms, 'norm')} can be folded into the layers beside them, as is usual."]
        return "\n".join(lines)

    def _how_sure(self, each: LinearLayers) -> str:
        if each.basis == "proved":
            return "Proved: no function between them is nonlinear, whatever the input."
        reason = "" if each.through else ", because the model's code reads numbers out of its tensors"
        return (
            f"Measured{reason}: true of all {plural(self.examples, 'example')}; of other examples it may be untrue of "
            f"{at_most(self.examples, _LEVEL)} at most (95 % confidence)."
        )
