"""Find the experts of mixtures among the layers of a report, and say how the tokens are spread over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import IntArray
from neuronscope.report.report import SiteReport
from neuronscope.sites import NAMES_EXPERTS, expert_number

__all__ = ["ExpertLayer", "expert_layers"]


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one mixture (``E`` experts)."""

    name: str  # name of the site with ``*`` in place of the expert's number: ``mlp.experts.w1.*/relu``
    numbers: tuple[int, ...]  # the number of each expert, in rising order
    experts: tuple[SiteReport, ...]  # the site of each expert

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
    """
    found: dict[str, dict[str, dict[int, SiteReport]]] = {}  # pattern on the layer → that on the site → number → site
    for site in layers:
        place = expert_number(site.layer)
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
        if len(experts) > 1 and (NAMES_EXPERTS.search(pattern) or len(tokens) > 1):
            numbers = tuple(sorted(experts))
            mixtures.append(ExpertLayer(name, numbers, tuple(experts[number] for number in numbers)))
    return mixtures
