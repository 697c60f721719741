"""Draw the experts of a mixture for a report's page: a row for each expert, its tokens, and its neurons as a strip."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from neuronscope.judge.verdicts import LABELS
from neuronscope.report.expert_layers import ExpertLayer, expert_layers
from neuronscope.report.report import Report, SiteReport
from neuronscope.writers.formatting import count, percent, plural
from neuronscope.writers.wording import expert_sentence, worst_experts

__all__ = ["ExpertRow", "Mixture", "mixtures"]

#: Mixtures and experts that are drawn, and places of a strip; of more neurons, several share a place.
LAYERS, EXPERTS, PLACES = 12, 64, 256
HEIGHT = 12
#: What is drawn in a strip, the most serious last: the label, and the class of its colour.
DRAWN = (("dormant", "warn"), ("cut off", "cut"), ("silent", "silent"), ("dead", "dead"), ("not finite", "alarm"))


class ExpertRow(NamedTuple):
    """One expert."""

    number: int
    tokens: str  # how many tokens it was given
    share: str  # which share of all that is
    dead: str  # how many of its neurons are dead
    strip: Markup  # its neurons, as SVG


class Mixture(NamedTuple):
    """The experts of one mixture."""

    name: str  # as of :class:`~neuronscope.report.expert_layers.ExpertLayer`
    sentence: str  # how the tokens are spread
    rows: list[ExpertRow]
    left_out: str  # what is not drawn; ``""`` = nothing


def mixtures(report: Report) -> tuple[list[Mixture], str]:
    """Return the drawings of a report's mixtures of experts, and a sentence on those that are left out."""
    found = expert_layers(report.headline_layers)
    ill = worst_experts(found, LAYERS)
    more = len(found) - len(ill)
    sentence = f"{plural(more, 'more mixture')} with fewer idle experts and dead neurons." if more else ""
    return [_mixture(layer, sure=not report.provisional) for layer in ill], sentence


def _mixture(layer: ExpertLayer, *, sure: bool) -> Mixture:
    tokens, sentence = layer.tokens, expert_sentence(layer, sure=sure)
    rows = [
        ExpertRow(
            number,
            count(expert.positions),
            percent(100 * expert.positions / tokens.sum()) if tokens.sum() else "–",
            count(int(expert.judgement.dead.sum())) if expert.positions else "unseen",
            _strip(expert),
        )
        for number, expert in zip(layer.numbers, layer.experts, strict=True)
    ]
    more = len(rows) - EXPERTS
    return Mixture(
        layer.name, sentence, rows[:EXPERTS], f"… {plural(more, 'more expert')} in the JSON report" if more > 0 else ""
    )


def _strip(expert: SiteReport) -> Markup:
    """Return the neurons of an expert as a strip; where several share a place, the most serious label is drawn."""
    places = min(PLACES, max(expert.neurons, 1))
    if not expert.positions:
        return _svg(places, [("unknown", f"M0 0h{places}v{HEIGHT}h-{places}z")])
    place = np.arange(expert.neurons) * places // max(expert.neurons, 1)
    grade = np.zeros(places, dtype=np.int64)
    labels = expert.judgement.labels()
    for number, (label, _) in enumerate(DRAWN, 1):
        np.maximum.at(grade, place[labels == LABELS.index(label)], number)
    paths = []
    for number, (_, css) in enumerate(DRAWN, 1):
        at = np.flatnonzero(grade == number)
        starts = at[np.diff(at, prepend=-2) > 1]
        ends = at[np.diff(at, append=places + 1) > 1] + 1
        if at.size:
            runs = zip(starts.tolist(), ends.tolist(), strict=True)
            paths.append((css, "".join(f"M{a} 0h{b - a}v{HEIGHT}h-{b - a}z" for a, b in runs)))
    return _svg(places, paths)


def _svg(places: int, paths: list[tuple[str, str]]) -> Markup:
    drawn = Markup("").join(Markup('<path class="fill-{}" d="{}"/>').format(css, path) for css, path in paths)
    return Markup(
        '<svg class="strip" viewBox="0 0 {} {}" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(places, HEIGHT, drawn)
