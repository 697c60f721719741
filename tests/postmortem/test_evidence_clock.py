"""The clock's bound is never broken by torch's optimizers, whatever the gradients; it is attained; it knows its end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.checkpoints.file.optimizer_clocks import (
    SILENT_FOLDS,
    SURE_FOLDS,
    AdamClock,
    BufferPeaks,
    SGDClock,
    by_chunks,
)
from neuronscope.checkpoints.file.optimizer_rules import recognize_optimizer
from scripts.dying_networks import Held

ROWS, COLUMNS = 4, 3

OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "amsgrad": lambda p, **o: torch.optim.Adam(p, amsgrad=True, **o),
    "maximize": lambda p, **o: torch.optim.Adam(p, maximize=True, foreach=False, **o),
    "foreach": lambda p, **o: torch.optim.Adam(p, foreach=True, **o),
    "fused": lambda p, **o: torch.optim.Adam(p, fused=True, **o),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, weight_decay=0.1, **o),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
}
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.5, 0.999), (0.95, 0.99), (0.9, 0.9999)]


def play(optimizer_name, betas, gradients, dtype=torch.float32):
    """The state after a run of gradients, ``(T, ROWS, COLUMNS)``."""
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1:], dtype=dtype))
    optimizer = OPTIMIZERS[optimizer_name]([parameter], lr=1e-3, betas=betas)
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 5)  # a schedule: the means do not know it
        parameter.grad = torch.as_tensor(gradient, dtype=dtype)
        optimizer.step()
    state = optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"], int(state["step"])


def silences(gradients) -> np.ndarray:
    """Steps since each row's last gradient that is not zero; all of them where there was none."""
    steps, rows = gradients.shape[:2]
    some = (gradients != 0).any(axis=2)
    return np.array([steps - 1 - max(np.flatnonzero(some[:, row]), default=-1) for row in range(rows)])


@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    betas=st.sampled_from(BETAS),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 60),
    tail=st.integers(0, 120),
    sparse=st.floats(0, 1),
    low=st.integers(-38, 0),
    high=st.integers(0, 17),
)
def test_the_bound_on_the_silent_steps_of_adam_is_never_broken(optimizer, betas, seed, steps, tail, sparse, low, high):
    """Gradients of any size from 1e-38 to 1e17, sparse, in spikes, of any sign, then a silence, other for each row."""
    random = np.random.default_rng(seed)
    shape = (steps + tail, ROWS, COLUMNS)
    scale = 10.0 ** random.uniform(low, high, size=shape)
    gradients = np.float32(random.standard_normal(shape) * scale)
    gradients[random.random(shape) < sparse] = 0
    for row, cut in enumerate(random.integers(1, steps + tail + 1, size=ROWS)):
        gradients[cut:, row] = 0
    mean, square, taken = play(optimizer, betas, gradients)
    truth = silences(gradients)
    never = (gradients == 0).all(axis=(0, 2))
    for known in (taken, None):
        reading = AdamClock(*betas, known).read(mean, square)
        assert (reading.steps.numpy()[~never] >= truth[~never]).all()
        assert reading.never.numpy()[never].all()
        # A row that got anything is never said to have got nothing, unless its square was too small for float32:
        # (1 − .9999) (1e-20)² = 1e-44, seven of the smallest denormals. (Where β1 is .5, m fades to an exact zero.)
        loud = (np.abs(gradients) > 1e-20).any(axis=(0, 2))
        assert not reading.never.numpy()[loud].any()


@given(
    st.sampled_from(BETAS),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(0, 100),
)
def test_the_silent_steps_of_a_neuron_use_its_bias_and_its_weight(betas, seed, steps, tail):
    """Where the weights of a row have gone silent and its bias has not, the row has not."""
    random = np.random.default_rng(seed)
    weight = np.float32(random.standard_normal((steps + tail, ROWS, COLUMNS)))
    bias = np.float32(random.standard_normal((steps + tail, ROWS, 1)))
    for gradients in (weight, bias):
        for row, cut in enumerate(random.integers(1, steps + tail + 1, size=ROWS)):
            gradients[cut:, row] = 0
    readings = []
    for gradients in (weight, bias):
        mean, square, taken = play("Adam", betas, gradients)
        readings.append(AdamClock(*betas, taken).read(mean, square))
    truth = silences(np.concatenate([weight, bias], axis=2))
    assert (readings[0].join(readings[1]).steps.numpy() >= truth).all()


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("tail", [0, 1, 37])
def test_the_bound_on_the_silent_steps_of_adam_is_attained(betas, tail):
    """By the gradients for which Cauchy and Schwarz's inequality is an equality: g_i ∝ (β1/β2)^(t−i)."""
    beta1, beta2 = betas
    steps = 60
    ages = np.arange(steps)[::-1]
    gradients = np.zeros((steps + tail, 1, 1))
    gradients[:steps, 0, 0] = (beta1 / beta2) ** ages
    mean, square, taken = play("Adam", betas, gradients, torch.float64)
    clock = AdamClock(beta1, beta2, steps)  # the supremum after as many steps as brought gradients
    reading = clock.bound(mean.abs() / square.sqrt(), 0.0)
    assert (
        tail - 1 <= float(min(reading, torch.tensor(59.0))) <= tail
    )  # floor() of a number that is tail up to rounding
    assert float(AdamClock(beta1, beta2, taken).read(mean, square).steps) >= tail


