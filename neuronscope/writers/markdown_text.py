"""Build markdown in which every name is inert, for GitHub and for TensorBoard's text dashboard.

Python-Markdown (TensorBoard) and GitHub treat code spans and character references alike, and little else; names are
written in one of the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from neuronscope.judge.diagnosis import GUESS, Diagnosis
from neuronscope.writers.formatting import visible

__all__ = ["SITE_COLUMNS", "bullets", "code", "diagnosis_parts", "pairs", "plain", "prose", "table"]

#: A name that every dialect shows unchanged inside a code span, in a table cell too.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.#()\-/:,=]([A-Za-z0-9_.#()\-/:,= ]*[A-Za-z0-9_.#()\-/:,=])?")


#: Columns of a table of layers, after the name: heading, field of ``SiteCells``, whether it is aligned to the right.
SITE_COLUMNS = (
    ("activation", "activation", False),
    ("neurons", "neurons", True),
    ("axis", "axis", False),
    ("dead", "dead", True),
    ("dead %", "dead_share", True),
    ("silent", "silent", True),
    ("dormant", "dormant", True),
    ("cut off", "cut_off", True),
    ("linear", "linear", True),
    ("not finite", "not_finite", True),
    ("worst neurons", "worst", False),
    ("examples", "examples", True),
    ("fires in", "bound", True),
)


def code(name: str) -> str:
    """Format a name as a code span if every dialect shows it unchanged; else as :func:`plain` text.

    >>> code("layer1.0.bn2/relu#1"), code("a|b")
    ('`layer1.0.bn2/relu#1`', 'a&#124;b')
    """
    name = visible(name)
    return f"`{name}`" if _PLAIN_NAME.fullmatch(name) else plain(name)


def plain(text: str) -> str:
    """Replace everything in ``text`` that markdown or HTML could read as markup by character references.

    >>> plain("<b>*x*</b>")
    '&#60;b&#62;&#42;x&#42;&#60;/b&#62;'
    """
    text = visible(text)
    text = re.sub(r"[&<>\\`*_{}\[\]|~@#!$^\"']", lambda match: f"&#{ord(match[0])};", text)
    text = re.sub(r"://|www\.", lambda match: "".join(f"&#{ord(char)};" for char in match[0]), text)
    # A sentence that starts like a list item must not open a list inside its own.
    return re.sub(r"^[-+]|(?<=^\d)[.)](?=\s)|(?<=^\d\d)[.)](?=\s)", lambda match: f"&#{ord(match[0])};", text)


def prose(sentence: str) -> str:
    """Make a sentence inert, and mark up what stands between backquotes as code.

    >>> prose("Worst layer: `a.0`, with <2>.")
    'Worst layer: `a.0`, with &#60;2&#62;.'
    """
    return "".join(code(part) if odd % 2 else plain(part) for odd, part in enumerate(re.split("`([^`]+)`", sentence)))


def bullets(lines: Iterable[str]) -> str:
    """Format lines of markdown as a list."""
    return "\n".join(f"- {line}" for line in lines)


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Format words and their meanings as a list; both are made inert."""
    return bullets(f"**{plain(word)}**: {plain(meaning)}" for word, meaning in items)


def diagnosis_parts(one: Diagnosis) -> str:
    """Format a diagnosis as a list; a cause that is a guess is in italics."""
    return bullets(
        f"**{plain(what)}**: {f'*{plain(text)}*' if what == GUESS else plain(text)}" for what, text in one.parts()
    )


def table(headings: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """Format a table.

    Args:
        headings: Heading of each column, and whether it is aligned to the right, as numbers are.
        rows: Cells of each row, as markdown.
    """
    rules = ["---:" if right else ":---" for _, right in headings]
    lines = [[heading for heading, _ in headings], rules, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
