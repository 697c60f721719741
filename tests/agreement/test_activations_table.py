"""Activations × layouts × set-ups: every activation of torch.nn, wherever its neurons lie, however it is called.

Each cell is trained for three steps and agrees with the slow twin in every integer; the neuron axis is found without
being told, and said how; and the weights are those of an unwatched run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, state_of


@dataclass(frozen=True)
class Kind:
    """One activation: as a module, as a function, and in place where it can be."""

    name: str
    module: Callable[[], nn.Module]
    function: Callable[[Tensor], Tensor] | None = None
    inplace: Callable[[], nn.Module] | None = None
    kind: str = "smooth"


ACTIVATIONS = (
    Kind("relu", nn.ReLU, F.relu, lambda: nn.ReLU(True), "relu-like"),
    Kind("relu6", nn.ReLU6, F.relu6, lambda: nn.ReLU6(True), "relu-like"),
    Kind("hardtanh", nn.Hardtanh, F.hardtanh, lambda: nn.Hardtanh(-0.1, 0.2, inplace=True), "relu-like"),
    Kind("hardswish", nn.Hardswish, F.hardswish, lambda: nn.Hardswish(True), "relu-like"),
    Kind("threshold", lambda: nn.Threshold(0.1, 0.0), lambda x: F.threshold(x, 0.1, 0.0), None, "relu-like"),
    Kind("hardshrink", nn.Hardshrink, F.hardshrink, None, "relu-like"),
    Kind("softshrink", nn.Softshrink, F.softshrink, None, "relu-like"),
    Kind("leaky_relu", nn.LeakyReLU, F.leaky_relu, lambda: nn.LeakyReLU(0.1, True), "leaky"),
    Kind("prelu", nn.PReLU, None, None, "leaky"),
    Kind("rrelu", nn.RReLU, F.rrelu, lambda: nn.RReLU(inplace=True), "leaky"),
    Kind("gelu", nn.GELU, F.gelu, None),
    Kind("gelu", lambda: nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    Kind("silu", nn.SiLU, F.silu, lambda: nn.SiLU(True)),
    Kind("mish", nn.Mish, F.mish, lambda: nn.Mish(True)),
    Kind("elu", nn.ELU, F.elu, lambda: nn.ELU(inplace=True)),
    Kind("selu", nn.SELU, F.selu, lambda: nn.SELU(True)),
    Kind("celu", nn.CELU, F.celu, lambda: nn.CELU(inplace=True)),
    Kind("softplus", nn.Softplus, F.softplus),
    Kind("logsigmoid", nn.LogSigmoid, F.logsigmoid),
    Kind("tanhshrink", nn.Tanhshrink, F.tanhshrink),
    Kind("sigmoid", nn.Sigmoid, torch.sigmoid, None, "saturating"),
    Kind("tanh", nn.Tanh, torch.tanh, None, "saturating"),
    Kind("hardsigmoid", nn.Hardsigmoid, F.hardsigmoid, lambda: nn.Hardsigmoid(True), "saturating"),
    Kind("softsign", nn.Softsign, F.softsign, None, "saturating"),
)
IDS = [f"{kind.name}{'' if index != 11 else '-tanh'}" for index, kind in enumerate(ACTIVATIONS)]


@dataclass(frozen=True)
class Layout:
    """A network's first layer, its input, and where its neurons lie at the activation."""

    name: str
    first: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axis: int
    neurons: int
    layer: str
    after: Callable[[Tensor], Tensor] = lambda x: x
    memory_format: torch.memory_format = torch.contiguous_format


