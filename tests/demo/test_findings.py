"""Sentences, tables and picture from numbers made up for the purpose: each says what is so, and only where it is so."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from neuronscope.demo.conclusions import findings, headline, number
from neuronscope.demo.picture import draw_comparison
from neuronscope.demo.recipe import VARIANTS
from neuronscope.demo.results import Collapse, Comparison, Epoch, Moment, Network, Run, Spread
from neuronscope.demo.tables import layer_table, main_table


def moment(step: int = 0, dead: int = 0, **numbers: float) -> Moment:
    """Two layers of 50 neurons; all the dead are in the first."""
    fields = {
        "silent": 0,
        "dormant": 0,
        "cut_off": 0,
        "zero_outputs": 0.0,
        "zero_gradients": 0.0,
        "not_finite": 0,
    } | numbers
    return Moment(
        step=step,
        dead=(dead, 0),
        silent=(int(fields["silent"]), 0),
        dormant=(int(fields["dormant"]), 0),
        cut_off=(int(fields["cut_off"]), 0),
        zero_outputs=float(fields["zero_outputs"]),
        zero_gradients=float(fields["zero_gradients"]),
        not_finite=int(fields["not_finite"]),
    )


def run(variant: str, seed: int, dead: int, accuracy: float = 0.9, **numbers: float) -> Run:
    """Two epochs, the spike in the second."""
    epochs = (Epoch(10, (0, 0), (0, 0), 1.0, 0.5), Epoch(20, (dead, 0), (0, 0), 0.5, accuracy))
    scans = (moment(0), moment(10, dead // 2), moment(20, dead, **numbers))
    return Run(variant, seed, scans, epochs, died=dead, revived=0, recount_agrees=True, seconds=1.0)


def comparison(*runs: Run) -> Comparison:
    recipe = {"spike_epochs": [2, 2], "layers": 2, "width": 50, "images": 100, "spike_factor": 20.0}
    networks = {each.variant: Network(each.variant, 100, 1000) for each in runs}
    return Comparison(recipe=recipe, networks=networks, runs=runs, versions={})


def said(*runs: Run) -> str:
    return "\n".join(findings(comparison(*runs)))


def test_a_spread_is_the_mean_deviation_and_range_over_seeds() -> None:
    # Of 2, 4, 9: mean 5, sample variance ((-3)² + (-1)² + 4²) / 2 = 13.
    assert Spread.of([2, 4, 9]) == Spread(5.0, math.sqrt(13), 2.0, 9.0)
    assert Spread.of([7]).deviation is None
    assert number(Spread.of([2, 4, 9])) == "5.0 ± 3.6"
    assert number(Spread.of([7])) == "7"


@pytest.mark.parametrize(
    ("dead", "said"),
    [
        ((35, 0.5, 0), "ReLU dies, GELU and SiLU live: after a spike 35 %, 0.5 % and 0 % of their neurons are dead"),
        ((35, 20, 0), "ReLU and GELU die, SiLU lives: after a spike 35 %, 20 % and 0 % of their neurons are dead"),
        ((0, 20, 0), "GELU dies, ReLU and SiLU live: after a spike 20 %, 0 % and 0 % of their neurons are dead"),
        ((35, 5, 0), "ReLU, GELU and SiLU: after a spike 35 %, 5.0 % and 0 % of their neurons are dead"),
        ((0, 0, 0), "ReLU, GELU and SiLU: after a spike 0 %, 0 % and 0 % of their neurons are dead"),
    ],
)
def test_the_headline_says_who_dies_only_where_it_is_so(dead: tuple[float, ...], said: str) -> None:
    shares = dict(zip(("ReLU", "GELU", "SiLU"), dead, strict=True))
    runs = [run(name, seed, int(2 * share) if seed else 0) for name, share in shares.items() for seed in range(2)]
    assert headline(comparison(*runs)) == said


def test_deaths_are_stated_as_mean_and_deviation() -> None:
    text = said(run("ReLU", 0, 30), run("ReLU", 1, 40))
    assert "ReLU ends with 35.0 ± 7.1 of 100 neurons dead (35 %)" in text
    assert "35.0 ± 7.1 others died in training" in text


@pytest.mark.parametrize(
    ("calm", "blamed"), [(3, "The spike is the cause: without it, 3 are dead"), (29, "The spike is not the cause")]
)
def test_the_spike_is_named_as_the_cause_only_where_deaths_follow_it(calm: int, blamed: str) -> None:
    assert blamed in said(run("ReLU", 0, 30), run("ReLU-no-spike", 0, calm))


def test_variants_with_and_without_dead_neurons_are_named() -> None:
    text = said(run("ReLU", 0, 30), run("GELU", 0, 2), run("SiLU", 0, 0), run("Tanh", 0, 0))
    assert "No dead neuron at the end: SiLU and Tanh." in text
    assert "Some neurons die without ReLU too: GELU 2 dead" in text


def test_underflow_is_reported_and_not_called_death() -> None:
    text = said(run("GELU", 0, 0, zero_outputs=0.49), run("SiLU", 0, 0, zero_outputs=0.004))
    assert "49 % of GELU's outputs are exactly zero" in text
    assert "no neuron is zero for every image" in text
    assert "SiLU's outputs" not in text


def test_dormant_neurons_of_smooth_functions_are_reported() -> None:
    text = said(run("GELU", 0, 0, dormant=30), run("SiLU", 0, 0))
    assert "Not dead is not healthy" in text
    assert "GELU 30 (30 %)." in text
    assert "Not dead is not healthy" not in said(run("GELU", 0, 0), run("SiLU", 0, 0))


def test_vanished_gradients_and_cut_off_neurons_are_reported() -> None:
    text = said(run("Tanh", 0, 0, zero_gradients=0.02, cut_off=3))
    assert "by Tanh 2.0 %" in text
    assert "Cut off (they fire, but no image gives them a gradient): Tanh 3." in text


def test_silent_neurons_are_reported_and_counted_among_those_that_are_zero_for_every_image() -> None:
    made = run("GELU", 0, 0, silent=4, zero_outputs=0.49)
    text = said(made, run("ReLU", 0, 30))
    assert "Silent (zero for every image, but some give them a gradient): GELU 4." in text
    assert "no neuron is zero for every image" not in text
    assert "Silent" not in said(run("GELU", 0, 0))
    headings = [str(column.header) for column in main_table(comparison(made), 120).columns]
    assert "silent at\nthe end" in headings


def test_a_slope_below_zero_is_praised_only_where_no_neuron_is_lost() -> None:
    kept = [run("LeakyReLU", 0, 0), run("ELU", 0, 0)]
    assert "none is dead or dormant with LeakyReLU and ELU" in said(*kept, run("ReLU", 0, 30))
    assert "A slope below zero" not in said(*kept, run("PReLU", 0, 0, dormant=1))
    assert "A slope below zero" not in said(run("ReLU", 0, 0))
    learned = [replace(run("PReLU", seed, 0, dormant=1), slopes=(0.25 - seed / 2, 0.1)) for seed in range(2)]
    assert "PReLU learned slopes from -0.25 to 0.25 below zero." in said(*learned)
    assert "learned slopes" not in said(*kept)


def test_small_gradients_are_reported_as_a_mean_over_the_seeds() -> None:
    small = [replace(run("Sigmoid", seed, 0, 0.8), gradient_reach=0.02 * (1 + seed)) for seed in range(2)]
    text = said(*small, replace(run("Tanh", 0, 0), gradient_reach=0.5))
    assert "Sigmoid makes gradients small: before the first step, the first layer gets 3.0 % of the gradient" in text
    assert "Tanh makes" not in text


def no_activation(seed: int, accuracy: float, flat: float, *, equal: bool = True) -> Run:
    found = Collapse(3, 64, 10, 9, 650, 2e-7 * (1 + seed), equal, flat)
    return replace(run("none", seed, 0, accuracy), collapse=found)


@pytest.mark.parametrize(
    ("deep", "flat", "bought"),
    [(0.94, 0.96, "nothing"), (0.96, 0.95, "nothing"), (0.99, 0.92, "accuracy")],
)
def test_what_depth_bought_is_what_a_linear_classifier_lacks(deep: float, flat: float, bought: str) -> None:
    # Of two seeds that are 2 points apart the deviation is 1.4 points.
    text = said(*(no_activation(seed, deep - 0.02 * seed, flat - 0.02 * seed) for seed in range(2)))
    assert "With none, 3 layers are one: their product, computed in float64, is a matrix of 10 × 64 and rank 9" in text
    assert "650 parameters instead of 1,000" in text
    assert (
        f"Depth bought {bought}: test accuracy {100 * deep - 1:.1f} ± 1.4 %, and {100 * flat - 1:.1f} ± 1.4 %" in text
    )
    assert "in 2 of 2 runs" in text
    assert "differences of at most 4e-07 of the largest output" in text


def test_a_product_that_is_not_the_network_is_reported() -> None:
    assert "in 1 of 2 runs the network's" in said(no_activation(0, 0.9, 0.9), no_activation(1, 0.9, 0.9, equal=False))
    assert "Depth bought" not in said(run("ReLU", 0, 30))


def gated() -> Comparison:
    """ReLU with 100 neurons, and GLU with 40."""
    made = comparison(run("ReLU", 0, 30), run("GLU", 0, 10, dormant=8))
    return replace(made, networks={**made.networks, "GLU": Network("GLU", 40, 1010)})


def test_shares_are_of_the_variants_own_neurons() -> None:
    made = gated()
    text = "\n".join(findings(made))
    assert "GLU 8 (20 %)" in text
    assert "GLU 40 (1,010 parameters), ReLU 100 (1,000)" in text
    assert "A gated neuron costs two" not in said(run("ReLU", 0, 30), run("GELU", 0, 0))
    summary = made.to_dict()["summary"]
    assert [summary[name]["neurons"] for name in ("ReLU", "GLU")] == [100, 40]
    console = Console(file=io.StringIO(), width=100)
    console.print(main_table(made, 100), layer_table(made, 100))
    lines = console.file.getvalue().splitlines()
    main, layers = (line.split() for line in lines if line.startswith("GLU"))
    assert main[1] == "40"
    assert layers[1:4] == ["50.0", "+", "40.0"]  # 10 and 8 of the 20 neurons of its first layer
    assert "Of 100 neurons" in "".join(str(main_table(comparison(run("ReLU", 0, 3)), 100).title))


def test_accuracy_is_called_uninformative_only_where_it_is() -> None:
    near = [
        run("ReLU", 0, 30, 0.93),
        run("ReLU", 1, 30, 0.95),
        run("LeakyReLU", 0, 0, 0.94),
        run("LeakyReLU", 1, 0, 0.94),
    ]
    far = [replace(each, epochs=(*each.epochs[:-1], replace(each.epochs[-1], accuracy=0.99))) for each in near[2:]]
    assert "Test accuracy does not show it" in said(*near)
    assert "Test accuracy does not show it" not in said(*near[:2], *far)


def test_a_network_that_lives_and_does_not_learn_is_named_with_its_worst_seed() -> None:
    text = said(run("ELU", 0, 0, 0.9), run("ELU", 1, 0, 0.31), run("ReLU", 0, 30, 0.2), run("Tanh", 0, 0, 0.9))
    assert "do not make a network learn. Test accuracy of the worst seed: ELU 31 %." in text
    assert "do not make a network learn" not in said(run("ReLU", 0, 30, 0.2), run("Tanh", 0, 0, 0.9))


def test_rare_labels_and_layers_without_any_take_no_room_in_the_tables() -> None:
    made = comparison(*(run(name, 0, dead, cut_off=1) for name, dead in (("ReLU", 30), ("Tanh", 0), ("ELU", 0))))
    made = replace(made, networks={name: Network(name, 101, 1) for name in made.networks})
    assert "cut\noff" not in [column.header for column in main_table(made, 200).columns]
    table = layer_table(made, 200)
    assert table.row_count == 1
    assert table.caption == "None in any layer: Tanh, ELU."


def test_a_recount_that_disagrees_is_reported() -> None:
    assert "in 1 of 2 runs" in said(run("ReLU", 0, 30), replace(run("ReLU", 1, 30), recount_agrees=False))


def test_a_network_that_is_not_finite_is_reported_and_its_json_can_be_written() -> None:
    broken = run("ReLU", 0, 0, not_finite=5)
    broken = replace(broken, epochs=(*broken.epochs[:-1], replace(broken.epochs[-1], loss=math.nan)))
    assert "NaN or infinity, so its other numbers mean nothing: ReLU." in said(broken)
    plain = comparison(broken).to_dict()
    assert plain["runs"][0]["epochs"][-1]["loss"] is None
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize("width", [60, 70, 80, 90, 100, 110, 120, 200])
def test_tables_drop_columns_rather_than_numbers(width: int) -> None:
    made = comparison(
        *(run(name, seed, 30 + seed, dormant=20, cut_off=1) for name in ("ReLU", "LeakyReLU") for seed in range(2))
    )
    text = io.StringIO()
    console = Console(file=text, width=width)
    console.print(main_table(made, width), layer_table(made, width))
    lines = text.getvalue().splitlines()
    first, second = (lines[place] for place, line in enumerate(lines) if line.startswith("ReLU"))
    # Dead at the start, dead at the end, dormant at the end, accuracy: always there and whole.
    assert re.findall(r"(?:30.5|20.0|90.0) ± [\d.]+(?: %)?", first)[-3:] == ["30.5 ± 0.7", "20.0 ± 0.0", "90.0 ± 0.0 %"]
    assert re.fullmatch(r"ReLU +61.0( \+ 40.0)? +0( \+    0)? *", second)
    assert "…" not in text.getvalue()


def test_a_wide_table_has_all_columns_and_a_narrow_one_the_main_ones() -> None:
    made = comparison(*(run("ReLU", seed, 30 + seed, dormant=20, cut_off=1) for seed in range(2)))
    assert [len(main_table(made, width).columns) for width in (120, 60)] == [10, 5]


def test_the_picture_shows_one_variant_or_many() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `demo`)")
    names = [variant.name for variant in VARIANTS]
    for count, lines in ((1, 1), (len(names), 5)):
        made = comparison(*(run(name, seed, 30) for name in names[:count] for seed in range(2)))
        figure = draw_comparison(made)
        assert len(figure.axes[0].lines) == lines
        assert len(figure.axes[2].patches) == 3 * count
