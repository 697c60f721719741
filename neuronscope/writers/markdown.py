"""Write a report as markdown: sentences, a table of layers, and what was not measured."""

from __future__ import annotations

from collections.abc import Sequence

from neuronscope.report.report import Report
from neuronscope.writers import wording
from neuronscope.writers.markdown_text import SITE_COLUMNS, bullets, code, diagnosis_parts, pairs, plain, prose, table

__all__ = ["render"]

#: Fields in bold, by the row's tone.
BOLD = {"alarm": ("dead", "not_finite"), "bad": ("dead", "dead_share"), "unknown": ("dead",)}


def render(report: Report) -> str:
    """Write a report as markdown that ends with a line end."""
    blocks = [f"**{plain(report.fault)}**"] if report.fault else []
    basis = plain(wording.based_on(report))
    blocks += [f"## Neuronscope: {plain(wording.title(report))}", f"**{basis}**" if report.provisional else basis]
    sentences = list(map(prose, wording.findings(report)))
    if report.not_finite:
        sentences[0] = f"**{sentences[0]}**"
    blocks.append(bullets(sentences))
    if report.layers:
        shown, left_out = wording.fold(report.layers)
        columns = [each for each in SITE_COLUMNS if each[1] != "dormant" or not wording.all_sparse(report)]
        rows = [_cells(wording.site_cells(site, report), columns) for site in shown]
        blocks.append(table([("layer", False), *((heading, right) for heading, _, right in columns)], rows))
        blocks += [f"{sentence}." for sentence in left_out]
    for index, one in enumerate(wording.causes(report)):
        heading = f"### Why, and what to do{' (provisional)' if report.provisional else ''}"
        blocks += [heading] if not index else []
        blocks += [f"#### {plain(one.sign)}", diagnosis_parts(one)]
    for heading, found in wording.lists(report, wording.fold(report.layers)[0], 12):
        blocks += [f"### {heading}", bullets(map(plain, found))] if found else []
    if report.not_measured:
        reasons = [[code(item.name), plain(item.reason)] for item in report.not_measured]
        blocks += ["### Not measured", table([("what", False), ("why", False)], reasons)]
    if report.other_notes:
        blocks += ["### Notes", bullets(map(plain, report.other_notes))]
    return "\n\n".join([*blocks, "### Words", pairs(wording.glossary(report))]) + "\n"


def _cells(row: wording.SiteCells, columns: Sequence[tuple[str, str, bool]]) -> list[str]:
    cells = [(field, plain(getattr(row, field))) for _, field, _ in columns]
    bold = BOLD.get(row.tone, ())
    name = f"{code(row.name)} {plain(row.mark)}".rstrip()
    return [name, *(f"**{text}**" if field in bold else text for field, text in cells)]
