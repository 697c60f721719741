"""Numbers in words: what is not zero is never rounded to zero, and a bound is never rounded down."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.judge.verdicts import rate_bound
from neuronscope.writers import formatting, wording

from . import sample_reports as samples


@given(part=st.integers(0, 10**9), rest=st.integers(0, 10**9))
def test_only_none_is_shown_as_0_percent_and_only_all_as_100(part: int, rest: int) -> None:
    whole = part + rest
    said = formatting.share(part, whole)
    assert (said == formatting.UNKNOWN) == (whole == 0)
    assert (said == "0 %") == (whole > 0 and part == 0)
    assert (said == "100 %") == (whole > 0 and rest == 0)
    if whole and re.fullmatch(r"[\d.]+ %", said):
        assert abs(float(said[:-2]) - 100 * part / whole) <= (0.0500001 if "." in said else 0.500001)


@given(examples=st.integers(1, 10**8), level=st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_a_bound_is_rounded_up_by_at_most_a_tenth(examples: int, level: float) -> None:
    matched = re.fullmatch(r"([\d.]+) %", formatting.at_most(examples, level))
    assert matched
    said, true = float(matched[1]), 100 * rate_bound(examples, level)
    assert true * (1 - 1e-6) <= said <= true * 1.101  # two digits: 1.0 → 1.1 is the coarsest step


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (0, "100 %"),
        (1, "95 %"),  # 1 − 0.05
        (299, "1 %"),  # 0.99694 %, up
        (300, "1 %"),  # 0.99361 %, up
        (1000, "0.3 %"),  # 0.29912 %
        (1_000_000, "0.0003 %"),  # 0.00029957 %
    ],
)
def test_a_bound_is_written_in_words(examples: int, said: str) -> None:
    assert formatting.at_most(examples, 0.95) == said


@given(st.text(alphabet=st.characters(codec=None)))
def test_text_made_visible_can_be_printed_and_encoded(text: str) -> None:
    shown = formatting.visible(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        (samples.Fate(), "·"),
        (samples.Fate(born=1), "1 (born)"),
        (samples.Fate(died=1), "1 (died)"),
        (samples.Fate(born=3), "3 (all born)"),
        (samples.Fate(died=3), "3 (all died)"),
        (samples.Fate(born=2, died=3), "5 (2 born)"),
        (samples.Fate(not_finite=2), "not finite"),
        (samples.Fate(born=1, died=1, not_finite=2), "2 (1 born)"),
    ],
)
def test_neurons_born_dead_and_neurons_that_died_are_described_differently(fate: samples.Fate, said: str) -> None:
    assert wording.site_cells(samples.site("relu", 16, fate), samples.mixed()).dead == said


def test_the_worst_neurons_are_listed_and_an_ellipsis_stands_for_the_rest() -> None:
    whole = samples.site("relu", 16, samples.Fate(born=4))
    assert wording.site_cells(whole, samples.mixed(), worst=4).worst == ", ".join(map(str, whole.worst(4)))
    assert wording.site_cells(whole, samples.mixed(), worst=3).worst == ", ".join(map(str, whole.worst(3))) + " …"


def test_a_mixed_network_has_a_sentence_for_each_finding() -> None:
    said = " ".join(wording.findings(samples.mixed()))
    # 10 + 2, 24, 3 and 1 dead of the 1056 − 16 neurons that were observed: 40 / 1040 = 3.85 %; 14 of them born dead.
    assert "40 of 1,040 neurons are dead (3.8 %). 14 never fired" in said
    assert "26 worked before and stopped, most at steps" in said
    assert "36 neurons are dormant" in said  # 6 + 30
    assert "No gradients were seen in 1 of 6 layers" in said
    assert "1 layer never ran" in said
    assert "* axis assumed: not in the totals (1 layer: block.act)." in said


def test_the_worst_layer_is_the_one_with_the_largest_share_of_dead_neurons() -> None:
    large, small = samples.site("large", 1000, samples.Fate(born=50)), samples.site("small", 10, samples.Fate(born=4))
    assert "Worst layer: `small`, with 4 of 10 dead." in " ".join(wording.findings(samples.report(large, small)))


def test_neurons_that_are_not_finite_are_neither_dead_nor_alive() -> None:
    whole = samples.report(samples.site("relu", 20, samples.Fate(born=4, not_finite=10)))
    assert wording.site_cells(whole.layers[0], whole).dead_share == "40 %"  # 4 of the 10 with finite outputs
    assert "4 of 10 neurons are dead (40 %)" in " ".join(wording.findings(whole))
    gone = samples.report(samples.site("relu", 20, samples.Fate(not_finite=20)))
    assert wording.site_cells(gone.layers[0], gone).dead_share == "–"
    said = wording.findings(gone)
    assert said[0].startswith("NOT FINITE: 140 outputs")  # 20 neurons × 7
    assert said[1].startswith("No neuron gave only finite outputs")


@given(st.floats(min_value=-1e9, max_value=1e9).filter(lambda value: value == 0 or abs(value) > 1e-12))
def test_a_bound_with_few_digits_is_still_a_bound(value: float) -> None:
    assert float(formatting.bounded(value, "output, at most")) >= value
    assert float(formatting.bounded(value, "output, at least")) <= value
    assert float(formatting.bounded(value, "output")) == pytest.approx(value, rel=1e-3)
