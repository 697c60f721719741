"""The published numbers come out again, each within what chance allows."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest

Row = tuple[str, float, float]


@pytest.fixture(scope="module")
def module() -> Any:
    return import_module("examples.published_numbers")


@pytest.fixture(scope="module")
def rows(module: Any) -> list[Row]:
    return list(module.rows())


def test_every_published_number_is_reproduced_within_five_standard_errors(module: Any, rows: list[Row]) -> None:
    assert len(rows) == 19
    for what, published, measured in rows:
        error = math.sqrt(published * (1 - published) / module.NETS)
        # Numbers that were simulated for the papers, in some 10,000 nets too, carry as much chance as ours.
        assert abs(measured - published) <= 5 * math.sqrt(2) * error, what


def test_enough_networks_are_simulated_to_separate_the_published_numbers(rows: list[Row]) -> None:
    nine = [row for row in rows if row[0].startswith("Lu 2019: 9 layers")]
    assert len(nine) == 10
    for _, published, measured in nine:
        for _, other, _ in nine:
            if abs(published - other) > 0.06:
                assert abs(measured - other) > abs(measured - published)