@pytest.mark.parametrize(
    ("betas", "supremum", "rate"),
    [
        # (1 − .9) / √(.001 (1 − .81/.999)) = .1 / √(.001 · .189189) = .1 / .0137546 = 7.2703; ln(√.999 / .9) = .104860
        ((0.9, 0.999), 7.2703, 0.104860),
        # .1 / √(.05 · (1 − .81/.95)) = .1 / √(.05 · .147368) = .1 / .085840 = 1.16496; ln(√.95 / .9) = .079714
        ((0.9, 0.95), 1.16496, 0.079714),
    ],
)
def test_the_constants_of_the_adam_clock_equal_their_formulas(betas, supremum, rate):
    clock = AdamClock(*betas)
    assert clock.supremum == pytest.approx(supremum, rel=1e-4)
    assert clock.rate == pytest.approx(rate, rel=1e-4)
    assert clock.silent_steps == pytest.approx(SILENT_FOLDS / rate, rel=1e-4)
    assert clock.sure_steps == pytest.approx(SURE_FOLDS / rate, rel=1e-4)


@pytest.mark.parametrize("clock", [AdamClock(0.5, 0.999), AdamClock(0.5, 0.9), SGDClock(0.5)], ids=str)
def test_the_clock_of_a_small_beta1_has_its_thresholds_in_steps(clock):
    """With β1 = .5 the 31.5 e-foldings that are 300 steps at the defaults pass within 50."""
    assert SURE_FOLDS / clock.rate < 60
    assert (clock.silent_steps, clock.sure_steps) == (80, 300)


@pytest.mark.parametrize(
    ("clock", "folds"), [(AdamClock(0.95, 0.999, None, 0.85), SILENT_FOLDS), (SGDClock(0.95, 0.85), 5)], ids=str
)
def test_a_cycled_decay_may_have_been_the_fastest_all_the_time(clock, folds):
    """What 300 steps at the least decay do to a row is not yet inferred to be silence, whatever its bound says."""
    assert clock.fastest_rate > 3 * clock.rate
    assert clock.sure_steps == pytest.approx(300 * clock.fastest_rate / clock.rate)
    assert clock.silent_steps == pytest.approx(folds / clock.rate)  # suspected as soon as it may be so


@given(
    seed=st.integers(0, 2**32 - 1),
    ends=st.sampled_from([(0.85, 0.95), (0.5, 0.9), (0.0001, 0.99)]),
    steps=st.integers(1, 150),
    tail=st.integers(0, 150),
    period=st.integers(1, 400),
)
def test_the_bound_is_never_broken_when_a_schedule_cycles_beta1(seed, ends, steps, tail, period):
    random = np.random.default_rng(seed)
    gradients = np.float32(random.standard_normal((steps + tail, ROWS, COLUMNS)) * 10.0 ** random.uniform(-9, 3))
    for row, cut in enumerate(random.integers(1, steps + tail + 1, size=ROWS)):
        gradients[cut:, row] = 0
    parameter = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    optimizer = torch.optim.Adam([parameter], betas=(ends[1], 0.999))
    schedule = torch.optim.lr_scheduler.CyclicLR(
        optimizer, 1e-4, 1e-3, step_size_up=period, base_momentum=ends[0], max_momentum=ends[1]
    )
    for gradient in gradients:
        parameter.grad = torch.as_tensor(gradient)
        optimizer.step()
        schedule.step()
    state = optimizer.state[parameter]
    rule = recognize_optimizer(optimizer.param_groups[0], {name: Held(tensor) for name, tensor in state.items()})
    assert (rule.least_beta, rule.betas[0]) == pytest.approx(ends)
    clock = AdamClock(rule.betas[0], rule.betas[1], int(state["step"]), rule.least_beta)
    assert (clock.read(state["exp_avg"], state["exp_avg_sq"]).steps.numpy() >= silences(gradients)).all()


