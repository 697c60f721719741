"""An activation has the number that it has in its own forward, whatever the forwards before it applied."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.attach.ordinals import Ordinals
from neuronscope.attach.origins import UNITS, Origin
from neuronscope.attach.units import Units

#: Number of a layer, name of an activation, and whether a module applies it.
Applied = tuple[int, str, bool]


class Program(nn.Module):
    """Two linear layers, and activations that are applied to what they give, as a list says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.relu, self.tanh = nn.ReLU(), nn.Tanh()
        self.applied: list[Applied] = []

    def forward(self, x: Tensor) -> Tensor:
        given = [layer(x) for layer in self.layers]
        total = given[0] + given[1]
        for layer, name, as_module in self.applied:
            function = getattr(self, name) if as_module else getattr(F if name == "relu" else torch, name)
            total = total + function(given[layer])
        return total


def names(applied: list[Applied]) -> list[str]:
    """Return the name of each site, numbered by counting."""
    before: Counter[tuple[int, str]] = Counter()
    found = []
    for layer, name, _ in applied:
        number = before[layer, name]
        before[layer, name] += 1
        found.append(f"layers.{layer}/{name}" + (f"#{number}" if number else ""))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_programs_that_change_from_step_to_step_number_their_activations_anew(seed: int):
    """Few programs in random order, each a change of another one in the middle, so that most steps begin alike."""
    draw = random.Random(seed)
    first = [(draw.randrange(2), draw.choice(("relu", "tanh")), draw.random() < 0.5) for _ in range(6)]
    programs = [first, first[:3]]
    for _ in range(4):
        other = list(draw.choice(programs))
        place = draw.randrange(len(other))
        other[place:place] = [(draw.randrange(2), draw.choice(("relu", "tanh")), draw.random() < 0.5)]
        programs.append(other)
    expected: Counter[str] = Counter()
    net = Program()
    with ns.watch(net) as scope:
        for _ in range(25):
            net.applied = draw.choice(programs)
            net(torch.randn(3, 4)).sum().backward()
            scope.step()
            expected.update(names(net.applied))
    assert {name: tally.positions // 3 for name, tally in scope.census().items()} == expected
    assert {name: tally.gradient_positions // 3 for name, tally in scope.census().items()} == expected


def origin(layer: str, part: tuple[tuple[int, int, int, int], ...] = ()) -> Origin:
    units = Units((0,), layer, ((layer, 0, 4, 1),), 0, ((), ((4, 1),)))
    return Origin.of(UNITS, 1, units=units, layer=layer, part=part)


def test_counts_are_complete_after_activations_that_were_the_same_as_in_the_last_forward():
    """A graph that is traced takes them, and puts them back if it is dropped."""
    ordinals, a = Ordinals(), origin("a")
    for _ in range(2):
        ordinals.clear()
        assert [ordinals.number(a, "relu") for _ in range(3)] == [0, 1, 2]
        assert ordinals.counts()[a.unit_set, "relu"] == 3
    before = ordinals.counts()
    assert ordinals.number(a, "relu") == 3
    ordinals.restore(before)
    assert ordinals.number(a, "relu") == 3
    ordinals.clear()
    assert (ordinals.number(a, "relu"), ordinals.counts()[a.unit_set, "relu"]) == (0, 1)


def test_activations_in_a_graph_are_counted_between_those_that_are_remembered():
    ordinals, a = Ordinals(), origin("a")
    for graph in (0, 2, 0, 1):
        ordinals.clear()
        assert ordinals.number(a, "relu") == 0
        if graph:
            ordinals.add((a.unit_set, "relu"), graph)
        assert [ordinals.number(a, "relu") for _ in range(2)] == [graph + 1, graph + 2]


def test_the_steps_of_a_sequence_share_a_number_behind_what_is_applied_to_all_of_it():
    ordinals, a = Ordinals(), origin("a")
    steps = [origin("a", part=((1, step, 1, 1),)) for step in range(3)]
    for whole_first in (False, True, False):
        ordinals.clear()
        if whole_first:
            assert ordinals.number(a, "relu") == 0
        assert [ordinals.number(step, "relu") for step in steps] == [int(whole_first)] * 3
        assert ordinals.number(a, "relu") == 1 + whole_first


def test_an_activation_of_which_the_numbering_was_interrupted_is_forgotten_with_its_forward(
    monkeypatch: pytest.MonkeyPatch,
):
    """The interrupt comes after the activation is counted, and before it is noted that it is."""
    ordinals, a, count = Ordinals(), origin("a"), Ordinals._count

    def interrupted(self: Ordinals, *args: Any) -> None:
        count(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ordinals, "_count", interrupted)
        ordinals.number(a, "relu")
    for _ in range(2):
        ordinals.clear()
        assert [ordinals.number(a, "relu") for _ in range(2)] == [0, 1]
