"""A site knows which columns of which layers read each of its neurons.

The truth is brute force: to silence a neuron is to set the columns that read it to zero, in all of its readers.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns

Silence = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Layers for all of the cases; ``path`` says which of them run, and calls ``silence`` behind the site."""

    def __init__(self, path: Callable[[Net, Tensor, Silence], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.up = (nn.Linear(4, width) for width in (6, 5, 6, 6))
        self.conv, self.wide = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.next_conv, self.norm = nn.Conv2d(6, 2, 1), nn.BatchNorm2d(6)
        self.out = nn.ModuleDict({str(width): nn.Linear(width, 3) for width in (2, 3, 5, 6, 9, 11, 12, 17, 24, 54, 59)})
        self.w, self.left = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3, 6))
        self.path = path
        self.silenced: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        def silence(y: Tensor) -> Tensor:
            if self.silenced is None:
                return y
            axis = 1 if y.dim() == 4 else -1
            mask = torch.ones(y.shape[axis])
            mask[self.silenced] = 0
            return y * (mask.view(-1, 1, 1) if y.dim() == 4 else mask)

        return self.path(self, x, silence)


def picture(x: Tensor) -> Tensor:
    return x.repeat(1, 9).reshape(len(x), 4, 9)[:, :2].reshape(len(x), 2, 3, 3)


PATHS: dict[str, tuple[str, Callable[[Net, Tensor, Silence], Tensor]]] = {
    "one layer": ("a/relu", lambda n, x, s: n.out["6"](s(torch.relu(n.a(x))))),
    "two layers": ("a/relu", lambda n, x, s: n.out["6"](h := s(torch.relu(n.a(x)))) + h @ n.w),
    "a product with the weight on the left": ("a/relu", lambda n, x, s: (n.left @ s(torch.relu(n.a(x))).T).T),
    "addmm": ("a/relu", lambda n, x, s: torch.addmm(torch.zeros(3), s(torch.relu(n.a(x))), n.w)),
    "concatenation, first": (
        "a/relu",
        lambda n, x, s: n.out["11"](torch.cat([s(torch.relu(n.a(x))), torch.tanh(n.b(x))], 1)),
    ),
    "concatenation, second": (
        "a/relu",
        lambda n, x, s: n.out["11"](torch.cat([torch.tanh(n.b(x)), s(torch.relu(n.a(x)))], 1)),
    ),
    "concatenation of plain units": (
        "a/relu",
        lambda n, x, s: n.out["17"](torch.cat([n.b(x), s(torch.relu(n.a(x))), n.gate(x)], 1)),
    ),
    "concatenation of a part": (
        "a/relu",
        lambda n, x, s: n.out["9"](torch.cat([n.gate(x), s(torch.relu(n.a(x)))[:, 3:]], 1)),
    ),
    "concatenation of concatenations": (
        "a/relu",
        lambda n, x, s: n.out["17"](
            torch.cat([n.gate(x), torch.cat([n.b(x), s(torch.relu(n.a(x)))], 1).unsqueeze(1).squeeze(1)], 1)
        ),
    ),
    "both signs": (
        "a/relu#1",
        lambda n, x, s: n.out["12"](torch.cat([torch.relu(h := n.a(x)), s(torch.relu(-h))], 1)),
    ),
    "halves": (
        "a/relu",
        lambda n, x, s: n.out["3"]((h := s(torch.relu(n.a(x))))[:, :3]) + n.out["2"](h[:, 4:]),
    ),
    "every second": ("gate(0:5:2)/relu", lambda n, x, s: n.out["3"](s(torch.relu(n.gate(x)[:, ::2])))),
    "the second half of a layer": ("a(3:6)/relu", lambda n, x, s: n.out["3"](s(torch.relu(n.a(x)[:, 3:])))),
    "channels": ("conv/relu", lambda n, x, s: n.next_conv(s(torch.relu(n.conv(picture(x))))).flatten(1)),
    "channels, flattened": (
        "conv/relu",
        lambda n, x, s: n.out["54"](s(torch.relu(n.conv(picture(x)))).flatten(1)),
    ),
    "channels last, flattened": (
        "conv/relu",
        lambda n, x, s: n.out["54"](s(torch.relu(n.conv(picture(x)))).permute(0, 2, 3, 1).flatten(1)),
    ),
    "channels, pooled and flattened": (
        "conv/relu",
        lambda n, x, s: n.out["24"](F.max_pool2d(s(torch.relu(n.conv(picture(x)))), 2, 1).flatten(1)),
    ),
    "channels beside others": (
        "conv/relu",
        lambda n, x, s: n.out["9"](torch.cat([n.wide(picture(x)), s(torch.relu(n.conv(picture(x))))], 1).mean((2, 3))),
    ),
    "a gated product": ("gate/reglu", lambda n, x, s: n.out["6"](s(torch.relu(n.gate(x)) * n.up(x)))),
    "a gate": ("gate/relu", lambda n, x, s: n.out["6"](s(torch.relu(n.gate(x))) * n.up(x))),
    "a gate beside others": (
        "gate/relu",
        lambda n, x, s: n.out["11"](torch.cat([n.b(x), s(torch.relu(n.gate(x))) * n.up(x)], 1)),
    ),
    "an activation that gates another": (
        "up/tanh",
        lambda n, x, s: n.out["6"](torch.relu(n.gate(x)) * s(torch.tanh(n.up(x)))),
    ),
}


