"""Write a post-mortem as markdown: sentences, a table of layers, causes and evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.writers import postmortem_wording as wording
from neuronscope.checkpoints.writers import timeline_wording
from neuronscope.writers.console import Column
from neuronscope.writers.formatting import count
from neuronscope.writers.markdown_text import bullets, code, diagnosis_parts, pairs, plain, prose, table

__all__ = ["render"]

GROUNDS = (
    ("claim", False),
    ("basis", False),
    ("source", False),
    ("neurons", True),
    ("layers", True),
    ("evidence", False),
)
#: Most lines of a list (disagreements, layers with woken neurons, reasons), and neurons that each names.
LISTED, NAMED = 20, 12


def render(report: PostmortemReport) -> str:
    """Write a post-mortem as markdown, which ends with a line end."""
    blocks = [f"## Neuronscope post-mortem: {plain(wording.title(report))}", plain(wording.based_on(report))]
    sentences = list(map(prose, wording.findings(report)))
    if wording.is_alarm(report):
        sentences[0] = f"**{sentences[0]}**"
    blocks.append(bullets(sentences))
    if report.layers:
        shown, left_out = wording.fold(report)
        shown_columns = [one for one in wording.COLUMNS if one.field != "woken" or report.in_box is not None]
        blocks.append(_table("layer", shown_columns, [wording.layer_cells(layer) for layer in shown]))
        blocks += [f"{sentence}." for sentence in left_out]
    if report.timeline is not None and len(report.timeline.checkpoints) > 1:
        blocks.append("### Between the checkpoints")
        for first, columns, (rows, without) in (
            ("checkpoint", timeline_wording.CHECKPOINT_COLUMNS, timeline_wording.checkpoint_rows(report.timeline)),
            ("layer", timeline_wording.TIMELINE_COLUMNS, timeline_wording.layer_rows(report.timeline)),
        ):
            blocks += [_table(first, columns, rows)] if rows else []
            blocks += [f"{without}."] if without else []
        blocks.append(plain(timeline_wording.EXPLANATION))
    if report.diagnoses:
        blocks.append("### Why, and what to do")
    for one in report.diagnoses:
        blocks += [f"#### {plain(one.sign)}", diagnosis_parts(one)]
    if grounds := wording.grounds(report):
        blocks += ["### Evidence", table(GROUNDS, map(_ground, grounds))]
    for heading, lines in wording.lists(report, LISTED, NAMED).items():
        blocks += [f"### {heading}", bullets(map(plain, lines))] if lines else []
    if report.abstentions:
        reasons = [[plain(what), plain(why)] for what, why in wording.abstentions(report, LISTED)]
        blocks += ["### Not known, and why", table([("what", False), ("why", False)], reasons)]
    if report.notes:
        blocks += ["### Notes", bullets(map(plain, report.notes))]
    return "\n\n".join([*blocks, "### Words", pairs(wording.GLOSSARY)]) + "\n"


def _table(first: str, columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """Format a table of objects with a ``name`` and the fields of the columns."""
    headings = [("dead %" if one.heading == "%" else one.heading.replace("\n", " "), one.right) for one in columns]
    cells = [[code(row.name), *(plain(getattr(row, one.field)) for one in columns)] for row in rows]
    return table([(first, False), *headings], cells)


def _ground(row: wording.Ground) -> list[str]:
    numbers = [count(row.neurons), count(row.layers)]
    return [plain(row.claim), plain(row.basis), plain(row.source), *numbers, plain(row.text)]
