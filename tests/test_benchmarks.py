"""The benchmarks run, in tiny sizes, and give whole tables. What they measure is no test's affair."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.__main__
import neuronscope as ns
from benchmarks.__main__ import PARTS, THREADS
from benchmarks.curves import Curve, draw
from benchmarks.growth import in_words
from benchmarks.pages import MARK, check, put_into, section
from benchmarks.profiling import Spent, time_of_ours
from benchmarks.tables import Picture, Table
from benchmarks.turns import Times, take_turns

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_benchmarks_returns_complete_tables(part: str) -> None:
    pieces = list(importlib.import_module(f"benchmarks.{part}").tables(quick=True))
    tables = [piece for piece in pieces if not isinstance(piece, Picture)]
    assert tables
    assert len(pieces) - len(tables) == (part == "growth")
    for table in tables:
        lines = table.markdown().splitlines()
        head = next(place for place, line in enumerate(lines) if line.startswith("|"))
        assert table.rows
        # The table's lines, its heading and the line below it all have as many cells.
        assert {line.count(" | ") for line in lines[head:] if line} == {len(table.columns) - 1}
        assert all(cell or place for row in table.rows for place, cell in enumerate(row))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_the_gpu_benchmarks_run_on_a_cpu_too() -> None:
    from benchmarks.gpu import MODES, tables

    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this torch is too old for the script")
    assert list(MODES) == ["eager", "compiled", "CUDA graphs"]
    # Inductor, which is slow to compile, is what the script itself takes.
    modes = {"eager": None, "traced": {"backend": "aot_eager"}}
    bandwidth, means, bits, captured, steps = tables("cpu", quick=True, modes=modes)
    assert len(bandwidth.rows) == 4  # two shapes, two types
    assert [row[1:] for row in bits.rows] == [("equal", "not asked")] * 2
    nets = [(net, mode) for mode in modes for net in ("ResNet-50-like, batch 2", "GPT-2-like")]
    assert [tuple(row[:2]) for row in steps.rows] == nets
    # The sites: a stem and two blocks of three, and one block of one. The steps: 3 to begin with, a warm one, a round.
    counted = [f"{sites} of {sites} sites at each of 5 steps" for sites in (7, 1, 7, 1)]
    assert [row[-2] for row in steps.rows] == counted
    assert {(row[-3], row[-1]) for row in steps.rows} == {("not asked", "not asked")}
    assert [row[-1] for row in captured.rows] == ["only CUDA has such graphs"]
    made = (bandwidth, means, bits, captured, steps)
    assert {len(row) - len(table.columns) for table in made for row in table.rows} == {0}


def test_the_default_overhead_is_that_of_one_observed_step_in_twenty() -> None:
    from benchmarks.steps import by_default

    # (1.4 + 19 · 1.0) ÷ 20 and (1.2 + 19 · 1.0) ÷ 20
    assert by_default((1.4, 1.2), (1.0, 1.0)) == pytest.approx((1.02, 1.01))


def test_the_large_networks_have_the_published_number_of_parameters() -> None:
    from benchmarks.large import gpt, resnet

    with torch.device("meta"):
        vision, language = resnet(batch=1)[0], gpt(batch=1)[0]
    # ResNet-50 has 25,557,032 parameters. GPT-2 has 124,439,808 with 1024 × 768 for positions and 50257 words, tied:
    # here 124,439,808 − 1024 · 768 + (50304 − 50257) · 768 + 50304 · 768 for the weights that are not tied.
    assert sum(weight.numel() for weight in vision.parameters()) == 25_557_032
    assert sum(weight.numel() for weight in language.parameters()) == 124_439_808 - 786_432 + 36_096 + 38_633_472


def test_without_a_gpu_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    with pytest.raises(SystemExit, match=r"^These figures need a GPU, and torch sees none here;[^\n]*$"):
        main()


def test_an_unknown_benchmark_part_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit):
        benchmarks.__main__.main()
    assert "no such part: nothing; there are importing, counting" in capsys.readouterr().err


def test_a_part_replaces_its_own_section_of_a_page_and_no_other(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Prose.\n\n### memory\n\nMore prose.\n\n{MARK}\n")
    table = Table("Title", ("a",), [("1",)])
    once = f"Prose.\n\n### memory\n\nMore prose.\n\n{MARK}\n"
    put_into(page, "memory", section("memory", "Measured today.", [table]), PARTS)
    memory = "\n### memory\n\nMeasured today.\n\n#### Title\n\n| a |\n| --- |\n| 1 |\n"
    assert page.read_text() == once + memory
    put_into(page, "counting", section("counting", "Measured yesterday.", []), PARTS)
    counting = "\n### counting\n\nMeasured yesterday.\n"
    assert page.read_text() == once + counting + memory  # in the order of the parts
    for _ in range(2):
        put_into(page, "counting", section("counting", "Measured tomorrow.", []), PARTS)
        assert page.read_text() == once + counting.replace("yesterday", "tomorrow") + memory
    put_into(page, "counting", section("counting", "Measured again.", []), ["counting"])  # there is no other part now
    assert page.read_text() == once + counting.replace("yesterday", "again").replace("tomorrow", "again")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Prose alone.", "Expected a page with the line"),
        (f"Prose.\n\n{MARK}\n\nMore prose.\n", "Expected nothing but sections of figures .* but got 'More prose.'"),
    ],
)
def test_a_page_that_cannot_take_figures_is_refused(tmp_path: Path, text: str, error: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=error):
        check(page)
    with pytest.raises(ValueError, match=error):
        put_into(page, "counting", "figures", PARTS)
    assert page.read_text() == text


def test_the_performance_page_has_a_section_for_every_part() -> None:
    page = ROOT / "docs" / "performance.md"
    check(page)
    prose, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    assert mark
    assert [part for part in PARTS if f"`{part}`" not in prose] == []


def test_the_performance_page_refers_only_to_tables_that_exist() -> None:
    prose, _, figures = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition(MARK)
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]*?)(?: …)?\*(?!\*)", " ".join(prose.split())))
    headings = re.findall(r"^#### (.*)$", figures, re.MULTILINE)
    assert len(named) > 5
    assert [name for name in named if not any(heading.startswith(name) for heading in headings)] == []
    pictures = re.findall(r"\]\((images/[^)]*)\)", figures)
    assert pictures
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


def test_the_option_into_writes_a_part_its_machine_and_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Prose.\n\n{MARK}\n\n### memory\n\nMeasured long ago.\n")
    pieces = [Table("Title", ("a",), [("1",)]), Picture("p.png", "A curve", lambda: b"drawn")]
    monkeypatch.setattr("benchmarks.importing.tables", lambda *, quick: iter(pieces))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "importing", "--into", str(page)])
    before = torch.get_num_threads()
    try:
        benchmarks.__main__.main()
    finally:
        torch.set_num_threads(before)
        logging.disable(logging.NOTSET)
    text = page.read_text()
    assert text.startswith(f"Prose.\n\n{MARK}\n\n### importing\n\nMeasured ")
    assert "with 1 thread, Python" in " ".join(text.split())
    assert text.endswith("| 1 |\n\n![A curve](images/p.png)\n\n### memory\n\nMeasured long ago.\n")
    assert (tmp_path / "images" / "p.png").read_bytes() == b"drawn"
    printed = capsys.readouterr()
    assert "#### Title" in printed.out
    assert "![" not in printed.out  # a terminal shows no picture
    assert "(importing: 0 s)" in printed.err
    assert THREADS == 1  # what the page says of its figures


def test_growth_curves_are_drawn_and_linear_growth_follows_its_guide_line() -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    from benchmarks.curves import draw_panel

    figure = Figure()
    linear, level = figure.subplots(1, 2)
    growing = Curve("By sites", "sites", (1, 10, 100), {"measured": (3e-6, 3e-5, 3e-4)}, grows=True)
    lasting = Curve("A run", "steps", (500, 1000), {"median": (2e-6, 2e-6), "mean": (3e-6, 4e-6)}, grows=False)
    draw_panel(linear, growing)
    draw_panel(level, lasting)
    guide, measured = linear.lines
    assert (linear.get_xscale(), linear.get_yscale(), level.get_xscale()) == ("log", "log", "linear")
    # 3 µs a site, and the guide of slope 1 that ends at 100 sites and 300 µs begins at 1 site and 3 µs.
    assert measured.get_ydata() == pytest.approx([3.0, 30.0, 300.0])
    assert guide.get_ydata() == pytest.approx([3.0, 300.0])
    assert [line.get_label() for line in level.lines] == ["constant", "median", "mean"]
    assert level.lines[0].get_ydata() == pytest.approx([2.0, 2.0])
    assert level.get_ylim()[0] == 0
    assert "µs" in linear.get_ylabel()
    bent = Curve("By ranks", "ranks", (1, 2, 4), {"measured": (1e-3, 2e-3, 2e-3)}, grows=False, what="an exchange")
    assert in_words(growing) == (
        "From 1 to 10 sites the cost is linear (slope 1.00). From 10 to 100 sites the cost is linear (slope 1.00)."
    )
    assert in_words(bent) == (
        "From 1 to 2 ranks the cost is linear (slope 1.00). From 2 to 4 ranks the cost is nearly constant (slope 0.00)."
    )
    picture = draw([growing, growing, lasting])
    assert picture.startswith(b"\x89PNG")
    assert picture == draw([growing, growing, lasting])  # the same figures give the same file


def test_time_in_our_python_is_separated_from_time_in_torch() -> None:
    ours, torchs, layers = (f"{ns.__path__[0]}/hooks.py", 1, "hook"), ("~", 0, "sum"), ("~", 0, "linear")
    theirs = ("train.py", 9, "step")
    # (direct calls, all calls, seconds in itself, seconds in all, by caller). `linear` is called by the loop, comes to
    # us to be passed on, and is called by us: 0.9 s that would be spent in any case. `sum` is called by both.
    calls = {
        theirs: (1, 1, 0.1, 2.0, {}),
        layers: (3, 6, 0.9, 1.5, {theirs: (3, 3, 0.0, 1.5), ours: (3, 3, 0.9, 0.9)}),
        ours: (4, 4, 0.4, 1.4, {layers: (3, 3, 0.3, 1.3), theirs: (1, 1, 0.1, 0.1)}),
        torchs: (5, 5, 0.5, 0.5, {ours: (3, 3, 0.3, 0.3), theirs: (2, 2, 0.2, 0.2)}),
    }
    assert time_of_ours(calls) == {("hooks", "hook"): Spent(4, 0.4, pytest.approx(0.3))}


def test_timed_runs_alternate_and_warm_up_runs_are_left_out() -> None:
    taken: list[str] = []
    times = take_turns({"a": lambda: taken.append("a"), "b": lambda: taken.append("b")}, rounds=3, warm=2)
    assert taken == ["a", "b"] * 5
    assert [len(each.seconds) for each in times.values()] == [3, 3]
    assert Times([4.0, 2.0, 6.0]).over(Times([2.0, 1.0, 4.0])) == (2.0, 2.0)  # 4 ÷ 2, 2 ÷ 1


def test_a_benchmark_table_is_written_as_markdown() -> None:
    table = Table("Title", ("a", "b"), [("1", "2")], note="How to read it.")
    assert table.markdown() == "#### Title\n\nHow to read it.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
