"""Assembly: which of several claims becomes a neuron's verdict, against a slow twin that decides one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.checkpoints.verdict.combine import combine_evidence, confirmations
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Evidence
from neuronscope.checkpoints.verdict.join_units import JoinedLayer
from neuronscope.checkpoints.verdict.layer_verdicts import DEAD_CLAIMS, LABELS
from neuronscope.errors import UsageError

from . import samples
from .samples import evidence

Said = tuple[str, str]


def decided(said: Sequence[Said]) -> tuple[str, str, bool]:
    """The slow twin: label, basis and whether contested, of one neuron of which this was said."""
    silent = [basis for claim, basis in said if claim == "silent"]
    if any(basis != "suspected" for basis in silent):
        said = [one for one in said if one[0] != "dead"]  # it gets a gradient, so it is not dead
    elif silent and all(basis == "suspected" for claim, basis in said if claim == "dead"):
        said = [one for one in said if one[0] != "dead"]
    alive = min((BASES.index(basis) for claim, basis in said if claim == "alive"), default=9)
    alive = min(alive, BASES.index("measured") if silent else 9)
    opposed = [(claim, basis) for claim, basis in said if claim in DEAD_CLAIMS]
    standing = [one for one in said if one[0] not in DEAD_CLAIMS or BASES.index(one[1]) <= alive]
    firm = [one for one in standing if one[1] != "suspected"]
    best = min(firm or standing, key=lambda one: (CLAIMS.index(one[0]), BASES.index(one[1])), default=("unknown", ""))
    return (*best, alive < 9 and bool(opposed))


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ([], ("unknown", "", False)),
        ([("dead", "suspected")], ("dead", "suspected", False)),
        ([("dead", "suspected"), ("dead", "proved")], ("dead", "proved", False)),
        # What is firm goes before what is suspected, however serious.
        ([("dead", "suspected"), ("no gradient", "inferred")], ("no gradient", "inferred", False)),
        ([("dead", "suspected"), ("alive", "suspected")], ("dead", "suspected", True)),
        # Of what is firm the most serious goes first: a zero row is no reason to keep quiet about a death.
        ([("zero row", "proved"), ("dead", "measured")], ("dead", "measured", False)),
        # Alive on a surer basis refutes; on the same it contests; on a lesser one it contests and loses.
        ([("no gradient", "inferred"), ("alive", "measured")], ("alive", "measured", True)),
        ([("no gradient", "inferred"), ("alive", "inferred")], ("no gradient", "inferred", True)),
        ([("dead", "proved"), ("alive", "measured")], ("dead", "proved", True)),
        ([("dead", "suspected"), ("alive", "inferred"), ("quiet", "proved")], ("quiet", "proved", True)),
        # Silent is dead with a gradient: where it is as firm, it takes the place of dead, and that is no contradiction.
        ([("dead", "measured"), ("silent", "measured")], ("silent", "measured", False)),
        ([("dead", "proved"), ("silent", "measured")], ("silent", "measured", False)),
        ([("dead", "suspected"), ("silent", "suspected")], ("silent", "suspected", False)),
        ([("dead", "proved"), ("silent", "suspected")], ("dead", "proved", True)),
        ([("dead", "inferred"), ("silent", "suspected")], ("silent", "suspected", True)),
        # A gradient was counted, so neither "no gradient" nor "never trained" stands.
        ([("never trained", "inferred"), ("silent", "measured")], ("silent", "measured", True)),
        ([("no gradient", "inferred"), ("silent", "suspected")], ("silent", "suspected", True)),
        # It may fire elsewhere, or get a gradient by another source's word: that is what alive says.
        ([("silent", "measured"), ("alive", "inferred")], ("silent", "measured", False)),
        ([("silent", "suspected"), ("alive", "measured")], ("alive", "measured", False)),
        # A neuron that fires may yet be quiet, unread or not finite.
        ([("unread", "proved"), ("alive", "measured")], ("unread", "proved", False)),
        ([("not finite", "proved"), ("alive", "measured")], ("not finite", "proved", False)),
        ([("quiet", "suspected"), ("alive", "measured")], ("alive", "measured", False)),
    ],
)
def test_all_evidence_on_one_neuron_gives_one_verdict(said: list[Said], verdict: tuple[str, str, bool]) -> None:
    layer = combine_evidence([evidence("a", 3, claim, basis, [1]) for claim, basis in said], {"a": JoinedLayer(3)})[0]
    found = layer.verdict(1)
    assert (found.label, found.basis, bool(layer.contested[1])) == verdict
    assert decided(said) == verdict
    assert layer.label_of(0) == layer.label_of(2) == "unknown"


PIECES = st.lists(
    st.tuples(st.sampled_from(CLAIMS), st.sampled_from(BASES), st.lists(st.integers(0, 11), unique=True).map(sorted)),
    max_size=8,
)


@given(PIECES)
def test_a_layer_is_decided_as_each_of_its_neurons_alone(pieces: list[tuple[str, str, list[int]]]) -> None:
    layer = combine_evidence([evidence("a", 12, *piece) for piece in pieces], {"a": JoinedLayer(12)})[0]
    dead = 0
    for neuron in range(12):
        said = [(claim, basis) for claim, basis, neurons in pieces if neuron in neurons]
        label, basis, contested = decided(said)
        found = layer.verdict(neuron)
        assert (found.label, found.basis, bool(layer.contested[neuron])) == (label, basis, contested)
        assert len(found.supports) + len(found.contradictions) == len(said)  # nothing that was said is hidden
        dead += label in DEAD_CLAIMS and basis in ("proved", "measured", "inferred")
    assert layer.dead == dead
    assert sum(layer.dead_by_basis().values()) == dead


def test_silence_agrees_with_a_dead_output_and_contradicts_a_missing_gradient() -> None:
    said = [
        evidence("a", 2, "silent", "measured", [0, 1], source="scan"),
        evidence("a", 2, "dead", "proved", [0], source="weights"),
        evidence("a", 2, "no gradient", "inferred", [1], source="adam"),
    ]
    layer = combine_evidence(said)[0]
    first, second = layer.verdict(0), layer.verdict(1)
    assert first.label == second.label == "silent"
    assert (first.contradictions, second.contradictions) == ((), ("no gradient · inferred · adam",))
    found = {one.claim: (one.held, one.refuted, one.untested) for one in confirmations([layer])}
    assert found == {"dead": (1, 0, 0), "no gradient": (0, 1, 0)}


@given(PIECES, st.randoms())
def test_the_order_of_evidence_does_not_matter(pieces: list[tuple[str, str, list[int]]], random: object) -> None:
    said = [evidence("a", 12, *piece) for piece in pieces]
    turned = list(said)
    random.shuffle(turned)  # type: ignore[attr-defined]
    one, other = (combine_evidence(order, {"a": JoinedLayer(12)})[0] for order in (said, turned))
    for name in ("labels", "basis", "contested", "since"):
        assert (getattr(one, name) == getattr(other, name)).all(), name


def test_number_source_and_step_come_from_the_best_evidence() -> None:
    said = [
        evidence(
            "a", 4, "no gradient", "inferred", [1, 2], source="adam", numbers=[90, 95], since=[10, 5], measure="age"
        ),
        evidence("a", 4, "dead", "measured", [2, 3], source="scan", numbers=[0.1, 0.2], measure="share"),
        evidence("a", 4, "dead", "measured", [3], source="record", numbers=[0.3], since=[7], measure="share"),
    ]
    layer = combine_evidence(said)[0]
    found = [layer.verdict(neuron) for neuron in range(4)]
    assert [(one.label, one.source, one.number, one.measure) for one in found] == [
        ("unknown", "", None, ""),
        ("no gradient", "adam", 90.0, "age"),
        ("dead", "scan", 0.1, "share"),
        ("dead", "scan", 0.2, "share"),  # of two that say the same on the same basis, the first
    ]
    # The scan cannot tell since when: the optimizer's clock does for neuron 2, the record for neuron 3.
    assert [(one.since, one.since_source) for one in found] == [(None, ""), (10, "adam"), (5, "adam"), (7, "record")]
    assert layer.is_clocked


def test_steps_of_another_kind_of_claim_are_not_used() -> None:
    said = [
        evidence("a", 2, "unread", "proved", [0, 1], since=[3, 3]),
        evidence("a", 2, "no gradient", "inferred", [0], since=[8]),
    ]
    layer = combine_evidence(said)[0]
    assert [layer.verdict(neuron).since for neuron in (0, 1)] == [8, 3]


def test_a_layer_without_any_gradient_is_idle_and_not_dead() -> None:
    layer = combine_evidence(
        [
            evidence(
                "a", 4, "never trained", "inferred", [0, 1, 2, 3], source="adam state", since=-1, whole_layer=True
            ),
            evidence("a", 4, "dead", "measured", [3], source="scan"),
        ]
    )[0]
    assert layer.idle.tolist() == [True, True, True, False]
    assert (layer.dead, layer.suspected) == (1, 0)  # the one that was measured
    only = evidence("a", 4, "no gradient", "suspected", [0, 1, 2, 3], source="adam state", whole_layer=True)
    layer = combine_evidence([only])[0]
    assert (int(layer.idle.sum()), layer.dead, layer.suspected) == (4, 0, 0)  # counted once: as idle


def test_layers_without_evidence_are_listed_as_unknown() -> None:
    layers = combine_evidence(
        [evidence("b", 2, "dead", "proved", [0]), evidence("z", 1, "alive", "measured", [0])],
        {"a": JoinedLayer(3), "b": JoinedLayer(2)},
    )
    assert [layer.name for layer in layers] == ["a", "b", "z"]
    assert layers[0].count("unknown") == 3


def test_evidence_of_different_widths_for_a_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Expected all evidence on a to be of 3 neurons, but scan has 4\."):
        combine_evidence(
            [evidence("a", 3, "dead", "proved", [0]), evidence("a", 4, "dead", "proved", [0], source="scan")]
        )


def test_claims_that_data_confirmed_and_refuted_are_counted() -> None:
    layers = combine_evidence(
        [
            evidence("a", 6, "no gradient", "inferred", [0, 1, 2, 3], source="adam"),
            evidence("a", 6, "dead", "suspected", [3, 4], source="batch norm"),
            evidence("a", 6, "quiet", "proved", [5], source="batch norm"),
            evidence("a", 6, "dead", "measured", [0], source="scan"),
            evidence("a", 6, "no gradient", "measured", [1], source="scan"),
            evidence("a", 6, "alive", "measured", [2, 3], source="scan"),
            evidence("b", 2, "no gradient", "inferred", [0], source="adam"),  # not measured: no part of the tally
        ]
    )
    found = {(one.source, one.claim): (one.held, one.refuted, one.untested) for one in confirmations(layers)}
    assert found == {("adam", "no gradient"): (2, 2, 0), ("batch norm", "dead"): (0, 1, 1)}


def test_eighty_layers_of_28672_neurons_are_arrays_and_not_objects() -> None:
    width = 28_672
    said: list[Evidence] = []
    every = np.arange(width)
    for index in range(80):
        gone = every[index::7]
        rest = np.setdiff1d(every, gone)
        for claim, neurons in (("no gradient", gone), ("alive", rest)):
            numbers = np.full(neurons.size, 9.0)
            said.append(
                Evidence(
                    f"l{index}", width, "adam", claim, "inferred", neurons, numbers, "age", "", numbers.astype(int)
                )
            )
    layers = combine_evidence(said)
    # labels and basis 1 byte each, contested 1, deciding, numbers, since and dating 8 each: 35 a neuron
    held = sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, np.ndarray))
    assert held == 35 * 80 * width
    assert sum(layer.dead for layer in layers) == sum(every[index::7].size for index in range(80))


@pytest.mark.parametrize("sample", [samples.alone, samples.with_data, samples.broken, samples.hostile])
def test_verdict_objects_equal_the_arrays(sample: object) -> None:
    report = sample()  # type: ignore[operator]
    found = list(report.verdicts())
    assert sum(one.label in DEAD_CLAIMS and one.basis != "suspected" for one in found) == report.dead + report.idle
    assert {one.label for one in found} <= set(LABELS)
    assert sum(bool(one.contradictions) for one in found) == report.contested