LAYOUTS = (
    Layout("(B, D)", lambda: nn.Linear(3, 6), (5, 3), 1, 6, "first"),
    Layout("(B, T, D)", lambda: nn.Linear(3, 6), (2, 6, 3), 2, 6, "first"),
    Layout("(B, H, W, D)", lambda: nn.Linear(3, 6), (2, 6, 6, 3), 3, 6, "first"),
    Layout("(D,)", lambda: nn.Linear(3, 6), (3,), 0, 6, "first"),
    Layout("(B, C, L)", lambda: nn.Conv1d(3, 6, 1), (2, 3, 6), 1, 6, "first"),
    Layout("(C, L)", lambda: nn.Conv1d(3, 6, 1), (3, 6), 0, 6, "first"),
    Layout("(B, C, H, W)", lambda: nn.Conv2d(3, 6, 1), (2, 3, 6, 6), 1, 6, "first"),
    Layout("(C, H, W)", lambda: nn.Conv2d(3, 6, 1), (3, 6, 6), 0, 6, "first"),
    Layout(
        "channels_last",
        lambda: nn.Conv2d(3, 6, 1),
        (2, 3, 6, 6),
        1,
        6,
        "first",
        memory_format=torch.channels_last,
    ),
    Layout("(B, C, D, H, W)", lambda: nn.Conv3d(3, 6, 1), (2, 3, 6, 6, 6), 1, 6, "first"),
    Layout("transposed conv", lambda: nn.ConvTranspose2d(3, 6, 1), (2, 3, 6, 6), 1, 6, "first"),
    Layout(
        "batch norm on (B, C, L)",
        lambda: nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)),
        (2, 3, 6),
        1,
        6,
        "first.1",
    ),
    Layout(
        "ConvNeXt: NHWC",
        lambda: nn.Conv2d(3, 6, 1),
        (2, 3, 6, 6),
        3,
        6,
        "first",
        lambda x: x.permute(0, 2, 3, 1),
    ),
    Layout("(B, D, T)", lambda: nn.Linear(3, 6), (2, 6, 3), 1, 6, "first", lambda x: x.transpose(1, 2)),
    Layout("(B, T * D)", lambda: nn.Linear(3, 6), (4, 5, 3), 1, 6, "first", lambda x: x.reshape(20, 6)),
    Layout("(T, B, D)", lambda: nn.Linear(3, 6), (4, 5, 3), 2, 6, "first", lambda x: x.swapaxes(0, 1)),
    Layout("(C, B, L)", lambda: nn.Conv1d(3, 6, 1), (2, 3, 6), 0, 6, "first", lambda x: x.movedim(1, 0)),
)


class Net(nn.Module):
    """A first layer, a change of layout, an activation, a little arithmetic, and a loss that reaches every unit."""

    def __init__(self, layout: Layout, act: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = layout.first()
        self.after = layout.after
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.first(x))
        return self.act(x * 2.0)


def agree(build: Callable[[], nn.Module], layout: Layout, axis: int | None = None) -> ns.Census:
    """Run a network unwatched, watched and counted slowly; they agree. Gives the census."""
    states = []
    watched, twin = Watched(), Twin({None: layout.axis if axis is None else axis})
    for watcher in (Nobody(), watched, twin):
        torch.manual_seed(0)
        model = build()
        if layout.memory_format is not torch.contiguous_format:
            model = model.to(memory_format=layout.memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with watcher.attach(model):
            for _ in range(3):
                x = torch.randn(layout.shape).contiguous(memory_format=layout.memory_format)
                watcher.backward(model(x).square().sum())
                optimizer.step()
                optimizer.zero_grad()
                watcher.step()
        states.append((state_of(model), torch.get_rng_state()))
    assert_bits(states[0][0], states[1][0])
    assert states[0][1].equal(states[1][1])
    census = watched.scope.census()
    assert_same(census, twin.tallies())
    for tally in census.values():
        assert tally.gradient_positions == tally.positions
    return census


#: Every activation in every way of calling it that there is.
WAYS = [
    pytest.param(kind, way, make, id=f"{name}-{way}")
    for kind, name in zip(ACTIVATIONS, IDS)
    for way, make in (
        ("module", kind.module),
        ("functional", kind.function and (lambda function=kind.function: function)),
        ("in place", kind.inplace),
    )
    if make is not None
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("kind", "way", "make"), WAYS)
def test_each_activation_is_counted_in_each_layout_and_spelling(
    kind: Kind, way: str, make: Callable[[], Callable[[Tensor], Tensor]], layout: Layout
):
    census = agree(lambda: Net(layout, make()), layout)
    name = f"{layout.layer}/{kind.name}"
    assert list(census) == [name]
    assert census[name].info.place == (f"{kind.name}()" if way == "functional" else "act")
    tally = census[name]
    assert tally.activation == kind.name
    assert tally.info.kind == kind.kind
    assert (tally.axis, tally.neurons) == (layout.axis, layout.neurons)
    assert tally.axis_source == f"layer ({layout.layer})"


#: The input of a GLU has twice the neurons, or twice the positions where it is split along another dimension.
GLUS = [
    (LAYOUTS[0], nn.Linear(3, 12), -1, (5, 1)),
    (LAYOUTS[1], nn.Linear(3, 12), -1, (2 * 6, 2)),
    (LAYOUTS[6], nn.Conv2d(3, 12, 1), 1, (2 * 6 * 6, 1)),
    (LAYOUTS[4], nn.Conv1d(3, 6, 1), 2, (2 * 3, 1)),  # split along the length: 6 neurons of 2 * 3 positions
]


@pytest.mark.parametrize(("layout", "first", "dim", "expected"), GLUS, ids=[layout.name for layout, *_ in GLUS])
@pytest.mark.parametrize("functional", [False, True])
def test_gated_linear_units_are_counted_in_each_layout(layout, first, dim, expected, functional):
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) for name, value in first.state_dict().items()}

    def build() -> nn.Module:
        net = Net(layout, (lambda x: F.glu(x, dim)) if functional else nn.GLU(dim))
        net.first = copy.deepcopy(first)
        net.first.load_state_dict(state)
        return net

    census = agree(build, layout, expected[1])
    (tally,) = census.values()
    assert tally.info.kind == "gated"
    assert tally.neurons == 6
    assert tally.positions == 3 * expected[0]


