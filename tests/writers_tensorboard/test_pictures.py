"""Pictures: what is dead shows, what was not seen does not look healthy, and nothing is cut off at the edge."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.report.report import LEVEL_DEAD, LEVEL_NOT_FINITE, LEVEL_SILENT, LEVEL_UNSEEN, Report
from neuronscope.writers.grouping import group_sites
from neuronscope.writers.pictures import heatmap, overview
from neuronscope.writers.pictures.axis import StepAxis, spread, ticks
from neuronscope.writers.pictures.canvas import Canvas, printable
from neuronscope.writers.pictures.colours import (
    ALIVE_HIGH,
    DEAD,
    NOT_FINITE,
    PAPER,
    SILENT,
    UNSEEN,
    ZERO,
    share_colours,
)
from neuronscope.writers.pictures.heatmap import order
from neuronscope.writers.pictures.overview import MOST_ROWS
from neuronscope.writers.pictures.site_rows import rows_of

from . import samples

Picture = npt.NDArray[np.uint8]

LONG = "a_very_long_package_name." * 12 + "relu()#3"
REPORTS: dict[str, Callable[[], Report]] = {
    "small net": samples.conv_net,
    "12 x 4096": samples.language_model,
    "200 sites": samples.many_sites,
    "all alive": lambda: samples.uniform(100),
    "all dead": lambda: samples.uniform(LEVEL_DEAD),
    "silent": lambda: samples.uniform(LEVEL_SILENT),
    "NaN": lambda: samples.uniform(LEVEL_NOT_FINITE),
    "unseen": lambda: samples.uniform(LEVEL_UNSEEN),
    "one window": lambda: samples.conv_net(1),
    "no window": lambda: samples.uniform(LEVEL_UNSEEN, count=0),
    "no site": lambda: samples.report_of([]),
    "one neuron": lambda: samples.uniform(LEVEL_DEAD, sites=1, neurons=1),
    "long and odd names": lambda: samples.report_of(
        [replace(site, name=LONG + "\n\x00中") for site in samples.conv_net().layers[:1]], model="M" * 300
    ),
}


def has(picture: Picture, colour: tuple[int, int, int], near: int = 0) -> int:
    """Number of pixels of a colour, give or take ``near`` in each channel."""
    return int((np.abs(picture.astype(int) - np.array(colour)).max(axis=-1) <= near).sum())


@pytest.mark.parametrize("name", REPORTS)
def test_every_picture_has_an_empty_margin(name: str) -> None:
    report = REPORTS[name]()
    for picture in (overview(report), *(heatmap(site, report.phase) for site in report.layers[:2])):
        assert picture.dtype == np.uint8
        assert picture.shape[1:] == (784, 3)
        edges = np.concatenate(
            [picture[:4].reshape(-1, 3), picture[:, :6].reshape(-1, 3), picture[:, -6:].reshape(-1, 3)]
        )
        assert (edges == PAPER).all(), "text or a box is cut off at the edge"
        assert (picture != np.array(PAPER, np.uint8)).any(), "nothing was drawn"


def test_a_small_networks_picture_stays_readable_on_a_tensorboard_card() -> None:
    # The time-series page shows 215 pixels of height and leaves out every other of 430.
    assert overview(samples.conv_net()).shape == (430, 784, 3)
    assert all(heatmap(site, "train").shape == (430, 784, 3) for site in samples.conv_net().layers)


def test_one_dead_neuron_of_4096_shows_in_both_pictures() -> None:
    steps = samples.windows(10)
    levels = np.full((10, 4096), 120, np.uint8)
    alive = samples.report_of([samples.site_of("act", levels, steps)])
    levels = levels.copy()
    levels[:, 1234] = LEVEL_DEAD
    dead = samples.report_of([samples.site_of("act", levels, steps)])
    assert has(overview(alive), ZERO) > 10_000
    assert has(overview(dead), ZERO) < 1_000  # the swatch of the legend is left
    red = heatmap(dead.layers[0], "train")[:, :550]
    assert has(red, DEAD, 8) > 3 * 500, "three rows of pixels, however many neurons there are"
    assert has(heatmap(alive.layers[0], "train"), DEAD, 8) == 0


def test_silent_neurons_have_a_colour_of_their_own_and_not_that_of_neurons_that_are_often_zero() -> None:
    steps = samples.windows(10)
    levels = np.full((10, 30), 120, np.uint8)
    levels[5:, :10] = LEVEL_SILENT
    site = samples.site_of("act", levels, steps)
    picture = heatmap(site, "train")[:, :550]
    silent, alive = has(picture, SILENT), (levels < LEVEL_SILENT).sum() / (levels == LEVEL_SILENT).sum()
    assert has(picture, ALIVE_HIGH) < 1_000, "a silent neuron looks like a living one"
    drawn = picture[88:-38]
    assert silent / (drawn.shape[0] * drawn.shape[1]) == pytest.approx(1 / (1 + alive), abs=0.03)
    assert has(heatmap(site, "train")[:, 580:], SILENT) > 200, "the legend beside the map names them"


def test_the_overview_has_a_column_for_silent_neurons_if_there_are_any() -> None:
    steps = samples.windows(4)
    levels = np.full((4, 20), 120, np.uint8)
    without = overview(samples.report_of([samples.site_of("act", levels, steps)]))
    levels = levels.copy()
    levels[:, 3] = LEVEL_SILENT
    report = samples.report_of([samples.site_of("act", levels, steps)])
    (row,) = rows_of(report, 10)
    assert (row.dead, row.silent, row.dormant) == (0, 1, 0)
    assert has(overview(report)[116:], ZERO) < has(without[116:], ZERO), "the grid makes room for the column"


def test_a_window_narrower_than_a_pixel_still_shows() -> None:
    steps = samples.windows(4000)
    levels = np.full((4000, 8), 120, np.uint8)
    levels[1777] = LEVEL_DEAD
    report = samples.report_of([samples.site_of("act", levels, steps)])
    worst = tuple(int(c) for c in share_colours(np.ones(1))[0])
    body = overview(report)[116:-38]  # without the legend
    assert has(body, (worst[0], worst[1], worst[2])) >= 40


def test_windows_are_drawn_at_the_position_of_their_steps() -> None:
    # Ten windows of 10 steps, then one of 900: the death in the last window covers nine tenths of the width.
    steps = np.array([*range(10, 101, 10), 1000], dtype=np.int64)
    levels = np.full((11, 8), 120, np.uint8)
    levels[-1] = LEVEL_DEAD
    report = samples.report_of([samples.site_of("act", levels, steps)])
    worst = tuple(int(c) for c in share_colours(np.ones(1))[0])
    row = overview(report)[116 + 10]
    dead = has(row, (worst[0], worst[1], worst[2]))
    alive = has(row, ZERO)
    assert dead / (dead + alive) == pytest.approx(0.9, abs=0.01)


def test_a_network_of_nan_does_not_look_healthy() -> None:
    report = samples.uniform(LEVEL_NOT_FINITE)
    body = overview(report)[116:]
    assert has(body, NOT_FINITE) > 10_000
    assert has(body, ZERO) == 0
    assert has(heatmap(report.layers[0], "train"), NOT_FINITE) > 10_000


def test_unseen_windows_are_striped_and_not_drawn_as_zero() -> None:
    report = samples.uniform(LEVEL_UNSEEN)
    body = overview(report)[116:]
    assert has(body, UNSEEN) > 10_000
    assert has(body, ZERO) == 0


def test_a_half_seen_window_counts_only_the_seen_neurons() -> None:
    # 100 neurons, 50 unseen, 25 dead: 25 / 50.
    levels = np.full((1, 100), 120, np.uint8)
    levels[0, :50], levels[0, 50:75] = LEVEL_UNSEEN, LEVEL_DEAD
    (row,) = rows_of(samples.report_of([samples.site_of("act", levels, samples.windows(1))]), 10)
    assert row.share.tolist() == [0.5]


def test_sites_with_different_windows_share_a_row_by_step() -> None:
    one = samples.site_of("block.a", np.full((2, 10), LEVEL_DEAD, np.uint8), np.array([10, 30]))
    two = samples.site_of("block.b", np.full((2, 30), 100, np.uint8), np.array([20, 30]))
    (row,) = rows_of(samples.report_of([one, two]), 1)
    assert row.steps.tolist() == [10, 20, 30]
    assert row.share.tolist() == [1.0, 0.0, 0.25]  # 10 / 10, 0 / 30, 10 / 40


def test_many_sites_are_grouped_and_their_dead_neurons_add_up() -> None:
    report = samples.many_sites()
    rows = rows_of(report, MOST_ROWS)
    assert len(rows) <= MOST_ROWS
    assert sum(row.dead for row in rows) == report.dead
    assert sum(row.sites for row in rows) == 200


def test_neurons_are_sorted_dead_first_by_the_step_of_their_death() -> None:
    site = samples.conv_net().layers[-1]
    labels = site.judgement.labels()[order(site)]
    assert (np.diff(labels.astype(int)) >= 0)[: site.dead + site.silent + site.cut_off + site.dormant - 1].all()
    dead = order(site)[: site.dead]
    assert site.judgement.dead[dead].all()
    assert (site.last_active_step[dead[: site.born_dead]] < 0).all()
    assert (np.diff(site.history.died_step[dead[site.born_dead :]]) >= 0).all()


names = st.lists(
    st.lists(st.sampled_from(["0", "1", "2", "layers", "act", "relu()", "relu#1"]), min_size=1, max_size=5).map(
        ".".join
    ),
    min_size=1,
    max_size=150,
    unique=True,
)


@given(names=names, most=st.integers(1, 40))
def test_every_site_is_in_exactly_one_group_and_groups_are_few(names: list[str], most: int) -> None:
    groups = group_sites(names, most)
    assert len(groups) <= most
    assert sorted(name for group in groups for name in group.sites) == sorted(names)


@pytest.mark.parametrize(
    ("names", "most", "labels"),
    [
        (["a.0", "a.1"], 2, ["a.0", "a.1"]),
        (["a.0.x", "a.0.y", "b.0.x"], 2, ["a.0.*", "b.0.*"]),
        ([f"model.layers.{i}.act" for i in range(8)], 4, [f"model.layers.{i} ... {i + 1}" for i in (0, 2, 4, 6)]),
    ],
)
def test_groups_of_sites_have_readable_labels(names: list[str], most: int, labels: list[str]) -> None:
    assert [group.label for group in group_sites(names, most)] == labels


@given(st.lists(st.floats(0, 300), min_size=1, max_size=10).map(sorted))
def test_labels_never_overlap_and_stay_inside_the_picture(wanted: list[float]) -> None:
    places = spread(wanted, 30.0, 0.0, 300.0)
    assert (np.diff(places) >= 30.0 - 1e-9).all()
    assert places[0] >= -1e-9
    assert places[-1] <= 300.0 + 1e-9


@given(low=st.integers(0, 10**6), span=st.integers(1, 10**7), most=st.integers(2, 10))
def test_axis_ticks_are_few_and_inside_the_axis(low: int, span: int, most: int) -> None:
    found = ticks(low, low + span, most)
    assert 1 <= len(found) <= most
    assert low - 1e-6 * span <= found[0] <= found[-1] <= low + span * (1 + 1e-6)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=400), st.integers(5, 300))
def test_every_window_is_covered_by_a_column(gaps: list[int], width: int) -> None:
    steps = np.cumsum(np.array(gaps, np.int64))
    first, last = StepAxis.of_windows([steps], 0, width).windows_of_columns(steps)
    covered = {window for low, high in zip(first, last, strict=True) for window in range(low, high)}
    assert covered == set(range(len(steps)))


@given(st.text(max_size=80), st.floats(5, 400))
def test_text_fitted_to_a_width_is_no_wider(text: str, width: float) -> None:
    canvas = Canvas(10, 10)
    assert canvas.text_width(canvas.fit(text, 22, width), 22) <= max(width, canvas.text_width("…", 22))
    assert "\n" not in printable(text)


def test_pictures_need_no_torch() -> None:
    code = "import neuronscope.writers.pictures, sys; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
