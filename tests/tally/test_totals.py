"""Totals count a unit of a layer once, however many activations it goes through, and leave out what is no neuron.

The censuses are made up: :mod:`tests.judge.made_up_censuses` counts the totals a second time, with loops.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from neuronscope.callbacks.alarms import DeadThreshold
from neuronscope.callbacks.publishing import summary
from neuronscope.judge.diagnosis import diagnose
from neuronscope.judge.verdicts import LABELS, Policy, judge
from neuronscope.report.report import Report
from neuronscope.report.run_facts import facts_from_report
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.writers.grouping import group_sites
from neuronscope.writers.pictures import heatmap, overview
from neuronscope.writers.pictures.site_rows import rows_of
from neuronscope.writers.tensorboard import scalars
from neuronscope.writers.tensorboard.diagnosis_text import diagnosis
from tests.judge.made_up_censuses import FATES, Units, info, report_of, tally, twin, twin_deaths, twin_turnover

H, A, B, G = ("h", 0, 6, 1), ("a", 0, 3, 1), ("b", 0, 3, 1), ("g", 0, 5, 1)

#: The units of a site and its number of neurons.
TEMPLATES: tuple[tuple[Units, int], ...] = (
    ((H,), 6),
    ((("f", 0, 4, 1),), 4),
    ((("f", 4, 8, 1),), 4),
    ((("f", 2, 6, 1),), 4),
    ((("f", 0, 8, 2),), 4),
    ((("f", 7, -1, -1),), 8),
    ((("f", 6, 1, -2),), 3),
    ((A,), 3),
    ((A, B), 6),
    ((B, A), 6),
    ((A, A), 6),
    ((G,), 5),
    ((), 3),
    ((H,), 4),  # not as many units as neurons: the neurons are the site's own
)


@dataclass(frozen=True)
class MadeUp:
    """A report, the labels by site of each of its windows, and the newest census."""

    report: Report
    windows: list[dict[str, list[str]]]
    census: Census


@st.composite
def made_up(draw: st.DrawFn) -> MadeUp:
    shapes = draw(
        st.lists(
            st.tuples(
                st.sampled_from(TEMPLATES),
                st.sampled_from(["relu-like", "gated", "saturating"]),
                st.sampled_from(["", "", "", "assumed", "output"]),
                st.booleans(),
            ),
            min_size=1,
            max_size=7,
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    windows, labels = [], []
    for index in range(draw(st.integers(1, 4))):
        tallies: dict[str, Tally] = {}
        for number, ((units, neurons), kind, role, gradients) in enumerate(shapes):
            about = info(*units, kind=kind, assumed=role == "assumed", output=role == "output")
            if number and rng.random() < 0.3:
                continue
            fates = rng.choice(FATES, neurons, p=(0.3, 0.3, 0.05, 0.1, 0.1, 0.05, 0.1))
            tallies[f"part{number % 3}.s{number}"] = tally(about, fates.tolist(), 10 * index, gradients=gradients)
        windows.append(tallies)
        judged = {name: judge(one, Policy()).labels() for name, one in tallies.items()}
        labels.append({name: [LABELS[code] for code in codes] for name, codes in judged.items()})
    return MadeUp(report_of(*windows), labels, Census(windows[-1]))


@settings(max_examples=300, deadline=None)
@given(made_up())
def test_every_total_equals_that_of_the_slow_twin(case: MadeUp) -> None:
    report, neurons = case.report, [one for one in twin(case.report.layers) if one.in_headlines]
    counts = Counter(one.label for one in neurons)
    assert report.neurons == len(neurons)
    assert report.label_counts == {label: counts[label] for label in LABELS}
    assert sum(report.label_counts.values()) == report.neurons
    born = sum(one.label == "dead" and report[one.site].last_active_step[one.neuron] < 0 for one in neurons)
    assert (report.dead, report.born_dead) == (counts["dead"], born)
    assert report.not_finite_neurons == counts["not finite"]
    observed = len(neurons) - counts["unseen"]
    judged = observed - counts["not finite"]
    assert (report.observed_neurons, report.judged_neurons) == (observed, judged)
    if judged:
        assert report.dead_percent == 100.0 * counts["dead"] / judged
    else:
        assert np.isnan(report.dead_percent)
    plain = json.loads(report.to_json())["summary"]
    assert plain["labels"] == report.label_counts
    assert (plain["neurons"], plain["dead"], plain["born_dead"]) == (len(neurons), counts["dead"], born)


@settings(max_examples=200, deadline=None)
@given(made_up())
def test_every_neuron_has_one_verdict_at_the_place_that_the_slow_twin_finds(case: MadeUp) -> None:
    found = [(one.label, one.site, one.neuron, one.in_headlines) for one in case.report.verdicts()]
    expected = [(one.label, one.site, one.neuron, one.in_headlines) for one in twin(case.report.layers)]
    assert sorted(found) == sorted(one for one in expected if one[0] not in ("alive", "linear"))


@settings(max_examples=100, deadline=None)
@given(made_up())
def test_a_census_counts_each_neuron_once(case: MadeUp) -> None:
    sites = [site for site in case.report.layers if site.name in case.census]
    assert case.census.neurons == sum(one.in_headlines for one in twin(sites))


@settings(max_examples=200, deadline=None)
@given(made_up(), st.sampled_from([None, -1, 0, 10, 20]))
def test_the_metrics_of_the_network_equal_those_of_the_slow_twin(case: MadeUp, since: int | None) -> None:
    report, found = case.report, scalars(case.report, since=since, per_site=False)
    counts = Counter(one.label for one in twin(report.layers) if one.in_headlines)
    observed = sum(counts.values()) - counts["unseen"]
    with_gradients = [site for site in report.layers if site.gradient_positions and site.in_headlines]
    of_those = Counter(one.label for one in twin(with_gradients) if one.in_headlines)
    expected = {}
    if observed:
        expected["neuronscope.more/not_finite_pct"] = 100.0 * counts["not finite"] / observed
        if counts["not finite"] < observed:
            expected["neuronscope/dead_pct"] = 100.0 * counts["dead"] / observed
    if seen := sum(of_those.values()) - of_those["unseen"]:
        expected["neuronscope.more/silent_pct"] = 100.0 * of_those["silent"] / seen
        expected["neuronscope.more/cut_off_pct"] = 100.0 * of_those["cut off"] / seen
    if any(site.in_headlines for site in report.layers):
        deaths, revivals = twin_turnover(report.layers, case.windows, since)
        expected["neuronscope/deaths_total"] = float(twin_deaths(report.layers, case.windows))
        expected |= {"neuronscope.more/deaths": float(deaths), "neuronscope.more/revivals": float(revivals)}
    layers = [site for site in report.layers if site.in_headlines and site.neurons > 1]
    labels = [[LABELS[code] for code in site.judgement.labels()] for site in layers]
    known = [one for one in labels if set(one) - {"unseen", "not finite"}]
    if known and "neuronscope/dead_pct" in expected:
        worst = max(one.count("dead") / (len(one) - one.count("unseen")) for one in known)
        expected["neuronscope/worst_layer_dead_pct"] = 100.0 * worst
        expected["neuronscope.more/collapsed_layers"] = float(
            sum(10 * one.count("dead") >= 9 * len(one) for one in labels)
        )
    left = {"neuronscope/dormant_pct", "neuronscope.more/born_dead_pct"}  # the totals' test has these
    assert {tag: value for tag, value in found.items() if tag not in left} == expected


@settings(max_examples=100, deadline=None)
@given(made_up(), st.integers(1, 4))
def test_a_row_of_several_layers_in_the_overview_counts_each_neuron_once(case: MadeUp, most: int) -> None:
    groups = group_sites([site.name for site in case.report.layers], most)
    for row, group in zip(rows_of(case.report, most), groups, strict=True):
        sites = [case.report[name] for name in group.sites]
        if not any(site.in_headlines for site in sites):
            assert row.dead == sum(site.dead for site in sites)
            continue
        neurons = [one.label for one in twin(sites) if one.in_headlines]
        assert (row.dead, row.broken) == (neurons.count("dead"), neurons.count("not finite"))
        assert row.observed == len(neurons) - neurons.count("unseen")
        if row.observed:
            assert row.share[-1] == row.dead / row.observed


@settings(max_examples=100, deadline=None)
@given(made_up())
def test_the_diagnosis_is_about_each_neuron_once(case: MadeUp) -> None:
    facts = facts_from_report(case.report)
    assert sum(layer.width for layer in facts.layers) == case.report.neurons
    assert sum(int(layer.dead.sum()) for layer in facts.layers) == case.report.dead
    assert sum(layer.not_finite for layer in facts.layers) == case.report.not_finite_neurons


def one_window(**sites: tuple[SiteInfo, list[str]]) -> Report:
    """The report of one window; of each site its description and its neurons' fates."""
    return report_of({name: tally(about, fates, 0) for name, (about, fates) in sites.items()})


