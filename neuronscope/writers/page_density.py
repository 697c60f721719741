"""Draw how often the latents of each sparse layer fire, as bars of SVGs that need no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuronscope.report.report import SiteReport
from neuronscope.writers.formatting import count, plural, visible
from neuronscope.writers.wording import sparse

__all__ = ["Bar", "Density", "densities"]

#: Width of a bar with its gap, and height of the highest one.
_WIDTH, _HEIGHT = 24.0, 100.0


@dataclass(frozen=True)
class Bar:
    """One bar."""

    x: float
    y: float  # its upper end, from the top
    width: float
    height: float
    title: str  # what it stands for
    css: str


@dataclass(frozen=True)
class Density:
    """The histogram of one layer."""

    name: str
    sentence: str  # what it shows, in words
    bars: list[Bar]  # the bars, the first for latents that never fired
    width: float  # width of the drawing
    height: float
    ticks: list[tuple[float, str]]  # whole numbers below the bars, each with its place from the left


def densities(sites: Sequence[SiteReport]) -> list[Density]:
    """Return a histogram of log10 firing densities for each sparse layer that was observed."""
    return [_density(site) for site in sites if site.kind == "sparse" and not site.is_unseen]


def _density(site: SiteReport) -> Density:
    counts, edges = site.density_histogram()
    never = site.neurons - site.unseen - int(counts.sum())
    highest = max(never, int(counts.max(initial=0)), 1)

    def bar(place: float, number: int, title: str, css: str) -> Bar:
        height = round(_HEIGHT * number / highest, 2)
        return Bar(place * _WIDTH + 1, _HEIGHT - height, _WIDTH - 2, height, title, css)

    bars = [bar(0, never, f"{plural(never, 'latent')} never fired", "never")]
    for place, number in enumerate(counts.tolist()):
        between = f"fired at 10^{edges[place]:g} to 10^{edges[place + 1]:g} of the tokens"
        bars.append(bar(place + 3, number, f"{plural(number, 'latent')} {between}", "fired"))
    ticks = [((place + 3) * _WIDTH, f"{edge:g}".replace("-", "−")) for place, edge in enumerate(edges) if edge % 1 == 0]
    return Density(
        visible(site.name),
        sparse([site])[0].partition(": ")[2],
        bars,
        (len(counts) + 3) * _WIDTH,
        _HEIGHT,
        [(_WIDTH / 2, f"never ({count(never)})"), *ticks],
    )
