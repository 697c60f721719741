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
