"""Markdown: a report as GitHub tables that TensorBoard's text dashboard draws too; every name is inert.

Python-Markdown (TensorBoard) and GitHub agree on code spans and on character references, and on little else; names are
written in one of the two.
"""

from __future__ import annotations

import re

from neuronscope.report.report import Report
from neuronscope.writers import findings, wording

__all__ = ["code", "plain", "render"]

#: Characters that stay as they are inside a code span in every dialect, in a table cell too.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.#()\-/:,=]([A-Za-z0-9_.#()\-/:,= ]*[A-Za-z0-9_.#()\-/:,=])?")

#: Columns: heading, field of ``SiteWords``, alignment.
COLUMNS = (
    ("neurons", "neurons", "---:"),
    ("axis", "axis", ":---"),
    ("dead", "dead", "---:"),
    ("dead %", "dead_share", "---:"),
    ("dormant", "dormant", "---:"),
    ("cut off", "cut_off", "---:"),
    ("linear", "linear", "---:"),
    ("not finite", "not_finite", "---:"),
    ("worst neurons", "worst", ":---"),
    ("examples", "examples", "---:"),
    ("fires in", "bound", "---:"),
)


def render(report: Report) -> str:
    """The report as markdown: what was found, a table by site, what was not measured, notes, and the words.

    Args:
        report: What to draw.

    Returns:
        Markdown that ends with a line end.
    """
    blocks = [f"**{plain(report.fault)}**"] if report.fault else []
    blocks += [f"## Neuronscope: {plain(findings.title(report))}", plain(findings.span(report))]
    found = [plain(sentence) for sentence in findings.finding(report)]
    if report.not_finite:
        found[0] = f"**{found[0]}**"
    blocks.append("\n".join(f"- {sentence}" for sentence in found))
    if report.layers:
        blocks.append(_table(report))
    if report.not_measured:
        rows = "\n".join(f"| {code(item.name)} | {plain(item.reason)} |" for item in report.not_measured)
        blocks += ["### Not measured", f"| what | why |\n| :--- | :--- |\n{rows}"]
    if report.other_notes:
        blocks += ["### Notes", "\n".join(f"- {plain(note)}" for note in report.other_notes)]
    words = "\n".join(f"- **{word}**: {plain(meaning)}" for word, meaning in findings.glossary(report))
    return "\n\n".join([*blocks, "### Words", words]) + "\n"


def _table(report: Report) -> str:
    shown, folded = wording.fold(report.layers)
    lines = [
        "| " + " | ".join(["site", "activation", *(heading for heading, _, _ in COLUMNS)]) + " |",
        "| " + " | ".join([":---", ":---", *(rule for _, _, rule in COLUMNS)]) + " |",
    ]
    for site in shown:
        words = wording.site_words(site, report.policy["confidence"])
        cells = [code(words.name), plain(words.activation)]
        for _, field, _ in COLUMNS:
            text = plain(getattr(words, field))
            cells.append(f"**{text}**" if field in _LOUD.get(words.tone, ()) else text)
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return f"{table}\n\n… {wording.plural(folded, 'more site')} with nothing to report." if folded else table


#: Which cells are bold, by the row's tone.
_LOUD = {"alarm": ("dead", "not_finite"), "bad": ("dead", "dead_share"), "unknown": ("dead",)}


def code(name: str) -> str:
    """``name`` as a code span where every dialect shows it as it is; else as :func:`plain` text.

    >>> code("layer1.0.relu#1"), code("a|b")
    ('`layer1.0.relu#1`', 'a&#124;b')
    """
    name = wording.visible(name)
    return f"`{name}`" if _PLAIN_NAME.fullmatch(name) else plain(name)


def plain(text: str) -> str:
    """``text`` with everything that markdown or HTML could read as markup written as a character reference.

    >>> plain("<b>*x*</b>")
    '&#60;b&#62;&#42;x&#42;&#60;/b&#62;'
    """
    text = wording.visible(text)
    text = re.sub(r"[&<>\\`*_{}\[\]|~@#!$^\"']", lambda match: f"&#{ord(match[0])};", text)
    text = re.sub(r"://|www\.", lambda match: "".join(f"&#{ord(char)};" for char in match[0]), text)
    # A sentence that opens like a list item must not open a list inside its own.
    return re.sub(r"^[-+]|(?<=^\d)[.)](?=\s)|(?<=^\d\d)[.)](?=\s)", lambda match: f"&#{ord(match[0])};", text)
