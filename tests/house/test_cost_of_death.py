"""The page on what death costs says what its file says, and the script counts and compares right."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from scipy import stats

import neuronscope as ns
from scripts import cost_of_death
from scripts.cost_of_death import PAGE, TASKS, Outcome, Results, Run

ROOT = Path(__file__).resolve().parents[2]
FILE = cost_of_death.load()


def test_the_page_is_what_the_script_makes_of_the_file() -> None:
    assert set(FILE) == set(cost_of_death.runs())
    assert cost_of_death.page(FILE) == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "docs/faq.md", "docs/cost-of-death.md"])
def test_the_summary_stands_where_readers_look(name: str) -> None:
    words = (ROOT / name).read_text(encoding="utf-8").split()
    assert " ".join(cost_of_death.summary(FILE).split()) in " ".join(words)


@pytest.mark.parametrize("network", TASKS)
def test_what_the_page_says_in_words_holds(network: str) -> None:
    def beyond_leaky(factors: tuple[float, ...]) -> tuple[float, float]:
        relu = cost_of_death.after_jumps(FILE, network, factors)
        return cost_of_death.interval(cost_of_death.more_with_leaky(FILE, relu))

    low, high = beyond_leaky(cost_of_death.MILD)  # up to × 20 the deaths make no difference that could be seen
    assert low < 0 < high
    assert beyond_leaky(cost_of_death.HARSH)[0] > 0  # beyond, ReLU loses more
    narrow, wide = TASKS[network].widths
    half = {width: statistics.fmean(cost_of_death.lost(FILE, network, width, "start", 0.5)) for width in (narrow, wide)}
    assert half[wide] < 3 < half[narrow]  # the wide ones do without half of their neurons, or nearly
    anywhere, matched, control = cost_of_death.correlations(FILE, network)
    assert anywhere.value < matched.value < 0
    assert control.high < 0 if network == "CNN" else control.low < -0.1 < control.value < 0.1 < control.high
    costs = {width: cost_of_death.share_that_costs(FILE, network, width, 1.0) for width in (narrow, wide)}
    assert costs[narrow] < 0.2 < 0.3 < costs[wide]


def test_when_and_where_neurons_die_matters_as_the_page_says() -> None:
    def lost(way: str, share: float, *, at_once: bool = False) -> float:
        return statistics.fmean(cost_of_death.lost(FILE, "MLP", 64, way, share, at_once=at_once))

    for share in (0.125, 0.25, 0.5):
        assert lost("middle", share, at_once=True) > 40 > 1 > lost("middle", share)
    assert lost("layer", 0.875) < 1 < 30 < lost("start", 0.875)


def test_what_few_dead_neurons_cost_does_not_show_as_the_summary_says() -> None:
    for share in (0.125, 0.5):
        low, high = cost_of_death.interval(cost_of_death.lost(FILE, "MLP", 64, "start", share))
        assert low < 0 < high < 2


def test_weights_that_fit_those_left_make_up_for_much_of_what_three_in_four_cost() -> None:
    plain, scaled = (cost_of_death.lost(FILE, "MLP", 64, way, 0.75) for way in ("start", "scaled"))
    low, _ = cost_of_death.interval([more - less for more, less in zip(plain, scaled, strict=True)])
    assert low > 0


def test_neurons_killed_by_hand_are_dead_at_the_end() -> None:
    killed = 0
    for run, outcome in FILE.items():
        if run.way != "jump":
            layers = 1 if run.way == "layer" else TASKS[run.network].layers
            assert outcome.dead >= round(layers * run.width * run.amount), run
            killed += 1
    assert killed > 100


@pytest.mark.parametrize(("way", "dead"), [("start", [4] * 6), ("scaled", [4] * 6), ("layer", [0, 0, 0, 4, 0, 0])])
def test_kill_hits_the_share_of_each_layer_that_it_is_told_to(way: str, dead: list[int]) -> None:
    torch.manual_seed(0)
    run = Run("MLP", "LeakyReLU", 16, way, 0.25, seed=3)
    model = cost_of_death.build(run._replace(activation="ReLU"))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.abs_()
    cost_of_death.kill(model, run)
    assert [site.dead for site in ns.scan(model, torch.rand(400, 64)).layers] == dead


def test_scaled_weights_make_up_for_dead_inputs() -> None:
    plain, scaled = (
        cost_of_death.build(Run("MLP", "ReLU", 64, way, 0.75, seed=3)).double() for way in ("start", "scaled")
    )
    for model, way in ((plain, "start"), (scaled, "scaled")):
        cost_of_death.kill(model, Run("MLP", "ReLU", 64, way, 0.75, seed=3))
    x = torch.rand(50, 64, dtype=torch.float64)
    with torch.no_grad():  # 6 layers, in which a quarter of the inputs is left, each twice as large
        torch.testing.assert_close(scaled(x), 2**6 * plain(x))


def test_what_trainings_of_one_network_say_counts_once() -> None:
    numbers = {
        Run("MLP", "ReLU", 16, "jump", factor, seed): factor + seed for factor in (10.0, 20.0) for seed in (0, 1)
    }
    assert cost_of_death.by_network(numbers) == [15.0, 16.0]


def test_networks_of_a_seed_begin_alike_whatever_the_activation() -> None:
    run = Run("CNN", "ReLU", 8, "jump", 20.0, seed=1)
    relu, leaky = (cost_of_death.build(run._replace(activation=name)).state_dict() for name in ("ReLU", "LeakyReLU"))
    assert all(torch.equal(relu[name], leaky[name]) for name in relu)
    other = cost_of_death.build(run._replace(seed=2)).state_dict()
    assert not torch.equal(relu["0.weight"], other["0.weight"])


def test_a_run_is_trained_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "MLP", TASKS["MLP"]._replace(epochs=2, jump=(1, 1)))
    half = cost_of_death.measure(Run("MLP", "ReLU", 16, "middle", 0.75, seed=0))
    assert (half.neurons, half.dead >= 72) == (96, True)
    assert 0 <= half.at_once <= 1
    jump, none = (cost_of_death.measure(Run("MLP", "ReLU", 16, "jump", factor, seed=0)) for factor in (1000.0, 1.0))
    assert jump.dead > none.dead
    assert math.isnan(jump.at_once)


def test_a_measurement_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Run] = []

    def measure(run: Run) -> Outcome:
        measured.append(run)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return Outcome(96, run.seed, run.seed, 0.5, math.nan)

    listed = [Run("MLP", "ReLU", 16, "jump", 1.0, seed) for seed in range(5)]
    monkeypatch.setattr(cost_of_death, "measure", measure)
    monkeypatch.setattr(cost_of_death, "runs", lambda: listed)
    path = tmp_path / "runs.csv"
    assert not cost_of_death.measure_missing(path, minutes=0)
    with pytest.raises(KeyboardInterrupt):
        cost_of_death.measure_missing(path, minutes=1)
    assert cost_of_death.measure_missing(path, minutes=1)
    assert measured == [*listed[:3], *listed[2:]]
    assert [(run, outcome.dead) for run, outcome in cost_of_death.load(path).items()] == list(zip(listed, range(5)))


def made_up(points: dict[tuple[float, int], tuple[int, float]]) -> Results:
    """Results of jumps by (factor, seed): (dead of 100, accuracy)."""
    return {
        Run("MLP", "ReLU", 16, "jump", factor, seed): Outcome(100, dead, dead, accuracy, math.nan)
        for (factor, seed), (dead, accuracy) in points.items()
    }


def test_the_correlation_over_all_runs_is_spearmans() -> None:
    results = made_up(
        {(1.0, 0): (3, 0.9), (1.0, 1): (5, 0.7), (1.0, 2): (5, 0.95), (1.0, 3): (9, 0.2), (1.0, 4): (7, 0.7)}
    )
    expected = stats.spearmanr([it.dead for it in results.values()], [it.accuracy for it in results.values()])
    found = cost_of_death.correlation([results])
    assert found.value == pytest.approx(expected.statistic)
    assert found.low < found.value < found.high


def test_inside_of_equal_settings_what_differs_between_them_does_not_count() -> None:
    # Harsher jumps: more dead and less accurate. Inside of each, the more dead, the more accurate.
    points = {
        (factor, seed): (round(factor) + seed, 0.9 - factor / 100 + seed / 1000)
        for factor in (1.0, 20.0, 40.0)
        for seed in range(6)
    }
    results = made_up(points)
    cells = [{run: it for run, it in results.items() if run.amount == factor} for factor in (1.0, 20.0, 40.0)]
    assert cost_of_death.correlation([results]).value < -0.7
    inside = {
        run: it._replace(accuracy=it.accuracy - 0.0015 * (run.seed == 5)) for cell in cells for run, it in cell.items()
    }
    cells = [{run: it for run, it in inside.items() if run.amount == factor} for factor in (1.0, 20.0, 40.0)]
    assert 0.9 < cost_of_death.correlation(cells).value < 1


def test_a_cell_without_deaths_is_left_out() -> None:
    cell = made_up({(1.0, seed): (seed, 0.9 - (seed * 7 % 5) / 100) for seed in range(5)})
    none_dead = made_up({(5.0, seed): (0, seed / 10) for seed in range(5)})
    assert cost_of_death.correlation([cell, none_dead]).value == cost_of_death.correlation([cell]).value


def test_the_share_that_costs_a_point_is_on_the_line_between_two_measured_shares() -> None:
    # 64 wide: nothing lost at 12.5 % and 25 %, 4 points at 50 %: 1 point at 25 % + 25 % / 4.
    accuracy = {0.0: 0.95, 0.125: 0.95, 0.25: 0.95, 0.5: 0.91, 0.75: 0.8, 0.875: 0.5, 0.9375: 0.1}
    results = {
        Run("MLP", "ReLU", 64, "start" if share else "jump", share or 1.0, seed): Outcome(384, 0, 0, value, math.nan)
        for share, value in accuracy.items()
        for seed in range(2)
    }
    assert cost_of_death.share_that_costs(results, "MLP", 64, 1.0) == pytest.approx(0.3125)
    assert statistics.fmean(cost_of_death.lost(results, "MLP", 64, "start", 0.875)) == pytest.approx(45)
