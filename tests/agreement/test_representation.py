"""Dormant shares equal a reference implementation of the papers' formulas; ranks equal known ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.errors import UsageError
from tests.agreement.slow_twin import assert_bits, state_of


class Pictures(nn.Module):
    """A network as agents use it for pictures: convolutions, then linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 12, 3), nn.Conv2d(12, 8, 3, stride=2)
        self.hidden, self.out = nn.Linear(8 * 9, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(torch.relu(self.hidden(features.flatten(1))))


def features_by_hand(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of all hidden activations, with gradients."""
    if isinstance(model, Pictures):
        first = torch.relu(model.first(x))
        second = torch.relu(model.second(first))
        hidden = torch.relu(model.hidden(second.flatten(1)))
        return {"first/relu": first, "second/relu": second, "hidden/relu": hidden, "output": model.out(hidden)}
    assert isinstance(model, nn.Sequential)
    first = model[1](model[0](x))
    second = model[3](model[2](first))
    return {"0/relu": first, "2/gelu": second, "output": model[4](second)}


def reference_score(values: Tensor) -> Tensor:
    """Return Sokar et al.'s score of each neuron: mean magnitude over batch and map, by the mean over the layer."""
    return gradient_score(values, 1e-9)


def gradient_score(values: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return the GraMa score of each neuron (Liu et al. 2025): the same of gradients, with nothing added."""
    score = values.abs().mean(dim=[dim for dim in range(values.dim()) if dim != 1])
    return score / (score.mean() + epsilon)


def weak(model: nn.Module) -> nn.Module:
    """Make some neurons of each hidden layer weak to different degrees, and one dead."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][:-1]
    with torch.no_grad():
        for layer in layers:
            for neuron, scale in enumerate((1e-3, 5e-3, 2e-2, 5e-2, 0.2)):
                layer.weight[neuron] *= scale
                layer.bias[neuron] *= scale
            layer.bias[5] = -100.0
    return model


def mlp() -> nn.Module:
    return weak(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2)))


def pictures() -> nn.Module:
    return weak(Pictures())


@pytest.mark.parametrize("tau", [0.0, 0.025, 0.1])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (64, 6)), (pictures, (16, 1, 10, 10))])
def test_dormant_shares_equal_the_papers_formulas(make: Callable[[], nn.Module], shape: Any, tau: float) -> None:
    model, x = make(), torch.randn(shape)

    def loss(output: Any, _: Any) -> Tensor:
        return output.square().mean()

    found = ns.representation(model, x, loss, tau=tau)
    values = features_by_hand(model, x)
    output = values.pop("output")
    gradients = dict(zip(values, torch.autograd.grad(loss(output, None), list(values.values())), strict=True))
    assert [layer.name for layer in found.layers] == list(values)
    dormant = gradient_dormant = neurons = 0
    for layer in found.layers:
        scores, gradient_scores = reference_score(values[layer.name]), gradient_score(gradients[layer.name])
        assert layer.dormant == int((scores <= tau).sum())
        assert layer.gradient_dormant == int((gradient_scores <= tau).sum())
        np.testing.assert_allclose(layer.mean_abs_output / layer.mean_abs_output.mean(), scores.detach(), rtol=1e-4)
        dormant += layer.dormant
        gradient_dormant += layer.gradient_dormant
        neurons += values[layer.name].shape[1]
    assert found.dormant_percent == pytest.approx(100 * dormant / neurons)
    assert found.gradient_dormant_percent == pytest.approx(100 * gradient_dormant / neurons)
    # And beside ours, of the same batch: the report counts as the paper does under the same name.
    report = ns.scan(model, x, policy=ns.Policy(dormant_tau=tau))
    assert report.tau_dormant == dormant
    if tau == 0.1:
        assert dormant > report.dormant > 0  # dead ones are in the paper's share, and not in ours


