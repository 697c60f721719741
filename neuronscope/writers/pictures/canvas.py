"""Draw text that fits its place, boxes and lines, and return the picture as an array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neuronscope.arrays import ByteArray
from neuronscope.errors import requiring
from neuronscope.writers.formatting import count
from neuronscope.writers.pictures.axis import StepAxis
from neuronscope.writers.pictures.colours import FRAME, INK, MUTED, PAPER, UNSEEN, UNSEEN_STRIPE, Colour, mix

with requiring("Pillow", "drawing pictures", "pillow"):
    from PIL import Image, ImageDraw, ImageFont
    from PIL import __version__ as _pillow

__all__ = ["Canvas", "draw_steps", "printable", "stripes"]

Box = tuple[float, float, float, float]
Point = tuple[float, float]

_FINE_STROKES = int(_pillow.partition(".")[0]) >= 11  # older versions allow only whole numbers of pixels
# Characters beyond ASCII that Pillow's own typeface (a reduced Aileron) has, and how to write some that it lacks.
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
    """Replace by ``?`` every character that the typeface cannot draw or that would break the line."""
    return "".join(c if " " <= c <= "~" or c in _EXTRA_GLYPHS else _SPELT.get(c, "?") for c in text)


class Canvas:
    """A picture to draw on, of so many pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.height = height
        self._image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        # TensorBoard shrinks pictures by leaving out pixels: slightly thicker strokes survive that.
        self._weight = 0.4 if _FINE_STROKES else 0
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def array(self) -> ByteArray:
        """Return the finished picture, uint8 ``(height, width, 3)``."""
        return np.asarray(self._image, dtype=np.uint8).copy()

    def text(
        self, at: Point, text: str, size: int, colour: Colour = INK, anchor: str = "ls", *, bold: bool = False
    ) -> None:
        """Draw text.

        Args:
            at: The point of its anchor.
            text: The text.
            size: Size of the typeface in pixels.
            colour: Its colour.
            anchor: As in Pillow: l, m or r (left, middle, right), then a, m or s (top, middle, baseline).
            bold: Whether it is bold.
        """
        stroke = max(1, round(size / 40)) if bold else self._weight
        self._draw.text(at, printable(text), colour, self._font(size), anchor, stroke_width=stroke, stroke_fill=colour)

    def text_width(self, text: str, size: int) -> float:
        """Return the width of a text in pixels.

        Args:
            text: The text.
            size: Size of the typeface in pixels.
        """
        return float(self._font(size).getlength(printable(text)))

    def fit(self, text: str, size: int, width: float) -> str:
        """Return a text; if it is too wide, replace its middle by an ellipsis.

        Args:
            text: The text.
            size: Size of the typeface in pixels.
            width: Most pixels.
        """
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

    def box(self, box: Box, fill: Colour | None = None, outline: Colour | None = None) -> None:
        """Draw a rectangle.

        Args:
            box: Left, top, right and bottom; the right and bottom edges lie outside.
            fill: Colour of its inside.
            outline: Colour of its frame.
        """
        left, top, right, bottom = (round(value) for value in box)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill, outline)

    def notice(self, at: Point, text: str, size: int) -> None:
        """Write text in a box on the picture.

        Args:
            at: The middle of the box.
            text: The text.
            size: Size of the typeface in pixels.
        """
        x, y = at
        self.box((x - 140, y - 16, x + 140, y + 16), PAPER)
        self.text(at, text, size, INK, "mm")

    def hatch(self, box: Box) -> None:
        """Draw a striped rectangle, which stands for *not observed*."""
        left, top, right, bottom = (round(value) for value in box)
        if right <= left or bottom <= top:
            return
        tile = stripes(bottom - top, right - left)
        self._image.paste(Image.fromarray(tile), (left, top))

    def line(self, points: Sequence[Point], colour: Colour = FRAME, width: float = 1.0) -> None:
        """Draw a line.

        Args:
            points: The points that it passes through.
            colour: Its colour.
            width: Its width in pixels.
        """
        if len(points) > 1:
            self._draw.line(list(points), colour, max(1, round(width)), joint="curve")

    def pixels(self, at: Point, picture: ByteArray) -> None:
        """Draw an array of pixels.

        Args:
            at: Its top left corner.
            picture: uint8 ``(h, w, 3)``.
        """
        self._image.paste(Image.fromarray(picture), (round(at[0]), round(at[1])))

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size)
        return self._fonts[size]


def draw_steps(canvas: Canvas, axis: StepAxis, top: float, size: int) -> None:
    """Draw a step axis: ticks with their steps, as many as there is room for.

    Args:
        canvas: The picture.
        axis: The axis.
        top: Its vertical place.
        size: Size of the typeface in pixels.
    """
    widest = canvas.text_width(count(int(axis.last)), size)
    for step in axis.ticks(max(2, int(axis.width / (widest * 1.4)))):
        x = axis.x(step)
        canvas.line([(x, top), (x, top + 6)], MUTED, 2)
        half = canvas.text_width(count(step), size) / 2
        inside = min(max(x, axis.left + half), axis.left + axis.width - half)
        canvas.text((inside, top + 28), count(step), size, MUTED, "ms")


def stripes(height: int, width: int) -> ByteArray:
    """Return slanted stripes, which stand for *not observed*, uint8 ``(height, width, 3)``.

    Args:
        height: Height in pixels.
        width: Width in pixels.
    """
    rows, columns = np.ogrid[:height, :width]
    on = (rows + columns) // 3 % 3 == 0
    stripe = mix(UNSEEN, UNSEEN_STRIPE, 0.8)
    return np.where(on[..., None], np.array(stripe, np.uint8), np.array(UNSEEN, np.uint8))


def _shortened(text: str, keep: int) -> str:
    """Keep ``keep`` characters around an ellipsis; in a module path the end says more than the beginning."""
    if keep >= len(text):
        return text
    head = keep // 3
    tail = keep - head
    return text[:head] + "…" + (text[-tail:] if tail else "")