def test_after_one_step_the_supremum_is_that_of_one_gradient():
    # |m| / √v = (1 − β1) |g| / √((1 − β2) g²) = .1 / √.001 = 3.1623
    assert AdamClock(0.9, 0.999, 1).supremum == pytest.approx(0.1 / math.sqrt(0.001))


@pytest.mark.parametrize("tail", [900, 2000])
def test_where_the_mean_has_faded_away_the_clock_says_that_it_has_stopped(tail):
    """m falls from 1e-4 by .9 a step: below 2.4e-38 after ln(1e-4 / 2.4e-38) / .10536 = 738; then there is no bound."""
    gradients = np.zeros((100 + tail, 2, 3), dtype=np.float32)
    gradients[:100] = 1e-4
    gradients[:, 1] = 1e-4  # this row goes on
    mean, square, taken = play("Adam", (0.9, 0.999), gradients)
    assert (mean[0] != 0).all()  # it has stopped at a denormal, and would be read for ever as the same small number
    reading = AdamClock(0.9, 0.999, taken).read(mean, square)
    assert reading.steps.tolist()[0] == math.inf
    assert 600 <= reading.least_steps[0] <= 900
    assert math.isfinite(reading.steps[1])
    assert math.isnan(reading.least_steps[1])


def test_gradients_whose_squares_underflow_are_not_called_silent():
    gradients = np.full((50, 1, 2), 1e-25, dtype=np.float32)  # squared: 1e-50, below the smallest float32
    mean, square, taken = play("Adam", (0.9, 0.999), gradients)
    reading = AdamClock(0.9, 0.999, taken).read(mean, square)
    assert (bool(reading.unknown[0]), bool(reading.never[0])) == (True, False)


def test_optimizer_numbers_that_are_not_finite_are_reported_as_broken():
    mean = torch.tensor([[1.0, math.nan], [1.0, 1.0], [math.inf, 1.0]])
    reading = AdamClock(0.9, 0.999).read(mean, torch.ones(3, 2))
    assert reading.not_finite.tolist() == [True, False, True]


def test_reading_in_chunks_gives_the_same_dates(monkeypatch):
    mean, square = torch.randn(50, 7), torch.rand(50, 7)
    whole = AdamClock(0.9, 0.999).read(mean, square)
    monkeypatch.setattr("neuronscope.checkpoints.file.optimizer_clocks._CHUNK", 20)
    parts = AdamClock(0.9, 0.999).read(mean, square)
    assert torch.equal(whole.steps, parts.steps)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_momentum_is_dated_relative_to_the_largest_row(momentum):
    """Rows that got gradients of one size until step 60, 40 and never: the second's buffer is μ^20 of the first's."""
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=momentum)
    for step in range(60):
        parameter.grad = torch.tensor([[1.0, 1.0], [float(step < 40)] * 2, [0.0, 0.0]])
        optimizer.step()
    peaks = BufferPeaks.of(optimizer.state[parameter]["momentum_buffer"])
    reading = SGDClock(momentum).read_layer(peaks, peaks.largest)
    # With a momentum of one half a buffer fades to an exact zero, so that a zero shows nothing.
    assert reading.never.tolist() == [False, False, momentum > 0.5]
    assert reading.steps[0] == 0
    # The first row's buffer has grown by (1 − μ^60) / (1 − μ^40) meanwhile: for μ = .99 that is 1.37, or 31 steps more.
    grown = math.log((1 - momentum**60) / (1 - momentum**40)) / -math.log(momentum)
    assert reading.steps[1] == round(20 + grown)


def test_a_layer_far_below_the_others_is_measured_by_them():
    loud, hushed = torch.tensor([1.0, 0.9]), torch.tensor([1.0, 0.9]) * 0.9**200
    layers = {name: BufferPeaks.of(rows[:, None]) for name, rows in (("a", loud), ("b", loud), ("c", hushed))}
    clock = SGDClock(0.9)
    largest = max(peaks.largest for peaks in layers.values())
    readings = {name: clock.read_layer(peaks, largest) for name, peaks in layers.items()}
    assert readings["a"].steps.tolist() == [0, 1]
    assert readings["c"].steps.tolist() == [200, 201]


def test_two_tensors_with_unequal_numbers_of_rows_are_not_read_together() -> None:
    with pytest.raises(ValueError, match="zip"):
        by_chunks(lambda first, second: (first, second), torch.zeros(3, 1 << 20), torch.zeros(2, 1 << 20))
