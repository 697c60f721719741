"""Page: what every HTML page of ours is made with, so that it needs no network and no name in it can become markup.

The page's own script and style are the only ones that its content policy lets run, by their hashes; every name goes
through autoescape, or into JSON that cannot close its element.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from neuronscope.writers import wording

if TYPE_CHECKING:  # Python 3.10 has it elsewhere
    from importlib.resources.abc import Traversable

__all__ = ["fill"]


def fill(template: Traversable, styles: list[Traversable], scripts: list[Traversable], data: Any, **values: Any) -> str:
    """Fill a page's template.

    Args:
        template: The page. It is given ``style`` and ``script``, their hashes ``style_hash`` and ``script_hash`` for
            its content policy, ``data``, and the filters ``visible``, ``count`` and ``plural``.
        styles: Style sheets of ours, joined in this order.
        scripts: Scripts of ours, likewise.
        data: What the scripts read: plain data, with no number that is not finite.
        **values: What else the template names.

    Returns:
        The page.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(visible=wording.visible, count=wording.count, plural=wording.plural)
    style, script = ("\n".join(file.read_text(encoding="utf-8") for file in files) for files in (styles, scripts))
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        data=_inert(data),
        style=Markup(style),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        style_hash=_digest(style),
        script_hash=_digest(script),
        **values,
    )


def _inert(data: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704 - inert


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
