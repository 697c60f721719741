"""What a watch says that it did not measure is true, in every way in which it comes about, and says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import neuronscope as ns

OPEN_STEP = "`scope.open_step("


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.fc(x)))


def reasons(scope: ns.Scope, phase: str = "train") -> dict[str, str]:
    return {item.name: item.reason for item in scope.report(phase).not_measured}


def test_steps_before_the_first_forward_are_no_sign_that_nothing_is_measured() -> None:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ns.watch(model) as scope:
            for step in range(5):
                if step > 1:
                    model(torch.randn(3, 4)).sum().backward()
                scope.step()
    assert scope.census()["fc/relu"].positions == 9
    assert reasons(scope) == {}


def test_a_model_that_is_never_called_is_said_not_to_be_called() -> None:
    model = Net()
    with ns.watch(model) as scope, pytest.warns(ns.NeuronscopeWarning, match="No call of Net was seen") as caught:
        for _ in range(5):
            F.relu(model.fc(torch.randn(3, 4))).sum().backward()
            scope.step()
    (warning,) = caught
    assert "`scope.open_step()`" in str(warning.message)
    assert "no call of this module was seen" in reasons(scope)["act"]


def test_a_model_of_which_nothing_can_be_counted_is_said_to_have_run() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Linear()
    with ns.watch(model) as scope, pytest.warns(ns.NeuronscopeWarning, match="No activation of Linear was seen"):
        model(torch.randn(3, 4)).sum().backward()
        scope.step()


@torch.overrides.wrap_torch_function(lambda x, gate: (x, gate))
def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.relu(gate)


class Gated(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * torch.relu(gate)


class TwoInputs(nn.Module):
    """A registered activation of two layers' units."""

    def __init__(self, act: Callable[[Tensor, Tensor], Tensor], *, by_name: bool, gate_first: bool) -> None:
        super().__init__()
        self.fc, self.gate, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 1)
        self.act, self.by_name, self.gate_first = act, by_name, gate_first

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.fc(x), self.gate(x)
        gate = F.relu(gate) if self.gate_first else gate
        return self.out(self.act(x=x, gate=gate) if self.by_name else self.act(x, gate))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("registered", "act"), [(Gated, Gated()), (gated, gated)], ids=["module", "function"])
def test_a_second_input_of_an_activation_is_read_by_it(
    registered: Any, act: Any, gate_first: bool, by_name: bool
) -> None:
    model = TwoInputs(act, by_name=by_name, gate_first=gate_first)
    with ns.watch(model, activations={registered: "gated"}) as scope:
        for _ in range(2):
            model(torch.randn(3, 4)).sum().backward()
            scope.step()
    assert reasons(scope) == {}
    assert set(scope.census()) == {"fc/gated", *(["gate/relu"] if gate_first else [])}
    assert scope.report().neurons == (12 if gate_first else 6)  # an output of the network would be left out


