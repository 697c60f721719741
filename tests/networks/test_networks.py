"""Neuronscope is right on networks of others, without being told anything: torchvision, timm, Hugging Face.

Each is trained for two steps from random weights, once watched and once counted slowly (:mod:`tests.networks.twin`).
All integers are equal, site names and their order too: the layer in a name is the one that autograd's graph says, and
its units those that gradients reach. No axis is a guess; and the weights are the same, bit for bit.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import torch

import neuronscope as ns
from tests.agreement.slow_twin import assert_bits, assert_same
from tests.networks.agreement import NETWORKS, assert_agreement, run
from tests.networks.language import MAMBAS
from tests.networks.rows import Row, leave, left, row_of
from tests.networks.zoo import Network, images, tokens


def name_of(network: Network) -> str:
    return f"{network.family}-{network.name}".replace(" ", "-")


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
def test_the_counts_of_a_network_equal_the_twins(network: Network) -> None:
    pytest.importorskip(network.family, exc_type=ImportError)
    result = run(network)
    assert_agreement(network, result)
    leave(row_of(network, result))


@pytest.mark.parametrize("network", MAMBAS, ids=name_of)
def test_the_counts_of_experts_equal_the_twins_where_it_sees_no_other_activation(network: Network) -> None:
    pytest.importorskip(network.family, exc_type=ImportError)
    result = run(network)
    truth = {name: tally for name, tally in result.truth.items() if ".experts." in name}
    assert len(truth) == 8
    assert_same(ns.Census({name: result.census[name] for name in result.census if ".experts." in name}), truth)
    assert not [name for name in result.not_measured if "experts" in name]
    assert_bits(*result.states)


GATED = {
    "LlamaForCausalLM": "model.layers.{}.mlp.gate_proj/swiglu",
    "MistralForCausalLM": "model.layers.{}.mlp.gate_proj/swiglu",
    "GemmaForCausalLM": "model.layers.{}.mlp.gate_proj/geglu",
    "Phi3ForCausalLM": "model.layers.{}.mlp.gate_up_proj(0:28)/swiglu",
    "ModernBertModel": "layers.{}.mlp.Wi(0:28)/geglu",
}


@pytest.mark.parametrize("name", GATED)
def test_gated_products_of_language_models_are_sites_with_their_names(name: str) -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    result = run(next(network for network in NETWORKS if network.name == name))
    products = [site for site, tally in result.census.items() if tally.info.kind == "gated"]
    assert products == [GATED[name].format(layer) for layer in range(2)]


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_experts_are_counted_together_when_their_axis_is_declared(way: str) -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    network = next(network for network in NETWORKS if network.name == f"MixtralForCausalLM ({way} experts)")
    result = run(network, axes={"*.experts.act_fn": -1})
    assert_same(result.census, result.truth)
    place = "model.layers.{}.mlp.experts.act_fn"
    assert [*result.census] == [name.format(layer) for layer in range(2) for name in (place, f"{place}/swiglu")]
    assert {tally.axis_source for tally in result.census.values()} == {"declared"}


def test_every_required_kind_of_network_is_tried() -> None:
    names = [network.name for network in NETWORKS]
    vision = "resnet18 mobilenet_v3* convnext_tiny VisionTransformer DenseNet inception_v3 efficientnet_b0"
    wanted = [*vision.split(), "OPT*", "GPT2*", "Llama*", "Bert*", "T5*"]
    assert [pattern for pattern in wanted if not fnmatch.filter(names, pattern)] == []


def test_the_inputs_of_the_networks_are_photographs_and_text() -> None:
    """Each step has others; bytes of text are no network's special tokens; pictures are no noise."""
    generator = torch.Generator().manual_seed(1)
    ids = [tokens()(generator)["input_ids"] for _ in range(2)]
    assert not ids[0].equal(ids[1])
    assert all(bytes(row.tolist()).decode(errors="strict").isascii() and row.min() >= 10 for row in torch.cat(ids))
    for size in (32, 64, 224, 299):
        first, second = (images(size)(generator)["x"] for _ in range(2))
        assert first.shape == (2, 3, size, size)
        assert not first.equal(second)
        # Neighbours in a photograph are alike: of independent pixels, the difference has twice the variance.
        assert first.diff(dim=-1).var() < first.var()


def test_a_row_left_for_the_coverage_page_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, other = NETWORKS[0], NETWORKS[1]
    row = Row(network.family, network.name, network.config, "exact", {"module": 7}, 99, {"layer": 7}, {"a": "b"})
    monkeypatch.delenv("NEURONSCOPE_NETWORK_ROWS", raising=False)
    leave(row)
    assert left(network) is None
    monkeypatch.setenv("NEURONSCOPE_NETWORK_ROWS", str(tmp_path))
    leave(row)
    assert (left(network), left(other)) == (row, None)
    assert row.sites == 7


def test_each_network_leaves_its_row_in_a_file_of_its_own() -> None:
    names = [re.sub(r"[^A-Za-z0-9_]+", "-", name_of(network)) for network in NETWORKS]
    assert len({*names}) == len(names)
