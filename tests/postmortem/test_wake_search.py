"""Searching a box for inputs that make neurons fire: planted neurons, brute force, seeds, limits, and odd networks."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuronscope.checkpoints.model import wake_search
from neuronscope.checkpoints.model.bounds.propagate import Box, propagate_bounds, site_bounds
from neuronscope.checkpoints.model.example_inputs import Example
from neuronscope.checkpoints.model.trace import trace
from neuronscope.checkpoints.model.wake_search import WakeSearch, search_waking_inputs
from neuronscope.errors import UsageError

BOX = (-1.0, 1.0)
#: No test here is decided by the clock.
LONG = 600.0


@pytest.fixture(autouse=True)
def fewer_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake_search, "_STARTS", 120)


def given(*args: Tensor, **kwargs: Tensor) -> Example:
    return Example(args, kwargs, "given")


def every_neuron(model: nn.Module, example: Example) -> dict[str, np.ndarray]:
    graph = trace(model, example.args, example.kwargs)
    return {site.name: np.ones(site.neurons, dtype=bool) for site in graph.first_calls()}


def search(model: nn.Module, example: Example, box: Box = BOX, seconds: float = LONG, seed: int = 0) -> WakeSearch:
    """Search for all neurons of a network."""
    return search_waking_inputs(model, example, box, every_neuron(model, example), seconds=seconds, seed=seed)


def deep(seed: int = 0) -> nn.Sequential:
    """A network of two inputs, many of whose neurons fire only in a small part of the box or nowhere."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.normal_()
            layer.bias.uniform_(-4, -0.5) if layer is not model[0] else layer.bias.uniform_(-2, 0.5)
    return model


def fires_on(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """How many of the inputs each neuron fires for, by site."""
    found = {}
    with torch.no_grad():
        for index, layer in enumerate(model):
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found[f"{index - 1}/relu"] = (x != 0).sum(0)
    return found


def planted() -> nn.Sequential:
    """Neuron 0 is dead in the box, 1 fires in one of its corners, 2 only beyond it, 3 for half of it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
        model[0].bias.copy_(torch.tensor([-9.0, -3.99, -4.01, 0.0]))
    return model


def test_neurons_that_fire_in_a_corner_of_the_box_are_woken_and_dead_ones_are_not() -> None:
    found = search(planted(), given(torch.zeros(1, 4)))
    assert (found.found["0/relu"] >= 0).tolist() == [False, True, False, True]
    assert found.complete
    assert not found.refused
    beyond = search(planted(), given(torch.zeros(1, 4)), box=(-1.1, 1.1))
    assert (beyond.found["0/relu"] >= 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_on_a_grid_agrees_with_the_search_and_with_the_bounds(seed: int) -> None:
    model = deep(seed)
    axis = torch.linspace(-1, 1, 401)
    on_grid = fires_on(model, torch.cartesian_prod(axis, axis))
    found = search(model, given(torch.zeros(1, 2)))
    graph = trace(model, (torch.zeros(1, 2),))
    bounds = site_bounds(graph, propagate_bounds(graph, BOX))
    rare = 0
    for name, inputs in found.found.items():
        fires = on_grid[name].numpy()
        assert (inputs[fires > 0] >= 0).all(), name  # whatever fires on the grid is woken
        assert not (fires[bounds[name].dead] > 0).any()
        assert not (inputs[bounds[name].dead] >= 0).any()
        rare += int(((fires > 0) & (fires < 401**2 / 1000)).sum())
    assert sum(int((inputs < 0).sum()) for inputs in found.found.values()) > 4
    if seed == 0:
        assert rare > 0


@pytest.mark.parametrize("batch", [1, 7])
def test_every_input_lies_in_the_box_and_makes_its_neurons_fire_in_a_plain_forward(batch: int) -> None:
    model, box = deep(), (-0.1, 0.7)  # neither end is a float32 number
    found = search(model, given(torch.zeros(batch, 2)), box=box)
    assert found.inputs
    for index, one in enumerate(found.inputs):
        assert list(one) == ["0"]
        assert one["0"].shape == (1, 2)
        assert bool(((one["0"].double() >= box[0]) & (one["0"].double() <= box[1])).all())
        fires = fires_on(model, one["0"])
        woken = [(name, neurons == index) for name, neurons in found.found.items()]
        assert any(mask.any() for _, mask in woken)
        for name, mask in woken:
            assert bool((fires[name][torch.from_numpy(mask)] == 1).all())


def test_a_seed_gives_the_same_inputs_again() -> None:
    first, again, other = (search(deep(), given(torch.zeros(1, 2)), seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first.found[name], again.found[name]) for name in first.found)
    assert all(torch.equal(one["0"], two["0"]) for one, two in zip(first.inputs, again.inputs, strict=True))
    assert not all(torch.equal(one["0"], two["0"]) for one, two in zip(first.inputs, other.inputs, strict=False))


class Counts(nn.Module):
    """Changes a buffer in each forward, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(torch.relu_(self.norm(self.fc(x))))


def test_a_search_leaves_the_model_and_all_random_states_as_they_were() -> None:
    model = Counts().train()
    model.norm.eval()
    model.fc.bias.requires_grad_(False)
    model.fc.weight.grad = torch.ones(4, 3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    assert not search(model, given(torch.zeros(1, 3))).refused
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model.fc.weight.grad, torch.ones(4, 3))
    assert model.norm.weight.grad is None


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) * self.up(x)


