"""The formulas: attained where they say so, never exceeded, and right where they can be worked out by hand."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from neuronscope.checkpoints.model.batchnorm_evidence import _firing_share_bound, _threshold, _training_maximum
from neuronscope.checkpoints.model.bounds.interval import Interval, NormalisedRows, gamma, product
from neuronscope.checkpoints.model.bounds.propagate import propagate_bounds, site_bounds
from neuronscope.checkpoints.model.bounds.weighted_ops import layer_norm_extremes
from neuronscope.checkpoints.model.examine_model import examine_model
from neuronscope.checkpoints.model.trace import trace


def evidence_of(model: nn.Module, **options: object) -> dict[tuple[str, str, str], dict[int, float]]:
    """(site, claim, basis) → neuron → number."""
    return {
        (one.layer, one.claim, one.basis): dict(zip(one.neurons.tolist(), one.numbers.tolist()))
        for one in examine_model(model, **options).evidence
    }


# --- layer norm ------------------------------------------------------------------------------------------------------


def maximiser(weight: Tensor, scale: Tensor, centred: bool) -> Tensor:
    """The input of a layer norm without ε that lifts each row of a linear layer highest."""
    scaled = weight * scale
    return scaled - scaled.mean(1, keepdim=True) if centred else scaled


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [2, 3, 64, 768])
def test_the_supremum_of_a_normalized_sum_is_attained_and_not_exceeded(centred: bool, width: int) -> None:
    weight, bias = torch.randn(7, width, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    scale, shift = torch.randn(width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    shift = shift if centred else torch.zeros_like(shift)
    centre, reach, size = layer_norm_extremes(NormalisedRows(scale, shift, centred), weight, bias)

    def through(x: Tensor, eps: float) -> Tensor:
        normed = F.layer_norm(x, (width,), scale, shift, eps) if centred else F.rms_norm(x, (width,), scale, eps)
        return F.linear(normed, weight, bias)

    best = maximiser(weight, scale, centred)
    for sign, extreme in ((1, centre + reach), (-1, centre - reach)):
        attained = through(sign * best, 1e-300).diagonal()
        torch.testing.assert_close(attained, extreme, rtol=1e-9, atol=1e-9)
        # ε makes it only smaller in size: σ²/(σ² + ε) < 1.
        smaller = through(sign * best, 0.1).diagonal()
        assert bool((sign * smaller < sign * extreme).all())
    for spread in (1e-3, 1.0, 1e3):
        y = through(torch.randn(2000, width, dtype=torch.float64) * spread, 1e-5)
        assert bool((y <= centre + reach + 1e-9 * size).all())
        assert bool((y >= centre - reach - 1e-9 * size).all())


def test_the_supremum_of_a_normalized_sum_equals_a_calculation_by_hand() -> None:
    # d = 2, γ = 1, β = 0: z is (1, −1) or (−1, 1) for every input. w = (3, 1): w·z = ±2.
    # P removes the mean 2: (1, −1), of norm √2, times √2 is 2.
    centre, reach, size = layer_norm_extremes(
        NormalisedRows(torch.ones(2), torch.zeros(2), True), torch.tensor([[3.0, 1.0]]), torch.tensor([0.5])
    )
    assert (centre.item(), reach.item()) == pytest.approx((0.5, 2.0), rel=1e-15)
    # Without P: √2·√10 = √20.
    assert size.item() == pytest.approx(math.sqrt(20), rel=1e-15)


@pytest.mark.parametrize("kind", ["layer norm", "rms norm"])
def test_a_neuron_behind_a_layer_norm_is_proved_dead_from_its_supremum_on(kind: str) -> None:
    norm = nn.LayerNorm(16) if kind == "layer norm" else nn.RMSNorm(16)
    linear = nn.Linear(16, 3)
    model = nn.Sequential(nn.Linear(5, 16), norm, nn.Dropout(0.3), linear, nn.ReLU())
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        shift = norm.bias.normal_() if kind == "layer norm" else torch.zeros(16)
        centre, reach, _ = layer_norm_extremes(
            NormalisedRows(norm.weight, shift, kind == "layer norm"), linear.weight, torch.zeros(3)
        )
        linear.bias.copy_(-(centre + reach) + torch.tensor([-0.01, 0.01, -1.0]))  # 0.01 below, 0.01 above, 1 below
    found = evidence_of(model)
    assert set(found) == {("3/relu", "dead", "proved")}
    numbers = found["3/relu", "dead", "proved"]
    assert numbers == pytest.approx({0: -0.01, 2: -1.0}, abs=9e-3)  # outward by 2e-4 of the reach at most
    assert all(number > -true for number, true in zip(numbers.values(), (0.01, 1.0)))  # and never inward


def test_the_bound_behind_a_layer_norm_is_tighter_than_the_interval() -> None:
    """The same network with the bound by norm and by interval: the first proves what the second cannot."""
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 200), nn.ReLU())
    with torch.no_grad():
        model[1].bias.fill_(-1.0).sub_(0.4)
    boxed = nn.Sequential(nn.LayerNorm((1, 64)), nn.Linear(64, 200), nn.ReLU())  # two dimensions: rows are not followed
    boxed[0].weight.data.copy_(model[0].weight.data[None])
    boxed[0].bias.data.copy_(model[0].bias.data[None])
    boxed[1].load_state_dict(model[1].state_dict())
    by_norm = evidence_of(model, example=torch.zeros(2, 1, 64)).get(("1/relu", "dead", "proved"), {})
    by_box = evidence_of(boxed, example=torch.zeros(2, 1, 64)).get(("1/relu", "dead", "proved"), {})
    # √64·‖w‖ ≈ 8·8·(1/8)/√3 = 4.6 and a box of ±√63 gives 64·√63·(1/16) ≈ 32: neither below 1.4, so scale the weights.
    assert (len(by_norm), len(by_box)) == (0, 0)
    for net in (model, boxed):
        net[1].weight.data.mul_(0.2)  # now 0.92 and 6.4
    assert len(evidence_of(model, example=torch.zeros(2, 1, 64))["1/relu", "dead", "proved"]) > 150
    assert ("1/relu", "dead", "proved") not in evidence_of(boxed, example=torch.zeros(2, 1, 64))


# --- batch norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "shift", "c", "share"),
    [
        (1.0, -3.0, 3.0, 0.1),  # 1/(1 + 9)
        (-2.0, -4.0, 2.0, 0.2),  # the sign of γ does not matter; 1/(1 + 4)
        (1.0, 0.0, 0.0, 1.0),
        (1.0, 2.0, -2.0, 1.0),
        (0.0, -1.0, math.inf, 0.0),  # constant −1
        (0.0, 0.0, math.inf, 0.0),  # constant 0
        (0.0, 1.0, -math.inf, 1.0),
    ],
)
def test_the_threshold_and_the_firing_share_behind_a_batch_norm_are_right(
    scale: float, shift: float, c: float, share: float
) -> None:
    gamma_, beta = torch.tensor([scale]), torch.tensor([shift])
    assert _threshold(gamma_, beta).item() == pytest.approx(c)
    assert _firing_share_bound(_threshold(gamma_, beta)).item() == pytest.approx(share)
    assert torch.special.ndtr(-_threshold(gamma_, beta)).item() == pytest.approx(0.5 * math.erfc(c / math.sqrt(2)))


@pytest.mark.parametrize("n", [2, 5, 64])
def test_the_training_maximum_of_a_batch_norm_is_attained_by_one_outlier(n: int) -> None:
    # n − 1 equal values and one apart: z of the latter is √(n − 1), whatever the distance.
    x = torch.zeros(n, 1, dtype=torch.float64)
    x[0] = 5.0
    gamma_, beta = torch.tensor([1.5], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    y = F.batch_norm(x, None, None, gamma_, beta, training=True, eps=1e-30)
    assert y.max().item() == pytest.approx(_training_maximum(gamma_, beta, n).item(), rel=1e-12)


def test_cantellis_bound_is_attained() -> None:
    # One of 10 values apart: z = √9 = 3 = c, and it is reached by 1/(1 + 3²) = 1 of 10.
    x = torch.zeros(10, 1, dtype=torch.float64)
    x[0] = 1.0
    beta = torch.tensor([-2.999], dtype=torch.float64)
    y = F.batch_norm(x, None, None, torch.ones(1, dtype=torch.float64), beta, training=True, eps=1e-30)
    assert (y > 0).double().mean().item() == 0.1
    assert _firing_share_bound(_threshold(torch.ones(1), beta)).item() == pytest.approx(0.1, rel=1e-3)


@settings(max_examples=50)
@given(
    st.integers(2, 40),
    st.floats(-6, 2),
    st.floats(-3, 3),
    st.integers(0, 1000),
    st.sampled_from(["normal", "cauchy", "spike", "two"]),
)
def test_no_training_batch_exceeds_the_bounds(n: int, shift: float, scale: float, seed: int, law: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 50, generator=generator, dtype=torch.float64)
    if law == "cauchy":
        x = x / torch.randn(n, 50, generator=generator, dtype=torch.float64)
    elif law == "spike":
        x[1:] = 0
    elif law == "two":
        x = x.sign()
    gamma_, beta = torch.full((50,), scale, dtype=torch.float64), torch.full((50,), shift, dtype=torch.float64)
    y = F.batch_norm(x, None, None, gamma_, beta, training=True)
    assert bool((y.amax(0) <= _training_maximum(gamma_, beta, n) + 1e-9).all())
    assert bool(((y > 1e-9).double().mean(0) <= _firing_share_bound(_threshold(gamma_, beta)) + 1e-12).all())


class _ClampedReLU(nn.Module):
    """An activation that is written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0, max=4.0)


