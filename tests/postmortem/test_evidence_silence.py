"""What an optimizer's state says of a layer: who is silent, who never learnt, and every reason to say nothing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from neuronscope.checkpoints.file import initial_weights
from neuronscope.checkpoints.file.examine_file import examine_file
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from scripts.dying_networks import Held, as_checkpoint

STEPS = 400
#: Last step, from 1, at which each of the hidden layer's five neurons gets a gradient; 0 = never, and two that go on.
#: Of the silent ones the first has been so for longer than 300 steps, the second for longer than 80, less than 300.
LAST = (STEPS, 0, 60, 310, STEPS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    nn.init.zeros_(model[0].bias)
    return model


def run(model, optimizer, last=LAST, steps=STEPS, head=True, each=lambda step: None):
    """Random gradients, but none for the rows of the first layer that have gone silent; gives both back."""
    random = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
            if name.startswith("0."):
                parameter.grad[[step > until for until in last]] = 0
            elif not head:
                parameter.grad = None
        optimizer.step()
        each(step)
    return model, optimizer


def of(found, claim, layer="0"):
    return [piece for piece in found if piece.claim == claim and piece.layer == layer]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.AdamW(p, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: torch.optim.RAdam(p),
        lambda p: torch.optim.Adam(p, amsgrad=True, maximize=True),
        lambda p: torch.optim.Adam(p, capturable=False, foreach=True),
        lambda p: torch.optim.Adam(list(p), fused=True),
        lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True),
    ],
    ids=["Adam", "AdamW", "NAdam", "RAdam", "amsgrad", "foreach", "fused", "SGD"],
)
def test_silent_never_trained_and_alive_neurons_are_told_apart_by_adam_state(make):
    model = network()
    found, said = examine_file(as_checkpoint(*run(model, make(model.parameters())), step=STEPS))
    assert said == []
    (never,), (silent, lately), (alive,) = (of(found, claim) for claim in ("never trained", "no gradient", "alive"))
    assert never.neurons.tolist() == [1]
    assert never.since.tolist() == [-1]
    assert (silent.neurons.tolist(), silent.basis) == ([2], "inferred")
    assert (lately.neurons.tolist(), lately.basis) == ([3], "suspected")
    assert alive.neurons.tolist() == [0, 4]
    for piece, last in ((silent, 60), (lately, 310)):
        number, truth = piece.numbers[0], STEPS - last
        if silent.source == "adam state":
            # A bound. Random signs leave the largest r of four at .05 to 2: ln(7.27 / .05) / .105 = 47 steps more.
            assert truth <= number <= truth + 48
        else:
            assert abs(number - truth) <= 20
        assert piece.since.tolist() == [STEPS - int(number)]
    assert {piece.basis for piece in found if piece is not lately} == {"inferred"}
    assert of(found, "alive", "2")[0].neurons.tolist() == [0, 1]


def group_of(checkpoint, **changes):
    """The same checkpoint with other hyperparameters in its groups; ``None`` takes one away."""
    (state,) = checkpoint.optimizers
    groups = []
    for group in state.groups:
        group = {**group, **changes}
        groups.append({name: value for name, value in group.items() if value is not None})
    return type(checkpoint)(**{**vars(checkpoint), "optimizers": (type(state)(tuple(groups), state.slots),)})


@pytest.mark.parametrize(
    ("make", "changes", "reason"),
    [
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), {}, "added to the gradient"),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1), {}, "added to the gradient"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), {"decoupled_weight_decay": None}, "does not say whether"),
        (lambda p: torch.optim.SGD(p), {}, "without momentum"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=1), {}, "does not add up gradients"),
        (lambda p: torch.optim.Adam(p, betas=(0.9, 0.8)), {}, "clock cannot be read"),
        (lambda p: torch.optim.Adam(p, betas=(0.0, 0.999)), {}, "clock cannot be read"),
        (lambda p: torch.optim.Adam(p), {"betas": "0.9"}, "betas are '0.9'"),
        (lambda p: torch.optim.Adam(p), {"weight_decay": math.nan}, "weight decay nan"),
        (lambda p: torch.optim.Adam(p), {"amsgrad": None, "decoupled_weight_decay": None}, "not those of Adam"),
        (lambda p: torch.optim.Adam(p, betas=(0.0, 0.999)), {"max_momentum": 0.9}, "betas of 0 to 0.9"),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1), {}, "no clock for Adagrad: its sums begin"),
        (lambda p: torch.optim.Rprop(p), {}, "no clock for Rprop"),
        # SOAP's group, and a slot of Adan's: means under Adam's names that are not Adam's.
        (
            torch.optim.Adam,
            {"amsgrad": None, "decoupled_weight_decay": None, "correct_bias": True, "shampoo_beta": -1},
            "not those of Adam",
        ),
        (lambda p: torch.optim.ASGD(p), {}, "no clock for its optimizer, which keeps"),
        (lambda p: torch.optim.Adafactor(p), {}, "no clock for Adafactor"),
    ],
)
def test_every_reason_for_no_evidence_is_stated(make, changes, reason):
    model = network()
    checkpoint = group_of(as_checkpoint(*run(model, make(model.parameters()), last=(STEPS,) * 5)), **changes)
    found, said = examine_file(checkpoint)
    assert found == []
    assert [piece.layer for piece in said] == ["0", "2"]
    assert all(reason in piece.reason for piece in said), said


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torch.optim.Adagrad, "Adagrad"),
        (torch.optim.RMSprop, "RMSprop"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), "RMSprop"),
        (torch.optim.Adadelta, "Adadelta"),
        (torch.optim.Adamax, "Adamax"),
        (lambda p: torch.optim.Adamax(p, weight_decay=0.1), "Adamax"),
    ],
)
def test_an_optimizer_without_a_clock_shows_rows_that_never_had_a_gradient(make, name):
    """Weight decay in the gradient reaches each row but those of which every weight is zero."""
    model = network()
    optimizer = make(model.parameters())
    decayed = optimizer.param_groups[0]["weight_decay"] > 0
    found, said = examine_file(as_checkpoint(*run(model, optimizer), step=STEPS))
    assert [(piece.claim, piece.layer, piece.neurons.tolist()) for piece in found] == (
        [] if decayed else [("never trained", "0", [1])]
    )
    assert [piece.layer for piece in said] == ["0", "2"]
    assert all(f"no clock for {name}" in piece.reason for piece in said)


def test_half_precision_optimizer_state_shows_rows_that_never_had_a_gradient_and_gives_no_dates():
    model = network().to(torch.bfloat16)
    found, said = examine_file(as_checkpoint(*run(model, torch.optim.Adam(model.parameters()))))
    assert [(piece.claim, piece.neurons.tolist()) for piece in found] == [("never trained", [1])]
    assert all("no clock for Adam whose state is kept in bfloat16" in piece.reason for piece in said)
    assert len(said) == 2


def test_float16_optimizer_state_shows_nothing():
    """A gradient of 1e-4 has a square that float16 cannot hold, so that a zero shows nothing."""
    checkpoint = as_checkpoint(*run(model := network(), torch.optim.Adam(model.parameters())))
    for slots in checkpoint.optimizers[0].slots.values():
        slots.update({name: Held(slots[name].read().half()) for name in ("exp_avg", "exp_avg_sq")})
    found, said = examine_file(checkpoint)
    assert found == []
    assert len(said) == 2


def test_state_of_bitsandbytes_is_read_in_32_bits_and_named_in_8(tmp_path):
    """Its kernels compute the means of AdamW, and it keeps them in a dictionary of their own.

    What it keeps in 8 bits is no longer zero where no gradient ever came.
    """
    model, optimizer = run(model := network(), torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    state["param_groups"] = [{name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "params")}]
    for key, kept in state["state"].items():
        names = {"state1": kept["exp_avg"], "state2": kept["exp_avg_sq"]}
        if key >= 2:
            maps = {f"{kind}{one}": torch.ones(256) for kind in ("qmap", "absmax") for one in "12"}
            names = {name: value.to(torch.uint8) for name, value in names.items()} | maps
        state["state"][key] = {"step": STEPS, "__bnb_optimizer_quant_state__": names}
    torch.save({"model": model.state_dict(), "optimizer": state, "step": STEPS}, tmp_path / "last.pt")
    found, said = examine_file(open_checkpoint(tmp_path / "last.pt"))
    assert [(piece.layer, "no clock for an 8-bit optimizer" in piece.reason) for piece in said] == [("2", True)]
    assert {piece.source for piece in found} == {"adam state"}
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == [[2], [3]]
    assert of(found, "never trained")[0].neurons.tolist() == [1]
    assert of(found, "alive")[0].neurons.tolist() == [0, 4]


def test_muon_has_a_clock_of_its_own():
    """Its decay acts on the weights only, and its buffer falls by the momentum a step; biases are not its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    last = (STEPS, 0, 60, 270, STEPS)
    checkpoint = as_checkpoint(*run(model, torch.optim.Muon(model.parameters(), momentum=0.9), last=last), step=STEPS)
    found, said = examine_file(checkpoint)
    assert said == []
    assert {piece.source for piece in found} == {"Muon state"}
    silent, lately = of(found, "no gradient")
    assert (silent.neurons.tolist(), silent.basis) == ([2], "inferred")
    assert (lately.neurons.tolist(), lately.basis) == ([3], "suspected")
    assert abs(silent.numbers[0] - (STEPS - 60)) <= 20
    assert of(found, "never trained")[0].neurons.tolist() == [1]
    assert "SGD" not in " ".join(piece.text for piece in found)