class Several(nn.Module):
    """A tensor by name, a list of tensors, and words; adds to its first input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, pair: list[Tensor], *, words: Tensor) -> Tensor:
        pair[0].add_(1.0)
        return torch.relu(self.conv(pair[0] - 1 + pair[1] + 0.01 * self.embed(words)))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x.transpose(0, 1))).mean(0)


class OneInput(nn.Module):
    """Takes an input without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x.view(4)))


class WithNumber(OneInput):
    """Takes a number beside its input, so that inputs cannot be joined."""

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) * number


WORDS = torch.zeros(1, dtype=torch.int64)
SHAPES: dict[str, tuple[Callable[[], nn.Module], Example, str]] = {
    "images": (Conv, given(torch.zeros(1, 2, 5, 5)), "bn/relu"),
    "a gated product": (Gated, given(torch.zeros(1, 4)), "conv/reglu"),
    "several tensors": (Several, Example(([torch.zeros(1, 4)] * 2,), {"words": WORDS}, ""), "conv/relu"),
    "time before batch": (TimeFirst, given(torch.zeros(1, 6, 4)), "conv/relu"),
    "one input at a time": (OneInput, given(torch.zeros(4)), "conv/relu"),
    "a number beside two rows": (WithNumber, given(torch.zeros(2, 4), torch.tensor(1.0)), "conv/relu"),
    "doubles": (lambda: Conv().double(), given(torch.zeros(1, 2, 5, 5, dtype=torch.float64)), "bn/relu"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_networks_of_all_shapes_are_searched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neuron 0 fires near one corner of the box, 1 nowhere, 2 widely."""
    monkeypatch.setattr(wake_search, "_STARTS", 4)
    monkeypatch.setattr(wake_search, "_SAMPLE", 64)
    make, example, site = SHAPES[name]
    torch.manual_seed(1)
    model = make().eval()
    weight = model.conv.weight
    with torch.no_grad():
        most = weight.flatten(1).abs().sum(1) * (2 if name == "several tensors" else 1)
        model.conv.bias.copy_(torch.stack([-0.9 * most[0], -1.5 * most[1], 0 * most[2]]))
    found = search(model, example)
    assert not found.refused
    assert (found.found[site] >= 0).tolist() == [True, False, True]
    assert found.complete
    if name == "several tensors":
        assert list(found.inputs[0]) == ["0.0", "0.1", "words"]
        assert found.inputs[0]["words"].tolist() == [0]
        one = found.inputs[int(found.found[site][0])]
        with torch.no_grad():
            assert float(model([one["0.0"].clone(), one["0.1"]], words=one["words"])[0, 0]) > 0


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x + torch.randn(4)))


class Picky(nn.Module):
    """Accepts zeros only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x != 0).any()):
            raise ValueError("zeros, please")
        return torch.relu(self.conv(x))


