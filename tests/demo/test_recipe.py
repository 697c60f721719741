"""The experiment as data: fair to all variants, and as the recipe says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.recipe import QUICK, VARIANTS, Recipe, build_network
from neuronscope.errors import MissingExtraError

VARIANT = {variant.name: variant for variant in VARIANTS}


def test_the_demo_compares_the_documented_variants() -> None:
    assert {"ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh", "Mish"} <= VARIANT.keys()
    assert set(QUICK) <= VARIANT.keys()


@pytest.mark.parametrize("name", VARIANT)
def test_networks_of_a_seed_have_the_same_weights_whatever_their_activation(name: str) -> None:
    recipe = Recipe()
    one, other = build_network(VARIANT["ReLU"], recipe, seed=3), build_network(VARIANT[name], recipe, seed=3)
    linear = [layer for layer in other if isinstance(layer, nn.Linear)]
    for mine, theirs in zip((layer for layer in one if isinstance(layer, nn.Linear)), linear, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert not theirs.bias.any()
    # Six activations, named alike in every variant, so that TensorBoard lays their curves over each other.
    assert [n for n, _ in other.named_children() if n.startswith("act")] == [f"act{i}" for i in range(1, 7)]


def test_seeds_differ_and_the_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    one, other = (build_network(VARIANT["ReLU"], Recipe(), seed) for seed in (0, 1))
    assert not torch.equal(one.linear1.weight, other.linear1.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_jumps_in_the_epochs_of_the_spike_only() -> None:
    recipe = Recipe()
    rates = [recipe.rate(epoch, spike=True) for epoch in range(1, 21)]
    assert [epoch for epoch, rate in enumerate(rates, 1) if rate == pytest.approx(0.02)] == [6, 7]
    assert rates.count(1e-3) == 18
    assert {recipe.rate(epoch, spike=False) for epoch in range(1, 21)} == {1e-3}
    assert recipe.neurons == 384


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
