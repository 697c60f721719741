"""The page on smooth units says where activations give exactly zero: a little beyond its numbers they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.smooth_zeros import FUNCTIONS, TYPES, evaluate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "smooth-units.md"


def _numbers(cell: str) -> list[float]:
    return [] if cell == "–" else [float(part.replace("−", "-")) for part in cell.split(", from ")]


def _rows() -> dict[str, list[list[float]]]:
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").partition("## What networks show")[0].splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in FUNCTIONS:
            rows[name] = [_numbers(cell) for cell in cells if cell]
    return rows


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "ReLU"])
def test_the_numbers_of_the_page(name: str, dtype: torch.dtype) -> None:
    edges = _rows()[name][2 * TYPES.index(dtype) :][:2]
    for which, cell in enumerate(edges):
        for edge in cell:  # processors differ in the last digits
            values = [evaluate(FUNCTIONS[name], torch.full((64,), edge * share, dtype=dtype)) for share in (1.06, 0.94)]
            beyond, before = (output if which == 0 else slope for output, slope in values)
            assert not bool(beyond.any())
            assert bool(before.all())


def test_every_function_has_a_row() -> None:
    assert set(_rows()) == set(FUNCTIONS)