@pytest.mark.parametrize("scale", [1e6, 1.0, 1e-8, 1e-12])
def test_the_share_of_low_gradients_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    # Small per-neuron gradients are what a mean over a large batch gives.
    model, x = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 1, bias=False)), torch.ones(8, 5)
    with torch.no_grad():
        model[0].weight[:] = torch.eye(5)
        model[2].weight[:] = torch.tensor(
            [[0.0, 0.01, 1.0, 1.0, 2.0]]
        )  # |∂L/∂y_i|, up to the scale; their mean is 0.802
    found = ns.representation(model, x, lambda output, _: scale * output.sum(), tau=0.025)
    assert found["0/relu"].gradient_dormant == 2
    assert found.gradient_dormant_percent == 40.0
    assert "40.0 % have a low gradient (GraMa, Liu et al. 2025, the same τ)." in str(found)
    assert ns.representation(model, x, lambda output, _: 0 * output.sum())["0/relu"].gradient_dormant == 5
    assert "GraMa" not in str(ns.representation(model, x))


def rank_model(weight: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 7, bias=False), nn.ReLU(), nn.Linear(7, 1))
    with torch.no_grad():
        model[0].weight[:] = weight
    return model


def test_ranks_and_norms_are_those_of_known_matrices() -> None:
    x = torch.eye(7)
    whole = ns.representation(rank_model(torch.eye(7)), x)["0/relu"]
    assert whole.effective_rank == pytest.approx(7.0)  # Dohare et al. 2024: that of an identity of 7
    assert whole.stable_rank == pytest.approx(7.0)
    assert whole.weight_norm == pytest.approx(7**0.5)
    one = ns.representation(rank_model(torch.ones(7, 7)), x)["0/relu"]
    assert one.effective_rank == pytest.approx(1.0)
    assert one.stable_rank == pytest.approx(1.0)
    # Singular values 3 and 1 of 7: entropy of (3/4, 1/4), and (9 + 1) / 9.
    two = ns.representation(rank_model(torch.diag(torch.tensor([3.0, 1.0, 0, 0, 0, 0, 0]))), x)["0/relu"]
    assert two.effective_rank == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    assert two.stable_rank == pytest.approx(10 / 9)
    assert (two.dead, two.dormant) == (5, 5)
    none = ns.representation(rank_model(-torch.eye(7)), x)["0/relu"]
    assert (none.effective_rank, none.stable_rank, none.dead) == (0.0, 0.0, 7)


def test_rows_are_evenly_spaced_and_at_most_as_many_as_asked_for() -> None:
    model = rank_model(torch.eye(7))
    batches = [torch.zeros(30, 7) for _ in range(10)]
    for number, batch in enumerate(batches):
        batch[:, 0] = torch.arange(30) + 30 * number + 1
    found = ns.representation(model, batches, rows=100)["0/relu"]
    # 300 positions; every second is 150, every fourth 75 <= 100.
    assert (found.positions, found.rows) == (300, 75)
    assert "75 sampled rows" in str(ns.representation(model, batches, rows=100))
    assert ns.representation(model, batches)["0/relu"].rows == 300


def test_the_model_is_left_as_it_was_and_its_numbers_are_those_of_a_scan() -> None:
    model, x = mlp(), torch.randn(20, 6)
    model(x).sum().backward()
    before, gradients = state_of(model), [weight.grad.clone() for weight in model.parameters()]  # type: ignore[union-attr]
    found = ns.representation(model, x, lambda output, _: output.mean())
    assert_bits(state_of(model), before)
    assert all(torch.equal(weight.grad, old) for weight, old in zip(model.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert ns.representation(model, x).gradient_dormant_percent != found.gradient_dormant_percent  # NaN without a loss
    assert [layer.dead for layer in found.layers] == [
        site.dead for site in ns.scan(model, x, lambda output, _: output.mean()).layers
    ]


@pytest.mark.parametrize("bad", [{"rows": 0}, {"tau": -1.0}, {"tau": True}, {"mask": "mask"}])
def test_bad_arguments_give_a_plain_error(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        ns.representation(mlp(), torch.randn(4, 6), **bad)


def test_nan_has_no_rank() -> None:
    found = ns.representation(rank_model(torch.full((7, 7), float("nan"))), torch.eye(7))["0/relu"]
    assert np.isnan(found.effective_rank)
    assert found.dormant == 0
