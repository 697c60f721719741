"""The script that keeps the table of truths: what it counts, and that it sees a wrong report."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuronscope.demo.digits import load_digits
from scripts import clock_truths
from scripts.clock_truths import Cell, Score, all_cells, page, score, train_cells


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An MLP with AdamW, 130 steps; a neuron in eight is killed at step 20."""
    patch = pytest.MonkeyPatch()
    patch.setattr(clock_truths, "STEPS", 130)
    patch.setattr(clock_truths, "KILLED", 20)
    ((_, checkpoint, truth),) = train_cells([Cell("MLP", "AdamW", "constant", 0)], load_digits())
    patch.undo()
    path = tmp_path_factory.mktemp("truths") / "last.pt"
    torch.save(checkpoint, path)
    return path, truth.last


def test_silent_rows_are_those_that_were_killed_and_all_are_found(trained):
    path, last = trained
    assert all((130 - rows[::8] >= 100).all() for layer, rows in last.items() if layer != "12")
    found = score(path, last, 130)
    assert found.silent >= 48
    assert found.found == found.silent
    assert (found.broken, found.unsaid, found.clockless) == (0, 0, 0)
    assert min(found.errors) >= 0


def test_a_bound_below_the_count_is_broken_and_a_living_row_called_silent_is_false(trained):
    path, last = trained
    honest = score(path, last, 130)
    earlier = {layer: np.where(rows >= 50, 1, rows) for layer, rows in last.items()}  # as if the living were silent
    assert score(path, earlier, 130).broken >= honest.living > 0
    later = {layer: np.full_like(rows, 130) for layer, rows in last.items()}  # as if the silent were living
    wrong = score(path, later, 130)
    assert wrong.suspected + wrong.inferred >= honest.found


def test_a_layer_of_which_the_report_says_nothing_is_counted(trained):
    path, last = trained
    assert score(path, {"elsewhere": last["0"]}, 130).unsaid == 64


def test_every_cell_is_trained_once_or_absent_for_a_reason():
    cells = list(all_cells(1))
    assert len(cells) == len(set(cells)) == 17 * 5 * 8
    assert {cell.optimizer for cell in cells if "matrices" in cell.absent} == {"Muon"}
    assert {cell.schedule for cell in cells if "β1" in cell.absent} == {"β1 .5"}
    assert cells[0].schedule == cells[84].schedule == "constant" != cells[85].schedule


def test_the_page_marks_what_does_not_reach_the_aim_and_where_no_clock_is():
    right = Score(silent=10, found=10, firm=9, living=100, inferred=1)
    wrong = Score(silent=10, found=9, living=100, inferred=2, broken=1, unsaid=3)
    none = Score(living=20, clockless=30, reasons=frozenset({"No clock for this layer: none."}))
    cells = [Cell("MLP", name, "constant", 0) for name in ("Adam", "AdamW", "Lion")]
    text = "\n".join(page(dict(zip(cells, (right, wrong, none))), "today"))
    assert list(right.misses()) == []
    assert len(list(wrong.misses())) == 4
    assert "- MLP, AdamW, constant: 9 of 10 silent rows found; 2 of 100 living rows inferred; 1 rows" in text
    assert "| AdamW | **9/10, 2 + 0** | – |" in text
    assert "| Lion | none | – |" in text
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("|")))) <= 100