def _change(step: int, optimizer: torch.optim.Optimizer, **values: float) -> None:
    if step == STEPS // 2:
        optimizer.param_groups[0].update(values)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {}),
        ({"nesterov": True}, {}),
        ({"dampening": 0.5}, {}),
        ({"maximize": True}, {}),
        ({"foreach": True}, {}),
        ({"fused": True}, {}),
        ({}, {"lr": 1e-3}),
        ({}, {"lr": 1e-1}),
        ({}, {"weight_decay": 1e-3}),
    ],
    ids=lambda value: " ".join(f"{name}={number}" for name, number in value.items()) or "plain",
)
def test_silent_rows_of_sgd_with_weight_decay_are_those_whose_buffer_is_a_multiple_of_their_weights(options, change):
    """The last gradients of each row are counted; the rate or the decay may change in the middle of the run."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9, weight_decay=1e-2, **options)
    run(model, optimizer, each=lambda step: _change(step, optimizer, **change))
    found, said = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    assert said == []
    (faded,) = [piece for piece in of(found, "no gradient") if piece.since is None]
    # Neuron 1 never got one, which looks the same. Rounding ends the clock before the 340 steps of neuron 2.
    assert (faded.neurons.tolist(), faded.basis) == ([1, 2], "inferred")
    assert 80 < faded.numbers[0] <= STEPS - 60
    assert "a multiple of the weights" in faded.text
    (dated,) = [piece for piece in of(found, "no gradient") if piece.since is not None]
    assert (dated.neurons.tolist(), dated.basis) == ([3], "suspected")
    assert abs(dated.numbers[0] - (STEPS - 310)) <= 20
    assert of(found, "alive")[0].neurons.tolist() == [0, 4]


@pytest.mark.parametrize("decay", [0.0, 5e-4])
def test_a_slow_momentum_gives_no_dates_and_calls_no_silent_row_alive(decay):
    """At a momentum of .99 the buffers of living rows differ by as much as 230 steps of silence make."""
    steps, last = 1500, (1500, 150, 900, 1200, 1410)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.99, weight_decay=decay)
    found, said = examine_file(as_checkpoint(*run(model, optimizer, last, steps), step=steps))
    assert [piece.neurons.tolist() for piece in of(found, "alive")] == [[0, 4]]  # 90 steps are a pause
    assert {(piece.basis, piece.since) for piece in of(found, "no gradient")} == {("suspected", None)}
    assert sorted(n for piece in of(found, "no gradient") for n in piece.neurons.tolist()) == [1, 2]
    assert {piece.basis for piece in of(found, "alive")} == {"suspected"}
    assert "forgets so slowly" in said[0].reason
    assert "accurate to some hundreds of steps" in of(found, "no gradient")[0].text


def test_a_decay_as_fast_as_the_momentum_buffer_leaves_no_clock():
    """Weights and buffers swing together then: rows that stopped 1,350 steps ago looked as if 926 had passed."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.99, weight_decay=1e-2)
    found, said = examine_file(as_checkpoint(*run(model, optimizer), step=STEPS))
    assert found == []
    assert {piece.layer for piece in said} == {"0", "2"}
    assert all("decay moves weights as fast" in piece.reason for piece in said)