@pytest.mark.parametrize(
    ("activation", "zero"),
    [
        (nn.ReLU6(), True),
        (nn.ReLU(inplace=True), True),
        (nn.Hardtanh(0, 6), True),
        (nn.Threshold(0.5, 0.0), True),
        (_ClampedReLU(), True),
        (nn.Hardtanh(-1, 1), False),
        (nn.Threshold(-0.5, 0.0), False),
        (nn.LeakyReLU(), False),
        (nn.Hardswish(), False),
        (nn.SiLU(), False),
    ],
    ids=str,
)
def test_batch_norm_speaks_of_every_activation_that_is_zero_below_zero(activation: nn.Module, zero: bool) -> None:
    """Counted on batches in training: never more than the share that is said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), activation)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, -3.0, -5.0, -1.0]))
    fired = (model.train()(torch.randn(8, 3, 5, 5).exp()) != 0).float().mean((0, 2, 3))
    found = [one for one in examine_model(model.eval()).evidence if one.source == "batch norm"]
    assert [(one.claim, one.basis, one.neurons.tolist()) for one in found] == (
        [("quiet", "inferred", [1, 2]), ("dead", "suspected", [2])] if zero else []
    )
    for one in found[:1]:
        assert (fired.numpy()[one.neurons] <= one.numbers).all()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=str)
def test_a_channel_that_weight_decay_shrank_to_nothing_is_negligible(activation: nn.Module) -> None:
    """|y| ≤ |β| + |γ| √(10⁶ − 1) = 1e-10 + 1e-6, counted below on inputs that are as far out as can be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), activation)
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 1e-9, -1e-10
    x = torch.randn(8, 3, 5, 5)
    x[0, :, 0, 0] = 1e6
    outputs = model.train()(x).detach().amax((0, 2, 3))
    (found,) = [one for one in examine_model(model.eval()).evidence if one.measure == "output in training, at most"]
    assert (found.claim, found.basis, found.neurons.tolist()) == ("quiet", "inferred", [2])
    assert found.numbers[0] == pytest.approx(1e-6, rel=1e-3)
    assert 0 < float(outputs[2]) <= found.numbers[0]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=str)