SPELLINGS = {
    "Tensor.relu": (lambda x: x.relu(), "relu"),
    "Tensor.relu_": (lambda x: x.relu_(), "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "F.relu_": (F.relu_, "relu"),
    "F.relu(inplace=True)": (lambda x: F.relu(x, inplace=True), "relu"),
    "F.relu(input=x)": (lambda x: F.relu(input=x), "relu"),
    "Tensor.sigmoid": (lambda x: x.sigmoid(), "sigmoid"),
    "Tensor.tanh": (lambda x: x.tanh(), "tanh"),
}


@pytest.mark.parametrize(("function", "name"), SPELLINGS.values(), ids=SPELLINGS)
def test_each_spelling_of_a_function_has_the_site_of_that_function(function, name):
    assert list(agree(lambda: Net(LAYOUTS[1], function), LAYOUTS[1])) == [f"first/{name}"]


#: A ReLU by another name; the twin is the plain function, so counts are compared with those of F.relu.
CLAMPS = {
    "torch.clamp(x, 0)": lambda x: torch.clamp(x, 0),
    "torch.clamp(x, min=0)": lambda x: torch.clamp(x, min=0),
    "Tensor.clamp": lambda x: x.clamp(min=0.0),
    "Tensor.clamp_": lambda x: x.clamp_(0),
    "Tensor.clamp_min": lambda x: x.clamp_min(0),
    "torch.clip": lambda x: torch.clip(x, min=0),
}


@pytest.mark.parametrize("function", CLAMPS.values(), ids=CLAMPS)
def test_clamp_at_zero_is_a_relu(function):
    found = []
    for act in (function, F.relu):
        torch.manual_seed(0)
        model = Net(LAYOUTS[1], act)
        with ns.watch(model) as scope:
            model(torch.randn(2, 6, 3)).square().sum().backward()
            scope.step()
        (tally,) = scope.census().values()
        found.append((tally.zero_outputs.tolist(), tally.positions, tally.gradient_positions, tally.info.kind))
    assert found[0] == found[1]


@pytest.mark.parametrize("bounds", [{"min": 1e-6}, {"min": -1, "max": 1}, {"max": 0}, {"min": 0.5}], ids=str)
def test_a_clamp_with_other_bounds_is_not_an_activation(bounds):
    model = Net(LAYOUTS[0], lambda x: F.relu(x).clamp(**bounds))
    with ns.watch(model) as scope:
        model(torch.randn(5, 3)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["first/relu"]


class Reused(nn.Module):
    """One activation module behind two layers, one of which is called twice on other shapes; a functional call too."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 1)
        self.up = nn.Linear(6, 6)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = F.relu(self.up(x))
        x = self.act(x - 0.1)
        return self.act(self.up(x.mean(1)))


@pytest.mark.parametrize(("kind", "way", "make"), [way for way in WAYS if way.values[1] != "functional"])
def test_an_activation_that_is_reused_is_one_site_for_each_layer(kind: Kind, way: str, make: Callable[[], nn.Module]):
    watched, twin = Watched(), Twin({"act": 1, "relu()": 2, "act#1": 2, "act#2": 1})
    for watcher in (watched, twin):
        torch.manual_seed(0)
        model = Reused(make())
        with watcher.attach(model):
            for _ in range(2):
                watcher.backward(model(torch.randn(4, 3, 6)).square().sum())
                watcher.step()
    # A second ReLU of what one call gives is another site.
    last = "up/relu#1" if kind.name == "relu" else f"up/{kind.name}"
    assert list(watched.scope.census()) == [f"conv/{kind.name}", "up/relu", last]
    assert_same(watched.scope.census(), twin.tallies())


class Mine(nn.ReLU):
    """A subclass counts as what it derives from."""


class Swiglu(nn.Module):
    """An activation class of one's own, with an activation inside that is not a site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inner(x)


def test_subclasses_of_activations_and_registered_classes_are_counted():
    model = nn.Sequential(nn.Linear(3, 4), Mine(), nn.Linear(4, 4), Swiglu())
    with ns.watch(model, activations={Swiglu: "silu"}) as scope:
        model(torch.randn(5, 3)).sum().backward()
        scope.step()
    assert {name: tally.activation for name, tally in scope.census().items()} == {"0/relu": "relu", "2/silu": "silu"}
    model = nn.Sequential(nn.Linear(3, 4), Swiglu())
    with ns.watch(model) as scope:
        model(torch.randn(5, 3)).sum().backward()
        scope.step()
    # x · sigmoid(x) is an activation written out, and no gate
    assert {name: tally.activation for name, tally in scope.census().items()} == {"0/sigmoid": "sigmoid"}


@pytest.mark.parametrize("gate", ["silu", "gelu", "relu", "sigmoid"])
@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("order", ["act * up", "up * act", "torch.mul", "mul_"])
def test_gated_products_are_sites(gate, module, order):
    modules = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}
    functions = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}

    class Gated(nn.Module):
        def __init__(self, order: str) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 3)
            self.order = order
            self.act = modules[gate]() if module else functions[gate]

        def forward(self, x: Tensor) -> Tensor:
            g, u = self.act(self.gate(x)), self.up(x)
            product = {
                "act * up": lambda: g * u,
                "up * act": lambda: u * g,
                "torch.mul": lambda: torch.mul(g, u),
                "mul_": lambda: u.mul_(g),
            }[self.order]()
            return self.down(product)

    watched, twin, plain = Watched(), Twin({None: 2}), Watched()
    for watcher in (watched, plain if order == "mul_" else twin):  # the twin sees no product that is written in place
        torch.manual_seed(0)
        model = Gated(order if watcher is not plain else "act * up")
        with watcher.attach(model):
            for _ in range(2):
                watcher.backward(model(torch.randn(2, 5, 3)).square().sum())
                watcher.step()
    product = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "sigmoid": "glu"}[gate]
    assert list(watched.scope.census()) == [f"gate/{gate}", f"gate/{product}"]
    if order == "mul_":
        for name, tally in plain.scope.census().items():
            other = watched.scope.census()[name]
            assert other.zero_outputs.tolist() == tally.zero_outputs.tolist()
            assert (other.positions, other.gradient_positions) == (tally.positions, tally.gradient_positions)
            np.testing.assert_allclose(other.abs_sum, tally.abs_sum)
    else:
        assert_same(watched.scope.census(), twin.tallies())
    assert watched.scope.census()[f"gate/{product}"].info.kind == "gated"


