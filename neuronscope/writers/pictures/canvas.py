"""A sheet of paper to draw on: text that fits its place, boxes, smooth lines, and the array that comes of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neuronscope.errors import MissingExtraError
from neuronscope.writers.pictures.axis import StepAxis, count
from neuronscope.writers.pictures.colours import FRAME, INK, MUTED, PAPER, UNSEEN, UNSEEN_STRIPE, Colour, mix

try:
    from PIL import Image, ImageDraw, ImageFont
    from PIL import __version__ as _pillow
except ImportError as error:
    raise MissingExtraError(
        "Expected Pillow for drawing pictures, but it is not installed: pip install pillow"
    ) from error

__all__ = ["Canvas", "draw_steps", "printable", "stripes"]

ByteArray = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
Point = tuple[float, float]

_FINE_STROKES = int(_pillow.partition(".")[0]) >= 11  # before, a stroke was a whole number of pixels
# What Pillow's own typeface (Aileron, cut down) has beyond ASCII, and how to write some of what it has not.
_EXTRA_GLYPHS = "…·±"
_SPELT = {
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MINUS SIGN}": "-",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{GREEK SMALL LETTER TAU}": "tau",
}


def printable(text: str) -> str:
    """``text`` with everything that the typeface cannot draw, or that would break a line, turned into ``?``."""
    return "".join(c if " " <= c <= "~" or c in _EXTRA_GLYPHS else _SPELT.get(c, "?") for c in text)


class Canvas:
    """A sheet of paper to draw on.

    Args:
        width: Its width in pixels.
        height: Its height in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.height = height
        self._image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        # TensorBoard shrinks pictures by leaving out pixels: strokes a little thicker survive that.
        self._weight = 0.4 if _FINE_STROKES else 0
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def array(self) -> ByteArray:
        """The finished picture, uint8 ``(height, width, 3)``."""
        return np.asarray(self._image, dtype=np.uint8).copy()

    def text(
        self, at: Point, text: str, size: int, colour: Colour = INK, anchor: str = "ls", *, bold: bool = False
    ) -> None:
        """Text at a point. ``anchor`` is Pillow's: l/m/r across, then a/m/s (top, middle, baseline)."""
        stroke = max(1, round(size / 40)) if bold else self._weight
        self._draw.text(at, printable(text), colour, self._font(size), anchor, stroke_width=stroke, stroke_fill=colour)

    def text_width(self, text: str, size: int) -> float:
        """Width of ``text`` in pixels."""
        return float(self._font(size).getlength(printable(text)))

    def fit(self, text: str, size: int, width: float) -> str:
        """``text``, its middle replaced by an ellipsis where it is wider than ``width``."""
        text = printable(text)
        if self.text_width(text, size) <= width:
            return text
        low, high = 0, len(text)  # characters kept; the width grows with them, so bisect
        while low < high:
            middle = (low + high + 1) // 2
            if self.text_width(_shortened(text, middle), size) <= width:
                low = middle
            else:
                high = middle - 1
        return _shortened(text, low)

    def box(self, box: Box, fill: Colour | None = None, outline: Colour | None = None, width: int = 1) -> None:
        """A filled or framed rectangle; the right and bottom edges are outside."""
        left, top, right, bottom = (round(value) for value in box)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill, outline, width)

    def hatch(self, box: Box) -> None:
        """A striped rectangle: *not observed*."""
        left, top, right, bottom = (round(value) for value in box)
        if right <= left or bottom <= top:
            return
        tile = stripes(bottom - top, right - left)
        self._image.paste(Image.fromarray(tile), (left, top))

    def line(self, points: Sequence[Point], colour: Colour = FRAME, width: float = 1.0) -> None:
        """A line through points."""
        if len(points) > 1:
            self._draw.line(list(points), colour, max(1, round(width)), joint="curve")

    def pixels(self, at: Point, picture: ByteArray) -> None:
        """Paste an array of pixels, uint8 ``(h, w, 3)``, with its top left corner at a point."""
        self._image.paste(Image.fromarray(picture), (round(at[0]), round(at[1])))

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size)
        return self._fonts[size]


def draw_steps(canvas: Canvas, axis: StepAxis, top: float, size: int) -> None:
    """Draw a step axis below a picture: ticks, and the steps at them, as many as there is room for."""
    widest = canvas.text_width(count(int(axis.last)), size)
    for step in axis.ticks(max(2, int(axis.width / (widest * 1.4)))):
        x = axis.x(step)
        canvas.line([(x, top), (x, top + 6)], MUTED, 2)
        inside = min(max(x, axis.left + canvas.text_width(count(step), size) / 2), _rightmost(canvas, axis, step, size))
        canvas.text((inside, top + 28), count(step), size, MUTED, "ms")


def _rightmost(canvas: Canvas, axis: StepAxis, step: int, size: int) -> float:
    return axis.left + axis.width - canvas.text_width(count(step), size) / 2


def stripes(height: int, width: int) -> ByteArray:
    """Slanted stripes that stand for *not observed*, uint8 ``(height, width, 3)``."""
    rows, columns = np.ogrid[:height, :width]
    on = (rows + columns) // 3 % 3 == 0
    stripe = mix(UNSEEN, UNSEEN_STRIPE, 0.8)
    return np.where(on[..., None], np.array(stripe, np.uint8), np.array(UNSEEN, np.uint8))


def _shortened(text: str, keep: int) -> str:
    """``keep`` characters of ``text`` around an ellipsis; the end says more than the beginning in a module path."""
    if keep >= len(text):
        return text
    head = keep // 3
    tail = keep - head
    return text[:head] + "…" + (text[-tail:] if tail else "")
