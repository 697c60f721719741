"""The terminal's table: clean when piped, coloured on a terminal, and honest about what was not seen."""

from __future__ import annotations

import io
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from neuronscope.report.report import Report, SiteReport
from neuronscope.writers.tensorboard import diagnosis

from . import golden
from . import sample_reports as samples
from .screen import bare, on_screen

SAMPLES = {
    "mixed": samples.mixed,
    "healthy": samples.healthy,
    "broken": samples.broken,
    "unwatched": samples.unwatched,
    "many": samples.many,
    "hostile": samples.hostile,
}


def row(text: str, site: str) -> list[str]:
    """The cells of a site's row, but for its name."""
    line = next(line for line in bare(text).splitlines() if line.startswith(site))
    return re.split(r"\s{2,}", line.strip())[1:]


@pytest.mark.parametrize("name", SAMPLES)
def test_piped_text_equals_the_stored_text(name: str) -> None:
    golden.check(f"terminal_{name}.txt", str(SAMPLES[name]()) + "\n")


@pytest.mark.parametrize("columns", [60, 80, 99])
def test_text_for_a_narrow_terminal_equals_the_stored_text(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    golden.check(f"terminal_mixed_{columns}.txt", bare(on_screen(monkeypatch, samples.mixed(), columns)) + "\n")


@pytest.mark.parametrize("name", SAMPLES)
def test_piped_text_has_no_control_codes_and_fits_its_width(name: str) -> None:
    for line in str(SAMPLES[name]()).split("\n"):
        assert line.isprintable()
        assert len(line) <= 120
        assert line == line.rstrip()


@pytest.mark.parametrize("columns", [60, 80, 100, 160])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_terminal_gets_colours_and_its_own_width(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_screen(monkeypatch, SAMPLES[name](), columns)
    assert "\x1b[1m" in text
    lines = bare(text).split("\n")
    assert max(map(len, lines)) <= columns
    assert all(line.isprintable() for line in lines)


def test_values_that_were_not_seen_are_not_shown_as_zero() -> None:
    text = str(samples.mixed())
    neurons, axis, dead, *rest = row(text, "never.ran/relu")[1:]
    assert (neurons, axis, dead) == ("16", "1", "unseen")
    assert rest == ["–"] * len(rest)
    headings = ["activation", "neurons", "axis", "dead", "%", "silent", "dormant", "cut off", "linear", "worst"]
    assert row(text, "blind.fc/relu#1")[headings.index("cut off")] == "–"
    assert row(text, "features.0/relu")[headings.index("cut off")] == "·"


def test_a_network_that_is_not_finite_never_looks_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(samples.broken())
    assert "!! NOT FINITE: 168 outputs are NaN or infinite, in 1 layer (fc2/relu)" in text  # 24 neurons × 7
    cells = row(text, "fc2/relu")
    assert "168" in cells
    assert "not finite" in cells
    assert not {"·", "0", "0 %"} & set(cells)
    coloured = on_screen(monkeypatch, samples.broken(), 120)
    assert re.search(r"\x1b\[1;\d+;41m!! NOT FINITE", coloured)  # 41: on red


@pytest.mark.parametrize(("sites", "folded"), [(20, 0), (21, 20)])
def test_beyond_twenty_sites_the_healthy_ones_are_folded(sites: int, folded: int) -> None:
    many = samples.report(
        *(samples.site(f"s{i:02}", 4, samples.Fate(born=int(i == 3)), windows=3) for i in range(sites))
    )
    text = str(many)
    assert len(re.findall(r"^s\d\d ", text, re.MULTILINE)) == sites - folded
    assert ("… 20 more layers with nothing to report" in text) == bool(folded)


@pytest.mark.parametrize(
    "kept",
    [
        samples.site("kept", 8, samples.Fate(linear=1)),
        samples.site("kept", 8, samples.Fate(not_finite=1)),
        samples.site("kept", 8, samples.Fate(cut_off=1)),
        samples.site("kept", 8, positions=0, windows=0),
    ],
    ids=["linear", "not finite", "cut off", "unseen"],
)
def test_a_site_with_anything_to_report_is_not_folded(kept: SiteReport) -> None:
    calm = [samples.site(f"calm{i}", 4, windows=3) for i in range(60)]
    text = str(samples.report(*calm, kept))
    assert row(text, "kept")
    assert "… 60 more layers" in text


def test_a_long_name_is_wrapped_and_nothing_of_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "encoder." + ".".join(f"block{i}" for i in range(12)) + ".relu"
    text = bare(on_screen(monkeypatch, samples.report(samples.site(name, 8)), 60))
    assert name in "".join(line.split(" ")[0] for line in text.splitlines())


def test_sites_with_different_numbers_of_examples_each_show_their_own() -> None:
    whole = samples.report(samples.site("few", 8, examples=20), samples.site("lots", 8, examples=1000))
    assert row(str(whole), "few")[-2:] == ["20", "< 14 %"]  # 1 − 0.05^(1/20) = 13.91 %
    assert row(str(whole), "lots")[-2:] == ["1,000", "< 0.3 %"]
    said = str(whole).replace("\n", " ")
    assert "20 to 1,000 training examples" in said
    assert "A neuron called dead could still fire on up to 14 % of inputs" in said


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_printing_never_fails_when_an_encoding_lacks_a_character(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    print(samples.mixed())
    sys.stdout.flush()
    assert "features.0/relu" in raw.getvalue().decode(encoding)


def test_a_window_that_is_too_short_says_so() -> None:
    whole = samples.mixed()
    assert "Provisional" not in str(whole)
    assert "Provisional: based on" in str(replace(whole, window=replace(whole.window, long_enough=False)))


@pytest.mark.parametrize("at", [-1, 0])
def test_the_report_of_a_scan_shows_counts_without_steps(at: int) -> None:
    whole = samples.mixed()
    scan = replace(
        whole,
        phase="scan",
        global_step=0,
        window=replace(whole.window, name="all", first_step=at, last_step=at, steps=at + 1),
    )
    assert "Based on 1,000 examples. A neuron called dead" in str(scan)
    for text in (str(scan), scan.to_markdown(), scan.to_html(), diagnosis(scan)):
        assert "40 of 1,040 neurons are dead (3.8 %). Their output was zero at every position of the data." in text
        shown = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
        said = [word for word in ("since watching began", "born", ">Born<", "worked before") if word in shown]
        assert not said, "a scan sees a network once, and nothing of its past"
    assert str(scan).startswith("Neuronscope · TinyNet · scan\n")


@pytest.mark.parametrize("top", [5, 20])
def test_of_many_layers_the_worst_are_shown_in_the_networks_order(top: int) -> None:
    many = samples.report(
        *(samples.site(f"s{i:02}", 100, samples.Fate(born=1 + i % 30), windows=3, seed=i) for i in range(60)),
        samples.site("s97 assumed", 8, samples.Fate(born=8), axis_source="assumed (rank)"),
        samples.site("s98", 8),
        samples.site("s99", 8, positions=0, windows=0),
    )
    text = many.to_text(top)
    shown = [int(name) for name in re.findall(r"^s(\d\d) ", text, re.MULTILINE)]
    # Layers i and i + 30 have 1 + i % 30 dead of 100 each: the worst are those with the highest i % 30.
    half = top // 2
    expected = sorted([*range(30 - half, 30), *range(60 - half, 60)])
    assert set(expected) <= set(shown)
    assert len(shown) == top
    assert shown == sorted(shown)
    assert f"… {62 - top} more layers with something to report, none worse than these" in text
    assert "… 1 more layer with nothing to report" in text


def test_the_headline_stands_at_the_end_of_a_long_report_again() -> None:
    for make in (samples.mixed, samples.broken, samples.many):
        lines = str(make()).split("\n")
        first = next(line for line in lines if "neurons are dead" in line or "NOT FINITE" in line)
        assert lines.count(first) == 2
        assert lines.index(first) < 8
        assert first in lines[-4:]
        assert lines[0] in lines[-6:]
    assert str(samples.healthy()).count("No dead neuron") == 1  # it fits a screen


def test_what_is_provisional_or_a_guess_looks_unlike_what_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = samples.report(samples.site("a/relu", 30, samples.Fate(born=3, silent=2)))
    unsure = replace(sure, window=replace(sure.window, long_enough=False))
    plain, coloured = str(unsure), on_screen(monkeypatch, unsure, 120)
    assert "Why, and what to do (provisional)" in plain
    assert " (provisional)" not in str(sure)
    assert "Provisional: based on" in plain
    assert re.search(r"\x1b\[33mProvisional: based", coloured)  # yellow
    assert not re.search(r"\x1b\[33mBased", on_screen(monkeypatch, sure, 120))
    assert re.search(r"\x1b\[3mLikely cause: Born dead", coloured)  # italic
    assert not re.search(r"\x1b\[3mWhat", coloured)
    markdown, board = unsure.to_markdown(), diagnosis(unsure)
    for text in (markdown, board):
        assert "**Provisional: based on" in text
        assert "- **Likely cause**: *Born dead" in text
        assert "- **What it means**: Their output" in text


def test_an_import_that_draws_a_random_number_does_not_change_pythons_random_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that prints a report must not go on with other numbers; rich draws one when it is imported."""
    code = "import random\nrandom.random()\nrender = lambda *_: 'shown'\n"
    (tmp_path / "drawing_writer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Report, "WRITERS", {"terminal": "drawing_writer"})
    state = random.getstate()
    assert str(samples.mixed()) == "shown"
    assert random.getstate() == state