def test_both_halves_of_a_crelu_are_the_same_neurons_with_their_most_serious_labels() -> None:
    report = one_window(
        plus=(info(("h", 0, 3, 1)), ["dead", "alive", "linear"]),
        minus=(info(("h", 0, 3, 1)), ["alive", "alive", "dead"]),
    )
    assert (report.neurons, report.dead) == (3, 2)
    assert [(one.site, one.neuron) for one in report.verdicts()] == [("plus", 0), ("minus", 2)]
    assert [site.neurons for site in report.layers] == [3, 3]  # each row shows its own neurons
    assert [site.dead for site in report.layers] == [1, 1]


def test_the_worst_layer_is_one_whose_dead_neurons_are_in_the_totals() -> None:
    report = one_window(
        plus=(info(("h", 0, 4, 1)), ["alive"] * 4),
        minus=(info(("h", 0, 4, 1)), ["alive", "alive", "alive", "dead"]),
        gate=(info(("g", 0, 4, 1), kind="smooth"), ["dead", "dead", "alive", "alive"]),
        product=(info(("g", 0, 4, 1), kind="gated"), ["alive"] * 4),
        loss=(info(("out", 0, 2, 1), output=True), ["dead", "dead"]),
    )
    assert "Worst layer: `minus`, with 1 of 4 dead." in str(report)
    said = DeadThreshold("stop", 1.0).check(report)
    assert said is not None
    assert said.endswith("Worst is minus: 1 of 4 dead.")