def test_sgd_with_weight_decay_says_nothing_of_rows_with_a_single_weight():
    """A single number is a multiple of any other."""
    model = nn.Sequential(nn.Linear(1, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9, weight_decay=1e-2)
    found, said = examine_file(as_checkpoint(*run(model, optimizer), step=STEPS))
    assert {piece.layer for piece in found} == {"2"}
    assert [(piece.layer, "5 neurons" in piece.reason) for piece in said] == [("0", True)]


def test_a_decoupled_decay_under_the_names_of_sgd_is_not_read_as_sgd():
    """The buffers of dead rows are far below what decay in the gradient would leave in them."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    run(model, optimizer)
    checkpoint = group_of(as_checkpoint(model, optimizer, step=STEPS), weight_decay=0.1)
    found, said = examine_file(checkpoint)
    assert of(found, "alive")[0].neurons.tolist() == [0, 4]
    assert of(found, "no gradient") == []
    assert ["2 neurons" in piece.reason for piece in said] == [True]


def test_no_gradient_under_a_new_optimizer_dates_to_its_beginning():
    """The five neurons were trained before: none is never trained, and 600 is the optimizer's own beginning."""
    model = network()
    run(model, torch.optim.Adam(model.parameters()), last=(STEPS,) * 5)
    optimizer = torch.optim.AdamW(model.parameters())
    run(model, optimizer, last=(STEPS, 0, 0, STEPS, STEPS))
    found, _ = examine_file(as_checkpoint(model, optimizer, step=600 + STEPS))
    assert of(found, "never trained") == []
    (silent,) = of(found, "no gradient")
    assert (silent.neurons.tolist(), silent.basis, silent.since) == ([1, 2], "inferred", None)
    assert silent.numbers.tolist() == [STEPS, STEPS]
    assert "its step 0 is step 600" in silent.text


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)])
@pytest.mark.parametrize("step", [STEPS, None])
def test_rows_that_were_trained_before_the_run_are_not_called_never_trained(make, step):
    """Weights from elsewhere: the file's step and the optimizer's agree, and the weights look like no initial ones."""
    model = network()
    run(model, torch.optim.Adam(model.parameters(), 1e-2), last=(STEPS,) * 5)
    optimizer = make(model.parameters())
    run(model, optimizer, last=(STEPS, 0, 0, STEPS, STEPS))
    found, _ = examine_file(as_checkpoint(model, optimizer, step=step))
    assert of(found, "never trained") == []
    (silent,) = of(found, "no gradient")
    assert (silent.neurons.tolist(), silent.since) == ([1, 2], None)
    # SGD does not count its steps: it may have begun a few steps ago.
    assert silent.basis == ("suspected" if "sgd" in silent.source else "inferred")


