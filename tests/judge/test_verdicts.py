"""Judging: what is said of one neuron, from counts alone, with every threshold at its edge."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import LABELS, Judgement, Policy, judge, rate_bound


def label(
    kind: str = "relu-like",
    *,
    zeros: int = 0,
    positions: int = 100,
    gradient_zeros: int = 0,
    gradient_positions: int = 100,
    not_finite: int = 0,
    mean: float = 1.0,
    linear: bool = False,
    policy: Policy | None = None,
) -> str:
    """The label of neuron 0 beside a healthy neuron 1 whose mean output is 1."""
    judgement = judge(
        SimpleNamespace(
            kind=kind,
            linear_when_on=linear,
            zero_outputs=np.array([zeros, 50 * positions // 100]),
            zero_gradients=np.array([gradient_zeros, 50 * gradient_positions // 100]),
            not_finite_outputs=np.array([not_finite, 0]),
            mean_abs_output=np.array([mean, 1.0]),
            positions=positions,
            gradient_positions=gradient_positions,
        ),
        policy or Policy(),
    )
    return LABELS[judgement.labels()[0]]


# Scores beside a neuron of mean 1: s = m / ((m + 1) / 2). s <= .025 where m <= .0125 / .9875 = .012658.
TABLE = [
    # zero at every position, and the gradient too
    ("dead", {"zeros": 100, "gradient_zeros": 100, "mean": 0.0}),
    ("alive", {"zeros": 99, "gradient_zeros": 99}),
    # gradients unseen: judged by outputs alone
    ("dead", {"zeros": 100, "gradient_zeros": 0, "gradient_positions": 0, "mean": 0.0}),
    # zero at every position, and a gradient came at one: silent, neither dead nor dormant
    ("silent", {"zeros": 100, "gradient_zeros": 99, "mean": 0.0}),
    ("silent", {"zeros": 100, "gradient_zeros": 9, "gradient_positions": 10, "mean": 0.0}),
    # it fired once, so it is not silent
    ("dormant", {"zeros": 99, "gradient_zeros": 0, "mean": 0.0001}),
    # an output below the tolerance counts as zero: silent, whatever its mean
    ("silent", {"zeros": 100, "gradient_zeros": 0, "mean": 1.0, "policy": Policy(tolerance=2.0)}),
    # fires, and no gradient comes back at any position
    ("cut off", {"zeros": 40, "gradient_zeros": 100}),
    ("alive", {"zeros": 40, "gradient_zeros": 99}),
    # gradients were seen at fewer positions than outputs
    ("dead", {"zeros": 100, "gradient_zeros": 10, "gradient_positions": 10, "mean": 0.0}),
    ("cut off", {"zeros": 0, "gradient_zeros": 10, "gradient_positions": 10}),
    # dormancy at its edge
    ("dormant", {"zeros": 10, "mean": 0.0126}),
    ("alive", {"zeros": 10, "mean": 0.0127}),
    ("dormant", {"zeros": 10, "mean": 0.05, "policy": Policy(dormant_tau=0.1)}),  # s = .05 / .525 = .0952
    ("alive", {"zeros": 10, "mean": 0.06, "policy": Policy(dormant_tau=0.1)}),  # s = .06 / .53 = .1132
    # sparse is not dead
    ("alive", {"zeros": 99, "gradient_zeros": 0}),
    # never off
    ("linear", {"zeros": 0, "linear": True}),
    ("alive", {"zeros": 1, "linear": True}),
    ("alive", {"zeros": 0, "linear": False}),
    # not finite outweighs everything that was seen
    ("not finite", {"zeros": 0, "not_finite": 1}),
    ("not finite", {"zeros": 0, "not_finite": 1, "linear": True, "gradient_zeros": 100}),
    # smooth: an underflow to exact zero is death, a small output is dormancy
    ("dead", {"kind": "smooth", "zeros": 100, "gradient_zeros": 100, "mean": 0.0}),
    ("dormant", {"kind": "smooth", "zeros": 0, "mean": 0.001}),
    # leaky: never dead by output
    ("silent", {"kind": "leaky", "zeros": 100, "gradient_zeros": 0, "mean": 0.0}),
    ("cut off", {"kind": "leaky", "zeros": 100, "gradient_zeros": 100, "mean": 0.0}),
    ("dormant", {"kind": "leaky", "zeros": 100, "gradient_zeros": 0, "gradient_positions": 0, "mean": 0.0}),
    # every other kind can be silent too: at a pre-activation of exactly zero, or by a straight-through estimator
    ("silent", {"kind": "smooth", "zeros": 100, "gradient_zeros": 0, "mean": 0.0}),
    ("silent", {"kind": "saturating", "zeros": 100, "gradient_zeros": 0, "mean": 0.0}),
    ("silent", {"kind": "gated", "zeros": 100, "gradient_zeros": 99, "mean": 0.0}),
    # saturating: cut off by zero gradient
    ("cut off", {"kind": "saturating", "zeros": 0, "gradient_zeros": 100}),
    ("alive", {"kind": "saturating", "zeros": 0, "gradient_zeros": 99}),
    # gated: the product
    ("dead", {"kind": "gated", "zeros": 100, "gradient_zeros": 100, "mean": 0.0}),
    # never observed: not healthy, not dead
    ("unseen", {"zeros": 0, "positions": 0, "gradient_positions": 0, "mean": float("nan")}),
]


@pytest.mark.parametrize(("expected", "counts"), TABLE)
def test_each_combination_of_counts_has_its_verdict(expected, counts):
    assert label(**counts) == expected


def test_all_neurons_of_a_silent_layer_are_dead():
    """All dead: the layer's mean is 0, and 0 / (0 + 1e-9) is a number."""
    counts = SimpleNamespace(
        kind="relu-like",
        linear_when_on=True,
        zero_outputs=np.full(4, 10),
        zero_gradients=np.full(4, 10),
        not_finite_outputs=np.zeros(4, int),
        mean_abs_output=np.zeros(4),
        positions=10,
        gradient_positions=10,
    )
    judgement = judge(counts, Policy())
    assert judgement.dead.all()
    assert not (judgement.silent | judgement.dormant | judgement.cut_off | judgement.linear | judgement.unseen).any()