def test_a_negligible_channel_is_proved_where_a_box_bounds_its_input(activation: nn.Module) -> None:
    """Outputs are counted at corners of the box. Without a box, some input makes any channel large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), activation, nn.Conv2d(5, 2, 1)).eval()
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 1e-6, 1e-7
        model[1].weight[3] = 0.1  # small, and not next to nothing
        model[1].running_mean[4] = 1000.0  # dead for this box: not negligible as well
    (found,) = [
        one for one in examine_model(model, box=(-1.0, 1.0)).evidence if (one.claim, one.basis) == ("quiet", "proved")
    ]
    outputs = model[:3](torch.rand(4096, 3, 1, 1).round() * 2 - 1).detach().abs().amax((0, 2, 3))
    assert (found.source, found.neurons.tolist()) == ("batch norm", [2])
    assert 0 < float(outputs[2]) <= found.numbers[0] <= 3e-6
    assert not [one for one in examine_model(model).evidence if (one.claim, one.basis) == ("quiet", "proved")]


def test_evidence_behind_a_batch_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.GELU()
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 1.0, -1.0, 0.0, 2.0, 1.0]))
        model[1].bias.copy_(torch.tensor([0.0, -3.0, -5.0, -1.0, -7.0, -100.0]))  # c = 0, 3, 5, ∞, 3.5, 100
        model[4].bias.fill_(-9.0)  # GELU is no ReLU: nothing is said
    found = evidence_of(model)
    quiet = found["1/relu", "quiet", "inferred"]
    assert quiet == pytest.approx({1: 0.1, 2: 1 / 26, 3: 0.0, 4: 1 / 13.25, 5: 1 / 10001})
    # Φ(−5) = 2.867e-7; Φ(−100) = 0 in float64.
    assert found["1/relu", "dead", "suspected"] == pytest.approx({2: 2.8665157e-7, 3: 0.0, 5: 0.0}, rel=1e-6)
    assert found["1/relu", "dead", "proved"] == {3: pytest.approx(-1.0, abs=1e-5)}  # γ = 0 and β < 0: in evaluation too
    assert not any(site == "4/gelu" for site, _, _ in found)


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_arithmetic_equals_calculations_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, -3.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 5.0], [-1.0, 0.0]]))
        model[2].bias.copy_(torch.tensor([-0.5, 0.0]))
    graph = trace(model, (torch.zeros(1, 2),))
    first, second = site_bounds(graph, propagate_bounds(graph, (0.0, 1.0))).values()
    # x₁ − x₂ in [−1, 1]; x₁ + x₂ − 3 in [−3, −1]: dead.
    # Then h₁ in [0, 1], h₂ = 0: h₁ − ½ in [−½, ½]; −h₁ in [−1, 0]: dead.
    np.testing.assert_allclose(first.lowest, [-1, -3], atol=1e-4)
    np.testing.assert_allclose(first.highest, [1, -1], atol=1e-4)
    np.testing.assert_allclose(second.highest, [0.5, 0.0], atol=1e-4)
    assert first.dead.tolist() == [False, True]
    assert second.dead.tolist() == [False, True]
    # Nothing known of the input: the first layer says nothing, the second knows h ≥ 0 and −h₁ ≤ 0.
    assert evidence_of(model) == {("2/relu", "dead", "proved"): {1: 0.0}}


@pytest.mark.parametrize("padding", [0, 1])
def test_padding_adds_a_zero_to_the_interval(padding: int) -> None:
    # One 3 × 3 filter of −1/9 over values in [1, 2], bias ½: inside −2 … −1 plus ½ < 0: dead.
    # With padding a corner sees five zeros, and its mean is 4/9 at least: ½ − 4/9 > 0.
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=padding), nn.ReLU())
    model[0].weight.data.fill_(-1 / 9)
    model[0].bias.data.fill_(0.5)
    found = evidence_of(model, box=(1.0, 2.0))
    assert (("0/relu", "dead", "proved") in found) == (padding == 0)
    with torch.no_grad():
        assert bool((model(torch.ones(1, 1, 8, 8)) > 0).any()) == (padding == 1)


def test_a_sum_that_is_never_above_zero_is_proved_without_slack() -> None:
    """Negative weights, no bias and what a ReLU gives: the bound is 0 exactly, and rounding cannot lift it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.ReLU())
    model[2].weight.data.abs_().neg_()
    model[2].weight.data[1, 0] = 1e-30
    assert evidence_of(model)["2/relu", "dead", "proved"] == {0: 0.0, 2: 0.0}


