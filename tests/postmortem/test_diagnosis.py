"""Diagnosis: each sign is found where its evidence is, says what that is, and is silent where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuronscope as ns
from neuronscope.checkpoints.diagnosis_inputs import postmortem_facts
from neuronscope.checkpoints.file.layers import find_layers, normalised_layers
from neuronscope.checkpoints.model.examine_model import examine_model
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.judge.diagnosis import SYMPTOMS, diagnose
from neuronscope.judge.symptoms import COLLAPSED, GROUPED, UNDATED, LayerFacts, RunFacts, groups
from neuronscope.report.run_facts import facts_from_report
from tests.writers import sample_reports

from . import samples


def layer(name: str = "a", width: int = 64, since: Any = (), **facts: Any) -> LayerFacts:
    """A layer whose first neurons are dead since the given steps."""
    steps = np.full(width, UNDATED, dtype=np.int64)
    steps[: len(since)] = since
    dead = np.arange(width) < len(since)
    return LayerFacts(name=name, dead=dead, since=steps, **facts)


def found(*layers: LayerFacts, **facts: Any) -> list[str]:
    return [one.sign for one in diagnose(RunFacts(layers, **{"step": 10_000, **facts}))]


#: Half of 32 neurons at a step each, from 0 to the end.
EVENLY = np.linspace(600, 9_900, 32).astype(int).tolist()
HEALTHY = layer(since=())

CASES: list[tuple[str, tuple[LayerFacts, ...], dict[str, Any], list[str]]] = [
    ("nothing", (HEALTHY,), {}, []),
    ("no layers", (), {}, []),
    ("no steps known", (layer(since=[UNDATED] * 9),), {"step": None}, []),
    ("a spike", (layer(since=[5000 + i for i in range(8)]),), {}, ["deaths close together in time"]),
    ("four are no group", (layer(since=[5000] * 4),), {}, []),
    ("a spike at the start", (layer(since=[3, 4, 4, 5, 9, 20]),), {}, ["deaths in the first steps"]),
    ("an even spread", (layer(since=EVENLY),), {}, ["deaths spread over the run"]),
    ("an even spread of few", (layer(since=EVENLY[::2]),), {}, []),
    # Of 100 steps a span of 25 is a quarter: 8 evenly spread deaths are no group, whatever their number.
    ("a short run", (layer(since=list(range(5, 100, 12))),), {"step": 100}, []),
    ("born dead", (layer(since=[-1]),), {}, ["dead since the beginning"]),
    (
        "born dead, 5 layers of 16",
        tuple(layer(str(i), 16, [-1]) for i in range(5)),
        {},
        ["dead since the beginning, deep and narrow"],
    ),
    # 5 layers of 64: 64 > 8 × 5
    ("born dead, 5 layers of 64", tuple(layer(str(i), 64, [-1]) for i in range(5)), {}, ["dead since the beginning"]),
    ("a bound", (layer(drifted=2),), {}, ["held below zero"]),
    ("NaN", (layer(not_finite=1),), {}, ["NaN or infinite numbers"]),
    ("silent", (layer(silent=3),), {}, ["silent neurons"]),
    ("unread", (layer(unread=3),), {}, ["outputs that nothing reads"]),
    ("collapse", (layer(width=10, since=[UNDATED] * 9),), {}, ["a layer nearly all dead"]),
    (
        "a collapse, perhaps",
        (layer(since=(), may_have_collapsed=True),),
        {},
        ["a layer that may have collapsed"],
    ),
    ("no collapse", (layer(width=10, since=[UNDATED] * 8),), {}, []),
    # Dead for 9,000 of 10,000 steps: a decay of 1e-4 a step leaves e^−0.9 = 41 %, one of 5e-5 64 %.
    ("shrunk", (layer(since=[1000], dead_norm=0.4),), {"decay": 1e-4}, ["dead weights shrink"]),
    ("smaller than decay makes them", (layer(since=[1000], dead_norm=0.4),), {"decay": 5e-5}, []),
    ("shrunk without decay", (layer(since=[1000], dead_norm=0.4),), {}, []),
    ("shrunk, since when is not known", (layer(since=[UNDATED], dead_norm=0.4),), {"decay": 1e-4}, []),
    ("hardly shrunk", (layer(since=[1000], dead_norm=0.6),), {"decay": 1e-4}, []),
    ("off centre", (layer(since=[UNDATED]), HEALTHY), {"input_offset": 2.5}, ["an input that is off centre"]),
    ("off centre, no deaths", (HEALTHY, layer(since=[UNDATED])), {"input_offset": 2.5}, []),
    ("centred", (layer(since=[UNDATED]), HEALTHY), {"input_offset": 0.3}, []),
    ("deaths, and no reason known", (layer(since=[UNDATED] * 20),), {}, []),
]


@pytest.mark.parametrize(("layers", "facts", "signs"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_symptoms_are_found_where_their_evidence_is(
    layers: tuple[LayerFacts, ...], facts: dict[str, Any], signs: list[str]
) -> None:
    assert found(*layers, **facts) == signs


def test_every_symptom_is_found_in_some_case() -> None:
    assert {sign for case in CASES for sign in case[3]} == {sign.name for sign in SYMPTOMS}


def remedy(sign: str, *layers: LayerFacts, **facts: Any) -> str:
    (one,) = [one for one in diagnose(RunFacts(layers, **{"step": 10_000, **facts})) if one.sign == sign]
    return one.remedy


SIGN_OF_COLLAPSE = "a layer nearly all dead"


@pytest.mark.parametrize(
    ("sign", "since", "facts"),
    [
        (SIGN_OF_COLLAPSE, [5000] * 64, {}),
        ("held below zero", [5000] * 9, {"drifted": 3}),
        ("deaths spread over the run", EVENLY, {}),
    ],
)
@pytest.mark.parametrize("kind", ["smooth", "leaky", "gated"])
def test_an_activation_is_not_advised_where_one_of_its_kind_is_in_use(
    sign: str, since: list[int], facts: dict[str, Any], kind: str
) -> None:
    names = ("GELU", "SiLU", "ELU", "LeakyReLU", "CReLU", "slope")
    assert any(name in remedy(sign, layer(since=since, kind="relu-like", **facts)) for name in names)
    assert not any(name in remedy(sign, layer(since=since, kind=kind, **facts)) for name in names)


@pytest.mark.parametrize(
    ("sign", "since"),
    [(SIGN_OF_COLLAPSE, [5000] * 64), ("dead since the beginning", [-1]), ("deaths spread over the run", EVENLY)],
)
def test_normalisation_is_not_advised_where_there_is_one(sign: str, since: list[int]) -> None:
    assert "Norm" in remedy(sign, layer(since=since))
    assert "Norm" not in remedy(sign, layer(since=since, normalised=True))


def test_advice_is_possible_whatever_the_activation_and_the_cause() -> None:
    """Hardswish has no option for a slope, a bound below zero need not come from the bias, sigmoids take no He."""
    (one,) = diagnose(RunFacts((layer(drifted=3, kind="relu-like"),), step=10_000))
    assert "Or replace the activation by one with a slope" in one.remedy
    assert "weights and biases" in one.cause
    assert "weights and biases" in one.remedy
    born = {
        kind: remedy("dead since the beginning", layer(since=[-1], kind=kind)) for kind in ("relu-like", "saturating")
    }
    assert ["He init" in born["relu-like"], "Xavier" in born["relu-like"]] == [True, False]
    assert ["He init" in born["saturating"], "Xavier" in born["saturating"]] == [False, True]


def test_advice_for_an_unknown_activation_is_conditional() -> None:
    assert "If the activation is zero for all negative inputs" in remedy(SIGN_OF_COLLAPSE, layer(since=[50] * 64))


@pytest.mark.parametrize("sign", [SIGN_OF_COLLAPSE, "deaths close together in time"])
def test_the_checkpoint_to_return_to_is_named(sign: str) -> None:
    found = layer(since=[5000] * 63 + [5003])
    assert remedy(sign, found).startswith("Go back to a checkpoint before step 5,000.")
    # Looked at every 20 steps: the deaths first seen at 5,000 may have come at 4,981.
    assert remedy(sign, found, observed_every=20).startswith("Go back to a checkpoint before step 4,981.")


def test_no_checkpoint_to_return_to_is_named_without_evidence() -> None:
    undated, born = (layer(since=[step] * 64) for step in (UNDATED, -1))
    assert remedy(SIGN_OF_COLLAPSE, undated).startswith("Go back to an earlier checkpoint that does not show this.")
    assert "checkpoint" not in remedy(SIGN_OF_COLLAPSE, born)


def test_a_collapse_is_dated_by_its_last_deaths() -> None:
    one = layer(since=[20] * 10 + [5000] * 53 + [5010])
    assert "before step 5,000." in remedy(SIGN_OF_COLLAPSE, one)


@pytest.mark.parametrize(
    ("since", "said"),
    [
        ((-1, 305), "The first of these layers has been dead since the beginning, the last since step 305."),
        ((300, 305), "The first of these layers has been dead since step 300, the last since step 305."),
        ((305, 305), "They have been dead since step 305."),
        ((-1, -1), "They have been dead since the beginning."),
    ],
)
def test_the_dates_of_layers_that_collapsed_one_after_another_are_both_told(since: tuple[int, int], said: str) -> None:
    layers = tuple(layer(str(step), 64, [step] * 64) for step in since)
    (found,) = (one for one in diagnose(RunFacts(layers, step=5000)) if one.sign == SIGN_OF_COLLAPSE)
    assert said in found.evidence


def test_a_scan_does_not_say_that_what_never_fired_in_it_was_dead_before_training() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    for index, dead in ((0, 3), (2, 8)):
        nn.init.ones_(model[index].weight)
        model[index].bias.data[:dead] = -1000.0
    found = diagnose(facts_from_report(ns.scan(model, [torch.rand(320, 4)])))
    assert [one.sign for one in found] == [SIGN_OF_COLLAPSE]
    assert "beginning" not in found[0].evidence
    assert "Go back to an earlier checkpoint that does not show this." in found[0].remedy


def test_the_diagnosis_of_a_watched_run_knows_activations_and_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8), nn.ReLU())
    with ns.watch(model, every_n_steps=5, window_steps=5) as scope:
        for step in range(40):
            if step == 22:
                with torch.no_grad():
                    model[1].bias[:] = -1000.0
                    model[3].bias[:] = -1000.0
            model(torch.randn(320, 4)).sum().backward()
            scope.step()
    facts = facts_from_report(scope.report())
    assert [(one.kind, one.normalised) for one in facts.layers] == [("smooth", True), ("relu-like", False)]
    assert facts.observed_every == 5
    found = next(one for one in diagnose(facts) if one.sign == SIGN_OF_COLLAPSE)
    # Seen to fire at step 20 and missed at 25.
    assert found.remedy.startswith("Go back to a checkpoint before step 21.")


def test_the_diagnosis_of_a_postmortem_knows_activations_and_norms(tmp_path: Path) -> None:
    """By the model: a norm right before the activation, one before its weights, and none."""
    model = nn.Sequential(
        *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU()),
        *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
    )
    given = examine_model(model)
    kinds = {site.name: site.kind for site in given.sites}
    assert kinds == {"1/relu": "relu-like", "4/silu": "smooth", "6/relu": "relu-like"}
    assert set(given.normalised) == {"1/relu", "4/silu"}
    torch.save(model.state_dict(), tmp_path / "net.pt")
    layers = find_layers(open_checkpoint(tmp_path / "net.pt").tensors)
    assert normalised_layers(layers) == {"0", "4"}


def test_the_evidence_of_a_diagnosis_names_numbers_layers_and_steps() -> None:
    two = layer("b", 32, [5003] * 2), layer("a", 64, [5000] * 6 + [9000])
    (one,) = diagnose(RunFacts(two, step=10_000, learning_rates=(0.003, 0.003, 0.1), clocked=True))
    assert one.evidence == (
        "8 of 9 dated deaths are at steps 5,000 to 5,003 of 10,000: layers a (6 of 64), b (2 of 32). Steps come from "
        "the optimizer's state: the earliest possible, usually about 20 steps too early. Learning rate when the "
        "checkpoint was saved: 0.1, 0.003."
    )
    assert (one.neurons, one.layers, one.steps) == (8, ("a", "b"), (5000, 5003))


def test_estimated_steps_are_not_called_the_earliest_possible() -> None:
    (group,) = diagnose(RunFacts((layer("a", 64, [5000] * 6),), step=10_000, clocked=True, estimated=True))
    assert "Steps are estimated by a clock, some too early and some too late." in group.evidence
    facts = RunFacts((layer("a", 9, [5000] * 9),), step=10_000, clocked=True, estimated=True)
    found = diagnose(facts)
    evidence = " ".join(one.evidence for one in found)
    assert "They have been dead since step 5,000, about." in evidence
    assert "earliest" not in evidence
    assert not any("before step" in one.remedy for one in found)  # they may have died earlier


def test_of_many_layers_some_are_named_and_all_are_counted() -> None:
    (one,) = diagnose(RunFacts(tuple(layer(str(i), 64, [-1] * (i + 1)) for i in range(7)), step=9))
    assert "layers 6 (7 of 64), 5 (6 of 64), 4 (5 of 64), 3 (4 of 64) and 3 more" in one.evidence
    assert one.layers == tuple("6543210")
    assert one.neurons == 28  # 1 + 2 + … + 7


def test_the_worst_diagnosis_comes_first() -> None:
    assert found(layer(since=[-1], drifted=3), layer("b", since=[5000] * 9)) == [
        "deaths close together in time",
        "held below zero",
        "dead since the beginning",
    ]


@pytest.mark.parametrize(
    ("steps", "length", "spans"),
    [
        ([], 1000, []),
        ([7] * 5, 1000, [(7, 7)]),
        ([7] * 4, 1000, []),
        # 25 steps is the span: the last of these is one too far.
        ([100, 101, 102, 103, 125], 1000, [(100, 125)]),
        ([100, 101, 102, 103, 126], 1000, []),
        # Of 10,000 steps, 1 % is more.
        ([100, 150, 160, 199, 200], 10_000, [(100, 200)]),
        ([100] * 6 + [900] * 9, 1000, [(900, 900), (100, 100)]),
        # Looked at every 250 steps: a quarter of all at each of four steps is an even spread, and no group.
        ([250] * 9 + [500] * 9 + [750] * 9 + [1000] * 9, 1000, []),
        ([250] * 2 + [500] * 60 + [750] * 2 + list(range(1000, 10_000, 250)), 10_000, [(250, 500)]),
        # At least a fifth of all: 5 of 30.
        ([100] * 5 + list(range(200, 1000, 32)), 1000, []),
    ],
)
def test_deaths_are_grouped_by_the_documented_rule(steps: list[int], length: int, spans: list[tuple[int, int]]) -> None:
    assert groups(np.array(steps, dtype=np.int64), length) == spans


@given(st.lists(st.integers(0, 2000), max_size=60), st.integers(2000, 5000))
def test_groups_of_deaths_are_short_separate_and_large(steps: list[int], length: int) -> None:
    rising = np.sort(np.array(steps, dtype=np.int64))
    spans = groups(rising, length)
    for first, last in spans:
        assert last - first <= max(25, length // 100)
        assert ((rising >= first) & (rising <= last)).sum() >= max(5, len(steps) / 5)
    for (_, end), (begin, _) in zip(sorted(spans), sorted(spans)[1:]):
        assert end < begin


@given(st.integers(1, 400), st.integers(0, 10**6))
def test_evenly_spread_deaths_are_never_called_a_group(number: int, length: int) -> None:
    steps = np.linspace(0, length, number).astype(np.int64)
    assert groups(steps, length) == []


def test_a_watched_run_is_diagnosed() -> None:
    # In the sample, 24 of 128 neurons of features.4 died, strewn over 2,000 steps, and 14 are dead from the start.
    report = sample_reports.mixed()
    signs = {one.sign: one for one in diagnose(facts_from_report(report))}
    assert signs["dead since the beginning"].neurons == report.born_dead == 14
    assert signs["deaths spread over the run"].neurons == report.dead - report.born_dead == 26
    assert diagnose(facts_from_report(sample_reports.healthy())) == ()
    broken = diagnose(facts_from_report(sample_reports.broken()))
    assert [(one.sign, one.neurons) for one in broken] == [("NaN or infinite numbers", 24)]


def test_the_inputs_of_a_diagnosis_are_taken_from_a_postmortem() -> None:
    report = samples.with_model()
    facts = postmortem_facts(report.layers, step=5000, learning_rates=(0.1,), dead_norm_ratios={"net.4": 0.2})
    by_name = {one.name: one for one in facts.layers}
    assert by_name["net.4"].drifted == 6  # the bounds that lie below zero
    assert by_name["net.4"].dead_norm == 0.2
    assert by_name["net.0"].dead_norm is None
    assert facts.clocked
    assert not facts.estimated
    assert facts.born() == 2
    assert facts.dated().size == 18 + 9 + 14
    assert facts.length() == 5000


def test_suspected_neurons_are_not_evidence_for_a_diagnosis() -> None:
    said = samples.report([samples.evidence("a", 16, "dead", "suspected", list(range(16)), since=300)])
    assert said.diagnoses == ()


def test_a_diagnosis_as_a_dictionary_is_plain_data() -> None:
    (one,) = samples.healthy().diagnoses or diagnose(RunFacts((layer(since=[500] * 6),), step=1000))
    plain = one.to_dict()
    assert plain["steps"] == [500, 500]
    assert plain["layers"] == ["a"]
    assert set(plain) == {"sign", "cause", "remedy", "source", "evidence", "neurons", "layers", "steps", "certain"}


def test_a_remedy_that_fits_some_layers_only_names_them() -> None:
    gone = [300] * 10
    relu, gelu = layer("a", 10, gone, kind="relu-like"), layer("b", 10, gone, kind="smooth")
    assert "Replace the activation of a by one with a slope" in remedy(COLLAPSED, relu, gelu)
    assert "Replace the activation by one with a slope" in remedy(COLLAPSED, relu)
    assert "Replace" not in remedy(COLLAPSED, gelu)
    gone = [layer(name, 10, gone, kind="saturating") for name in "cdefg"]
    assert "Replace the activation of c, d, e and 2 more by one that does not saturate" in remedy(
        COLLAPSED, *gone, relu
    )


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ((), "Go back to a checkpoint before step 300. "),
        ((100, 288, 300, 400), "Go back to a checkpoint before step 300 (the last one known is of step 288). "),
        ((300, 400), "Go back to a checkpoint before step 300 (none is known). "),
    ],
)
@pytest.mark.parametrize("sign", [COLLAPSED, GROUPED])
def test_going_back_names_the_last_healthy_checkpoint(saved: tuple[int, ...], said: str, sign: str) -> None:
    # A checkpoint of step 300 holds the weights with which the neurons were first seen not to fire.
    assert said in remedy(sign, layer("a", 10, [300] * 9), step=5000, checkpoints=saved)


def test_what_follows_from_the_evidence_is_not_called_a_likely_cause() -> None:
    spike = diagnose(RunFacts((layer("a", 10, [300] * 9),), step=5000))
    heads = {one.sign: one.parts()[1][0] for one in spike}
    assert heads == {COLLAPSED: "What it means", GROUPED: "Likely cause"}


def test_a_post_mortem_of_several_checkpoints_names_the_last_healthy_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(1, 301):
        if step == 200:
            net[0].bias.data.fill_(-1000.0)
        net(torch.randn(32, 4)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if step in (100, 150, 250, 300):
            state = {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": step}
            torch.save(state, tmp_path / f"{step}.ckpt")
    report = ns.postmortem([tmp_path / f"{step}.ckpt" for step in (100, 150, 250, 300)])
    assert report.dead == 16
    (spike,) = [one for one in report.diagnoses if one.sign == GROUPED]
    # The clock's dates are the earliest possible: some steps before 200, and after 150.
    assert "(the last one known is of step 150)" in spike.remedy
