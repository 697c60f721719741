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
        for edge in cell:
            beyond, before = (_at(name, edge * share, dtype, 64)[which] for share in (1.06, 0.94))  # last digits differ
            if (name, dtype, which) == ("GELU", torch.bfloat16, 1) and bool(beyond.any()):
                assert torch.equal(beyond[:1], _at(name, edge * 1.06, dtype, 1)[which])  # one by one, as the page says
                beyond = _at(name, -13.8 * 1.06, dtype, 64)[which]
            assert not bool(beyond.any())
            assert bool(before.all())


def _at(name: str, x: float, dtype: torch.dtype, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    return evaluate(FUNCTIONS[name], torch.full((elements,), x, dtype=dtype))


def test_every_function_has_a_row() -> None:
    assert set(_rows()) == set(FUNCTIONS)