def test_infinite_times_zero_is_zero() -> None:
    infinite = torch.tensor([torch.inf, -torch.inf, torch.inf])
    assert product(infinite, torch.tensor([0.0, 0.0, -2.0])).tolist() == [0.0, 0.0, -torch.inf]


@pytest.mark.parametrize("biased", [True, False])
def test_a_sum_in_another_order_stays_in_its_bounds(biased: bool) -> None:
    """10,000 terms, and a bias that cancels them: float32 depends on their order, and the bounds hold all."""
    n = 10_000
    model = nn.Sequential(nn.Linear(n, 1, bias=biased), nn.ReLU())
    with torch.no_grad():
        weight = model[0].weight.uniform_(0.5, 1.0)[0]
        exact = weight.double().sum()
        bias = float(model[0].bias.copy_(-exact)[0]) if biased else 0.0
    terms = weight.detach().numpy()
    one_by_one = [np.cumsum(terms[torch.randperm(n).numpy()], dtype=np.float32)[-1] for _ in range(50)]
    sums = [float(total + np.float32(bias)) for total in one_by_one]
    graph = trace(model, (torch.zeros(1, n),))
    found = site_bounds(graph, propagate_bounds(graph, (1.0, 1.0)))["0/relu"]
    middle = float(exact + bias)
    assert min(sums) < middle < max(sums)  # without an allowance for rounding, some would lie outside
    assert found.lowest[0] <= min(sums) <= max(sums) <= found.highest[0]
    assert found.highest[0] - middle < 2.1 * gamma(n, torch.float32) * float(exact)  # and no wider than the theory


