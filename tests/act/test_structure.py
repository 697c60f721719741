"""A site knows the weights that lead into each neuron, and says where it does not know them exactly.

The truth is brute force: a neuron whose incoming rows and reading columns change at random changes nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.act.structure import Structure

Path = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Layers for all of the cases; ``path`` says which of them run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.a, self.b, self.up, self.same = (nn.Linear(4, width) for width in (6, 5, 6, 4))
        self.wide, self.batch, self.layer = nn.Linear(4, 12), nn.BatchNorm1d(6), nn.LayerNorm(6)
        self.conv, self.norm, self.norm_after = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.depthwise, self.turned = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ConvTranspose2d(6, 2, 2)
        self.out = nn.ModuleDict({str(width): nn.Linear(width, 3) for width in (4, 5, 6, 11, 12, 24)})
        self.w = nn.Parameter(torch.randn(6, 4))
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self, x)


def picture(x: Tensor) -> Tensor:
    return x.repeat(1, 8).reshape(len(x), 2, 4, 4)


def halves(net: Net, x: Tensor) -> Tensor:
    gate, up = net.wide(x).chunk(2, -1)
    return net.out["6"](F.silu(gate) * up)


def both_signs(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.out["12"](torch.cat([torch.relu(h), torch.relu(-h)], 1))


def read_twice(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.out["6"](torch.relu(h)) + h @ net.w[:, :3]


def through_numpy_like_function(net: Net, x: Tensor) -> Tensor:
    return net.out["6"](torch.relu(net.a(x)).softmax(-1))


def through_numpy(net: Net, x: Tensor) -> Tensor:
    h = torch.relu(net.a(x))
    return net.out["6"](h) * float(h.detach().cpu().numpy().mean())


def through_a_number(net: Net, x: Tensor) -> Tensor:
    h = torch.relu(net.a(x))
    return net.out["6"](h) * h[0, 0].item()


#: The name of the site, the layers of its rows, the layers of its columns, the path.
EXACT: dict[str, tuple[str, str, str, Path]] = {
    "linear": ("a/relu", "a", "out.6", lambda n, x: n.out["6"](torch.relu(n.a(x)))),
    "batch norm": ("batch/relu", "batch a", "out.6", lambda n, x: n.out["6"](torch.relu(n.batch(n.a(x))))),
    "scaled, dropout": (
        "a/relu",
        "a",
        "out.6",
        lambda n, x: n.out["6"](F.dropout(torch.relu(n.a(x) * 2), training=n.training)),
    ),
    "convolution, norm, pooling, flatten": (
        "norm/relu",
        "norm conv",
        "out.6",
        lambda n, x: n.out["6"](F.max_pool2d(torch.relu(n.norm(n.conv(picture(x)))), 2).flatten(1)),
    ),
    "flattened maps": (
        "conv/relu",
        "conv",
        "out.24",
        lambda n, x: n.out["24"](torch.relu(n.conv(picture(x))).flatten(1)),
    ),
    "transposed convolution": (
        "conv/relu",
        "conv",
        "turned",
        lambda n, x: n.turned(torch.relu(n.conv(picture(x)))).mean((2, 3)),
    ),
    "concatenation with an offset": (
        "a/relu",
        "a",
        "out.11",
        lambda n, x: n.out["11"](torch.cat([torch.tanh(n.b(x)), torch.relu(n.a(x))], 1)),
    ),
    "gate and up": ("a/swiglu", "a up", "out.6", lambda n, x: n.out["6"](F.silu(n.a(x)) * n.up(x))),
    "gate and up in one weight": ("wide(0:6)/swiglu", "wide wide", "out.6", halves),
    "glu": ("wide/glu", "wide wide", "out.6", lambda n, x: n.out["6"](F.glu(n.wide(x)))),
    "written out": ("a/sigmoid", "a", "out.6", lambda n, x: n.out["6"]((h := n.a(x)) * torch.sigmoid(h))),
    "two activations multiplied": (
        "up/tanh",
        "up a",
        "out.6",
        lambda n, x: n.out["6"](torch.sigmoid(n.a(x)) * torch.tanh(n.up(x))),
    ),
}


def watched(model: nn.Module, *args: Tensor) -> ns.Scope:
    with ns.watch(model) as scope:
        model(*args)
        scope.step()
    return scope


@pytest.mark.parametrize("case", EXACT)
def test_rows_and_columns_are_all_of_a_neuron_and_of_nothing_else(case: str) -> None:
    torch.manual_seed(0)
    site, rows, columns, path = EXACT[case]
    model, x = Net(path), torch.randn(40, 4)
    for layer in (model.a, model.conv):
        nn.init.ones_(layer.bias)  # so that no neuron is dead
    census = watched(model, x).census()
    model.eval()
    found = Structure(model).of(site, census[site])
    assert found.unknown == ""
    assert [each.layer for each in found.incoming] == rows.split()
    assert [each.layer for each in found.readers] == columns.split()
    for neuron in range(found.neurons):
        without, changed = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            for net in (without, changed):
                for layer, own in Structure(net).of(site, census[site]).columns(neuron):
                    for part in layer.columns:
                        for column in own:
                            part.of(column).zero_()
            for layer, row in Structure(changed).of(site, census[site]).rows(neuron):
                for part in layer.rows:
                    part.of(row).uniform_(1, 2)
        assert torch.equal(without(x), changed(x))  # the rows lead to the columns alone
        assert not torch.equal(without(x), model(x))


UNKNOWN: dict[str, tuple[str, Path, str]] = {
    "added in": ("same/relu", lambda n, x: n.out["4"](torch.relu(n.same(x)) + x), "added in"),
    "returned": ("a/relu", lambda n, x: torch.relu(n.a(x)), "returned by the model"),
    "read before": ("a/relu", read_twice, "`w` reads `a` too"),
    "both signs": ("a/relu", both_signs, "the same units go through `a/relu#1` too"),
    "layer norm": ("layer/relu", lambda n, x: n.out["6"](torch.relu(n.layer(n.a(x)))), "`a`: mixed by a norm"),
    "norm without weights": (
        "a/relu",
        lambda n, x: n.out["6"](F.layer_norm(torch.relu(n.a(x)), (6,))),
        "mixed by a norm",
    ),
    "normalised to length one": ("a/relu", lambda n, x: n.out["6"](F.normalize(torch.relu(n.a(x)))), "mixed by a norm"),
    "called twice": (
        "same/relu",
        lambda n, x: n.out["4"](torch.relu(n.same(torch.relu(n.same(x))))),
        "`same` is called more than once",
    ),
    "no zero any more": ("a/relu", lambda n, x: n.out["6"](torch.relu(n.a(x)) + 1), "changed by `add`"),
    "softmax": ("a/relu", through_numpy_like_function, "read by `softmax`"),
    "NumPy": ("a/relu", through_numpy, "read by `numpy`"),
    "a number": ("a/relu", through_a_number, "read by `item`"),
    "a bare parameter": ("a/relu", lambda n, x: torch.relu(n.a(x)) @ n.w, "`w` is a parameter that no layer"),
    "a norm of sums": (
        "batch/relu",
        lambda n, x: n.out["6"](torch.relu(n.batch(n.a(x) + n.up(x)))),
        "`batch` normalises what is no layer's units alone",
    ),
    "two activations in a row": (
        "a/relu",
        lambda n, x: n.out["6"](torch.tanh(torch.relu(n.a(x)))),
        "it goes through `a/tanh` next",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_exactly_is_said(case: str) -> None:
    site, path, reason = UNKNOWN[case]
    model = Net(path)
    found = Structure(model).of(site, watched(model, torch.randn(7, 4)).census()[site])
    assert reason in found.unknown


def test_tied_weights_and_unusual_layers_are_said() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2)

    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    own = nn.Sequential(Own(4, 4), nn.ReLU(), nn.Linear(4, 4))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))
    groups = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 2, 1, groups=2))
    for model, site, reason in (
        (tied, "0/relu", "shares a weight with another layer"),
        (own, "0/relu", "is of class Own, whose weights are not known"),
        (normed, "0/relu", "is made of other tensors"),
        (groups, "0/relu", "is a convolution in groups"),
    ):
        found = Structure(model).of(site, watched(model, torch.randn(5, 4)).census()[site])
        assert reason in found.unknown, found.unknown


def test_a_norm_and_a_depthwise_convolution_take_units_one_by_one() -> None:
    def path(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.norm_after(net.depthwise(torch.relu(net.conv(picture(x))))))
        return net.turned(h).mean((2, 3))

    net = Net(path)
    census = watched(net, torch.randn(5, 4)).census()
    before, after = (Structure(net).of(name, census[name]) for name in ("conv/relu", "norm_after/relu"))
    assert [(layer.path, layer.one_by_one, own) for layer, own in before.columns(3)] == [("depthwise", True, [3])]
    assert [(layer.path, row) for layer, row in after.rows(3)] == [("norm_after", 3), ("depthwise", 3)]


def test_reports_show_it_and_saved_states_keep_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.constant_(model[0].bias[:2], -99)
    scope = watched(model, torch.randn(5, 4))
    report = scope.report()
    assert "0/relu: rows of layer 0 lead in, columns of layer 2 read it" in str(report)
    assert "0/relu: rows of layer 0 lead in, columns of layer 2 read it" in report.to_markdown()
    layer = report.to_dict()["layers"][0]
    assert layer["incoming"] == [{"layer": "0", "neuron": 0, "neurons": 6, "row": 0, "step": 1}]
    assert layer["weights_unknown"] == ""
    with ns.watch(model) as again:
        again.load_state_dict(scope.state_dict())
    assert again.census()["0/relu"].incoming == scope.census()["0/relu"].incoming


def test_compiled_and_eager_know_the_same() -> None:
    model, x = Net(EXACT["gate and up"][3]), torch.randn(7, 4)
    eager = watched(model, x).census()["a/swiglu"]
    torch._dynamo.reset()
    with ns.watch(model) as scope:
        torch.compile(model, backend="eager")(x)
        scope.step()
    compiled = scope.census()["a/swiglu"]
    assert compiled.incoming == eager.incoming
    assert compiled.weights_unknown == eager.weights_unknown == ""


def test_recomputed_activations_are_no_second_call() -> None:
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        model = Net(lambda n, x, r=reentrant: n.out["6"](checkpoint(lambda y: torch.relu(n.a(y)), x, use_reentrant=r)))
        with ns.watch(model) as scope:
            model(torch.randn(7, 4, requires_grad=True)).sum().backward()
            scope.step()
        assert scope.census()["a/relu"].weights_unknown == ""
