"""A report in Python: one line as repr, an isolated frame in a notebook, a table of pandas, a figure to restyle."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.errors import MissingExtraError, UsageError
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import Report
from neuronscope.writers.figure import BARS
from tests.postmortem import samples as postmortems

from . import sample_reports as samples

AnyReport = Report | PostmortemReport
WATCHED = ("mixed", "healthy", "broken", "unwatched", "hostile", "many")
EXAMINED = ("with_data", "several", "hostile", "many", "empty", "idle", "broken")
MAKERS: list[Callable[[], AnyReport]] = [
    *(getattr(samples, name) for name in WATCHED),
    *(getattr(postmortems, name) for name in EXAMINED),
]
every_report = pytest.mark.parametrize("make", MAKERS, ids=lambda make: f"{make.__module__[-7:]}.{make.__name__}")


@every_report
def test_repr_is_one_short_line(make: Callable[[], AnyReport]) -> None:
    report = make()
    for one in (report, *report.layers):
        line = repr(one)
        assert line.isprintable()
        assert len(line) < 200
    assert f"{report.dead} of " in repr(report)


@every_report
def test_a_notebook_shows_the_whole_page_in_a_frame_that_cannot_reach_it(make: Callable[[], AnyReport]) -> None:
    report = make()
    found = re.fullmatch(r'<iframe ([^<>]*) srcdoc="([^"]*)"></iframe>', report._repr_html_())
    assert found
    assert 'sandbox="allow-scripts"' in found[1]  # without allow-same-origin: an origin of its own
    assert html.unescape(found[2]) == report.to_html()


@every_report
def test_the_table_of_neurons_agrees_with_that_of_layers(make: Callable[[], AnyReport]) -> None:
    report = make()
    layers, neurons = (columns(report, rows) for rows in ("layer", "neuron"))
    assert len({len(column) for column in layers.values()}) == 1
    assert len({len(column) for column in neurons.values()}) == 1
    assert list(layers["layer"]) == [layer.name for layer in report.layers]
    assert len(neurons["label"]) == sum(layers["neurons"])
    in_totals = [name for name, counts in zip(layers["layer"], layers["in_totals"], strict=True) if counts]
    assert {name for name, counts in zip(neurons["layer"], neurons["in_totals"], strict=True) if counts} == {*in_totals}


def columns(report: AnyReport, rows: str) -> Any:
    return getattr(report._writer("table"), f"{rows}_columns")(report)


def test_each_label_of_the_table_of_neurons_is_counted_in_that_of_layers() -> None:
    report = samples.mixed()
    layers, neurons = columns(report, "layer"), columns(report, "neuron")
    for place, site in enumerate(report.layers):
        mine = [label for name, label in zip(neurons["layer"], neurons["label"], strict=True) if name == site.name]
        for label in ("dead", "silent", "cut off", "dormant", "linear"):
            counted = layers[label.replace(" ", "_")][place]
            assert np.isnan(counted) or mine.count(label) == counted
        assert layers["unseen"][place] == mine.count("unseen")
        assert sum(mine.count(label) for label in LABELS) == site.neurons


def test_what_was_not_measured_is_nan_in_the_table_and_not_zero() -> None:
    layers = columns(samples.mixed(), "layer")
    never, blind = layers["layer"].index("never.ran/relu"), layers["layer"].index("blind.fc/relu#1")
    assert all(np.isnan(layers[name][never]) for name in ("dead", "silent", "dormant", "dead_percent", "bound"))
    assert np.isnan(layers["silent"][blind])
    assert layers["dead"][blind] == 1


@pytest.mark.parametrize("make", [samples.mixed, postmortems.with_data])
@pytest.mark.parametrize("rows", ["layer", "neuron"])
def test_a_report_becomes_a_table_of_pandas(make: Callable[[], AnyReport], rows: str) -> None:
    pytest.importorskip("pandas")
    report = make()
    frame = report.to_pandas(rows)
    assert list(frame.columns) == list(columns(report, rows))
    assert len(frame) == (len(report.layers) if rows == "layer" else sum(one.neurons for one in report.layers))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    report = samples.healthy()
    with pytest.raises(UsageError, match="'layer' or 'neuron'"):
        report.to_pandas("site")
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="pip install pandas"):
        report.to_pandas()
    with pytest.raises(MissingExtraError, match="pip install matplotlib"):
        report.plot()


@every_report
def test_every_report_is_drawn_without_a_word_of_markup(make: Callable[[], AnyReport]) -> None:
    report = make()
    figure = report.plot()
    figure.canvas.draw()  # a name that began a formula would raise here
    bars = figure.axes[-1]
    assert len(bars.get_yticklabels()) <= BARS
    if len(report.layers) <= BARS:
        assert len(bars.get_yticklabels()) == len(report.layers)
        assert "not shown" not in bars.get_xlabel()
    else:
        assert f"{len(report.layers) - len(bars.get_yticklabels())} more layers not shown" in bars.get_xlabel()


def test_a_figure_of_nothing_says_so_instead_of_empty_axes() -> None:
    (axes,) = samples.report().plot().axes
    assert [text.get_text() for text in axes.texts] == ["No layer was seen, so there is nothing to draw."]
    assert not axes.axison


def test_a_name_with_dollars_is_drawn_as_it_is() -> None:
    figure = samples.report(samples.site("a$b_{/relu$", 8, samples.Fate(died=2))).plot()
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["a$b_{/relu$"]


def test_the_legend_has_names_that_begin_with_an_underscore() -> None:
    sites = [samples.site(f"_{name}/relu", 8, samples.Fate(died=2), windows=3) for name in "ab"]
    legend = samples.report(*sites).plot().axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == ["all layers", "_a/relu", "_b/relu"]


def test_the_figure_follows_the_current_style_and_draws_into_a_given_one() -> None:
    with mpl.rc_context({"axes.facecolor": "#102030", "font.size": 7}):
        figure = samples.mixed().plot()
    assert mpl.colors.to_hex(figure.axes[0].get_facecolor()) == "#102030"
    assert figure.axes[0].xaxis.label.get_size() == 7
    own = Figure()
    assert samples.mixed().plot(own) is own
    above, below = Figure(layout="constrained").subfigures(2)
    samples.mixed().plot(above)
    postmortems.with_data().plot(below)
    assert len(above.axes) == len(below.axes) == 2


def test_the_curve_of_a_post_mortem_ends_at_the_dead_whose_step_is_known() -> None:
    report = postmortems.with_data()
    (curve,) = report.plot().axes[0].get_lines()
    dated = sum(int((layer.since[layer.dead_mask] >= -1).sum()) for layer in report.headline_layers)
    assert np.asarray(curve.get_ydata())[-1] == pytest.approx(100 * dated / report.neurons)
    assert np.asarray(curve.get_xdata())[-1] == report.global_step


def test_a_frame_holds_a_page_of_hostile_names_only_as_text() -> None:
    frame = samples.hostile()._repr_html_()
    assert "<script" not in frame
    assert json.dumps(frame)
