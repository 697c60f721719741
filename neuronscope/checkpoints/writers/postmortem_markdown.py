"""Markdown: a post-mortem as GitHub tables; every name is inert."""

from __future__ import annotations

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.writers import postmortem_wording
from neuronscope.writers import wording
from neuronscope.writers.markdown import code, plain

__all__ = ["render"]

#: Columns: heading, field of ``LayerWords``, alignment.
COLUMNS = (
    ("neurons", "neurons", "---:"),
    ("dead", "dead", "---:"),
    ("dead %", "dead_share", "---:"),
    ("how sure", "sure", ":---"),
    ("since", "since", ":---"),
    ("suspected", "suspected", "---:"),
    ("other", "other", ":---"),
    ("contested", "contested", "---:"),
    ("unknown", "unknown", "---:"),
)
#: Contests that are listed, and neurons that each names.
LISTED, NAMED = 20, 12


def render(report: PostmortemReport) -> str:
    """The post-mortem as markdown: findings, layers, causes, what it rests on, what is not known, and the words.

    Args:
        report: What to draw.

    Returns:
        Markdown that ends with a line end.
    """
    blocks = [
        f"## Neuronscope post-mortem: {plain(postmortem_wording.title(report))}",
        plain(postmortem_wording.span(report)),
    ]
    found = [plain(sentence) for sentence in postmortem_wording.finding(report)]
    if postmortem_wording.is_alarm(report):
        found[0] = f"**{found[0]}**"
    blocks.append(_list(found))
    if report.layers:
        blocks.append(_layers(report))
    if report.diagnoses:
        blocks.append("### Why, and what to do")
        for one in report.diagnoses:
            parts = [f"**{what}**: {plain(text)}" for what, text in postmortem_wording.diagnosis(one)]
            blocks += [f"#### {plain(one.sign)}", _list(parts)]
    grounds = postmortem_wording.grounds(report)
    if grounds:
        rows = [
            [
                plain(row.claim),
                plain(row.basis),
                plain(row.source),
                wording.count(row.neurons),
                str(row.layers),
                plain(row.text),
            ]
            for row in grounds
        ]
        headings = [("claim", ":---"), ("basis", ":---"), ("source", ":---"), ("neurons", "---:"), ("layers", "---:")]
        blocks += ["### What this rests on", _table([*headings, ("ground", ":---")], rows)]
    if report.confirmations:
        blocks += ["### What measuring said of it", _list([plain(line) for line in postmortem_wording.held(report)])]
    contested = postmortem_wording.contested(report, LISTED, NAMED)
    if contested:
        blocks += ["### Contested", _list([plain(line) for line in contested])]
    if report.abstentions:
        rows = [[plain(what), plain(why)] for what, why in postmortem_wording.abstained(report)]
        blocks += ["### Not known, and why", _table([("what", ":---"), ("why", ":---")], rows)]
    if report.notes:
        blocks += ["### Notes", _list([plain(note) for note in report.notes])]
    blocks += ["### Words", _list([f"**{word}**: {plain(meaning)}" for word, meaning in postmortem_wording.GLOSSARY])]
    return "\n\n".join(blocks) + "\n"


def _layers(report: PostmortemReport) -> str:
    shown, left_out = postmortem_wording.fold(report)
    rows = []
    for row in map(postmortem_wording.layer_words, shown):
        cells = [plain(getattr(row, field)) for _, field, _ in COLUMNS]
        rows.append([code(row.name), *cells])
    table = _table([("layer", ":---"), *((heading, rule) for heading, _, rule in COLUMNS)], rows)
    return "\n\n".join([table, *(f"{sentence}." for sentence in left_out)])


def _table(headings: list[tuple[str, str]], rows: list[list[str]]) -> str:
    lines = [[heading for heading, _ in headings], [rule for _, rule in headings], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
