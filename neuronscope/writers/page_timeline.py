"""Draw what happened to a network by optimizer step, as paths of SVGs that need no script and share one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import IntArray
from neuronscope.writers.formatting import count, plural

__all__ = ["BINS", "HEIGHT", "WIDTH", "Timeline", "Track", "bars", "timeline"]

#: Size of a drawing, and height of its highest bar.
WIDTH, HEIGHT = 1000.0, 100.0
#: Most bins that a run is divided into.
BINS = 120
#: A series whose highest value is more than this many times its median is drawn on a logarithmic scale.
_LOGARITHMIC = 100.0
#: How the page names the series of :attr:`neuronscope.report.report.Report.series`.
_SERIES = (("learning_rate", "learning rate"), ("loss", "loss"), ("gradient_norm", "gradient norm"))


@dataclass(frozen=True)
class Track:
    """One drawing of the timeline."""

    name: str  # what it shows
    css: str
    scale: str  # its highest value, in words
    path: str  # an SVG path over ``0 0 WIDTH HEIGHT``


@dataclass(frozen=True)
class Timeline:
    """Drawings over the steps of a run, one below the other."""

    tracks: list[Track]
    marks: list[float]  # where checkpoints were saved, from 0 to ``WIDTH``
    ticks: list[int]  # steps to write below the drawings, evenly spaced from the first to the last


def timeline(
    died: IntArray,
    revived: IntArray,
    last: int,
    series: Mapping[str, Sequence[tuple[int, float]]],
    checkpoints: Sequence[int] = (),
) -> Timeline | None:
    """Draw deaths and revivals, and what the training logged; ``None`` if nothing is dated and nothing was logged.

    Args:
        died: Step of each dated death, int64 ``(D,)``.
        revived: Step of each revival, int64 ``(R,)``.
        last: Last step of the run, unless there is a later one.
        series: Points ``(step, value)`` of what was logged; see :attr:`neuronscope.report.report.Report.series`.
        checkpoints: Steps at which checkpoints were saved.
    """
    lines = [(name, css, series[css]) for css, name in _SERIES if len(series.get(css, ())) > 1]
    if not died.size and not revived.size and not lines:
        return None
    last = max([last, 1, *died.tolist(), *revived.tolist(), *(points[-1][0] for _, _, points in lines)])
    bins = min(BINS, last + 1)
    width = (last + 1) / bins
    tracks = []
    for name, css, steps in (("deaths", "died", died), ("revivals", "revived", revived)):
        if steps.size:
            counts = np.histogram(steps, bins=bins, range=(0, last + 1))[0]
            within = f" within about {plural(round(width), 'step')}" if width > 1 else " at one step"
            scale = f"{count(int(steps.size))} in all, at most {count(int(counts.max()))}{within}"
            tracks.append(Track(name, css, scale, bars(counts, WIDTH / bins)))
    tracks += [_line(name, css.replace("_", "-"), points, last) for name, css, points in lines]
    return Timeline(
        tracks,
        [round(WIDTH * step / last, 1) for step in checkpoints if step <= last],
        [0, last // 2, last] if last > 1 else [0, last],
    )


def bars(counts: IntArray, width: float = 1.0) -> str:
    """Return bars as one path; a bar that is not zero is always high enough to be seen.

    Args:
        counts: Height of each bar, int64 ``(B,)``; the highest is scaled to ``HEIGHT``.
        width: Width of a bar.
    """
    heights = np.maximum(np.round(HEIGHT * counts / counts.max()), 4)
    found = np.flatnonzero(counts).tolist()
    return "".join(f"M{at * width:g} {HEIGHT:g}v-{heights[at]:g}h{width:g}v{heights[at]:g}z" for at in found)


def _line(name: str, css: str, points: Sequence[tuple[int, float]], last: int) -> Track:
    """Draw a series as a line, interrupted where it is not finite."""
    steps, values = np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=np.float64)
    finite = np.isfinite(values)
    broken = f", not finite from step {count(int(steps[~finite][0]))}" if not finite.all() else ""
    if not finite.any():
        return Track(name, css, broken.lstrip(", "), "")
    highest = int(np.nanargmax(np.where(finite, values, -np.inf)))
    median, top = float(np.median(values[finite])), float(values[highest])
    logarithmic = values[finite].min() > 0 and top > _LOGARITHMIC * median
    drawn = np.log(values, where=finite & (values > 0), out=np.full(values.shape, np.nan)) if logarithmic else values
    low, high = (float(edge(drawn[finite])) for edge in (np.min, np.max))
    path, begun = [], False
    for step, value, known in zip(steps.tolist(), drawn.tolist(), finite.tolist(), strict=True):
        if known:
            y = HEIGHT - 4 - (HEIGHT - 8) * ((value - low) / (high - low) if high > low else 0.5)
            path.append(f"{'L' if begun else 'M'}{WIDTH * step / last:.1f} {y:.1f}")
        begun = known
    scale = f"at most {top:.3g} at step {count(int(steps[highest]))}, median {median:.3g}"
    return Track(name, css, scale + (", logarithmic" if logarithmic else "") + broken, "".join(path))
