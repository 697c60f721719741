"""The benchmarks run, in tiny sizes, and give whole tables. What they measure is no test's affair."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.__main__
from benchmarks.__main__ import MARK, PARTS, put_into
from benchmarks.tables import Table
from benchmarks.turns import Times, take_turns

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_gives_whole_tables(part: str) -> None:
    tables = list(importlib.import_module(f"benchmarks.{part}").tables(quick=True))
    assert tables
    for table in tables:
        lines = table.markdown().splitlines()
        head = next(place for place, line in enumerate(lines) if line.startswith("|"))
        assert table.rows
        # The table's lines, its heading and the line below it all have as many cells.
        assert {line.count(" | ") for line in lines[head:] if line} == {len(table.columns) - 1}
        assert all(cell or place for row in table.rows for place, cell in enumerate(row))


def test_what_needs_a_gpu_runs_on_a_cpu_too() -> None:
    from benchmarks.gpu import tables

    bandwidth, steps = tables("cpu", quick=True, compiled=False)
    assert len(bandwidth.rows) == 4  # two shapes, two types
    assert [row[:2] for row in steps.rows] == [("ResNet-50-like", "eager"), ("GPT-2-like", "eager")]


def test_the_large_networks_are_what_their_names_say() -> None:
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


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit):
        benchmarks.__main__.main()
    assert "no such part: nothing; there are importing, counting" in capsys.readouterr().err


def test_figures_replace_those_below_the_mark_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Prose.\n\n{MARK}\n\nold figures\n")
    for _ in range(2):
        put_into(page, "new figures\n\n")
        assert page.read_text() == f"Prose.\n\n{MARK}\n\nnew figures\n"
    page.write_text("Prose alone.")
    with pytest.raises(ValueError, match="Expected a page with the line"):
        put_into(page, "figures")
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").count(MARK) == 1


def test_runs_take_turns_and_warm_ones_do_not_count() -> None:
    taken: list[str] = []
    times = take_turns({"a": lambda: taken.append("a"), "b": lambda: taken.append("b")}, rounds=3, warm=2)
    assert taken == ["a", "b"] * 5
    assert [len(each.seconds) for each in times.values()] == [3, 3]
    assert Times([4.0, 2.0, 6.0]).over(Times([2.0, 1.0, 4.0])) == (2.0, 2.0)  # 4 ÷ 2, 2 ÷ 1


def test_a_table_is_markdown() -> None:
    table = Table("Title", ("a", "b"), [("1", "2")], note="How to read it.")
    assert table.markdown() == "### Title\n\nHow to read it.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