@pytest.mark.parametrize("first", [nn.Linear(64, 5), nn.Conv2d(3, 5, 3), nn.Conv1d(4, 5, 6)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam,
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(list(p), weight_decay=0.1, fused=True),
    ],
    ids=["Adam", "SGD", "AdamW", "fused AdamW"],
)
def test_rows_that_an_earlier_optimizer_hardly_moved_are_not_called_never_trained(first, make):
    """Row 1 is as torch drew it; row 2 moved by a thousandth of its range, so that no statistic tells it from row 1."""
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(first), nn.ReLU())
    model[0].reset_parameters()
    run(model, torch.optim.SGD(model.parameters(), 1e-5), last=(20, 0, 20, 20, 20), steps=20)
    optimizer = make(model.parameters())
    run(model, optimizer, last=(STEPS, 0, 0, STEPS, STEPS))
    found, _ = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    assert [piece.neurons.tolist() for piece in of(found, "never trained")] == [[1]]
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == [[2]]


def drawn_on_cuda(shape: tuple[int, ...], bound: float, seed: int = 0) -> torch.Tensor:
    """Return ±bound drawn as on a GPU: 32 random bits become a float32 in (0, 1], and then a number of the range."""
    bits = np.random.default_rng(seed).integers(0, 2**32, size=shape, dtype=np.uint32)
    share = bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    low = np.float32(bound)
    return torch.from_numpy(share * (low + low) - low)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW], ids=["Adam", "AdamW"])
