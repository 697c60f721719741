"""Whose optimizer state is whose: never a wrong tie, all that the file allows, and the reason where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from neuronscope.checkpoints.checkpoint import Checkpoint, OptimizerState
from neuronscope.checkpoints.file.parameter_matching import match_parameters
from neuronscope.checkpoints.run import postmortem
from scripts.dying_networks import Held, as_checkpoint


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def train(model: nn.Module, optimizers) -> None:
    """Two steps in which every parameter that wants a gradient gets one of its own."""
    for number in range(2):
        for place, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, place + 1.0 + number) if parameter.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()


def check(model: nn.Module, optimizers, names=None, expected: int | None = None, ordered=True) -> list[str]:
    """Every tie is right by the numbers themselves; gives the reasons of the abstentions."""
    checkpoint = as_checkpoint(model, *optimizers)
    if not ordered:
        tensors = {name: checkpoint.tensors[name] for name in sorted(checkpoint.tensors)}
        checkpoint = replace(checkpoint, tensors=tensors, is_ordered=False)
    states, abstentions = match_parameters(checkpoint, names)
    parameters = dict(model.named_parameters())
    for name, entry in states.items():
        kept = optimizers[entry.optimizer].state.get(parameters[name], {})
        assert set(entry.slots) == set(kept), name
        for slot, value in kept.items():
            stored = entry.slots[slot]
            stored = stored.read() if hasattr(stored, "read") else torch.tensor(stored)
            assert torch.equal(stored, value.detach().float()), (name, slot)
    if expected is not None:
        assert len(states) == expected
    return [abstention.reason for abstention in abstentions]


def decay_groups(model: nn.Module) -> list[dict]:
    flat = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": flat, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() < 2]}]


def frozen(model: nn.Module) -> nn.Module:
    model[0].requires_grad_(False)
    return model


ALL = 8  # three weights and biases, the norm's two


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), ALL),
        (lambda m: torch.optim.AdamW(decay_groups(m)), ALL),
        (lambda m: torch.optim.AdamW(m.named_parameters()), ALL),
        (lambda m: torch.optim.SGD(m.parameters(), momentum=0.9), ALL),
        (
            lambda m: torch.optim.Adam(frozen(m).parameters()),
            ALL,
        ),  # frozen, yet in the optimizer: an entry with no slots
        # The last layer alone: (3, 6) and (3,) are there once.
        (lambda m: torch.optim.Adam(m[5].parameters()), 2),
        # Without the first layer: three of size 6 come before (6, 6) in the file, and two in the optimizer.
        (lambda m: torch.optim.Adam([p for p in frozen(m).parameters() if p.requires_grad]), 4),
        (lambda m: torch.optim.Adam([{"params": m[5].parameters()}, {"params": m[0].parameters()}]), 3),
    ],
    ids=["one group", "decay or not", "named", "sgd", "frozen", "head alone", "first frozen out", "head and first"],
)
def test_each_entry_of_an_optimizer_is_matched_to_its_parameter(make, expected):
    model = mlp()
    optimizer = make(model)
    train(model, [optimizer])
    reasons = check(model, [optimizer], expected=expected)
    states = sum(len(group["params"]) for group in optimizer.param_groups)
    assert bool(reasons) == (expected < states)  # what is not tied is said


def test_parameters_left_out_of_the_optimizer_are_known_from_the_model():
    model = frozen(mlp())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    train(model, [optimizer])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert check(model, [optimizer], names=names, expected=6) == []


@pytest.mark.parametrize("alike", [False, True])
def test_the_two_optimizers_of_a_gan_are_matched(alike):
    model = nn.ModuleDict(
        {
            "generator": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)),
            "judge": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8 if alike else 1)),
        }
    )
    optimizers = [torch.optim.Adam(part.parameters()) for part in (model["judge"], model["generator"])]
    train(model, optimizers)
    # Alike in every shape, they cannot be told apart.
    reasons = check(model, optimizers, expected=0 if alike else 8)
    assert len(reasons) == (2 if alike else 0)


def test_tied_weights_are_matched_to_their_one_entry_in_the_optimizer():
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 9, bias=False), nn.Linear(9, 2))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    train(model, [optimizer])
    reasons = check(model, [optimizer], expected=2)  # either name would be right: neither is given
    assert len(reasons) == 1
    names = [name for name, _ in model.named_parameters()]
    assert check(model, [optimizer], names=names, expected=3) == []


@pytest.mark.parametrize("groups", [1, 2])
def test_a_language_model_whose_head_shares_its_embedding_is_matched(groups):
    """Grouped as by Hugging Face's Trainer: only matrices decay. The shared weight is in the file twice."""
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=8, vocab_size=12, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters() if groups == 1 else decay_groups(model))
    train(model, [optimizer])
    assert check(model, [optimizer], expected=len(list(model.parameters()))) == []


@pytest.mark.parametrize("damage", ["shape", "count", "no group", "wild"])
def test_the_optimizer_of_another_network_is_matched_to_nothing(damage):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, [optimizer])
    (state,) = as_checkpoint(model, optimizer).optimizers
    tensors = {name: Held(tensor) for name, tensor in model.state_dict().items()}
    groups = [dict(group) for group in state.groups]
    if damage == "shape":
        tensors["0.weight"] = Held(torch.zeros(7, 7))
    if damage == "count":
        groups[0]["params"] = list(range(40))
    if damage == "no group":
        groups = [{}]
    if damage == "wild":
        groups[0]["params"] = "0123"
    states, abstentions = match_parameters(
        Checkpoint(Path("memory"), "", tensors, optimizers=(type(state)(tuple(groups), state.slots),))
    )
    assert states == {}
    assert len(abstentions) == (1 if damage in ("shape", "count") else 0)