def test_the_halves_of_a_fused_layer_are_different_neurons_unless_they_overlap() -> None:
    halves = {"low": (info(("f", 0, 28, 1)), ["dead"] * 28), "high": (info(("f", 28, 56, 1)), ["alive"] * 28)}
    assert one_window(**halves).neurons == 56
    assert one_window(**halves, middle=(info(("f", 20, 40, 1)), ["alive"] * 20)).neurons == 56
    assert one_window(low=halves["low"], middle=(info(("f", 20, 40, 1)), ["alive"] * 20)).neurons == 40


def test_a_branch_that_is_also_seen_alone_is_counted_once() -> None:
    report = one_window(
        joined=(info(("a", 0, 2, 1), ("b", 0, 2, 1)), ["alive", "dead", "alive", "dead"]),
        alone=(info(("a", 0, 2, 1)), ["alive", "dead"]),
    )
    assert (report.neurons, report.dead) == (4, 2)


@pytest.mark.parametrize(("product", "dead"), [(["alive", "dead"], 1), (["alive", "alive"], 0)])
def test_a_gate_and_its_product_are_one_neuron_judged_by_the_product(product: list[str], dead: int) -> None:
    report = one_window(
        gate=(info(("g", 0, 2, 1), kind="smooth"), ["dead", "alive"]),
        product=(info(("g", 0, 2, 1), kind="gated"), product),
    )
    assert (report.neurons, report.dead) == (2, dead)
    assert {one.site for one in report.verdicts()} <= {"product"}


def test_a_neuron_that_one_site_observed_is_not_unseen() -> None:
    about = info(("g", 0, 2, 1), kind="gated")
    first = {
        "gate": tally(info(("g", 0, 2, 1), kind="smooth"), ["alive"] * 2, 0),
        "product": tally(about, ["alive"] * 2, 0),
    }
    report = report_of(first, {"gate": tally(info(("g", 0, 2, 1), kind="smooth"), ["dead", "alive"], 10)})
    assert report["product"].unseen == 2
    assert (report.neurons, report.observed_neurons, report.dead) == (2, 2, 1)


def excluded(assumed: bool) -> Report:
    """A healthy layer of 4 neurons, and 6 dead ones that are not in the totals."""
    out = info(("out", 0, 6, 1), assumed=assumed, output=not assumed)
    return one_window(body=(info(("h", 0, 4, 1)), ["alive"] * 4), loss=(out, ["dead"] * 6))