def test_rows_that_were_drawn_on_a_gpu_are_found_to_be_never_trained(make):
    """Rows 1 and 2 get no gradient; row 2 was moved a little by an earlier optimizer."""
    model = nn.Sequential(nn.Linear(64, 5), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(drawn_on_cuda((5, 64), 1 / 8))
        model[0].weight[2] += 1e-5 * torch.randn(64, generator=torch.Generator().manual_seed(2))
    optimizer = make(model.parameters())
    run(model, optimizer, last=(STEPS, 0, 0, STEPS, STEPS))
    found, _ = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    assert [piece.neurons.tolist() for piece in of(found, "never trained")] == [[1]]
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == [[2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_of_other_types_are_not_taken_for_initial_ones_by_their_spread(dtype):
    """The same statistics hold after a small step of an earlier optimizer, and no grid of numbers tells them apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 5), nn.ReLU()).to(dtype)
    run(model, torch.optim.SGD(model.parameters(), 1e-3), last=(20,) * 5, steps=20)
    optimizer = torch.optim.Adam(model.parameters())
    run(model, optimizer, last=(STEPS, 0, STEPS, STEPS, STEPS))
    found, _ = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    assert of(found, "never trained") == []
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == [[1]]


def test_a_schedule_of_the_learning_rate_under_weight_decay_hides_what_was_drawn():
    """What decay did is not known then, so that nothing is said of initialisation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 5), nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    run(model, optimizer, last=(STEPS, 0, STEPS, STEPS, STEPS), each=lambda step: schedule.step())
    found, _ = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    assert of(found, "never trained") == []
    assert [(piece.neurons.tolist(), piece.basis) for piece in of(found, "no gradient")] == [([1], "inferred")]


@pytest.mark.parametrize("most", [1, 2])
def test_only_as_many_rows_are_followed_back_through_weight_decay_as_the_bound_allows(monkeypatch, most):
    """Of the other rows nothing is said of initialisation."""
    monkeypatch.setattr(initial_weights, "_MOST_ROW_STEPS", most * STEPS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 5), nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    run(model, optimizer, last=(STEPS, 0, 0, 0, STEPS))
    found, _ = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    assert of(found, "never trained")[0].neurons.tolist() == [1, 2][:most]
    assert of(found, "no gradient")[0].neurons.tolist() == [1, 2, 3][most:]


@pytest.mark.parametrize("steps", [60, 150, 250])
def test_a_pause_since_a_new_optimizer_began_is_not_called_the_end_of_gradients(steps):
    model = network()
    run(model, torch.optim.Adam(model.parameters()), last=(STEPS,) * 5)
    optimizer = torch.optim.AdamW(model.parameters())
    run(model, optimizer, last=(STEPS, 0, STEPS, STEPS, STEPS), steps=steps)
    found, _ = examine_file(as_checkpoint(model, optimizer, step=1003 + steps))
    bases = {60: [], 150: ["suspected"], 250: ["inferred"]}[steps]
    assert [(piece.claim, piece.basis) for piece in found if piece.claim != "alive"] == [
        ("no gradient", basis) for basis in bases
    ]


@pytest.mark.parametrize("batches", [2, 4])
def test_a_file_that_counts_batches_gives_no_dates(batches):
    """Two batches make a step: the file says 800, and the optimizer 400. A date of one is no date of the other."""
    model = network()
    run(model, optimizer := torch.optim.Adam(model.parameters()))
    found, _ = examine_file(as_checkpoint(model, optimizer, step=batches * STEPS + 1))
    assert [piece.since for piece in of(found, "no gradient")] == [None, None, None]
    assert of(found, "never trained") == []  # the file may count the steps of another optimizer before this one


@pytest.mark.parametrize(
    ("make", "changes", "dtype"),
    [
        (lambda p: torch.optim.Adamax(p, betas=(0.5, 0.999)), {}, torch.float32),
        (lambda p: torch.optim.Adamax(p), {"base_momentum": 0.4, "max_momentum": 0.9}, torch.float32),
        (lambda p: torch.optim.RMSprop(p, alpha=0.4), {}, torch.float32),
        (lambda p: torch.optim.Adadelta(p, rho=0.4), {}, torch.float32),
        (lambda p: torch.optim.SGD(p, momentum=0.4), {}, torch.bfloat16),
    ],
    ids=["Adamax", "cycled", "RMSprop", "Adadelta", "bfloat16"],
)
def test_means_that_fade_to_exact_zeros_show_nothing(make, changes, dtype):
    """Row 2 was trained until step 60; with such a decay its mean is zero at the end, as if it had never been."""
    model = network().to(dtype)
    checkpoint = group_of(as_checkpoint(*run(model, make(model.parameters()))), **changes)
    found, said = examine_file(checkpoint)
    assert found == []
    assert [piece.layer for piece in said] == ["0", "2"]
    assert all("no clock for" in piece.reason and "reach exact zeros" in piece.reason for piece in said)


def test_a_schedule_cycles_the_momentum_of_rmsprop_and_not_its_mean_of_squares():
    model = network()
    optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    checkpoint = group_of(as_checkpoint(*run(model, optimizer)), base_momentum=0.4, max_momentum=0.9)
    found, said = examine_file(checkpoint)
    assert of(found, "never trained")[0].neurons.tolist() == [1]
    assert all("only a row that never got a gradient" in piece.reason for piece in said)


def test_a_buffer_without_decay_that_has_faded_away_is_not_said_to_hold_decay():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5)
    _, said = examine_file(as_checkpoint(*run(model, optimizer, last=(200, 200, 200, 200, 200), head=False)))
    assert [piece.layer for piece in said if "too small for the numbers of their dtype" in piece.reason] == ["0"]
    assert all("weight decay" not in piece.reason for piece in said)


def test_betas_that_are_tensors_are_read_from_a_file(tmp_path):
    model = network()
    betas = torch.tensor(0.9), torch.tensor(0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), betas=betas, foreach=False)
    run(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "tensors.pt")
    found, said = examine_file(open_checkpoint(tmp_path / "tensors.pt"))
    assert said == []
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == [[2], [3]]


