"""What reports say and draw of several checkpoints: numbers, rows that are folded, and names that stay inert."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.checkpoint_timeline import (
    DIED,
    REVIVED,
    CheckpointTimeline,
    LayerTimeline,
    LeftOut,
    TimelinePoint,
)
from neuronscope.checkpoints.writers import timeline_wording as wording
from tests.writers.html_page import Page

from . import samples


def layer(name: str, checkpoints: int, *events: tuple[int, int, int, int, int]) -> LayerTimeline:
    """A layer of 10 neurons; an event is (neuron, kind, checkpoint, earliest, latest)."""
    table = np.array(events, dtype=np.int64).reshape(-1, 5)
    neuron, kind, at, early, late = table.T
    died, revived = (np.bincount(at[kind == which], minlength=checkpoints) for which in (DIED, REVIVED))
    return LayerTimeline(
        name=name,
        neurons=10,
        in_headlines=True,
        dead=np.cumsum(died - revived),
        unknown=np.zeros(checkpoints, dtype=np.int64),
        neuron=neuron,
        kind=kind.astype(np.uint8),
        checkpoint=at,
        earliest=early,
        latest=late,
        basis=np.full(neuron.size, 2, dtype=np.uint8),
    )


def timeline(checkpoints: int, *layers: LayerTimeline, left_out: tuple[LeftOut, ...] = ()) -> CheckpointTimeline:
    points = tuple(TimelinePoint(f"runs/{at}.pt", 100 * (at + 1), 0) for at in range(checkpoints))
    return CheckpointTimeline(points, layers, left_out)


def report(of: CheckpointTimeline) -> PostmortemReport:
    return replace(samples.healthy(), timeline=of)


def test_cells_say_who_died_and_revived_between_which_steps() -> None:
    events = ((0, DIED, 0, -1, -1), (1, DIED, 0, -1, 100), (2, DIED, 1, 101, 200), (3, DIED, 1, 150, 150))
    one = timeline(4, layer("a", 4, *events, (2, REVIVED, 3, 301, 400), (4, DIED, 3, 350, 350)), layer("b", 4))
    (row,), rest = wording.layer_rows(one)
    assert row.when == "2 by step 100; 2 at steps 101–200; 1 at step 350"
    assert row.back == "1 at steps 301–400"
    assert (row.first, row.died, row.revived, row.last, row.basis) == ("2", "3", "1", "4", "5 inferred")
    assert rest == "… 1 layer in which none died or revived"
    rows, _ = wording.checkpoint_rows(one)
    assert [(row.name, row.dead, row.died, row.revived, row.where) for row in rows] == [
        ("step 100", "2", "2", "·", "a (2)"),
        ("step 200", "4", "2", "·", "a (2)"),
        ("step 300", "4", "·", "·", "·"),
        ("step 400", "4", "1", "1", "a (1)"),
    ]
    assert wording.findings(one)[0] == (
        "Over 4 checkpoints, steps 100 to 400: 2 neurons are dead at the first, 3 died later and 1 revived; 4 are dead "
        "at the last."
    )


def test_of_very_many_checkpoints_and_layers_those_with_deaths_are_shown() -> None:
    layers = [layer(f"l{at}", 300, *[(n, DIED, 100 + at, 1, 2) for n in range(1 + at % 3)]) for at in range(90)]
    rows, rest = wording.checkpoint_rows(timeline(300, *layers))
    assert len(rows) == 40
    assert [rows[0].name, rows[-1].name] == ["step 100", "step 30,000"]
    assert sorted(row.died for row in rows) == ["2"] * 8 + ["3"] * 30 + ["·"] * 2
    assert rest == "… 260 more checkpoints with no more deaths and revivals"
    shown, rest = wording.layer_rows(timeline(300, *layers))
    assert len(shown) == 40
    assert rest == "… 50 more layers with no more deaths and revivals"


def test_the_chart_draws_numbers_to_scale() -> None:
    drawn = wording.chart(timeline(2, layer("a", 2, *[(n, DIED, 0, 1, 2) for n in range(2)], (5, DIED, 1, 101, 200),
                                             (6, DIED, 1, 101, 200), (0, REVIVED, 1, 101, 200))))  # fmt: skip
    assert drawn is not None
    assert (drawn.most_dead, drawn.most_events, drawn.marks, drawn.steps) == (3, 2, [500.0, 1000.0], 200)
    assert drawn.dead == "M500.0 100V33.3H1000.0V0.0H1000.0V100z"
    assert drawn.died == "M0.0 50v-50.0h499.0v50.0zM500.0 50v-50.0h499.0v50.0z"
    assert drawn.revived == "M500.0 50v25.0h499.0v-25.0z"
    assert wording.chart(timeline(1, layer("a", 1))) is None


def test_a_timeline_without_a_death_is_drawn_too() -> None:
    calm = timeline(3, layer("a", 3))
    drawn = wording.chart(calm)
    assert drawn is not None
    assert (drawn.dead, drawn.died, drawn.revived) == ("", "", "")
    for text in (str(report(calm)), report(calm).to_markdown(), report(calm).to_html()):
        assert "0 died later" in text


@pytest.mark.parametrize("name", [samples.HOSTILE, "\x1b[31mred\n| x |", "a|b`c`|d"])
def test_names_of_layers_and_files_stay_inert(name: str) -> None:
    one = timeline(2, layer(name, 2, (0, DIED, 1, 101, 200)), left_out=(LeftOut(name, name, True),))
    hostile = report(replace(one, checkpoints=(*one.checkpoints[:1], TimelinePoint(name, 200, 3))))
    page = hostile.to_html()
    assert [tag for tag, _ in Page(page).raw] == ["style", "script", "script"]
    assert "alert(1)</script>" not in page
    assert "\x1b" not in str(hostile) + hostile.to_markdown()
    rows = [line for line in hostile.to_markdown().splitlines() if "step 200" in line]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 8
