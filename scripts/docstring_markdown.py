"""Let docstrings be read as markdown: a griffe extension, which ``mkdocs.yml`` names.

The docstrings of the package are written for ``help()``: roles (``:class:`Scope```), doctests and blocks after ``::``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:mod|func|class|meth|attr|data|exc):`([^`]+)`")
DOCTEST = re.compile(r"(?:^ *>>> .*\n?(?:^ *\S.*\n?)*\n?)+", flags=re.MULTILINE)


def as_markdown(docstring: str, link: Any = lambda name: f"`{name}`") -> str:
    """Return a docstring as markdown.

    Args:
        docstring: The docstring, without the indentation of its code.
        link: Makes markdown of the name in a role.
    """
    text = ROLE.sub(lambda role: link(role[1]), docstring)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"`docs/([\w-]+\.md)`", r"[\1](\1)", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return DOCTEST.sub(lambda doctest: f"```pycon\n{doctest[0].rstrip()}\n```\n", text)


class DocstringMarkdown(griffe.Extension):
    """Changes the docstrings of each module, class, function and attribute that is loaded."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
