"""Neuronscope is right on networks of others, without being told anything: torchvision, timm, Hugging Face.

Each is trained for two steps from random weights, once watched and once counted slowly (:mod:`tests.networks.twin`).
All integers are equal, site names and their order too; the axis is what the network's row says, and no guess; the
number of neurons fits what autograd's graph says of the layer before; and the weights are the same, bit for bit.
"""

from __future__ import annotations

import fnmatch

import pytest

from tests.core.slow_twin import assert_same
from tests.networks.agreement import NETWORKS, assert_agreement, run
from tests.networks.zoo import Network


def name_of(network: Network) -> str:
    return f"{network.family}-{network.name}".replace(" ", "-")


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
def test_census_is_the_twins(network: Network) -> None:
    pytest.importorskip(network.family, exc_type=ImportError)
    assert_agreement(network, run(network))


GATED = {
    "LlamaForCausalLM": "model.layers.{}.mlp.act_fn.gated",
    "MistralForCausalLM": "model.layers.{}.mlp.act_fn.gated",
    "GemmaForCausalLM": "model.layers.{}.mlp.act_fn.gated",
    "Phi3ForCausalLM": "model.layers.{}.mlp.activation_fn.gated",
    "ModernBertModel": "layers.{}.mlp.act.gated",
}


@pytest.mark.parametrize("name", GATED)
def test_gated_products_are_found_by_name(name: str) -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    census = run(next(network for network in NETWORKS if network.name == name)).census
    assert [site for site in census if site.endswith(".gated")] == [GATED[name].format(layer) for layer in range(2)]
    products = [tally for site, tally in census.items() if site.endswith(".gated")]
    assert {tally.activation for tally in products} <= {"swiglu", "geglu"}


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_experts_are_counted_together_when_their_axis_is_declared(way: str) -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    network = next(network for network in NETWORKS if network.name == f"MixtralForCausalLM ({way} experts)")
    result = run(network, axes={"*.experts.act_fn": -1})
    assert_same(result.census, result.truth)
    assert {tally.axis_source for tally in result.census.values()} == {"declared"}


def test_every_kind_that_the_issue_names_is_tried() -> None:
    names = [network.name for network in NETWORKS]
    vision = "resnet18 mobilenet_v3* convnext_tiny VisionTransformer DenseNet inception_v3 efficientnet_b0"
    wanted = [*vision.split(), "OPT*", "GPT2*", "Llama*", "Bert*", "T5*"]
    assert [pattern for pattern in wanted if not fnmatch.filter(names, pattern)] == []