@pytest.mark.parametrize(
    ("model", "example", "box", "why"),
    [
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.ReLU()), given(WORDS[None]), BOX, "no floating-point"),
        (planted(), given(torch.zeros(1, 4)), (0.0, float("inf")), "not finite"),
        (planted(), given(torch.zeros(1, 4)), (0.1, 0.1), "no number of the input's type torch.float32"),
        (Noise(), given(torch.zeros(1, 4)), BOX, "other outputs when it runs on the same input again"),
        (Picky(), given(torch.zeros(1, 4)), BOX, "zeros, please"),
    ],
    ids=["words", "infinite box", "box between two numbers", "random network", "network that fails"],
)
def test_where_no_search_is_possible_the_reason_is_given(
    model: nn.Module, example: Example, box: Box, why: str
) -> None:
    found = search(model, example, box)
    assert why in found.refused
    assert not found.inputs
    assert all((inputs < 0).all() for inputs in found.found.values())


def test_a_box_that_does_not_fit_the_input_is_refused() -> None:
    with pytest.raises(UsageError, match="to be two numbers, or two tensors"):
        search(planted(), given(torch.zeros(1, 4)), (torch.zeros(3), torch.ones(3)))


def test_a_box_of_tensors_bounds_each_element() -> None:
    low, high = torch.tensor([-1.0, 0, -1, 0]), torch.tensor([1.0, 0, 1, 0])
    found = search(planted(), given(torch.zeros(1, 4)), (low, high))
    assert (found.found["0/relu"] >= 0).tolist() == [False, False, False, True]
    assert all(bool((one["0"][:, 1::2] == 0).all()) for one in found.inputs)


def test_a_search_whose_time_is_up_says_so_and_claims_nothing_more() -> None:
    found = search(planted(), given(torch.zeros(1, 4)), seconds=0.0)
    assert not found.complete
    assert not found.refused
    assert not found.inputs


def test_inputs_of_the_data_are_starts() -> None:
    """The neuron fires for one point of 64 dimensions, of which no gradient tells from elsewhere."""
    torch.manual_seed(0)
    point = torch.rand(64).round()

    class Needle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc((x - point).abs().round()))

    model = Needle()
    with torch.no_grad():
        model.fc.weight.fill_(-1)
        model.fc.bias.fill_(0.5)
    example, targets = given(torch.zeros(1, 64)), {"fc/relu": np.array([True])}
    without = search_waking_inputs(model, example, (0.0, 1.0), targets, seconds=LONG)
    data = given(torch.stack([1 - point, 3 * point]))  # outside the box; moved into it, it is the point
    found = search_waking_inputs(model, example, (0.0, 1.0), targets, seconds=LONG, data=data)
    assert without.found["fc/relu"].tolist() == [-1]
    assert found.found["fc/relu"].tolist() == [0]
    unlike = search_waking_inputs(model, example, (0.0, 1.0), targets, seconds=LONG, data=given(torch.ones(2, 63)))
    assert not unlike.refused


class Centred(nn.Module):
    """Subtracts the mean over the batch, so that one input alone never makes a neuron fire."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x - x.mean(0)))


def test_an_input_that_makes_a_neuron_fire_only_beside_others_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake_search, "_STARTS", 8)
    found = search(Centred(), given(torch.zeros(1, 4)))
    assert found.found["fc/relu"].tolist() == [-1, -1, -1]
    assert not found.inputs


def test_a_watched_neuron_is_noted_though_it_is_not_searched_for() -> None:
    watched = {"0/relu": np.array([True, False, False, True])}
    targets = {"0/relu": np.array([False, True, False, False])}
    found = search_waking_inputs(
        planted(), given(torch.zeros(1, 4)), BOX, targets, seconds=LONG, watched=watched
    ).found["0/relu"]
    assert (found >= 0).tolist() == [False, True, False, True]


def test_a_site_where_neurons_are_only_watched_is_noted_too() -> None:
    model = nn.Sequential(planted(), nn.Linear(4, 2), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, -1]]))
        model[1].bias.copy_(torch.tensor([-1.0, 0.0]))
    targets = {"0.0/relu": np.array([False, True, False, False])}
    watched = {"1/relu": np.array([True, True])}
    found = search_waking_inputs(model, given(torch.zeros(1, 4)), BOX, targets, seconds=LONG, watched=watched)
    assert (found.found["1/relu"] >= 0).tolist() == [True, False]


def test_where_there_is_no_neuron_to_wake_the_network_does_not_run() -> None:
    watched = {"0/relu": np.array([True, True, True, True])}
    found = search_waking_inputs(Picky(), given(torch.zeros(1, 4)), BOX, {}, seconds=LONG, watched=watched)
    assert found.complete
    assert not found.refused
    assert not found.inputs
