"""The HTML page as text: within its size, self-contained, and closed to every name that tries to be markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from neuronscope.report.report import Report
from neuronscope.writers.html import ranges

from . import sample_reports as samples


class Page(HTMLParser):
    """Elements with their attributes, the text of scripts and styles, and the rows of the sites' table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append(("", dict(attrs).get("data-key")))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)
            return
        self.words.append(data)
        if self.rows and self.rows[-1]:
            text, key = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data.strip(), key)

    @property
    def data(self) -> Any:
        return json.loads(next(text for _, text in self.raw if text.startswith("{")))


def realistic() -> Report:
    fate = samples.Fate(born=400, died=300, revived=20, dormant=100)
    return samples.report(*(samples.site(f"layers.{i}", 4096, fate, windows=200, seed=i) for i in range(12)))


@pytest.mark.slow
@pytest.mark.parametrize("sample", [samples.noisy, realistic])
def test_a_page_for_twelve_sites_of_4096_neurons_stays_below_300_kb(sample: Any) -> None:
    text = sample().to_html()
    assert len(text.encode("utf-8")) < 300_000
    said = re.findall(r"To keep this page small, ([^.]*)\. The JSON report holds all", text)
    assert len(said) == 12
    for line in said:
        assert "64 of 200 windows are drawn" in line
        assert "neurons share a row" in line


def test_a_map_that_is_drawn_in_full_has_no_note_on_resolution() -> None:
    assert "To keep this page small" not in samples.mixed().to_html()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = samples.hostile().to_html()
    page = Page(text)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name != "style"
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("#") or value == "data:,"
    assert [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "base", "form")] == []
    style = next(text for tag, text in page.raw if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_the_security_policy_allows_only_our_own_script_and_style() -> None:
    page = Page(samples.hostile().to_html())
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "Content-Security" in str(a))
    assert policy is not None
    assert [tag for tag, _ in page.raw] == ["style", "script", "script"]
    style, data, script = (text for _, text in page.raw)
    for directive, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    assert not re.search("[<>&]", data)


def test_hostile_names_are_escaped_to_plain_text() -> None:
    plain = Page(samples.report(*(samples.site("x", 8, samples.Fate(born=2, died=1)) for _ in range(6))).to_html())
    page = Page(samples.hostile().to_html())
    words = "".join(page.words)
    for site in samples.hostile().layers[:3]:
        assert words.count(site.name) >= 3  # table, map, list of the dead
    assert "\\x1b[31mred\\n| x |" in words
    # The same report but for its names has the same elements, but for those of the extra sections and line breaks.
    count = {tag: sum(t == tag for t, _ in page.elements) for tag in ("tr", "article", "script", "details", "canvas")}
    assert count == {tag: sum(t == tag for t, _ in plain.elements) for tag in count}


def cell(page: Page, site: str, heading: str) -> tuple[str, str | None]:
    column = [text for text, _ in page.rows[0]].index(heading)
    return next(row for row in page.rows[1:] if row[1][0] == site)[column]


@pytest.mark.parametrize(
    ("site", "heading", "shown", "key"),
    [
        ("features.0/relu", "Dead", "12", "12"),
        ("features.0/relu", "Dead %", "19 %", "18.75"),
        ("features.0/relu", "Born", "10", "10"),
        ("features.0/relu", "Died", "2", "2"),
        ("features.3/relu", "Born", "·", "0"),
        ("block.gate/sigmoid", "Cut off", "5", "5"),
        ("blind.fc/relu#1", "Cut off", "–", ""),
        ("blind.fc/relu#1", "Dead", "1", "1"),
        ("never.ran/relu", "Dead", "unseen", ""),
        ("never.ran/relu", "Dormant", "–", ""),
        ("never.ran/relu", "Not finite", "–", ""),
        ("never.ran/relu", "Examples", "–", ""),
        ("block.act*", "Axis", "1 · assumed ?", None),
        ("classifier.1", "Dead", "·", "0"),
    ],
)
def test_table_cells_show_their_values_and_sort_by_them(site: str, heading: str, shown: str, key: str | None) -> None:
    assert cell(Page(samples.mixed().to_html()), site, heading) == (shown, key)


def cards(report: Report) -> dict[str, str]:
    found = re.findall(r"<dt>([^<]*)</dt><dd><strong>([^<]*)</strong>", report.to_html())
    return dict(found)


def test_the_headline_shows_the_numbers_of_the_report() -> None:
    assert cards(samples.mixed()) == {
        "Neurons": "1,056",  # without the 96 whose axis is assumed
        "Dead": "40",
        "Dead share": "3.8 %",
        "Silent": "3",  # features.3; not the 3 of block.act, whose axis is assumed
        "Dormant": "36",
        "Cut off": "5",
        "Not finite": "0",
    }


def test_a_report_that_observed_nothing_shows_no_row_of_zeros() -> None:
    numbers = cards(samples.unwatched())
    assert numbers.pop("Neurons") == "40"
    assert set(numbers.values()) == {"–"}


def test_without_gradients_the_number_of_cut_off_neurons_is_unknown() -> None:
    assert cards(samples.report(samples.site("relu", 8, gradients=False)))["Cut off"] == "–"
    assert cards(samples.report(samples.site("relu", 8)))["Cut off"] == "0"


def test_neurons_that_are_not_finite_are_shown_prominently() -> None:
    text = samples.broken().to_html()
    assert '<p class="banner">NOT FINITE: 168 outputs are' in text
    assert '<div class="card alarm"><dt>Not finite</dt>' in text
    assert cards(samples.broken())["Dead share"] == "–"
    assert cell(Page(text), "fc2/relu", "Dead") == ("not finite", "0")
    assert cell(Page(text), "fc2/relu", "Dormant")[0] == "–"
    assert "banner" not in re.sub(r"<style>.*?</style>", "", samples.mixed().to_html(), flags=re.DOTALL)


def test_dead_neurons_are_listed_with_their_step() -> None:
    text = samples.mixed().to_html()
    site = samples.mixed()["features.0/relu"]
    born = np.flatnonzero(site.judgement.dead & (site.last_active_step < 0))
    died = np.flatnonzero(site.judgement.dead & (site.last_active_step >= 0))
    assert f"<b>Born dead (10):</b> {ranges(born, 40)[0]}</p>" in text
    for neuron in died:
        assert f"{neuron} (step {site.history.died_step[neuron]:,})" in text


def test_a_list_that_is_cut_states_how_many_are_left_out() -> None:
    text = samples.report(samples.site("relu", 500, samples.Fate(died=90))).to_html()
    listed = re.search(r"<b>Died \(90\):</b> ([^<]*) and 50 more</p>", text)
    assert listed
    assert listed[1].count("(step ") == 40


@pytest.mark.parametrize(
    ("indices", "limit", "said", "left"),
    [([], 3, "", 0), ([4], 3, "4", 0), ([0, 1, 2, 5, 7, 8], 3, "0–2, 5, 7–8", 0), ([0, 1, 2, 5, 7, 8], 1, "0–2", 3)],
)
def test_runs_of_neurons_are_written_as_ranges(indices: list[int], limit: int, said: str, left: int) -> None:
    assert ranges(np.array(indices, dtype=np.int64), limit) == (said, left)


def test_a_site_that_was_not_seen_has_no_map_and_a_note_says_so() -> None:
    page = Page(samples.mixed().to_html())
    assert [site["id"] for site in page.data["layers"]] == [0, 1, 2, 3, 4, 5, 7]
    assert "Never observed: there is nothing to draw." in page.words