def random_judgement(rng: np.random.Generator) -> tuple[Judgement, SimpleNamespace]:
    """The judgement on six neurons with random counts, and the counts."""
    positions, gradient_positions = (int(n) for n in rng.integers(0, 4, 2))
    zero_outputs = rng.integers(0, positions + 1, 6)
    counts = SimpleNamespace(
        kind=str(rng.choice(["relu-like", "smooth", "leaky", "saturating", "gated"])),
        linear_when_on=bool(rng.integers(2)),
        zero_outputs=zero_outputs,
        zero_gradients=rng.integers(0, gradient_positions + 1, 6),
        not_finite_outputs=rng.integers(0, positions - zero_outputs + 1) * (rng.random(6) < 0.2),
        mean_abs_output=np.where(zero_outputs == positions, 0.0, rng.random(6) ** 4),
        positions=positions,
        gradient_positions=gradient_positions,
    )
    return judge(counts, Policy()), counts


LABELLED = [name.replace(" ", "_") for name in LABELS if name != "alive"]


def test_every_neuron_bears_one_label_and_the_counts_of_labels_add_up():
    rng = np.random.default_rng(0)
    met = set()
    for _ in range(300):
        judgement, _ = random_judgement(rng)
        labels = judgement.labels()
        assert labels.dtype == np.uint8
        masks = np.stack([getattr(judgement, name) for name in LABELLED])
        assert (masks.sum(axis=0) <= 1).all()
        counts = np.bincount(labels, minlength=len(LABELS))
        assert counts.tolist() == [*masks.sum(axis=1), (labels == LABELS.index("alive")).sum()]
        assert counts.sum() == 6
        met.update(np.unique(labels).tolist())
    assert met == set(range(len(LABELS))), "the random counts must reach every label"


def test_the_published_share_of_dormant_neurons_includes_dead_and_silent_ones():
    rng = np.random.default_rng(1)
    for _ in range(300):
        judgement, counts = random_judgement(rng)
        if not counts.positions:
            assert not judgement.tau_dormant.any()
            continue
        finite = counts.not_finite_outputs == 0
        score = counts.mean_abs_output / (counts.mean_abs_output[finite].mean() + 1e-9) if finite.any() else np.zeros(6)
        np.testing.assert_array_equal(judgement.tau_dormant, (score <= 0.025) & finite)
        assert not ((judgement.dead | judgement.silent | judgement.dormant) & ~judgement.tau_dormant).any()


def test_silent_stands_between_dead_and_cut_off():
    assert LABELS.index("dead") < LABELS.index("silent") < LABELS.index("cut off") < LABELS.index("dormant")


@pytest.mark.parametrize(
    ("examples", "confidence", "expected"),
    [
        # 1 - .05 ** (1 / n), worked out with 30 digits
        (1, 0.95, 0.95),  # 1 - .05
        (2, 0.95, 0.776393202250021),  # 1 - sqrt(.05) = 1 - .223606797749979
        (4, 0.95, 0.5271292),  # 1 - sqrt(.2236068) = 1 - .4728708
        (1000, 0.95, 0.00299125),  # 1 - exp(-2.995732 / 1000); the rule of three says .003
        (10**9, 0.95, 2.995732e-9),  # -log(.05) / n: no digit is lost where 1 - x would lose all
        (10, 0.99, 0.3690427),  # 1 - .01 ** .1 = 1 - .6309573
        (0, 0.95, 1.0),  # nothing was observed: anything goes
    ],
)
def test_the_bound_on_the_firing_rate_is_the_exact_one(examples, confidence, expected):
    assert rate_bound(examples, confidence) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), 299),  # log(.05) / log(.99) = 298.07
        (Policy(max_rate=0.05), 59),  # log(.05) / log(.95) = 58.4
        (Policy(confidence=0.99), 459),  # log(.01) / log(.99) = 458.2
        (Policy(max_rate=0.5, confidence=0.5), 1),  # log(.5) / log(.5) = 1
    ],
)
def test_the_number_of_examples_that_a_window_needs_is_exact(policy, expected):
    assert policy.min_examples == expected
    assert rate_bound(expected, policy.confidence) <= policy.max_rate + 1e-12
    assert expected == 1 or rate_bound(expected - 1, policy.confidence) > policy.max_rate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", -1e-9),
        ("tolerance", float("nan")),
        ("tolerance", float("inf")),
        ("tolerance", "small"),
        ("dormant_tau", -0.1),
        ("dormant_tau", None),
        ("confidence", 0.0),
        ("confidence", 1.0),
        ("confidence", 95),
        ("max_rate", 0.0),
        ("max_rate", float("nan")),
        ("max_rate", "1%"),
    ],
)
def test_an_invalid_policy_raises_a_clear_error(name, value):
    with pytest.raises(UsageError, match=f"`{name}`"):
        Policy(**{name: value})
