"""Two checkpoints of one run: who got nothing in between, who died there, and checkpoints that are not of one run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from neuronscope.checkpoints.file.examine_file import examine_file
from scripts.dying_networks import as_checkpoint

FIRST, LAST = 300, 800
#: Last step at which each of six neurons gets a gradient; 0 = never.
UNTIL = (LAST, 0, 100, 290, 650, 320)

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "AdamW, β2 .95": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def run(make, until=UNTIL, scale=lambda step: 1.0, rate=lambda step: 1.0):
    """Random gradients until each row's end; the checkpoints at both steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, len(until)), nn.ReLU(), nn.Linear(len(until), 2))
    optimizer = make(model.parameters())
    base = optimizer.param_groups[0]["lr"]
    kept = []
    for step in range(1, LAST + 1):
        optimizer.param_groups[0]["lr"] = base * rate(step)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter) * scale(step)
            if name.startswith("0."):
                parameter.grad[[step > end for end in until]] = 0
        optimizer.step()
        if step in (FIRST, LAST):
            kept.append(as_checkpoint(model, optimizer, step=step))
    return kept


def compared(earlier, later):
    """Evidence on layer ``0`` from the comparison of two checkpoints, and what the comparison abstains from."""
    evidence, abstentions = examine_file(later, earlier=earlier)
    return (
        [piece for piece in evidence if piece.source.startswith("two checkpoints") and piece.layer == "0"],
        [piece for piece in abstentions if piece.source == "two checkpoints"],
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neurons_silent_or_dead_between_two_checkpoints_are_found(name, schedule):
    rate = (lambda step: 1.0) if schedule == "constant" else (lambda step: 0.5 + 0.5 * math.cos(3.1 * step / LAST))
    found, said = compared(*run(OPTIMIZERS[name], rate=rate))
    assert said == []
    silent, died, lately, alive = found
    assert (silent.claim, silent.neurons.tolist()) == ("no gradient", [2, 3])  # 1 never trained: told by one alone
    assert silent.numbers.tolist() == [LAST - FIRST] * 2
    # 5 at step 320, longer ago than 300 steps (395 where β2 is .95); 4 at step 650, longer than 80 and less than 300.
    for piece, neuron, basis in ((died, 5, "inferred"), (lately, 4, "suspected")):
        assert (piece.claim, piece.neurons.tolist(), piece.basis) == ("no gradient", [neuron], basis)
        assert "stopped in between" in piece.text
    assert (alive.claim, alive.neurons.tolist()) == ("alive", [0])
    if name != "SGD":
        # By the earlier clock's bound: no later than the truth, no more than the 48 steps of a row's r before it.
        for piece, neurons in ((silent, (2, 3)), (died, (5,)), (lately, (4,))):
            for since, neuron in zip(piece.since, neurons):
                assert UNTIL[neuron] - 48 <= since <= UNTIL[neuron]


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_averaged_weights_do_not_show_who_got_no_gradient(name):
    """Averages move without a gradient, some rows' longer than others': a frozen layer would seem half silent."""
    earlier, later = run(OPTIMIZERS[name])
    plain, _ = compared(earlier, later)
    for averaged in ((True, True), (True, False), (False, True)):
        pair = [replace(one, is_averaged=which) for one, which in zip((earlier, later), averaged)]
        found, said = compared(*pair)
        assert [piece.neurons.tolist() for piece in found] == [[5], [4], [0]]  # died, or alive: by the means alone
        assert [piece.text for piece in found] == [piece.text for piece in plain[1:]]
        assert [piece.layer for piece in said] == [""]
        assert "are averages" in said[0].reason


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_checkpoints_show_faint_gradients_that_one_cannot_show(name):
    """From step 250 on gradients are a ten-thousandth of before: one checkpoint takes the living for silent."""
    earlier, later = run(OPTIMIZERS[name], scale=lambda step: 1.0 if step < 250 else 1e-4)
    alone, _ = examine_file(later)
    if name in ("Adam", "AdamW"):  # v still remembers the loud gradients; with β2 = .95 it has forgotten them
        assert any(0 in piece.neurons for piece in alone if (piece.layer, piece.claim) == ("0", "no gradient"))
    found, _ = compared(earlier, later)
    assert [piece.neurons.tolist() for piece in found if "at least" in piece.measure] == [[2, 3]]


def test_a_layer_that_is_cut_off_is_reported_as_a_whole():
    found, _ = compared(*run(OPTIMIZERS["Adam"], until=(FIRST,) * 3))
    (silent,) = found
    assert silent.whole_layer


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a, b: (b, a), "not updated in between"),
        (lambda a, b: (b, b), "not updated in between"),
        (
            lambda a, b: (as_checkpoint(nn.Linear(3, 3), torch.optim.Adam(nn.Linear(3, 3).parameters())), b),
            "another network",
        ),
        (lambda a, b: (type(a)(**{**vars(a), "optimizers": ()}), b), "one of them has none"),
    ],
    ids=["swapped", "the same", "another network", "no state"],
)
def test_checkpoints_that_cannot_be_compared_give_a_reason_and_no_evidence(spoil, reason):
    found, said = compared(*spoil(*run(OPTIMIZERS["Adam"])))
    assert found == []
    assert said
    assert all(reason in piece.reason for piece in said)


def test_adam_betas_that_changed_between_checkpoints_are_noticed():
    earlier, _ = run(OPTIMIZERS["AdamW"])
    _, later = run(OPTIMIZERS["AdamW, β2 .95"])
    found, said = compared(earlier, later)
    assert found == []
    assert all("betas were changed" in piece.reason for piece in said)
