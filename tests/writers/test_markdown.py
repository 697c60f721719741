"""Markdown: read back by GitHub's kind of parser and by TensorBoard's own, every name comes out as it went in."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest
from markdown_it import MarkdownIt

from neuronscope.writers import formatting, markdown_text

from . import golden
from . import sample_reports as samples

NAMES = [site.name for site in samples.hostile().layers]


def github(text: str) -> str:
    rendered: str = MarkdownIt("commonmark").enable("table").render(text)
    return rendered


def tensorboard(text: str) -> str:
    util = pytest.importorskip("tensorboard.plugin_util", reason="TensorBoard is not installed")
    rendered: str = util.markdown_to_safe_html(text)
    return rendered


def cells(rendered: str) -> list[list[str]]:
    """The text of each cell of the first table, row by row, heading left out."""
    table = re.search(r"<table>.*?</table>", rendered, re.DOTALL)
    assert table
    rows = re.findall(r"<tr>(.*?)</tr>", table[0], re.DOTALL)
    return [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        for row in rows[1:]
    ]


@pytest.mark.parametrize("name", ["mixed", "broken", "unwatched", "hostile", "many"])
def test_markdown_equals_the_stored_text(name: str) -> None:
    golden.check(f"markdown_{name}.md", getattr(samples, name)().to_markdown())


@pytest.mark.parametrize("parse", [github, tensorboard])
def test_names_render_in_markdown_as_they_are(parse: object) -> None:
    rendered = (github if parse is github else tensorboard)(samples.hostile().to_markdown())
    assert [row[0] for row in cells(rendered)] == [formatting.visible(name) for name in NAMES]
    assert {len(row) for row in cells(rendered)} == {14}
    unescaped = set(re.findall(r"<(/?[a-z0-9]+)", rendered))
    wanted = ["h2", "h3", "h4", "em", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "strong", "code"]
    assert unescaped <= {f"{slash}{tag}" for tag in wanted for slash in ("", "/")}


@pytest.mark.parametrize("parse", [github, tensorboard])
def test_the_markdown_table_and_lists_are_well_formed(parse: object) -> None:
    rendered = (github if parse is github else tensorboard)(samples.mixed().to_markdown())
    rows = {row[0]: row for row in cells(rendered)}
    assert rows["features.0/relu"][1:6] == ["relu", "64", "1", "12 (10 born)", "19 %"]
    assert rows["never.ran/relu"][4:] == ["unseen"] + ["–"] * 9
    assert rows["blind.fc/relu#1"][6] == rows["blind.fc/relu#1"][8] == "–", "silent and cut off are not known"
    assert rows["block.act *"][3] == "1 · assumed ?"
    assert "<code>head.fused</code>" in rendered
    assert "<li>Gradients at blind.fc/relu#1 were not seen: its input needs none.</li>" in html.unescape(rendered)


def test_neurons_that_are_not_finite_come_first_and_in_bold() -> None:
    rendered = github(samples.broken().to_markdown())
    assert re.search(r"<ul>\s*<li><strong>NOT FINITE: 168 outputs", rendered)
    broken = next(row for row in cells(rendered) if row[0] == "fc2/relu")
    assert broken[10] == "168"
    assert "0 %" not in broken


@pytest.mark.parametrize("text", ["1. x", "- x", "+ x", "12) x", "* x", "# x", "> x", "=== ", "<b>", "&lt;", "a\n\nb"])
def test_a_note_is_one_item_of_plain_text(text: str) -> None:
    rendered = github(f"- {markdown_text.plain(text)}\n")
    inside = re.fullmatch(r"<ul>\n<li>([^<]*)</li>\n</ul>\n", rendered)
    assert inside
    assert html.unescape(inside[1]) == formatting.visible(text).strip()


def test_hostile_names_in_a_diagnosis_are_text() -> None:
    text = dataclasses.replace(samples.hostile(), phase="train").to_markdown()
    diagnosis = text[text.index("### Why, and what to do") :]
    assert "dead since the beginning: layers &#60;script&#62;" in diagnosis
    assert "<script" not in diagnosis
