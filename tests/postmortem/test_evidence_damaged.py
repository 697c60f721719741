"""A damaged checkpoint, or one made to harm: whatever its state and names are, there is an answer and no traceback."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.checkpoints.checkpoint import Checkpoint, OptimizerState
from neuronscope.checkpoints.diagnosis_inputs import learning_rates, weight_decay_per_step
from neuronscope.checkpoints.file.examine_file import examine_file
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from scripts.dying_networks import Held

NUMBERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.floats(0, 1), st.text(max_size=2)), max_size=3),
    st.just((0.9, 0.999)),
)
SHAPES = st.sampled_from([(), (0,), (2,), (3,), (2, 3), (3, 2), (3, 3), (2, 3, 1, 1), (0, 3), (1, 2, 3)])
TYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])


@st.composite
def tensors(draw):
    tensor = torch.full(draw(SHAPES), draw(st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -1e-45, 1e30])))
    return Held(tensor.nan_to_num().to(kind) if not (kind := draw(TYPES)).is_floating_point else tensor.to(kind))


NAMES = st.sampled_from(
    [
        *("0.weight", "0.bias", "2.weight", "2.bias", "weight", "bias", "", ".", "a.experts.weight", "<b>.weight"),
        *("\x00.weight", "x.weight_v", "x.weight_g", "9" * 400 + ".weight"),
        *("parametrizations.weight.original1", "parametrizations.weight.original0"),
    ]
)
GROUPS = st.fixed_dictionaries(
    {"params": st.one_of(st.lists(st.one_of(st.integers(0, 4), NAMES, st.lists(st.none())), max_size=5), NUMBERS)},
    optional={
        "lr": NUMBERS,
        "betas": NUMBERS,
        "momentum": NUMBERS,
        "nesterov": st.booleans(),
        "weight_decay": st.one_of(st.sampled_from([0, 0.1]), NUMBERS),
        "amsgrad": st.booleans(),
        "decoupled_weight_decay": st.one_of(st.booleans(), NUMBERS),
        "param_names": st.one_of(st.lists(NAMES, max_size=5), NUMBERS),
        "step": NUMBERS,
    },
)
SLOTS = st.dictionaries(
    st.sampled_from(["exp_avg", "exp_avg_sq", "momentum_buffer", "step"]),
    st.one_of(tensors(), st.floats(), st.integers(-2, 10**30)),
    max_size=4,
)
CHECKPOINTS = st.builds(
    Checkpoint,
    path=st.just(Path("x")),
    format=st.just("damaged"),
    tensors=st.dictionaries(NAMES, tensors(), max_size=5),
    optimizers=st.lists(
        st.builds(
            OptimizerState,
            groups=st.lists(GROUPS, max_size=2).map(tuple),
            slots=st.dictionaries(st.one_of(st.integers(0, 4), NAMES), SLOTS, max_size=5),
        ),
        max_size=2,
    ).map(tuple),
    records=st.dictionaries(
        st.text(max_size=3), st.dictionaries(st.sampled_from(["scope", "phases"]), NUMBERS), max_size=1
    ),
    step=st.one_of(st.none(), st.integers(0, 10**6)),
)


@given(CHECKPOINTS, st.one_of(st.none(), CHECKPOINTS), st.one_of(st.none(), st.lists(NAMES, max_size=4)))
def test_damaged_optimizer_state_gives_evidence_or_a_reason(checkpoint, earlier, names):
    found, said = examine_file(checkpoint, parameter_names=names, earlier=earlier)
    assert all(isinstance(piece, Evidence) for piece in found)  # whose own checks hold: rising indices within the layer
    assert all(isinstance(piece, Abstention) and piece.reason for piece in said)


@given(CHECKPOINTS)
def test_a_checkpoint_compared_with_itself_gives_no_evidence(checkpoint):
    found, _ = examine_file(checkpoint, earlier=checkpoint)
    assert not [piece for piece in found if piece.source.startswith("two checkpoints")]


@given(st.lists(GROUPS, max_size=3))
def test_settings_that_are_no_finite_numbers_are_left_out(groups):
    checkpoint = Checkpoint(Path("a.ckpt"), "test", {}, optimizers=(OptimizerState(tuple(groups), {}),))
    assert all(map(math.isfinite, learning_rates(checkpoint)))
    assert not math.isnan(weight_decay_per_step(checkpoint))
