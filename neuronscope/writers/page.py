"""Fill HTML pages that need no network and in which no name can become markup.

A page's content policy allows only its own script and style to run, by their hashes. Every name passes through
autoescape, or into JSON that cannot close its element.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from neuronscope.judge.diagnosis import Diagnosis
from neuronscope.report.report import LEVEL_MAX, LEVELS
from neuronscope.writers.formatting import NONE, UNKNOWN, count, plural, visible
from neuronscope.writers.packing import NetworkMap

if TYPE_CHECKING:  # Python 3.10 has it elsewhere
    from importlib.resources.abc import Traversable

__all__ = ["Card", "Cell", "LayerRow", "causes", "fill", "layer_data", "levels", "overview_data"]


class Card(NamedTuple):
    """A headline number: its name, its value, a line below it, and its tone."""

    name: str
    value: str
    below: str
    tone: str = "calm"


class Cell(NamedTuple):
    """A cell of the table of layers."""

    text: str
    #: The number that its column is sorted by; ``""`` = not known, which sorts last; ``None`` = as the text says: a
    #: number is itself, ``·`` is 0 and other text is not known.
    key: float | str | None = None
    css: str = ""
    drawing: Markup = Markup("")  # SVG below the text

    @property
    def written_key(self) -> float | str | None:
        """The key, unless the text says it."""
        said = {NONE: "0", UNKNOWN: ""}.get(self.text, self.text.replace(",", ""))
        return None if said == str(self.key) else self.key


@dataclass(frozen=True)
class LayerRow:
    """A layer's row in the table."""

    number: int  # its place among the layers, from 0
    name: str
    tone: str  # ``alarm``, ``bad``, ``warn``, ``unknown`` or ``calm``
    cells: list[Cell]  # its cells after the name
    mark: str = ""  # stands beside the name


def layer_data(
    number: int, meta: list[tuple[str, bool]], lost: str, drawing: dict[str, Any] | None, facts: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what the script reads of a layer.

    Args:
        number: That of its :class:`LayerRow`.
        meta: Pieces of the line below its name, each with whether it is bold.
        lost: What its drawing leaves out; ``""`` = nothing.
        drawing: Its drawing, with its bytes as ``data``; ``None`` if there is nothing to draw.
        facts: Sentences on its weights and on what was done to its neurons.
    """
    about = {"id": number, "meta": meta, **({"facts": list(facts)} if facts else {})}
    if drawing is None:
        return {**about, "lost": "Never observed: there is nothing to draw."}
    said = f"To keep this page small, {lost}. The JSON report holds all." if lost else ""
    return {**about, "lost": said, **drawing}


def levels() -> dict[str, int]:
    """Return the codes of a map's levels by name, as the script knows them, such as ``dead`` and ``unseen``."""
    return {"max": LEVEL_MAX, **{label.replace(" ", "_"): level for label, level in LEVELS.items()}}


def overview_data(overview: NetworkMap | None, places: list[int]) -> dict[str, Any] | None:
    """Return what the script reads of the map of all layers.

    Args:
        overview: The map, or ``None``.
        places: Number of the :class:`LayerRow` of each of its rows; −1 if the table has none.
    """
    if overview is None:
        return None
    rows = len(places)
    return {"neurons": rows, "rows": rows, "steps": overview.steps, "layers": places, "data": overview.data}


def causes(diagnoses: Iterable[Diagnosis]) -> list[tuple[Diagnosis, list[tuple[str, str]]]]:
    """Return each diagnosis with its parts, what to do first: the name of each part, and its text."""
    return [(one, sorted(one.parts(), key=lambda part: part[0] != "What to do")) for one in diagnoses]


def fill(template: Traversable, styles: list[Traversable], scripts: list[Traversable], data: Any, **values: Any) -> str:
    """Fill a template that extends ``page.html.j2``.

    Args:
        template: The template.
        styles: Style sheets after ``page.css``, joined in this order.
        scripts: Scripts after ``page.js``, joined in this order.
        data: What the scripts read: plain data without NaN and infinity.
        **values: The variables of both templates.
    """
    home = files("neuronscope.writers")
    templates = {"page.html.j2": home / "page.html.j2", "page": template}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({name: file.read_text(encoding="utf-8") for name, file in templates.items()}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, count=count, plural=plural, prose=_prose, breakable=_breakable)
    style, script = (
        "\n".join(file.read_text(encoding="utf-8") for file in found)
        for found in ([home / "assets" / "page.css", *styles], [home / "assets" / "page.js", *scripts])
    )
    return environment.get_template("page").render(
        data=_inert(data),
        style=Markup(style),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        style_hash=_digest(style),
        script_hash=_digest(script),
        **values,
    )


def _prose(sentence: str) -> Markup:
    """Escape a sentence, and mark up what stands between backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(visible(sentence)))))  # noqa: S704 - escaped


def _breakable(name: str) -> Markup:
    """Escape a name, and allow a line break after each dot."""
    return Markup(".<wbr>").join(name.split("."))


def _inert(data: Any) -> Markup:
    """Return JSON that can stand in a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704 - inert


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