def test_an_interval_that_is_nan_bounds_nothing() -> None:
    broken = Interval(torch.tensor([torch.nan]), torch.tensor([torch.nan]), (1,)).cleaned()
    assert (broken.low.item(), broken.high.item()) == (-torch.inf, torch.inf)


# --- smooth activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "least", "zero_below"),
    [
        (F.gelu, -0.1701, -15.0),
        (lambda x: F.gelu(x, approximate="tanh"), -0.1701, -15.0),
        (F.silu, -0.2785, -110.0),
        (F.mish, -0.3089, -110.0),
        (F.hardswish, -0.3751, -3.0),
    ],
    ids=["gelu", "gelu tanh", "silu", "mish", "hardswish"],
)
def test_smooth_activations_are_zero_where_we_say_so(function: object, least: float, zero_below: float) -> None:
    far = -torch.logspace(math.log10(-zero_below), 38, 200_000, dtype=torch.float64).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = far[far >= torch.finfo(dtype).min].to(dtype)
        x = x[x <= zero_below]
        assert not bool(function(x).any())
    # Up to there they fall to their least value and rise from it: the differences change sign once.
    x = torch.linspace(zero_below, 10, 400_001, dtype=torch.float64)
    y = function(x)
    assert y.min().item() > least
    assert y.min().item() < least + 2e-4  # a number just below it
    rising = (y.diff() > 1e-15).int()
    first = int(rising.argmax())
    assert bool((y.diff()[:first] <= 1e-15).all())
    assert bool((y.diff()[first:] >= -1e-15).all())


@pytest.mark.parametrize(
    ("activation", "bias"), [(nn.GELU(), -16.0), (nn.SiLU(), -111.0), (nn.Mish(), -111.0), (nn.Hardswish(), -4.0)]
)
def test_a_smooth_neuron_that_underflows_is_proved_dead(activation: nn.Module, bias: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), activation)
    model[0].weight.data.fill_(0.25)  # the box adds up to 0.5
    model[0].bias.data.copy_(torch.tensor([bias, bias + 2]))
    name, found = f"0/{type(activation).__name__.lower()}", evidence_of(model, box=(-1.0, 1.0))
    assert list(found[name, "dead", "proved"]) == [0]
    assert not bool(model(torch.rand(100, 2) * 2 - 1)[:, 0].any())
    if not isinstance(activation, nn.Hardswish):
        assert (name, "dead", "proved") not in evidence_of(model.double(), box=(-1.0, 1.0))  # not zero yet