@pytest.mark.parametrize("assumed", [True, False])
def test_sites_that_are_assumed_or_outputs_are_in_no_total_metric_or_alarm(assumed: bool) -> None:
    report = excluded(assumed)
    assert (report.neurons, report.dead, report.dead_percent) == (4, 0, 0.0)
    assert DeadThreshold("stop", 1.0).check(report) is None
    found = scalars(report)
    assert found["neuronscope/dead_pct"] == 0.0
    assert not any("loss" in tag for tag in found)
    assert diagnose(facts_from_report(report)) == ()
    assert "0 of 4 neurons dead" in summary(report)
    assert report["loss"].dead == 6  # its own row still shows them


@pytest.mark.parametrize("assumed", [True, False])
def test_sites_that_are_not_in_the_totals_are_marked_in_every_writer(assumed: bool) -> None:
    report = excluded(assumed)
    mark, words = ("*", "axis assumed: not in the totals") if assumed else ("**", "output: not in the totals")
    assert f"loss {mark} " in str(report)
    assert f"{mark} {words} (1 layer: loss)." in str(report)
    markdown = report.to_markdown()
    assert f"| `loss` {mark.replace('*', '&#42;')} |" in markdown
    assert words in markdown
    page = report.to_html()
    assert f"loss</a> {mark}</th>" in page
    assert f'["{words}",true],["6 dead",true]' in page  # beside the layer's map, which its script draws
    assert page.count(words) == 2  # among the findings too
    text = diagnosis(report)
    assert f"`loss` {mark.replace('*', '&#42;')}" in text
    assert words in text
    layer = json.loads(report.to_json())["layers"][1]
    assert (layer["in_headlines"], layer["output"]) == (False, not assumed)
    assert all(not one.in_headlines for one in report.verdicts())
    assert len(list(report.verdicts())) == 6
    assert [row.mark for row in rows_of(report, 24)] == ["", mark]
    without = one_window(body=(info(("h", 0, 4, 1)), ["alive"] * 4))
    assert overview(report).shape[0] > overview(without).shape[0]  # a line more, with what the mark means
    own = {"assumed": assumed, "output": not assumed}
    plain = one_window(loss=(info(("out", 0, 6, 1)), ["dead"] * 6))["loss"]
    marked = one_window(loss=(info(("out", 0, 6, 1), **own), ["dead"] * 6))["loss"]
    assert not np.array_equal(heatmap(plain, "train"), heatmap(marked, "train"))


def test_a_report_without_any_layer_in_the_totals_says_so() -> None:
    report = one_window(loss=(info(("out", 0, 6, 1), output=True), ["dead"] * 6))
    assert report.neurons == 0
    assert np.isnan(report.dead_percent)
    assert "no observed neuron is in the totals" in str(report)
    assert "no observed neuron is in the totals" in summary(report)
    assert "nothing was observed" not in str(report).lower()
    assert scalars(report) == {}
    overview(report)
    report.to_html()


def test_an_alarm_counts_each_neuron_once() -> None:
    layer = ("h", 0, 4, 1)
    report = one_window(
        plus=(info(layer), ["dead", "alive", "alive", "alive"]),
        minus=(info(layer), ["alive", "dead", "alive", "alive"]),
        other=(info(("o", 0, 4, 1)), ["alive"] * 4),
    )
    assert DeadThreshold("stop", 26.0).check(report) is None
    said = DeadThreshold("stop", 25.0).check(report)
    assert said is not None
    assert said.startswith("2 of 8 neurons are dead (25 %)")


def test_a_layer_is_not_called_collapsed_because_only_its_dead_neurons_are_counted_there() -> None:
    report = one_window(
        plus=(info(("h", 0, 20, 1)), ["alive"] * 20),
        minus=(info(("h", 0, 20, 1)), ["dead"] * 2 + ["alive"] * 18),
    )
    assert "a layer nearly all dead" not in {one.sign for one in diagnose(facts_from_report(report))}


def test_nan_is_told_even_where_a_layer_is_not_in_the_totals() -> None:
    report = one_window(
        body=(info(("h", 0, 4, 1)), ["alive"] * 4), loss=(info(output=True), ["not finite", "alive", "alive"])
    )
    assert report.not_finite_neurons == 0
    assert report.not_finite == 1
    assert "NOT FINITE: 1 output is NaN" in str(report)
