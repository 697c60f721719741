"""Writes a post-mortem as markdown: sentences, a table of layers, causes and evidence."""

from __future__ import annotations

from collections.abc import Iterable

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.writers import postmortem_wording as wording
from neuronscope.writers.formatting import count
from neuronscope.writers.markdown_text import bullets, code, pairs, plain, prose, table

__all__ = ["render"]

#: Columns after the layer's name: heading, field of ``LayerCells``, whether it is aligned to the right.
COLUMNS = (
    ("neurons", "neurons", True),
    ("dead", "dead", True),
    ("dead %", "dead_share", True),
    ("how sure", "sure", False),
    ("woken", "woken", True),
    ("since", "since", False),
    ("suspected", "suspected", True),
    ("other", "other", False),
    ("contested", "contested", True),
    ("unknown", "unknown", True),
)
GROUNDS = (
    ("claim", False),
    ("basis", False),
    ("source", False),
    ("neurons", True),
    ("layers", True),
    ("evidence", False),
)
#: Disagreements that are listed, and neurons that each names.
LISTED, NAMED = 20, 12


def render(report: PostmortemReport) -> str:
    """Write a post-mortem as markdown.

    Args:
        report: The post-mortem.

    Returns:
        Markdown that ends with a line end.
    """
    blocks = [f"## Neuronscope post-mortem: {plain(wording.title(report))}", plain(wording.based_on(report))]
    sentences = list(map(prose, wording.findings(report)))
    if wording.is_alarm(report):
        sentences[0] = f"**{sentences[0]}**"
    blocks.append(bullets(sentences))
    if report.layers:
        shown, left_out = wording.fold(report)
        columns = [one for one in COLUMNS if one[1] != "woken" or report.in_box is not None]
        rows = [_cells(wording.layer_cells(layer), columns) for layer in shown]
        blocks.append(table([("layer", False), *((heading, right) for heading, _, right in columns)], rows))
        blocks += [f"{sentence}." for sentence in left_out]
    if report.diagnoses:
        blocks.append("### Why, and what to do")
    for one in report.diagnoses:
        blocks += [f"#### {plain(one.sign)}", pairs(wording.diagnosis(one))]
    if grounds := wording.grounds(report):
        blocks += ["### Evidence", table(GROUNDS, map(_ground, grounds))]
    for heading, lines in (
        ("Confirmed by measuring", wording.confirmations(report)),
        ("Woken by an input of the box", wording.woken(report, NAMED)),
        ("Contested", wording.contested(report, LISTED, NAMED)),
    ):
        blocks += [f"### {heading}", bullets(map(plain, lines))] if lines else []
    if report.abstentions:
        reasons = [[plain(what), plain(why)] for what, why in wording.abstentions(report)]
        blocks += ["### Not known, and why", table([("what", False), ("why", False)], reasons)]
    if report.notes:
        blocks += ["### Notes", bullets(map(plain, report.notes))]
    return "\n\n".join([*blocks, "### Words", pairs(wording.GLOSSARY)]) + "\n"


def _cells(row: wording.LayerCells, columns: Iterable[tuple[str, str, bool]]) -> list[str]:
    return [code(row.name), *(plain(getattr(row, field)) for _, field, _ in columns)]


def _ground(row: wording.Ground) -> list[str]:
    numbers = [count(row.neurons), count(row.layers)]
    return [plain(row.claim), plain(row.basis), plain(row.source), *numbers, plain(row.text)]