def loop_file(averaged, optimizer):
    return {"model": averaged.state_dict(), "optimizer": optimizer.state_dict()}


def lightning_file(averaged, optimizer):
    """As Lightning's callbacks that average weights write it."""
    return {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": averaged.module.state_dict(),
        "averaging_state": {"n_averaged": averaged.n_averaged},
        "optimizer_states": [optimizer.state_dict()],
    }


@pytest.mark.parametrize("content", [loop_file, lightning_file])
@pytest.mark.parametrize(("decay", "is_read"), [(5e-4, False), (0.0, True)])
def test_a_buffer_with_decay_is_not_compared_with_averaged_weights(tmp_path, content, decay, is_read):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=decay)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    run(model, optimizer, each=lambda step: averaged.update_parameters(model))
    torch.save(content(averaged, optimizer), tmp_path / "averaged.pt")
    found, said = examine_file(open_checkpoint(tmp_path / "averaged.pt"))
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == ([[2], [3]] if is_read else [])
    assert [piece.layer for piece in said if "averages" in piece.reason] == ([] if is_read else ["0", "2"])


@pytest.mark.parametrize(
    ("cycle", "basis"), [({}, "inferred"), ({"base_momentum": 0.85, "max_momentum": 0.95}, "suspected")]
)
def test_a_buffer_of_decay_alone_shows_less_where_a_schedule_cycles_the_momentum(cycle, basis):
    """A large decay hides the gradients' rest when it has fallen by 13 e-foldings: 80 steps at a momentum of .85."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=3.0)
    checkpoint = as_checkpoint(*run(model, optimizer, last=(STEPS, STEPS, 60, STEPS, STEPS)), step=STEPS)
    (silent,) = of(examine_file(group_of(checkpoint, **cycle))[0], "no gradient")
    assert (silent.neurons.tolist(), silent.basis) == ([2], basis)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9)])
def test_a_cycled_momentum_gives_no_date_later_than_the_last_gradient(make):
    """The schedule is in the middle of its cycle, and the group holds its two ends."""
    model = network()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=1000)
    run(model, optimizer, last=(STEPS, STEPS, 10, STEPS, STEPS), each=lambda step: schedule.step())
    found, _ = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    silent = of(found, "no gradient")
    assert [piece.neurons.tolist() for piece in silent] == [[2]]
    assert all(piece.since is None or piece.since[0] <= 10 for piece in silent)


def test_a_neuron_with_a_rare_gradient_is_not_called_dead_where_beta1_is_small():
    """Every 45th step, the last one 40 steps ago: with β1 = .5 the first mean has faded to nothing in between."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.999))
    random = torch.Generator().manual_seed(1)
    for step in range(1, 986):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        if step % 45:
            for parameter in model[0].parameters():
                parameter.grad[3] = 0
        optimizer.step()
    found, _ = examine_file(as_checkpoint(model, optimizer, step=985))
    assert all(piece.basis == "suspected" for piece in found if piece.claim != "alive")


