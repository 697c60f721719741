"""Define the colours of the pictures: a neutral paper for light and dark pages, scales safe for colour-blind eyes."""

from __future__ import annotations

import numpy as np

from neuronscope.arrays import ByteArray, FloatArray

__all__ = [
    "ALIVE_HIGH",
    "ALIVE_LOW",
    "CUT_OFF",
    "DEAD",
    "DORMANT",
    "FRAME",
    "INK",
    "MUTED",
    "NOT_FINITE",
    "PAPER",
    "SERIES",
    "SILENT",
    "UNSEEN",
    "UNSEEN_STRIPE",
    "ZERO",
    "Colour",
    "as_hex",
    "mix",
    "share_colours",
]

Colour = tuple[int, int, int]

#: Pictures do not know whether the page around them is light or dark: this grey glares on neither.
PAPER: Colour = (206, 207, 205)
INK: Colour = (20, 23, 28)
MUTED: Colour = (58, 63, 70)
FRAME: Colour = (150, 151, 148)

# Verdicts. Lightness differs as well as hue, so that they stay apart in grey.
DEAD: Colour = (190, 26, 36)
SILENT: Colour = (204, 121, 167)
CUT_OFF: Colour = (118, 80, 164)
DORMANT: Colour = (238, 167, 38)
NOT_FINITE: Colour = (12, 12, 14)
UNSEEN: Colour = (226, 225, 220)
UNSEEN_STRIPE: Colour = (176, 175, 170)
# Living neurons, from never zero to nearly always zero: a scale that stays far from the verdicts' hues.
ALIVE_LOW: Colour = (226, 236, 241)
ALIVE_HIGH: Colour = (92, 134, 164)

#: A dead share of exactly zero. Anything above it begins at the first colour of the scale, so one dead neuron shows.
ZERO: Colour = (219, 228, 231)
_SHARE_STOPS: tuple[tuple[float, Colour], ...] = (
    (0.0, (253, 219, 176)),
    (0.1, (250, 172, 108)),
    (0.3, (230, 100, 60)),
    (0.6, (190, 26, 36)),
    (1.0, (94, 0, 20)),
)

#: One colour a curve: Okabe and Ito's set, darkened where the paper is too light for it, then three more.
SERIES: tuple[Colour, ...] = (
    (196, 68, 12),
    (0, 104, 170),
    (0, 140, 105),
    (196, 96, 152),
    (214, 140, 0),
    (70, 160, 214),
    (60, 60, 66),
    (122, 92, 38),
    (104, 70, 170),
    (120, 150, 30),
)


def share_colours(shares: FloatArray) -> ByteArray:
    """Return the colours of dead shares in [0, 1], any shape ``S``, as uint8 ``S + (3,)``; exactly 0 has its own."""
    stops = [stop for stop, _ in _SHARE_STOPS]
    channels = [np.interp(shares, stops, [colour[c] for _, colour in _SHARE_STOPS]) for c in range(3)]
    colours = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    colours[shares <= 0.0] = ZERO
    return colours


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Mix two colours.

    Args:
        first: The first colour.
        second: The second colour.
        share: Share of the second colour, in [0, 1].
    """
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def as_hex(colour: Colour) -> str:
    """Return a colour as ``#rrggbb``, for matplotlib."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
