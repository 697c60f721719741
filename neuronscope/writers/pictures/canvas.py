"""A sheet of paper to draw on: text that fits its place, boxes, smooth lines, and the array that comes of it."""

from __future__ import annotations

import io
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

__all__ = ["Canvas", "draw_steps", "encode_png", "printable", "stripes"]

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


def encode_png(picture: ByteArray) -> bytes:
    """A picture ``(H, W, 3)`` as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


class Canvas:
    """A sheet of ``width x height`` pixels, drawn ``scale`` times as large and brought down smoothly at the end.

    Args:
        width: Width of the finished picture in pixels.
        height: Its height.
        scale: How many pixels are drawn for each finished one, each way; 1 draws it as it is.
    """

    def __init__(self, width: int, height: int, scale: int = 1) -> None:
        self.width, self.height, self.scale = width, height, scale
        self._image = Image.new("RGB", (width * scale, height * scale), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        # TensorBoard shrinks pictures by leaving out pixels: strokes a little thicker survive that.
        self._weight = 0.4 if scale == 1 and _FINE_STROKES else 0
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def array(self) -> ByteArray:
        """The finished picture, uint8 ``(height, width, 3)``."""
        image = self._image
        if self.scale > 1:
            image = image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        return np.asarray(image, dtype=np.uint8).copy()

    def text(
        self, at: Point, text: str, size: int, colour: Colour = INK, anchor: str = "ls", *, bold: bool = False
    ) -> None:
        """Text at a point. ``anchor`` is Pillow's: l/m/r across, then a/m/s (top, middle, baseline)."""
        stroke = max(1, round(size * self.scale / 40)) if bold else self._weight
        self._draw.text(
            self._scaled(at), printable(text), colour, self._font(size), anchor, stroke_width=stroke, stroke_fill=colour
        )

    def text_width(self, text: str, size: int) -> float:
        """Width of ``text`` in pixels of the finished picture."""
        return float(self._font(size).getlength(printable(text))) / self.scale

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

    def wrap(self, text: str, size: int, width: float, lines: int) -> list[str]:
        """``text`` broken at spaces into at most ``lines`` lines of at most ``width``; the last is shortened to fit."""
        done: list[str] = []
        words = printable(text).split()
        while words and len(done) < lines - 1:
            count = len(words)
            while count > 1 and self.text_width(" ".join(words[:count]), size) > width:
                count -= 1
            done.append(self.fit(" ".join(words[:count]), size, width))
            words = words[count:]
        return [*done, self.fit(" ".join(words), size, width)] if words else done

    def box(self, box: Box, fill: Colour | None = None, outline: Colour | None = None, width: int = 1) -> None:
        """A filled or framed rectangle; the right and bottom edges are outside."""
        left, top, right, bottom = (round(value * self.scale) for value in box)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill, outline, width * self.scale)

    def hatch(self, box: Box) -> None:
        """A striped rectangle: *not observed*."""
        left, top, right, bottom = (round(value * self.scale) for value in box)
        if right <= left or bottom <= top:
            return
        tile = stripes(bottom - top, right - left, self.scale)
        self._image.paste(Image.fromarray(tile), (left, top))

    def line(self, points: Sequence[Point], colour: Colour = FRAME, width: float = 1.0) -> None:
        """A line through points."""
        if len(points) > 1:
            scaled = [self._scaled(point) for point in points]
            self._draw.line(scaled, colour, max(1, round(width * self.scale)), joint="curve")

    def dot(self, at: Point, radius: float, colour: Colour) -> None:
        """A disc, with a rim of paper that parts it from what lies below."""
        for size, fill in ((radius * 1.35, PAPER), (radius, colour)):
            (x, y), r = self._scaled(at), size * self.scale
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill)

    def area(self, points: Sequence[Point], colour: Colour, strength: float = 0.2) -> None:
        """A see-through polygon: ``strength`` of ``colour`` over what is there."""
        if len(points) < 3:
            return
        mask = Image.new("L", self._image.size, 0)
        ImageDraw.Draw(mask).polygon([self._scaled(point) for point in points], fill=round(255 * strength))
        self._image.paste(Image.new("RGB", self._image.size, colour), (0, 0), mask)

    def pixels(self, at: Point, picture: ByteArray) -> None:
        """An array of finished pixels, ``(h, w, 3)``, with its top left corner at a point."""
        image = Image.fromarray(picture)
        if self.scale > 1:
            image = image.resize((image.width * self.scale, image.height * self.scale), Image.Resampling.NEAREST)
        x, y = self._scaled(at)
        self._image.paste(image, (round(x), round(y)))

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size * self.scale)
        return self._fonts[size]

    def _scaled(self, point: Point) -> Point:
        return point[0] * self.scale, point[1] * self.scale


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


def stripes(height: int, width: int, scale: int = 1) -> ByteArray:
    """Slanted stripes that stand for *not observed*, uint8 ``(height, width, 3)``."""
    rows, columns = np.ogrid[:height, :width]
    on = (rows + columns) // (3 * scale) % 3 == 0
    stripe = mix(UNSEEN, UNSEEN_STRIPE, 0.8)
    return np.where(on[..., None], np.array(stripe, np.uint8), np.array(UNSEEN, np.uint8))


def _shortened(text: str, keep: int) -> str:
    """``keep`` characters of ``text`` around an ellipsis; the end says more than the beginning in a module path."""
    if keep >= len(text):
        return text
    head = keep // 3
    tail = keep - head
    return text[:head] + "…" + (text[-tail:] if tail else "")
