"""Masks, adapters and norms of weights are read as the weights that they give, without the library that made them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import neuronscope as ns
from neuronscope.errors import CheckpointError, UsageError


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def _pruned(net: nn.Sequential) -> None:
    prune.ln_structured(net[0], "weight", amount=3, n=2, dim=0)
    prune.random_unstructured(net[0], "bias", amount=2)


def _old_weight_norm(net: nn.Sequential) -> None:
    weight_norm(net[0])
    net[0].weight_g.data[3] = 0


def _new_weight_norm(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])
    net[0].parametrizations.weight.original0.data[3] = 0


WRAPPERS: dict[str, Callable[[nn.Sequential], Any]] = {
    "pruned": _pruned,
    "weight norm": _new_weight_norm,
    "old weight norm": _old_weight_norm,
    "weight norm, other axis": lambda net: parametrizations.weight_norm(net[0], dim=1),
    "spectral norm": lambda net: parametrizations.spectral_norm(net[0]),
    "old spectral norm": lambda net: spectral_norm(net[0]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_plain_network_gets_the_weights_that_the_wrapped_one_computes_with(tmp_path: Path, name: str) -> None:
    wrapped, network = plain(), plain()
    WRAPPERS[name](wrapped)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter += 0.01 * (parameter != 0)
    torch.save({"model": wrapped.state_dict()}, tmp_path / "a.pt")
    x = torch.randn(400, 6)
    report = ns.postmortem(tmp_path / "a.pt", network, [x])
    torch.testing.assert_close(network(x), wrapped.eval()(x))
    dead = int((wrapped[:2](x) == 0).all(0).sum())
    assert (report.neurons, report.dead) == (8, dead)
    assert [layer.neurons for layer in report.layers] == [8, 2]
    assert any("merged into the weights" in note for note in report.notes)
    own = ns.postmortem(tmp_path / "a.pt", wrapped, [x])
    assert own.dead == dead
    assert not any("merged" in note for note in own.notes)


def test_rows_that_a_mask_makes_zero_are_seen_in_the_file_alone(tmp_path: Path) -> None:
    wrapped = plain()
    _pruned(wrapped)
    torch.save(wrapped.state_dict(), tmp_path / "a.pt")
    report = ns.postmortem(tmp_path / "a.pt")
    zero = (wrapped[0].weight == 0).all(1)
    assert zero.sum() == 3
    assert [report["0"].label_of(neuron) == "zero row" for neuron in range(8)] == zero.tolist()


class Base(nn.Module):
    """A network in which LoRA changes a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(torch.relu(self.conv(x)).mean((2, 3)))))


def base() -> Base:
    torch.manual_seed(1)
    return Base()


def adapters(infix: str = "") -> dict[str, Tensor]:
    """Two matrices for each of two layers, as PEFT names them."""
    torch.manual_seed(2)
    shapes = {"conv": ((4, 3, 3, 3), (6, 4, 1, 1)), "up": ((2, 6), (8, 2))}
    return {
        f"base_model.model.{path}.lora_{letter}{infix}.weight": torch.randn(shape)
        for path, pair in shapes.items()
        for letter, shape in zip("AB", pair, strict=True)
    }


def merged(scales: dict[str, float]) -> Base:
    """What PEFT's ``merge_and_unload`` gives, by its own formulas."""
    network, parts = base(), adapters()
    for path, scale in scales.items():
        a, b = (parts[f"base_model.model.{path}.lora_{letter}.weight"] for letter in "AB")
        layer = getattr(network, path)
        change = torch.einsum("rikl,or->oikl", a, b[:, :, 0, 0]) if a.dim() == 4 else b @ a
        layer.weight.data += scale * change
    return network


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "alpha": ({"lora_alpha": 8, "r": 2}, {"conv": 2.0, "up": 4.0}),
    "root": ({"lora_alpha": 8, "use_rslora": True}, {"conv": 4.0, "up": 8 / math.sqrt(2)}),
    "pattern": ({"lora_alpha": 8, "alpha_pattern": {"up": 3}}, {"conv": 2.0, "up": 1.5}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_folder_is_merged_into_the_network_that_the_user_gives(tmp_path: Path, name: str) -> None:
    config, scales = CONFIGS[name]
    save_file(adapters(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    x, expected = torch.randn(400, 3, 5, 5), merged(scales)
    network = base()
    report = ns.postmortem(tmp_path, network, [x])
    torch.testing.assert_close(network(x), expected(x))
    torch.save(expected.state_dict(), tmp_path / "merged.pt")
    same = ns.postmortem(tmp_path / "merged.pt", base(), [x])
    assert [(one.name, one.neurons, one.dead) for one in report.layers] == [
        (one.name, one.neurons, one.dead) for one in same.layers
    ]
    assert ns.postmortem(tmp_path, base, [x]).dead == same.dead  # a function is called for its weights


@pytest.mark.parametrize("given", ["conv.weight", "conv.base_layer.weight"])
def test_a_whole_network_with_adapters_fits_the_network_without(tmp_path: Path, given: str) -> None:
    state = base().state_dict()
    if "base_layer" in given:
        state = {
            name.replace("conv.", "conv.base_layer.").replace("up.", "up.base_layer."): one
            for name, one in state.items()
        }
    state |= {name.removeprefix("base_model.model."): one for name, one in adapters(".default").items()}
    torch.save(state, tmp_path / "a.pt")
    network, x = base(), torch.randn(20, 3, 5, 5)
    report = ns.postmortem(tmp_path / "a.pt", network, [x])
    torch.testing.assert_close(network(x), merged({"conv": 1.0, "up": 1.0})(x))
    assert [layer.name for layer in report.layers] == ["conv", "up", "down"]


def test_adapters_and_norms_that_cannot_be_merged_are_named(tmp_path: Path) -> None:
    save_file(adapters(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds only adapters"):
        ns.postmortem(tmp_path, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"neither it nor the network has the weight `conv\.weight`"):
        ns.postmortem(tmp_path, plain())
    torch.save({**base().state_dict(), **adapters(".a"), **adapters(".b")}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="several"):
        ns.postmortem(tmp_path / "two.pt", base())
    magnitudes = {"up.lora_magnitude_vector": torch.ones(8)}
    torch.save({**base().state_dict(), **magnitudes}, tmp_path / "dora.pt")
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector"):
        ns.postmortem(tmp_path / "dora.pt", base())
    for name in ("two.pt", "dora.pt"):
        assert ns.postmortem(tmp_path / name).layers
