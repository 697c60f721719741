"""The page on the optimizer's clock has the thresholds that the code uses, and its script finds the tables there."""

from __future__ import annotations

import pytest

from neuronscope.checkpoints.file.optimizer_clocks import (
    SILENT_FOLDS,
    SILENT_FOLDS_BELOW_LARGEST,
    SILENT_STEPS,
    SURE_FOLDS,
    SURE_STEPS,
)
from scripts.optimizer_clock import HEADS, PAGE, with_tables


def test_the_page_names_the_thresholds_of_the_code():
    text = " ".join(PAGE.read_text().split())
    assert (
        f"*suspected* once the bound is above {SILENT_STEPS} steps, and *inferred* once it is above {SURE_STEPS}"
        in text
    )
    assert f"above {SILENT_FOLDS:g} and {SURE_FOLDS:g} e-foldings" in text
    assert f"{SILENT_FOLDS_BELOW_LARGEST:g} e-foldings below the largest row of its layer" in text


def test_the_tables_of_the_page_have_the_columns_of_the_script():
    page = PAGE.read_text()
    assert [line for line in page.splitlines() if line.startswith("| network |")] == list(HEADS)
    again = with_tables(page, [[head, "| --- |", "| a | 1 |"] for head in HEADS])
    assert again.count("| a | 1 |\n") == len(HEADS)
    assert "| what | why |" in again
    assert "MLP, Adam 1e-3" not in again
    with pytest.raises(ValueError, match="3 tables"):
        with_tables(page, [])
