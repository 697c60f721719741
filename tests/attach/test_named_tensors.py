"""`scope.count(name, tensor)`: any tensor is a site, in a forward, outside of any, and in a compiled graph."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from neuronscope.errors import NeuronscopeWarning, UsageError

INPUTS, LATENTS = 4, 8


class Coder(nn.Module):
    """A sparse autoencoder with an activation that Neuronscope does not know as one."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(INPUTS, LATENTS), nn.Linear(LATENTS, INPUTS)
        with torch.no_grad():
            self.enc.bias[:2] = -50
        self.scope: ns.Scope | None = None
        self.pre = True
        self.seen: list[tuple[Tensor, Tensor]] = []

    def encode(self, x: Tensor) -> Tensor:
        pre = self.enc(x)
        latents = (pre - 0.2).clamp(min=-0.1) + 0.1  # zero up to 0.1
        if self.scope is not None:
            self.scope.count("latents", latents, pre if self.pre else None)
        return latents

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.encode(x))


def train(coder: Coder, run: Any, *, steps: int = 4, watched: bool = True, **options: Any) -> ns.Scope | None:
    """Train on random data, and note outputs and gradients of each step by hand."""
    scope = ns.watch(coder, **options) if watched else None
    coder.scope = scope
    optimizer = torch.optim.SGD(coder.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(6, INPUTS, generator=draw)
        with torch.no_grad():
            pre = coder.enc(x)
        latents = (pre - 0.2).clamp(min=-0.1) + 0.1
        leaf = latents.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((coder.dec(leaf) - x).square().sum(), leaf)
        coder.seen.append((latents, torch.where(pre - 0.2 >= -0.1, gradient, 0.0) if coder.pre else gradient))
        (run(x) - x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scope is not None:
            scope.step()
    return scope


def in_forward(coder: Coder) -> Any:
    return coder


def by_parts(coder: Coder) -> Any:
    return lambda x: coder.dec(coder.encode(x))


def compiled(coder: Coder) -> Any:
    torch._dynamo.reset()
    return torch.compile(coder, backend="aot_eager", fullgraph=True)


def checkpointed(coder: Coder) -> Any:
    return lambda x: checkpoint(coder, x.requires_grad_(), use_reentrant=True)


RUNS = [in_forward, by_parts, compiled, checkpointed]


def coder(pre: bool = True) -> Coder:
    torch.manual_seed(0)
    made = Coder()
    made.pre = pre
    return made


@pytest.mark.parametrize("pre", [True, False], ids=["pre-activation", "tensor alone"])
@pytest.mark.parametrize("run", RUNS)
def test_counts_are_those_of_brute_force(run: Any, pre: bool) -> None:
    sae = coder(pre)
    scope = train(sae, run(sae))
    assert scope is not None
    tally = scope.census()["latents"]
    outputs = sum((latents == 0).sum(0) for latents, _ in sae.seen)
    gradients = sum((gradient == 0).sum(0) for _, gradient in sae.seen)
    assert isinstance(outputs, Tensor)
    assert isinstance(gradients, Tensor)
    assert tally.zero_outputs.tolist() == outputs.tolist()
    assert tally.zero_gradients.tolist() == gradients.tolist()
    assert (tally.positions, tally.gradient_positions, tally.examples) == (24, 24, 24)
    report = scope.report()
    labels, never = report["latents"].judgement, (outputs == 24).tolist()
    assert never[:2] == [True, True]
    assert (labels.dead if pre else labels.silent).tolist() == never
    assert report.neurons == LATENTS
    scope.detach()


@pytest.mark.parametrize("run", RUNS)
def test_training_is_the_same_bit_for_bit(run: Any) -> None:
    alone, watched = coder(), coder()
    train(alone, run(alone), watched=False)
    scope = train(watched, run(watched))
    assert scope is not None
    assert scope.census()["latents"].positions
    scope.detach()
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_layer_is_known_where_its_units_are_followed() -> None:
    sae = coder()
    scope = train(sae, sae)
    assert scope is not None
    tally = scope.census()["latents"]
    assert (tally.layer, tally.readers, tally.in_headlines) == ("enc", ("dec",), True)
    assert not scope.report().not_measured


def test_steps_phases_pauses_and_saved_states_hold_as_for_other_sites() -> None:
    sae = coder()
    scope = ns.watch(sae, every_n_steps=2)
    x = torch.randn(5, INPUTS)
    for _ in range(4):
        scope.count("latents", sae.encode(x))
        scope.step()
    with scope.phase("val"):
        scope.count("latents", sae.encode(x))
    with scope.paused():
        scope.count("latents", sae.encode(x))
    with torch.no_grad():
        scope.count("latents", sae.encode(x))
    assert {phase: scope.census(phase)["latents"].positions for phase in scope.phases} == {
        "train": 10,
        "val": 5,
        "inference": 5,
    }
    other = ns.watch(coder())
    other.load_state_dict(scope.state_dict())
    assert np.array_equal(other.census()["latents"].zero_outputs, scope.census()["latents"].zero_outputs)
    scope.detach()
    scope.count("latents", sae.encode(x))
    assert scope.census()["latents"].positions == 10


def test_another_axis() -> None:
    sae = coder()
    with ns.watch(sae) as scope:
        maps = torch.randn(2, 3, 5).relu()
        scope.count("maps", maps, axis=1)
        scope.step()
    assert scope.census()["maps"].zero_outputs.tolist() == (maps == 0).sum((0, 2)).tolist()
    assert scope.census()["maps"].positions == 10


def test_sparse_neurons_are_not_called_dormant() -> None:
    sae = coder()
    latents = torch.ones(400, 3)
    latents[:, 0] = 0
    latents[0, 0] = 1e-3
    with ns.watch(sae) as scope:
        scope.count("latents", latents)
        scope.count("hidden", latents, kind="relu-like")
        scope.step()
    report = scope.report()
    assert (report["latents"].dormant, report["hidden"].dormant) == (0, 1)
    assert (report["latents"].tau_dormant, report["hidden"].tau_dormant) == (0, 1)


@pytest.mark.parametrize(
    ("name", "tensor", "arguments", "reason"),
    [
        ("latents", [1.0], {}, "an input of type list"),
        ("latents", torch.zeros(2, dtype=torch.int64), {}, "int64 tensors"),
        ("latents", torch.zeros(2, 3), {"pre": torch.zeros(2, 4)}, r"shape \(2, 3\), but got shape \(2, 4\)"),
        ("latents", torch.zeros(2, 3), {"axis": 2}, "got 2 for shape"),
        ("enc", torch.zeros(2, 3), {}, "the name is that of a layer"),
        ("act", torch.zeros(2, 3), {}, "the name is that of a layer"),
    ],
)
def test_what_cannot_be_counted_is_said_once_and_ends_nothing(
    name: str, tensor: Any, arguments: dict[str, Any], reason: str
) -> None:
    sae = coder()
    sae.act = nn.ReLU()
    with ns.watch(sae) as scope:
        sae.act(sae.enc(torch.randn(3, INPUTS)))
        with pytest.warns(NeuronscopeWarning, match=reason):
            scope.count(name, tensor, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scope.count(name, tensor, **arguments)
        scope.count("others", torch.ones(2, 3))
        scope.step()
        assert not scope.detached
    assert name in [each.name for each in scope.report().not_measured]
    assert scope.census()["others"].positions == 2


def test_a_changed_width_is_said_and_the_first_one_goes_on() -> None:
    sae = coder()
    with ns.watch(sae) as scope:
        scope.count("latents", torch.ones(2, 3))
        with pytest.warns(NeuronscopeWarning, match="changed from 3 to 4"):
            scope.count("latents", torch.ones(2, 4))
        scope.count("latents", torch.ones(2, 3))
        scope.step()
    assert scope.census()["latents"].positions == 4
    assert [each.name for each in scope.report().not_measured if "3 to 4" in each.reason] == ["latents"]


@pytest.mark.parametrize("arguments", [{"axis": 1.0}, {"kind": "spars"}])
def test_wrong_arguments_are_errors(arguments: dict[str, Any]) -> None:
    with ns.watch(coder()) as scope, pytest.raises(UsageError, match="Expected argument"):
        scope.count("latents", torch.ones(2, 3), **arguments)


def test_patterns_choose_named_tensors_too() -> None:
    sae = coder()
    with ns.watch(sae, exclude="latents") as scope:
        scope.count("latents", torch.ones(2, 3))
        scope.step()
    assert list(scope.census()) == []
