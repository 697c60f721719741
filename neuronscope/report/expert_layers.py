"""Find the experts of mixtures among the layers of a report, and say how the tokens are spread over them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import IntArray
from neuronscope.report.report import SiteReport

__all__ = ["ExpertLayer", "expert_layers"]

#: A number in a path that comes after a part named so is the number of an expert: the first one after ``experts``, as
#: an expert may be a list of layers; the last one after ``moe``, which may be a list of mixtures.
_NAMED = re.compile(r"(?:^|[._])(?:(experts?)|moe)(?=[._]|$)")
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one mixture (``E`` experts).

    Attributes:
        name: Name of the site with ``*`` in place of the expert's number: ``mlp.experts.w1.*/relu``.
        numbers: The number of each expert, in rising order. An expert that a loop has never run is not among them.
        experts: The site of each expert.
    """

    name: str
    numbers: tuple[int, ...]
    experts: tuple[SiteReport, ...]

    @property
    def tokens(self) -> IntArray:
        """How many tokens each expert was given in the window, int64 ``(E,)``."""
        return np.array([expert.positions for expert in self.experts], dtype=np.int64)

    @property
    def idle(self) -> tuple[int, ...]:
        """The numbers of the experts that were given no token in the window."""
        return tuple(number for number, expert in zip(self.numbers, self.experts, strict=True) if not expert.positions)

    @property
    def routing_entropy(self) -> float:
        """How evenly the tokens are spread: ``−Σ p ln p / ln E``, from 0 (one expert has all) to 1; NaN without tokens.

        >>> ExpertLayer("", (), ()).routing_entropy
        nan
        """
        tokens = self.tokens
        if tokens.sum() == 0 or len(tokens) < 2:
            return float("nan")
        share = tokens[tokens > 0] / tokens.sum()
        return float(abs((share * np.log(share)).sum()) / np.log(len(tokens)))


def expert_layers(layers: Iterable[SiteReport]) -> list[ExpertLayer]:
    """Return the mixtures of experts among layers, in their order.

    Layers whose paths differ in one number are the experts of a mixture if a part of the path before the number is
    ``expert``, ``experts`` or ``moe``; or if the number is at the end, as that of a matrix in a stack, and they were
    given different numbers of tokens. Of several activations of the same units the last one is taken: the product of
    a gate.

    Args:
        layers: The layers.
    """
    found: dict[str, dict[str, dict[int, SiteReport]]] = {}  # pattern on the layer → that on the site → number → site
    for site in layers:
        place = _number_in(site.layer)
        if place is None:
            continue
        start, stop, number = place
        pattern = f"{site.layer[:start]}*{site.layer[stop:]}"
        name = pattern + site.name[len(site.layer) :]
        found.setdefault(pattern, {}).setdefault(name, {})[number] = site
    mixtures = []
    for pattern, sites in found.items():
        name, experts = [*sites.items()][-1]
        tokens = {site.positions for site in experts.values()}
        if len(experts) > 1 and (_NAMED.search(pattern) or len(tokens) > 1):
            numbers = tuple(sorted(experts))
            mixtures.append(ExpertLayer(name, numbers, tuple(experts[number] for number in numbers)))
    return mixtures


def _number_in(layer: str) -> tuple[int, int, int] | None:
    """Return where the number of an expert begins and ends in a layer's path, and the number; ``None`` without one.

    >>> _number_in("layers.2.experts.5.0"), _number_in("mlp.w1.3"), _number_in("layers.2.up")
    ((17, 18, 5), (7, 8, 3), None)
    >>> _number_in("moe.layers.0.experts.5.2")  # the third module of expert 5
    (21, 22, 5)
    """
    for named in reversed([*_NAMED.finditer(layer)]):
        found = [*_NUMBER.finditer(layer, named.end())]
        if found:
            number = found[0 if named[1] else -1]
            break
    else:
        found = [*_NUMBER.finditer(layer)]
        if not found or _NAMED.search(layer) or found[-1].end() < len(layer):
            return None
        number = found[-1]
    return number.start(1), number.end(1), int(number[1])