class Sometimes(Net):
    """A second head that only some phases run."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Linear(6, 2), nn.Tanh())
        self.with_side = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc(x))
        return self.out(h) + (self.side(h).sum(1, keepdim=True) if self.with_side else 0)


def test_a_module_that_ran_in_another_phase_only_is_not_said_never_to_have_run() -> None:
    model = Sometimes()
    with ns.watch(model) as scope:
        model(torch.randn(3, 4)).sum().backward()
        model.with_side = True
        with torch.no_grad():
            model(torch.randn(3, 4))  # a rollout
        scope.step()
        with scope.phase("val"):
            model(torch.randn(3, 4))
        model.with_side = False
        with scope.phase("test"):
            model(torch.randn(3, 4))
    assert reasons(scope, "val") == {}
    assert reasons(scope)["side.1"] == "this module ran without gradients only: see phase `inference`, `val`"
    assert reasons(scope, "test")["side.1"] == (
        "no call of this module was seen in phase `test`: see phase `inference`, `val`"
    )


def test_a_module_whose_forward_is_called_past_its_hooks_is_not_said_not_to_have_run() -> None:
    class Past(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act.forward(self.fc(x)))

    model = Past()
    with ns.watch(model) as scope:
        model(torch.randn(3, 4)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["fc/relu"]  # its function was seen
    assert "or calls its `forward` itself" in reasons(scope)["act"]


class Part(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.whole = Part(4, 6), Part(6, 4), Net()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("nobody calls it")


def train(model: nn.Module, step: Callable[[Any], Tensor]) -> ns.Scope:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ns.NeuronscopeWarning)
        with ns.watch(model) as scope:
            for _ in range(3):
                step(model).sum().backward()
                scope.step()
    return scope


def test_a_part_of_the_model_that_holds_all_of_its_layers_misses_nothing() -> None:
    model = Parts()
    del model.encode, model.decode
    scope = train(model, lambda model: model.whole(torch.randn(5, 4)))
    tally = scope.census()["whole.fc/relu"]
    assert (tally.positions, tally.examples, tally.axis_source) == (15, 15, "layer (whole.fc)")
    assert reasons(scope) == {}


def test_an_activation_between_two_parts_is_named_from_autograds_graph() -> None:
    scope = train(Parts(), lambda model: model.decode(F.relu(model.encode(torch.randn(5, 4)))))
    reason = reasons(scope)["encode.fc"]
    assert "`ReluBackward0` in autograd's graph" in reason
    assert "`scope.open_step()`" in reason


def test_what_is_linear_between_two_parts_is_not_listed() -> None:
    scope = train(Parts(), lambda model: model.decode(2 * model.encode(torch.randn(5, 3, 4)).mean(1)))
    assert "encode.fc" not in reasons(scope)


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Conv1d(6, 5, 1), nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten())


def unroll(model: nn.Sequential) -> Tensor:
    x = torch.randn(5, 4)
    for number, layer in enumerate(model):
        x = layer(x[..., None] if number == 2 else x)
    return x


def test_the_layers_of_a_chain_that_is_called_one_by_one_are_found_in_autograds_graph() -> None:
    scope = train(chain(), unroll)
    census = scope.census()
    assert {name: (tally.neurons, tally.positions, tally.examples) for name, tally in census.items()} == {
        "0/relu": (6, 15, 0),
        "3/tanh": (5, 15, 0),
    }
    assert {tally.axis_source for tally in census.values()} == {"layer (0)", "layer (3)"}
    reason = reasons(scope)["(root)"]
    assert "examples are not counted" in reason
    assert OPEN_STEP in reason


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_chain_in_checkpoints_says_that_examples_are_not_counted(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    scope = train(
        model,
        lambda model: checkpoint_sequential(model, 2, torch.randn(5, 4).requires_grad_(), use_reentrant=reentrant),
    )
    tallies = scope.census().values()
    assert {(tally.neurons, tally.positions, tally.examples) for tally in tallies} == {(6, 15, 0)}
    assert "examples are not counted" in reasons(scope)["(root)"]
    if not reentrant:
        assert list(scope.census()) == ["0/relu", "2/relu"]


def test_a_weight_on_the_left_is_no_layer_of_columns_in_autograds_graph() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.randn(6, 4)), nn.ReLU()

    scope = train(Left(), lambda model: model.act(model.weight @ torch.randn(4, 9)))
    assert {tally.axis_source for tally in scope.census().values()} == {"assumed (rank)"}


class Fragile(nn.ReLU):
    """Fails at its first call."""

    failed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.failed:
            self.failed = True
            raise ValueError("out of memory")
        return super().forward(x)


def test_a_call_that_failed_is_not_said_to_give_what_cannot_be_counted() -> None:
    model = Net()
    model.act = Fragile()
    with ns.watch(model) as scope:
        with pytest.raises(ValueError, match="out of memory"):
            model(torch.randn(3, 4))
        assert reasons(scope)["fc/relu"].startswith("its last call gave no output, because it failed")
        model(torch.randn(3, 4)).sum().backward()
        scope.step()
    tally = scope.census()["fc/relu"]
    assert (tally.positions, tally.gradient_positions) == (3, 3)
    assert reasons(scope) == {}


def test_a_recurrent_cell_with_a_forward_of_its_own_is_not_said_to_be_a_fused_kernel() -> None:
    class Cell(nn.RNNCellBase):
        def __init__(self) -> None:
            super().__init__(4, 6, bias=True, num_chunks=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(F.linear(x, self.weight_ih, self.bias_ih))

    model = nn.Sequential(Cell(), nn.Linear(6, 1))
    with ns.watch(model) as scope:
        model(torch.randn(3, 4)).sum().backward()
        scope.step()
    assert list(scope.census()) == ["0/relu"]
    assert reasons(scope) == {}
    assert "fused kernel" in reasons(train(nn.Sequential(nn.GRU(4, 6)), lambda model: model(torch.randn(3, 4))[0]))["0"]
