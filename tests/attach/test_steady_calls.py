"""What was found out of a site's last call serves the next one only where everything that it follows from is the same.

Each network here changes one thing from step to step, and keeps the rest: above all the shape at the site.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns


class Net(nn.Module):
    """A linear layer that passes its input on, something done to the outcome, and an activation."""

    def __init__(self, between: Callable[[Tensor, int], Tensor], act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act, self.between = nn.Linear(4, 4, bias=False), act, between
        self.step = 0
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.between(self.fc(x), self.step))


#: Of the four columns the first is always off; of the four rows all are on elsewhere.
X = torch.tensor([[-1.0, 1.0, 1.0, 1.0]]).repeat(4, 1)


def turned(x: Tensor, step: int) -> Tensor:
    return x.t() if step % 2 else x


def run(net: Net, steps: int, x: Tensor = X, **options: object) -> ns.Scope:
    with ns.watch(net, **options) as scope:
        for net.step in range(steps):
            net(x).sum().backward()
            scope.step()
    return scope


def test_the_neuron_axis_may_change_between_calls_of_one_shape():
    tally = run(Net(turned, nn.ReLU()), 4).census()["fc/relu"]
    # Turned or not, neuron 0 is off at its 4 positions of each of 4 steps, and the others never.
    assert tally.zero_outputs.tolist() == [16, 0, 0, 0]
    assert tally.zero_gradients.tolist() == [16, 0, 0, 0]
    assert (tally.positions, tally.gradient_positions) == (16, 16)


def test_a_declared_axis_stays_where_it_was_declared():
    tally = run(Net(turned, nn.ReLU()), 4, axes={"act": 1}).census()["fc/relu"]
    # Two steps as they are: neuron 0 off at 4 positions each. Two turned: each neuron off at 1 of its 4 positions.
    assert tally.zero_outputs.tolist() == [8 + 2, 2, 2, 2]
    assert tally.zero_gradients.tolist() == [8 + 2, 2, 2, 2]


def test_a_negative_axis_is_right_when_the_number_of_dimensions_changes():
    """On tensors of which no layer is known."""
    net = Net(lambda x, step: (X[:, None] if step % 2 else X).clone().requires_grad_(), nn.ReLU())
    tally = run(net, 4, axes={"act": -1}).census()["act"]
    assert tally.zero_outputs.tolist() == [16, 0, 0, 0]
    assert tally.zero_gradients.tolist() == [16, 0, 0, 0]


def test_the_neuron_axis_of_a_functional_site_may_change_between_calls():
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.between(self.fc(x), self.step))

    tally = run(Functional(turned, nn.Identity()), 4).census()["fc/relu"]
    assert tally.zero_outputs.tolist() == [16, 0, 0, 0]


def test_the_layer_may_change_between_calls_of_one_shape():
    """One activation module behind a linear layer and behind a convolution, whose outputs have the same shape."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.conv, self.act, self.step = nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ReLU(), 0
            for layer in (self.fc, self.conv):
                nn.init.zeros_(layer.weight)
                layer.bias.data = torch.tensor([-1.0, 1.0, 1.0, 1.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.act((self.conv if self.step % 2 else self.fc)(x))

    net = Either()
    with ns.watch(net) as scope:
        for net.step in range(4):
            net(torch.randn(3, 4, 4)).sum().backward()
            scope.step()
    # Neuron 0 of each layer is off at its 3 · 4 positions of 2 steps, on axis 2 and on axis 1.
    found = {name: (tally.axis, tally.zero_outputs.tolist()) for name, tally in scope.census().items()}
    assert found == {"fc/relu": (2, [24, 0, 0, 0]), "conv/relu": (1, [24, 0, 0, 0])}


def test_the_split_dimension_of_a_glu_may_change_between_calls():
    net = Net(lambda x, step: x, nn.GLU(1))
    with torch.no_grad():
        net.fc.weight.copy_(torch.eye(4))
    with ns.watch(net, axes={"act": 1}) as scope:
        for net.step in range(2):
            net.act.dim = 1 - net.step
            net(torch.ones(4, 4)).sum().backward()
            scope.step()
            if net.step == 0:
                assert scope.census()["fc/glu"].neurons == 2
    # Step 0: 4 rows of 2 neurons. Step 1 has 4 neurons, of which the two that are known say nothing: it is not counted.
    assert scope.census()["fc/glu"].positions == 4
    assert "neurons changed from 2 to 4" in scope.report().not_measured[0].reason


def test_the_number_of_examples_is_taken_from_each_forward():
    """Latents of one shape, whatever the batch."""
    net = Net(lambda x, step: x.flatten(0, 1)[:10], nn.ReLU())
    with ns.watch(net) as scope:
        for size in (2, 7, 3):
            net(torch.randn(size, 5, 4)).sum().backward()
            scope.step()
    tally = scope.census()["fc/relu"]
    assert (tally.positions, tally.examples) == (30, 12)


def test_calls_with_and_without_gradients_may_alternate():
    net = Net(lambda x, step: x, nn.ReLU())
    with ns.watch(net) as scope:
        for number in range(6):
            with torch.set_grad_enabled(number % 2 == 0):
                y = net(X).sum()
            if number % 2 == 0:
                y.backward()
            scope.step()
    counted = {phase: scope.census(phase)["fc/relu"] for phase in ("train", "inference")}
    assert {phase: (tally.positions, tally.gradient_positions) for phase, tally in counted.items()} == {
        "train": (12, 12),
        "inference": (12, 0),
    }


def test_each_phase_has_counters_of_its_own():
    net = Net(lambda x, step: x, nn.ReLU())
    with ns.watch(net) as scope:
        for _ in range(3):
            net(X).sum().backward()
            with scope.phase("val"):
                net(-X)
            scope.step()
    assert scope.census("train")["fc/relu"].zero_outputs.tolist() == [12, 0, 0, 0]
    assert scope.census("val")["fc/relu"].zero_outputs.tolist() == [0, 12, 12, 12]


def test_a_sparse_tensor_of_the_same_shape_is_not_counted_as_a_dense_one():
    net = Net(lambda x, step: x.detach().to_sparse() if step == 1 else x, nn.ReLU())
    with ns.watch(net) as scope:
        for net.step in range(3):
            net(X)
            scope.step()
    assert scope.census()["fc/relu"].positions == 8  # steps 0 and 2
    (missing,) = scope.report().not_measured
    assert "cannot be counted" in missing.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_may_change_between_calls(dtype: torch.dtype):
    net = Net(lambda x, step: x.to(dtype) if step % 2 else x, nn.ReLU())
    tally = run(net, 4).census()["fc/relu"]
    assert tally.zero_outputs.tolist() == [16, 0, 0, 0]
    assert tally.mean_abs_output.tolist() == [0.0, 1.0, 1.0, 1.0]


class Weights(nn.Module):
    """Applies ``F.linear`` with the weight and the bias that a function picks at each step."""

    def __init__(self, pick: Callable[[Weights, Tensor], tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.eye(4)) for _ in range(2))
        self.register_buffer("kept", torch.zeros(4))
        self.fc, self.act, self.pick, self.step = nn.Linear(4, 4, bias=False), nn.ReLU(), pick, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x[:3])
        return self.act(F.linear(x, *self.pick(self, h)))


def positions(net: Weights, steps: int = 6) -> dict[str, int]:
    with ns.watch(net, axes={"act": 1}) as scope:
        for net.step in range(steps):
            net(X).sum().backward()
            scope.step()
    return {name: tally.positions for name, tally in scope.census().items()}


def test_one_call_may_be_given_another_weight_in_each_step():
    net = Weights(lambda net, h: ((net.first, net.second)[net.step % 2], None))
    assert positions(net) == {"first/relu": 12, "second/relu": 12}


def test_one_call_may_be_given_another_part_of_a_weight_in_each_step():
    net = Weights(lambda net, h: (net.first[:2] if net.step % 2 else net.first[2:], None))
    assert positions(net) == {"first(2:4)/relu": 12, "first(0:2)/relu": 12}


def computed(net: Weights, h: Tensor) -> Tensor | None:
    return h.sum(0) if net.step == 4 else None


def overwritten(net: Weights, h: Tensor) -> Tensor:
    if net.step == 4:
        net.kept.copy_(h.detach()[0])
    return net.kept


def overwritten_in_part(net: Weights, h: Tensor) -> Tensor:
    if net.step == 4:
        net.kept[:] = h.detach()[0]
    return net.kept


@pytest.mark.parametrize("bias", [computed, overwritten, overwritten_in_part])
def test_a_bias_may_come_from_a_layer_in_some_steps_only(bias: Callable[[Weights, Tensor], Tensor | None]):
    """Then that layer is read by the one whose bias it is, and gives no output of the network."""
    net = Weights(lambda net, h: (net.first, bias(net, h)))
    with ns.watch(net) as scope:
        for net.step in range(6):
            net(X).sum().backward()
            scope.step()
            assert scope._hooks.recorder.forward.flow.gives_outputs("fc") == (net.step < 4), net.step


def test_what_is_known_by_the_identity_of_a_weight_ends_with_it():
    """Another tensor may get that identity."""
    net = Weights(lambda net, h: (net.first, None))
    with ns.watch(net) as scope:
        net(X).sum().backward()
        flow = scope._hooks.recorder.forward.flow
        before = flow._changes
        del net.second
        assert flow._changes == before
        del net.first
        assert flow._changes > before


def test_a_mask_may_be_given_in_some_steps_only():
    net = Net(lambda x, step: x, nn.ReLU())
    kept = torch.tensor([[True, False], [True, True]])

    with ns.watch(net, mask=lambda *_: kept if net.step % 3 == 1 else None) as scope:
        for net.step in range(6):
            net(X.view(2, 2, 4)).sum().backward()
            scope.step()
    # Four positions a step, and three in steps 1 and 4.
    tally = scope.census()["fc/relu"]
    assert (tally.positions, tally.gradient_positions) == (22, 22)
    assert tally.zero_outputs.tolist() == [22, 0, 0, 0]


def test_the_activation_may_be_swapped_for_another_module_or_function_between_calls():
    """The old one is put back later, and its hooks are still on it."""
    net = Net(lambda x, step: x, nn.ReLU())
    first, second = net.act, nn.Tanh()
    with ns.watch(net) as scope:
        for net.step in range(6):
            net.act = second if net.step % 3 == 1 else first
            if net.step % 3 == 2:
                net(X)
                with torch.no_grad():
                    torch.tanh(net.fc(X))
            else:
                net(X).sum().backward()
            scope.step()
    counted = {name: (tally.positions, tally.gradient_positions) for name, tally in scope.census().items()}
    assert counted == {"fc/relu": (16, 8), "fc/tanh": (8, 8)}
