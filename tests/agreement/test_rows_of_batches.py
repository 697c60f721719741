"""How many examples stand behind a site whose rows are not simply those of one batch, as the twin counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_same

ROWS = 4


class Reader(nn.Module):
    """A network that reads tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(50, 8), nn.Linear(8, 6), nn.Linear(6, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.embed(tokens))).mean(1))


def counted(who: Nobody, build: Callable[[], nn.Module], run: Callable[[Nobody, nn.Module], None]) -> None:
    """Run a network for one who counts.

    Args:
        who: Who counts.
        build: Makes the network.
        run: Runs it.
    """
    torch.manual_seed(0)
    model = build()
    with who.attach(model):
        run(who, model)


@pytest.mark.parametrize("lengths", [range(5, 12), range(11, 4, -1), [6, 6, 7, 7, 8]], ids=str)
def test_an_evaluation_that_is_sorted_by_length_is_no_generation(lengths: Sequence[int]) -> None:
    def run(who: Nobody, model: nn.Module) -> None:
        with who.phase("val"), torch.no_grad():
            for length in lengths:
                model(torch.randint(50, (ROWS, length)))

    watched, twin = Watched(), Twin({None: 2})
    counted(watched, Reader, run)
    counted(twin, Reader, run)
    assert_same(watched.scope.census("val"), twin.tallies("val"))
    assert watched.scope.census("val")["hidden/relu"].examples == ROWS * len(lengths)


class Branches(nn.Module):
    """Two layers of which each is given some of the rows.

    Args:
        kind: What the rows are: maps, or sequences of tokens.
        few: How many rows the first layer is given.
        joined: Whether the rows are put together before the activation.
    """

    def __init__(self, kind: str, few: int, *, joined: bool = False) -> None:
        super().__init__()
        self.few, self.joined, self.over = few, joined, (2, 3) if kind == "maps" else (1,)
        self.one, self.other = (nn.Conv2d(3, 4, 3) if kind == "maps" else nn.Linear(3, 4) for _ in range(2))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x[: self.few]), self.other(x[self.few :])
        h = torch.relu(torch.cat([one, other])) if self.joined else torch.cat([torch.relu(one), torch.relu(other)])
        return self.out(h.mean(self.over))


def train(shape: Sequence[int]) -> Callable[[Nobody, nn.Module], None]:
    def run(who: Nobody, model: nn.Module) -> None:
        for _ in range(3):
            who.backward(model(torch.randn(*shape)).square().sum())
            who.step()

    return run


SHAPES = {"maps": (32, 3, 8, 8), "tokens": (32, 10, 3)}


@pytest.mark.parametrize("few", [1, 2, 30])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_branch_has_no_more_examples_than_rows(kind: str, few: int) -> None:
    watched, twin = Watched(), Twin({None: 1 if kind == "maps" else 2})
    for who in (watched, twin):
        counted(who, lambda: Branches(kind, few), train(SHAPES[kind]))
    assert_same(watched.scope.census(), twin.tallies())
    assert {name: tally.examples for name, tally in watched.scope.census().items()} == {
        "one/relu": 3 * few,
        "other/relu": 3 * (32 - few),
    }


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_that_are_joined_before_an_activation_are_examples_of_their_own_layer(kind: str) -> None:
    watched = Watched()
    counted(watched, lambda: Branches(kind, 2, joined=True), train(SHAPES[kind]))
    assert {name: tally.examples for name, tally in watched.scope.census().items()} == {
        "one/relu": 6,
        "other/relu": 90,
    }


class Turned(nn.Module):
    """The rows of the batch lie on the second dimension, or are run in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.pieces, self.out = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.steps(x.transpose(0, 1))).transpose(0, 1)
        return self.out(torch.cat([torch.relu(self.pieces(each)) for each in h.split(5)]))


def test_rows_on_the_second_dimension_and_rows_in_pieces_are_all_examples() -> None:
    watched, twin = Watched(), Twin({None: 2})
    for who in (watched, twin):
        counted(who, Turned, train((32, 6, 3)))
    assert_same(watched.scope.census(), twin.tallies())
    assert [tally.examples for tally in watched.scope.census().values()] == [3 * 32] * 2


def test_a_function_that_says_how_many_examples_there_are_is_believed() -> None:
    watched = Watched(examples=lambda args, kwargs: 7)
    counted(watched, lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), train((1, 90, 3)))
    assert [tally.examples for tally in watched.scope.census().values()] == [21]
