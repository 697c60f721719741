"""What makes two censuses the same."""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_equal_counts(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Of the same sites, in any order, every count is the same integer."""
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        assert set(found[name]) == set(wanted[name])
        for field, value in wanted[name].items():
            np.testing.assert_array_equal(found[name][field], value, err_msg=f"{name} {field}")