def test_matching_ends_with_very_many_parameter_groups():
    tensors = {f"{number}.weight": Held(torch.zeros(2)) for number in range(5_000)}
    groups = tuple({"params": [number]} for number in range(5_000))
    slots = {number: {"exp_avg": Held(torch.zeros(2))} for number in range(5_000)}
    optimizer = OptimizerState(groups, slots)
    states, abstentions = match_parameters(Checkpoint(Path("memory"), "", tensors, optimizers=(optimizer,)))
    assert states == {}
    assert "too many" in abstentions[0].reason


SHAPES = st.sampled_from([(2, 3), (3, 2), (2,), (3,), (1,)])


@given(st.data())
def test_no_match_between_optimizer_and_parameters_is_wrong(data):
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=9))
    model = nn.ParameterDict(
        {f"{chr(97 + i)}_weight": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}
    )
    # Each parameter is in one of two groups of one of two optimizers, or in none; some never get a gradient.
    places = data.draw(
        st.lists(st.sampled_from([None, (0, 0), (0, 1), (1, 0)]), min_size=len(shapes), max_size=len(shapes))
    )
    optimizers = []
    for number, groups in ((0, (0, 1)), (1, (0,))):
        chosen = [[p for p, place in zip(model.values(), places) if place == (number, group)] for group in groups]
        if any(chosen):
            optimizers.append(torch.optim.Adam([{"params": params} for params in chosen if params]))
    for parameter in model.values():
        parameter.requires_grad_(data.draw(st.booleans()))
    train(model, optimizers)
    check(model, optimizers)


class Attention(nn.Module):
    """Four layers of one shape, in another order than that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(4), nn.Linear(4, 9), nn.Linear(9, 9)


@pytest.mark.parametrize(
    ("make", "groups", "expected"),
    [
        (mlp, lambda m: m.parameters(), ALL),
        (mlp, decay_groups, ALL),
        (lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), lambda m: m.parameters(), 24),
        # The last six are known from their shapes and numbers; which of the others is q cannot be known.
        (Attention, lambda m: m.parameters(), 6),
        (lambda: nn.Sequential(Attention(), Attention()), lambda m: m.parameters(), 12),
    ],
)
def test_parameters_are_matched_where_the_file_sorts_names(make, groups, expected):
    model = make()
    optimizer = torch.optim.Adam(groups(model))
    train(model, [optimizer])
    reasons = check(model, [optimizer], expected=expected, ordered=False)
    assert bool(reasons) == (expected < len(list(model.parameters())))
    assert check(model, [optimizer], names=[name for name, _ in model.named_parameters()], ordered=False) == []


def test_a_partly_frozen_network_is_matched_where_the_file_sorts_names():
    """Only one selection of the parameters has the shapes of the four entries in a possible order."""
    model = frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    train(model, [optimizer])
    assert check(model, [optimizer], expected=4, ordered=False) == []
    # With a norm, its two parameters have the shape of the bias that was frozen.
    model = frozen(mlp())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    train(model, [optimizer])
    assert "could be swapped" in check(model, [optimizer], expected=4, ordered=False)[0]


@given(st.data())
def test_no_match_is_wrong_where_the_file_sorts_names(data):
    """Modules in modules, called by letters in any order or by numbers, with parameters of few shapes."""

    def module(depth: int) -> nn.Module:
        kind = data.draw(st.sampled_from(["list", "letters", "linear", "norm"] if depth else ["linear", "norm"]))
        if kind == "linear":
            return nn.Linear(2, data.draw(st.sampled_from([2, 3])), bias=data.draw(st.booleans()))
        if kind == "norm":
            return nn.LayerNorm(2)
        parts = [module(depth - 1) for _ in range(data.draw(st.integers(1, 3)))]
        if kind == "list":
            return nn.Sequential(*parts)
        names = data.draw(st.permutations("abc"))
        return nn.ModuleDict(dict(zip(names, parts, strict=False)))

    model = nn.ModuleDict({name: module(2) for name in data.draw(st.permutations(["x", "y1", "y2"]))[:2]})
    if list(model) == ["y2", "y1"]:
        return  # numbers are taken for the order
    groups = list(model.parameters()) if data.draw(st.booleans()) else decay_groups(model)
    if data.draw(st.booleans()):
        for part in model.modules():
            part.requires_grad_(data.draw(st.booleans()))
        for group in groups if isinstance(groups[0], dict) else ():
            group["params"] = [p for p in group["params"] if p.requires_grad]
        if not isinstance(groups[0], dict):
            groups = [p for p in groups if p.requires_grad]
    if not groups:
        return
    optimizer = torch.optim.Adam(groups)
    train(model, [optimizer])
    check(model, [optimizer], ordered=False)


def test_a_hugging_face_folder_tells_the_order_of_its_parameters_by_its_configuration(tmp_path):
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=8, vocab_size=12, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(decay_groups(model))
    train(model, [optimizer])
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    report = postmortem(tmp_path)
    assert not [one for one in report.abstentions if "not known" in one.reason]
    (tmp_path / "config.json").unlink()
    assert [one for one in postmortem(tmp_path).abstentions if "not known" in one.reason]
