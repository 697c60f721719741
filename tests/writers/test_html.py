"""The HTML page as text: within its size, self-contained, and closed to every name that tries to be markup."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from neuronscope.report.report import LEVEL_UNSEEN, Report
from neuronscope.writers.html import ranges, render
from neuronscope.writers.packing import summarise

from . import sample_reports as samples
from .html_page import Page


def realistic() -> Report:
    fate = samples.Fate(born=400, died=300, revived=20, dormant=100)
    return samples.report(*(samples.site(f"layers.{i}", 4096, fate, windows=200, seed=i) for i in range(12)))


def kept(page: Page) -> list[str]:
    """What the page says of each layer's lost resolution."""
    return [
        layer["lost"] if isinstance(layer["lost"], str) else page.data["lost"][layer["lost"]]
        for layer in page.data["layers"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sample", [samples.noisy, realistic])
def test_a_page_for_twelve_sites_of_4096_neurons_stays_below_300_kb(sample: Any) -> None:
    text = sample().to_html()
    assert len(text.encode("utf-8")) < 300_000
    said = kept(Page(text))
    assert len(said) == 12
    for line in said:
        assert re.match(r"To keep this page small, \d+ of 200 windows are drawn", line)
        assert "neurons share a row" in line
        assert line.endswith("The JSON report holds all.")


@pytest.mark.slow
def test_a_page_for_three_hundred_layers_stays_below_500_kb() -> None:
    fate = samples.Fate(born=9, died=30, revived=3, dormant=7)
    sites = (samples.site(f"blocks.{i}.mlp.fc1/relu", 256, fate, windows=60, seed=i) for i in range(300))
    text = samples.report(*sites).to_html()
    assert len(text.encode("utf-8")) < 500_000
    assert len(Page(text).rows) == 301


def test_of_thousands_of_layers_the_worst_have_a_row_and_the_map_shows_all() -> None:
    calm = samples.site("x", 8, windows=2)
    ill = samples.site("x", 8, samples.Fate(died=2), windows=2)
    worse = samples.site("x", 8, samples.Fate(died=3), windows=2)
    broken = samples.site("x", 8, samples.Fate(not_finite=1), windows=2)
    kinds = [worse] * 5 + [ill] * 400 + [calm] * 1_594 + [broken]
    sites = [replace(kind, name=f"layer.{at}/relu") for at, kind in enumerate(kinds)]
    text = samples.report(*sites).to_html()
    page = Page(text)
    names = [row[1][0] for row in page.rows[1:]]
    assert len(names) == 400
    assert {f"layer.{at}/relu" for at in (0, 1, 2, 3, 4, 1_999)} <= set(names)
    assert "6 more layers with a smaller share of such neurons than these, 1,594 more layers with nothing" in text
    assert "The map shows all, and the JSON report holds all" in text
    assert page.data["overview"]["rows"] == 2_000
    shown = [place for place in page.data["overview"]["layers"] if place >= 0]
    assert shown == [layer["id"] for layer in page.data["layers"]]
    assert page.data["worst"] == 0


def test_a_map_that_is_drawn_in_full_has_no_note_on_resolution() -> None:
    assert "To keep this page small" not in samples.mixed().to_html()


def overview_planes(report: Report) -> tuple[list[int], np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    """The map of the network as its docstring describes it: steps, dead neurons, levels of the rest, names."""
    packed = summarise(report.layers, 1 << 30, report.window.last_step)
    assert packed is not None
    raw = zlib.decompress(base64.b64decode(packed.data))
    rows, columns = len(report.layers), len(packed.steps)
    cells = rows * columns
    planes = np.frombuffer(raw[4 * rows : 4 * rows + 4 * cells], np.uint8).reshape(4, rows, columns).astype(np.int64)
    dead = (planes * 256 ** np.arange(4)[:, None, None]).sum(0)
    rest = np.frombuffer(raw[4 * (rows + cells) : 4 * (rows + cells) + cells], np.uint8).reshape(rows, columns)
    return packed.steps, dead, rest, json.loads(raw[4 * (rows + cells) + cells :])


def test_the_map_of_the_network_counts_the_dead_of_each_layer_in_each_window() -> None:
    report = samples.mixed()
    steps, dead, rest, names = overview_planes(report)
    assert steps == list(range(100, 2_100, 100))
    assert names == [site.name for site in report.layers]
    for row, site in enumerate(report.layers):
        if site.name == "never.ran/relu":
            assert (dead[row] == 0).all()
            assert (rest[row] == LEVEL_UNSEEN).all()
        else:
            assert dead[row].tolist() == site.history.dead.tolist()
            assert (rest[row] != LEVEL_UNSEEN).all()
    late = samples.site("late", 4, windows=3)
    late = replace(late, history=replace(late.history, steps=late.history.steps + 1_800))
    _, dead, rest, _ = overview_planes(samples.report(samples.site("early", 8, windows=20), late))
    assert (rest[1, :18] == LEVEL_UNSEEN).all()
    assert (rest[1, 18:] != LEVEL_UNSEEN).all()
    assert summarise(samples.unwatched().layers, 1 << 30, 0) is None


def test_the_page_loads_nothing_from_elsewhere() -> None:
    Page(samples.hostile().to_html()).assert_loads_nothing_from_elsewhere()


def test_the_security_policy_allows_only_our_own_script_and_style() -> None:
    Page(samples.hostile().to_html()).assert_policy_allows_only_its_own_script_and_style()


def test_hostile_names_are_escaped_to_plain_text() -> None:
    plain = Page(samples.report(*(samples.site("x", 8, samples.Fate(born=2, died=1)) for _ in range(6))).to_html())
    page = Page(samples.hostile().to_html())
    words = "".join(page.words)
    for site in samples.hostile().layers[:3]:
        assert site.name in words
    assert "\\x1b[31mred\\n| x |" in words
    # The same report but for its names has the same elements, but for those of the extra sections and line breaks.
    count = {tag: sum(t == tag for t, _ in page.elements) for tag in ("tr", "article", "script", "canvas")}
    assert count == {tag: sum(t == tag for t, _ in plain.elements) for tag in count}


def cell(page: Page, site: str, heading: str) -> tuple[str, str | None]:
    column = [text for text, _ in page.rows[0]].index(heading)
    return next(row for row in page.rows[1:] if row[1][0] == site)[column]


@pytest.mark.parametrize(
    ("site", "heading", "shown", "key"),
    [
        ("features.0/relu", "Dead", "12", None),  # the text says what it is sorted by
        ("features.0/relu", "Dead %", "19 %", "18.75"),
        ("features.0/relu", "Born", "10", None),
        ("features.0/relu", "Died", "2", None),
        ("features.3/relu", "Born", "·", None),
        ("block.gate/sigmoid", "Cut off", "5", None),
        ("blind.fc/relu#1", "Cut off", "–", None),
        ("blind.fc/relu#1", "Dead", "1", None),
        ("never.ran/relu", "Dead", "unseen", ""),
        ("never.ran/relu", "Dormant", "–", None),
        ("never.ran/relu", "Fires in", "–", None),
        ("features.0/relu", "Fires in", "< 0.3 %", "-1000"),
        ("block.act*", "Dead %", "0 %", "0.0"),
        ("classifier.1", "Dead", "·", None),
    ],
)
def test_table_cells_show_their_values_and_sort_by_them(site: str, heading: str, shown: str, key: str | None) -> None:
    assert cell(Page(samples.mixed().to_html()), site, heading) == (shown, key)


def test_columns_that_say_nothing_of_any_layer_are_left_out() -> None:
    headings = {text for text, _ in Page(samples.mixed().to_html()).rows[0]}
    assert "Not finite" not in headings
    assert {"Silent", "Dormant", "Linear"} <= headings
    assert {text for text, _ in Page(samples.healthy().to_html()).rows[0]} == {
        *("#", "Layer", "Neurons", "Dead", "Dead %", "Worst neurons", "Fires in")
    }


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
    assert cell(Page(text), "fc2/relu", "Not finite")[0] == "168"
    assert "banner" not in re.sub(r"<style>.*?</style>", "", samples.mixed().to_html(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("indices", "limit", "said", "left"),
    [([], 3, "", 0), ([4], 3, "4", 0), ([0, 1, 2, 5, 7, 8], 3, "0–2, 5, 7–8", 0), ([0, 1, 2, 5, 7, 8], 1, "0–2", 3)],
)
def test_runs_of_neurons_are_written_as_ranges(indices: list[int], limit: int, said: str, left: int) -> None:
    assert ranges(np.array(indices, dtype=np.int64), limit) == (said, left)


def test_a_site_that_was_not_seen_has_no_map_and_a_note_says_so() -> None:
    page = Page(samples.mixed().to_html())
    assert [site["id"] for site in page.data["layers"] if "data" in site] == [0, 1, 2, 3, 4, 5, 7]
    assert page.data["layers"][6]["lost"] == "Never observed: there is nothing to draw."


def test_a_layers_details_name_its_weights_and_the_neurons_that_were_revived() -> None:
    page = Page(samples.acted().to_html())
    assert [layer.get("facts") for layer in page.data["layers"]] == [
        [
            "Weights: rows of layers fc1, norm lead in, columns of layer fc2 read it.",
            f"Revived: 5 neurons at 2 steps, last at step 1,200 by {samples.HOSTILE}: 1–3, 7.",
        ],
        [f"Weights: rows of layer {samples.HOSTILE}; not known exactly: added in (a residual sum)."],
        None,
    ]
    assert "alert(1)" not in "".join(text for tag, text in page.raw if tag == "script" and text[:1] != "{")


def test_two_reports_are_compared_layer_by_layer() -> None:
    fate = samples.Fate(born=3, died=2)
    now = samples.site("fc1/relu", 16, fate, seed=1)
    before = samples.site("fc1/relu", 16, samples.Fate(born=3), seed=1)
    other = samples.site("fc2/relu", 16, samples.Fate(born=4), seed=2)
    text = render(samples.report(now, other), replace(samples.report(before, other), phase="val"))
    died = np.flatnonzero(now.judgement.dead & ~before.judgement.dead)
    revived = np.flatnonzero(before.judgement.dead & ~now.judgement.dead)
    assert died.size == 2
    assert revived.size == 0
    assert "Compared with phase val at step 2,000" in text
    assert "2 neurons dead only here and 0 neurons dead only there, in 2 layers that both have." in text
    said = " ".join("".join(Page(text).words).split())
    assert f"fc1/relu352: {ranges(died, 20)[0]}·" in said
    assert said.count("fc2/relu") < said.count("fc1/relu")
    unseen = samples.site("fc1/relu", 16, positions=0, windows=0)
    text = render(samples.report(now), samples.report(unseen))
    assert "0 neurons dead only here and 0 neurons dead only there" in text