def test_softmax_and_attention_are_not_sites():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.LogSoftmax(-1), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    with ns.watch(model) as scope:
        model(torch.randn(5, 4)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["4/tanh"]
    assert list(scope.not_neurons()) == ["3"]


WITHOUT_SLOPE = {
    "LeakyReLU": nn.LeakyReLU(0.0),
    "leaky_relu": lambda x: F.leaky_relu(x, negative_slope=0),
    "leaky_relu in place": lambda x: F.leaky_relu_(x + 0.0, 0.0),
    "RReLU": nn.RReLU(0.0, 0.0),
    "rrelu": lambda x: F.rrelu(x, 0.0, upper=0.0),
    "rrelu by names": lambda x: F.rrelu(input=x, lower=0.0, upper=0.0),
}


@pytest.mark.parametrize("act", WITHOUT_SLOPE.values(), ids=WITHOUT_SLOPE)
def test_a_leaky_activation_whose_slope_is_zero_can_be_dead(act: nn.Module | Callable[[Tensor], Tensor]) -> None:
    net = Net(LAYOUTS[0], act)
    with torch.no_grad():
        net.first.bias[:2] = -100
    with ns.watch(net, every_n_steps=1) as scope:
        net(torch.ones(5, 3)).sum().backward()
        scope.step()
    [tally] = scope.census().values()
    dead = {verdict.neuron for verdict in scope.report().verdicts() if verdict.label == "dead"}
    assert (tally.kind, tally.zero_outputs[:2].tolist()) == ("relu-like", [5, 5])
    assert dead == set(np.flatnonzero(tally.zero_outputs == 5)) >= {0, 1}