def test_decoupled_weight_decay_is_recognised_in_an_old_adamw_state():
    """Old torch does not save whether decay is decoupled. Coupled, it would have reached the never-trained row."""
    model = network()
    checkpoint = as_checkpoint(*run(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1)), step=STEPS)
    found, said = examine_file(group_of(checkpoint, decoupled_weight_decay=None))
    assert said == []
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == [[2], [3]]


@pytest.mark.parametrize(
    ("more", "slot", "is_read"),
    [
        ({"initial_lr": 1e-3, "name": "no decay"}, "", True),
        ({"rank": 4, "update_proj_gap": 200}, "", False),  # GaLore's means are of projections
        ({}, "exp_avg_diff", False),  # Adan has a third mean
    ],
)
def test_means_under_adams_names_are_read_only_where_nothing_else_is_kept_or_set(more, slot, is_read):
    """The group is that of the AdamW of transformers before 5, whose decay is decoupled."""
    model = network()
    checkpoint = as_checkpoint(*run(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1)), step=STEPS)
    taken = ("amsgrad", "decoupled_weight_decay", "foreach", "maximize", "capturable", "differentiable", "fused")
    checkpoint = group_of(checkpoint, **dict.fromkeys(taken), correct_bias=True, **more)
    for slots in checkpoint.optimizers[0].slots.values():
        slots.update({slot: slots["exp_avg"]} if slot else {})
    found, said = examine_file(checkpoint)
    assert [piece.neurons.tolist() for piece in of(found, "no gradient")] == ([[2], [3]] if is_read else [])
    assert len(said) == (0 if is_read else 2)