def tally_of(model: Net, name: str, x: Tensor) -> ns.Tally:
    with ns.watch(model) as scope:
        model(x).sum().backward()
        scope.step()
    return scope.census()[name]


@pytest.mark.parametrize("case", PATHS)
def test_to_silence_a_neuron_is_to_clear_the_columns_that_read_it(case: str) -> None:
    torch.manual_seed(0)
    site, path = PATHS[case]
    model, x = Net(path), torch.randn(7, 4)
    tally = tally_of(model, site, x)
    assert set(tally.reader_notes) <= {"returned by the model"}
    assert {each.layer for each in tally.reader_columns} == set(tally.readers)
    for neuron in range(tally.neurons):
        cleared = copy.deepcopy(model)
        columns = 0
        for reader in tally.reader_columns:
            for column in reader.of(neuron):
                columns += 1
                with torch.no_grad():
                    if reader.layer == "w":
                        cleared.w[column] = 0
                    elif reader.layer == "left":
                        cleared.left[:, column] = 0
                    else:
                        cleared.get_submodule(reader.layer).weight[:, column] = 0
        model.silenced = neuron
        torch.testing.assert_close(cleared(x), model(x))
        model.silenced = None
        assert columns or case in ("halves", "concatenation of a part")


UNKNOWN: dict[str, tuple[str, Callable[[Net, Tensor, Silence], Tensor], str]] = {
    "einsum": (
        "a/relu",
        lambda n, x, s: torch.einsum("bi,io->bo", torch.relu(n.a(x)), n.w),
        "columns of `w` not known",
    ),
    "maps of which two dimensions are joined around the channels": (
        "conv/relu",
        lambda n, x, s: n.out["54"](torch.relu(n.conv(picture(x))).permute(0, 2, 1, 3).flatten(1)),
        "columns of `out.54` not known",
    ),
    "flattened maps beside others": (
        "conv/relu",
        lambda n, x, s: n.out["59"](torch.cat([torch.relu(n.conv(picture(x))).flatten(1), n.b(x)], 1)),
        "read by `cat`",
    ),
    "a sum": ("a/relu", lambda n, x, s: n.out["6"](torch.relu(n.a(x)) + n.gate(x)), "added in"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_where_columns_are_not_known_a_note_says_so(case: str) -> None:
    site, path, note = UNKNOWN[case]
    tally = tally_of(Net(path), site, torch.randn(7, 4))
    assert note in tally.reader_notes
    assert tally.reader_columns == ()


def test_a_norm_reads_one_channel_a_neuron() -> None:
    model = Net(lambda n, x, s: n.norm(torch.relu(n.conv(picture(x)))).sum((2, 3)))
    tally = tally_of(model, "conv/relu", torch.randn(7, 4))
    assert [reader.layer for reader in tally.reader_columns] == ["norm"]
    assert [tally.reader_columns[0].of(neuron) for neuron in (0, 5, 6)] == [[0], [5], []]


def test_columns_stay_in_saved_states_and_reports() -> None:
    torch.manual_seed(0)
    model = Net(PATHS["concatenation, second"][1])
    with ns.watch(model) as scope:
        model(torch.randn(7, 4)).sum().backward()
        scope.step()
    buffer = io.BytesIO()
    torch.save(scope.state_dict(), buffer)
    buffer.seek(0)
    with ns.watch(model) as again:
        again.load_state_dict(torch.load(buffer))
    columns = scope.census()["a/relu"].reader_columns
    assert again.census()["a/relu"].reader_columns == columns
    layer = next(layer for layer in scope.report().layers if layer.name == "a/relu")
    assert layer.reader_columns == columns
    assert layer.to_dict()["reader_columns"] == [columns[0]._asdict()]
