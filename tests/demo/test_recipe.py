"""The experiment as data: fair to all variants, and as the recipe says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.recipe import QUICK, VARIANTS, Recipe, SwiGLU, build_classifier, build_network
from neuronscope.demo.training import _fit
from neuronscope.errors import MissingExtraError

VARIANT = {variant.name: variant for variant in VARIANTS}


def test_the_demo_compares_the_documented_variants() -> None:
    assert list(VARIANT)[:3] == list(QUICK) == ["ReLU", "GELU", "SiLU"]
    assert VARIANT.keys() >= {"LeakyReLU", "PReLU", "ELU", "Mish", "Tanh", "Sigmoid", "GLU", "SwiGLU-LayerNorm", "none"}


@pytest.mark.parametrize("name", [name for name, variant in VARIANT.items() if not variant.gated])
def test_networks_of_a_seed_have_the_same_weights_whatever_their_activation(name: str) -> None:
    recipe = Recipe()
    one, other = build_network(VARIANT["ReLU"], recipe, seed=3), build_network(VARIANT[name], recipe, seed=3)
    linear = [layer for layer in other if isinstance(layer, nn.Linear)]
    for mine, theirs in zip((layer for layer in one if isinstance(layer, nn.Linear)), linear, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert not theirs.bias.any()
    # Six activations, named alike in every variant, so that TensorBoard lays their curves over each other.
    assert [n for n, _ in other.named_children() if n.startswith("act")] == [f"act{i}" for i in range(1, 7)]
    assert VARIANT[name].width(recipe) == 64


@pytest.mark.parametrize("name", [name for name, variant in VARIANT.items() if variant.gated])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(layers=1, width=9), Recipe(layers=3, width=200)])
def test_gated_networks_have_the_width_at_which_parameters_are_as_many_as_they_can_be(
    name: str, recipe: Recipe
) -> None:
    def parameters(width: int, factor: int) -> int:
        sizes = [64, *[width] * recipe.layers]
        return sum((size + 1) * factor * width for size in sizes[:-1]) + (width + 1) * 10

    network = build_network(VARIANT[name], recipe, 0)
    width, wanted = VARIANT[name].width(recipe), parameters(recipe.width, 1)
    assert sum(each.numel() for each in network.parameters()) == parameters(width, 2)
    assert all(
        abs(parameters(width, 2) - wanted) <= abs(parameters(other, 2) - wanted) for other in range(1, recipe.width + 1)
    )
    assert network(torch.randn(5, 64)).shape == (5, 10)
    if recipe == Recipe():
        assert (width, parameters(width, 2), wanted) == (44, 25970, 25610)  # 1.4 % more


def test_swiglu_gates_the_first_half_with_the_second_as_glu_does() -> None:
    x = torch.randn(7, 3, 10)
    value, gate = x[..., :5], x[..., 5:]
    torch.testing.assert_close(SwiGLU()(x), value * gate * torch.sigmoid(gate))
    torch.testing.assert_close(nn.GLU()(x), value * torch.sigmoid(gate))


def test_six_layers_of_swiglu_need_a_norm_between_them(digits: Digits) -> None:
    variant, recipe = VARIANT["SwiGLU-LayerNorm"], Recipe()
    bare = build_network(replace(variant, layer_norm=False), recipe, 0).double()
    with torch.no_grad():
        small, large = (bare(scale * digits.train_x.double()).abs().max().item() for scale in (4, 8))
        assert large > 2**55 * small  # nearly the 64th power of the input
        spread = build_network(variant, recipe, 0)(digits.train_x).std().item()
    assert 0.1 < spread < 10


@pytest.mark.parametrize("norm", [False, True])
def test_swiglu_learns_with_the_norm_and_not_without(norm: bool, digits: Digits) -> None:
    recipe = Recipe(epochs=2)
    network = build_network(replace(VARIANT["SwiGLU-LayerNorm"], layer_norm=norm), recipe, 0)
    losses: list[float] = []
    _fit(network, 0, digits, recipe, lambda: None, losses.append, spike=False)
    assert losses[1] < losses[0] < 5 if norm else losses[1] > 1e6  # guessing is 2.3


def test_seeds_differ_and_the_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    one, other = (build_network(VARIANT["ReLU"], Recipe(), seed) for seed in (0, 1))
    assert not torch.equal(build_classifier(0).weight, build_classifier(1).weight)
    assert not torch.equal(one.linear1.weight, other.linear1.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_jumps_in_the_epochs_of_the_spike_only() -> None:
    recipe = Recipe()
    rates = [recipe.rate(epoch, spike=True) for epoch in range(1, 21)]
    assert [epoch for epoch, rate in enumerate(rates, 1) if rate == pytest.approx(0.02)] == [6, 7]
    assert rates.count(1e-3) == 18
    assert {recipe.rate(epoch, spike=False) for epoch in range(1, 21)} == {1e-3}


def test_the_digits_are_split_once_and_standardised_by_the_training_images(digits: Digits) -> None:
    # 1797 images, 80 % of them = 1437.6, rounded down.
    assert digits.train_x.shape == (1437, 64)
    assert digits.test_x.shape == (360, 64)
    assert digits.train_x.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert digits.train_x.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(load_digits().train_x, digits.train_x)
    assert set(digits.test_y.tolist()) == set(range(10))


def test_without_scikit_learn_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'neuronscope\[demo\]'"):
        load_digits()


def test_the_demo_is_imported_without_scikit_learn() -> None:
    code = "import sys, neuronscope.demo.program; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