def test_coupled_weight_decay_read_as_decoupled_hides_silent_neurons():
    """Why it is abstained from: read as AdamW's, the same state says that neurons silent for 340 steps are alive."""
    model = network()
    checkpoint = as_checkpoint(*run(model, torch.optim.Adam(model.parameters(), weight_decay=0.1)), step=STEPS)
    found, _ = examine_file(group_of(checkpoint, decoupled_weight_decay=True))
    assert of(found, "no gradient") == []


def test_after_few_steps_only_neurons_that_never_had_a_gradient_are_found():
    model = network()
    found, said = examine_file(as_checkpoint(*run(model, torch.optim.Adam(model.parameters()), steps=81)))
    assert [(piece.claim, piece.neurons.tolist()) for piece in found] == [("never trained", [1])]
    assert ["81 times" in piece.reason for piece in said] == [True, True]


@pytest.mark.parametrize(("cut", "basis", "beyond"), [(90, "inferred", 300), (290, "suspected", 80)])
def test_a_layer_that_goes_silent_as_a_whole_is_not_reported_as_dead_neurons(cut, basis, beyond):
    """Two die at 20, 1 never learns; then the layer is cut off: that 0 and 4 go silent says nothing of themselves."""
    model = network()
    found, said = examine_file(
        as_checkpoint(*run(model, torch.optim.Adam(model.parameters()), last=(cut, 0, 20, 20, cut)), step=STEPS)
    )
    assert said == []
    single, together = sorted(of(found, "no gradient"), key=lambda piece: piece.whole_layer)
    assert (single.whole_layer, single.neurons.tolist(), single.basis) == (False, [2, 3], "inferred")
    assert (together.whole_layer, together.neurons.tolist(), together.basis) == (True, [0, 4], basis)
    assert "whole layer" in together.text
    assert f"more than {beyond} steps" in together.text
    (never,) = of(found, "never trained")
    assert never.neurons.tolist() == [1]
    assert of(found, "alive") == []


def test_a_layer_that_never_learnt_is_reported_as_a_whole():
    model = network()
    found, _ = examine_file(as_checkpoint(*run(model, torch.optim.Adam(model.parameters()), last=(0,) * 5)))
    (never,) = of(found, "never trained")
    assert never.whole_layer
    assert never.neurons.tolist() == [0, 1, 2, 3, 4]


def test_a_frozen_layer_has_no_date_of_death():
    """Its gradient is None from step 100 on: the optimizer leaves it out, and its clock stands still."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    run(model, optimizer, steps=100, last=(100, 0, 10, 10, 100))
    model[0].requires_grad_(False)
    for parameter in model[0].parameters():
        parameter.grad = None
    for _ in range(50):
        for parameter in model[2].parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    found, _ = examine_file(as_checkpoint(model, optimizer, step=150))
    (silent,) = of(found, "no gradient")
    assert silent.since is None
    assert "left out of 50" in silent.text


def test_a_layer_that_was_never_updated_is_not_called_healthy():
    model = network()
    found, said = examine_file(as_checkpoint(*run(model, torch.optim.Adam(model.parameters()), head=False)))
    assert {piece.layer for piece in found} == {"0"}
    assert [(piece.layer, "never updated" in piece.reason) for piece in said] == [("2", True)]


def test_optimizer_state_that_is_not_finite_is_reported():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    run(model, optimizer)
    optimizer.state[model[0].weight]["exp_avg"][2, 1] = math.nan
    found, said = examine_file(as_checkpoint(model, optimizer, step=STEPS))
    assert of(found, "no gradient")[0].neurons.tolist() == [3]
    assert ["1 neurons is NaN" in piece.reason for piece in said] == [True]


def test_a_missing_optimizer_is_reported():
    found, said = examine_file(as_checkpoint(network()))
    assert found == []
    assert [piece.layer for piece in said] == [""]


def test_layers_of_experts_get_no_verdict():
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(4, 3, 5))
    _, said = examine_file(as_checkpoint(model, torch.optim.Adam(model.parameters())))
    assert ["experts are stacked" in piece.reason for piece in said] == [True]
