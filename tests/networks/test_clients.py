"""Networks as people write them have the sites that a person would name, and nothing else is counted.

What is expected is written here by hand: which layers an activation follows, how many units these have, and at how many
positions. See :mod:`tests.networks.clients` for the networks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from tests.networks.clients import CLIENTS
from tests.networks.flow_ends import ending_operators

PACKAGES = {
    "RetinaNet": "torchvision",
    **dict.fromkeys(
        ["DETR", "Llama", "Gemma 2", "Mixtral", "Mamba", "BERT", "T5", "Whisper", "CLIP", "DPO with LoRA"],
        "transformers",
    ),
}
STEPS = 2


class Expected(NamedTuple):
    """What is to be found in a network.

    Attributes:
        sites: Of each site of training: its neurons, and its positions in a step.
        inference: The same of forwards without gradients.
        outputs: Sites that give the network's outputs.
        not_measured: Where activations are that cannot be measured.
        not_neurons: Where functions are that are applied to no neurons.
    """

    sites: Mapping[str, tuple[int, int]]
    inference: Mapping[str, tuple[int, int]] = {}
    outputs: frozenset[str] = frozenset()
    not_measured: frozenset[str] = frozenset()
    not_neurons: frozenset[str] = frozenset()


def language(gate: str, product: str, positions: int = 14, layer: str = "mlp.gate_proj") -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{number}.{layer}/{activation}": (24, positions)
        for number in range(2)
        for activation in (gate, product)
    }


LEVELS = 2 * (16 * 16 + 8 * 8 + 4 * 4)  # of two pictures
MAMBA = {
    "conv1d/silu": (32, 14),
    "dt_proj/softplus": (32, 14),
    "in_proj(32:64)/silu": (32, 14),
    "in_proj(32:64)/swiglu": (32, 14),
}
RESNET = "model.backbone.model."
ACTOR = {f"{net}.{layer}/tanh": (8, 6) for net in ("policy_net", "value_net_body") for layer in (0, 2)}

EXPECTED: dict[str, Expected] = {
    # Each head runs once a level, and is one site.
    "RetinaNet": Expected(
        {
            "backbone.stem.1/relu": (16, 2 * 16 * 16),
            "backbone.down.0/relu": (16, 2 * 8 * 8),
            **{
                f"head.{head}_head.conv.{number}.0/relu": (16, LEVELS)
                for head in ("classification", "regression")
                for number in range(4)
            },
        },
        not_neurons=frozenset({"clamp()", "sigmoid()"}),  # the overlaps of anchors and boxes, and the focal loss
    ),
    "DETR": Expected(
        {
            f"{RESNET}embedder.embedder.convolution/relu": (8, 2 * 32 * 32),
            f"{RESNET}encoder.stages.0.layers.0.layer.0.convolution/relu": (8, 2 * 16 * 16),
            f"{RESNET}encoder.stages.0.layers.0.layer.1.convolution/relu": (8, 2 * 16 * 16),
            f"{RESNET}encoder.stages.1.layers.0.layer.0.convolution/relu": (16, 2 * 8 * 8),
            f"{RESNET}encoder.stages.1.layers.0.layer.1.convolution/relu": (16, 2 * 8 * 8),
            "model.encoder.layers.0.mlp.fc1/relu": (24, 2 * 64),
            "model.decoder.layers.0.mlp.fc1/relu": (24, 2 * 5),
            "model.decoder.layers.1.mlp.fc1/relu": (24, 2 * 5),
            "bbox_predictor.layers.0/relu": (16, 2 * 5),
            "bbox_predictor.layers.1/relu": (16, 2 * 5),
            "bbox_predictor.layers.2/sigmoid": (4, 2 * 5),
        },
        outputs=frozenset({"bbox_predictor.layers.2/sigmoid"}),
    ),
    # One SiLU object, fifteen layers. The sigmoid of the joined levels is of many layers at once.
    "YOLO": Expected(
        {
            f"model.{layer}.bn/silu": (neurons, 2 * side * side)
            for layer, neurons, side in [
                ("0", 8, 16),
                ("1", 16, 8),
                ("2.cv1", 16, 8),
                ("2.m.0.0", 8, 8),
                ("2.cv2", 16, 8),
                ("3", 32, 4),
                ("4.cv1", 16, 4),
                ("4.cv2", 32, 4),
                ("6.cv1", 16, 8),
                ("6.m.0.0", 8, 8),
                ("6.cv2", 16, 8),
                ("7.cv2.0.0", 8, 8),
                ("7.cv3.0.0", 8, 8),
                ("7.cv2.1.0", 8, 4),
                ("7.cv3.1.0", 8, 4),
            ]
        },
        not_measured=frozenset({"model.7.sigmoid()"}),
    ),
    "Llama": Expected(language("silu", "swiglu")),
    # The caps of the attention scores are of no neurons; the cap of the logits is an output.
    "Gemma 2": Expected(
        {**language("gelu", "geglu"), "lm_head/tanh": (64, 14)},
        outputs=frozenset({"lm_head/tanh"}),
        not_neurons=frozenset(f"model.layers.{number}.self_attn.tanh()" for number in range(2)),
    ),
    "Mixtral": Expected({}),  # how many tokens an expert gets depends on the router: see below
    "Mamba": Expected(
        {f"backbone.layers.{number}.mixer.{site}": found for number in range(2) for site, found in MAMBA.items()},
        not_measured=frozenset(f"backbone.layers.{number}.mixer.act" for number in range(2)),
    ),
    "BERT": Expected(
        {
            "bert.encoder.layer.0.intermediate.dense/gelu": (24, 14),
            "bert.encoder.layer.1.intermediate.dense/gelu": (24, 14),
            "cls.predictions.transform.dense/gelu": (16, 14),
        }
    ),
    "T5": Expected(
        {
            "encoder.block.0.layer.1.DenseReluDense.wi/relu": (24, 14),
            "decoder.block.0.layer.2.DenseReluDense.wi/relu": (24, 14),
        }
    ),
    "Whisper": Expected(
        {
            "model.encoder.conv1/gelu": (16, 2 * 20),
            "model.encoder.conv2/gelu": (16, 2 * 10),
            "model.encoder.layers.0.fc1/gelu": (24, 2 * 10),
            "model.decoder.layers.0.fc1/gelu": (24, 14),
        }
    ),
    "CLIP": Expected(
        {
            "vision_model.encoder.layers.0.mlp.fc1/gelu": (24, 2 * 5),
            "text_model.encoder.layers.0.mlp.fc1/gelu": (24, 14),
        }
    ),
    # The time's last layer goes through the SiLU of each block: a site for each of them.
    "diffusion U-Net": Expected(
        {
            "time_embedding.0/silu": (16, 2),
            **{f"time_embedding.2/silu{number}": (16, 2) for number in ("", "#1", "#2")},
            "down.norm1/silu": (8, 128),
            "down.norm2/silu": (16, 128),
            "mid.norm1/silu": (16, 32),
            "mid.norm2/silu": (16, 32),
            "up.norm1/silu": (32, 128),
            "up.norm2/silu": (8, 128),
            "conv_norm_out/silu": (8, 128),
        }
    ),
    "DiT": Expected(
        {
            "t_embedder.0/silu": (16, 2),
            "t_embedder.2/silu": (16, 2),
            "t_embedder.2/silu#1": (16, 2),
            "blocks.0.fc1/gelu": (32, 32),
            "blocks.1.fc1/gelu": (32, 32),
        }
    ),
    # `lin`'s units along the edges; `nn.2` at the nodes, and of each graph.
    "graph network": Expected(
        {
            **{f"conv{number}.lin/relu": (8, 6) for number in (1, 2)},
            **{f"conv{number}.nn.0/relu": (8, 6) for number in (1, 2)},
            **{f"conv{number}.nn.2/elu": (8, 6) for number in (1, 2)},
            "conv2.nn.2/relu": (8, 2),
        }
    ),
    # The second half of each layer gates the first; of a step's products the first half is the decision.
    "TabNet": Expected(
        {
            **{f"shared.bn(8:16)/{activation}": (8, 2 * 8) for activation in ("sigmoid", "glu")},
            **{f"steps.{n}.bn(8:16)/{activation}": (8, 8) for n in (0, 1) for activation in ("sigmoid", "glu")},
            **{f"steps.{n}.bn(8:12)/relu": (4, 8) for n in (0, 1)},
        }
    ),
    # Three steps of time. The first state of the cell is zeros: no product of two layers.
    "recurrent cells": Expected(
        {
            **{f"ih({units})/sigmoid": (4, 6) for units in ("0:4", "4:8", "12:16")},
            "ih(8:12)/tanh": (4, 6),
            "ih(0:4)/glu": (4, 6),
            "ih(4:8)/glu": (4, 4),
            "ih(4:8)/tanh": (4, 6),
            "ih(12:16)/glu": (4, 6),
            "rnn_in/tanh": (6, 6),
        }
    ),
    "actor-critic": Expected(
        {**ACTOR, "action_net/tanh": (2, 6)},
        {**ACTOR, "action_net/tanh": (2, 6)},
        outputs=frozenset({"action_net/tanh"}),
    ),
    # Two texts with gradients, and two of the reference without.
    "DPO with LoRA": Expected(
        language("silu", "swiglu", 28, "mlp.gate_proj.base_layer"),
        language("silu", "swiglu", 28, "mlp.gate_proj.base_layer"),
    ),
    "sparse autoencoder": Expected({"W_enc/relu": (32, 16)}),
}


#: In the clients where a flow of units ends before an activation: the operators that end it. A row of docs/coverage.md.
ENDED_BY = {"RetinaNet": {"cat"}, "YOLO": {"cat"}, "Gemma 2": {"matmul"}}

#: What is found in each client, in a sentence: a column of the table in docs/coverage.md.
FOUND = {
    "RetinaNet": "Each head's ReLUs are one site, over all levels; the overlaps of boxes and the loss are no neurons",
    "DETR": "Backbone, encoder, decoder and the boxes' small network; the boxes' sigmoid is an output",
    "YOLO": "One SiLU object, fifteen sites; the sigmoid of all levels' scores is of several layers",
    "Llama": "Gate and SwiGLU product of each layer, one neuron together",
    "Gemma 2": "Gate and GeGLU product; caps of attention scores are no neurons; the cap of the logits is an output",
    "Mixtral": "Gate and SwiGLU product of each expert",
    "Mamba": "The convolution, the step size, and the gated half of `in_proj`",
    "BERT": "The feed-forward layers, and the transform of the language head",
    "T5": "The feed-forward layers of encoder and decoder",
    "Whisper": "Both convolutions, and the feed-forward layers of encoder and decoder",
    "CLIP": "The feed-forward layers of both towers; the comparison of all pairs has no site",
    "diffusion U-Net": "Group norms name the sites; the time's last layer has one for each block that it goes to",
    "DiT": "The feed-forward layers; the condition's last layer has one site for each block",
    "graph network": "Along the edges, at the nodes, and of whole graphs after they are added up",
    "TabNet": "Gates written by hand with their units; the layer that all steps share is one site",
    "recurrent cells": "The gates by their units of `ih`, over all steps of time; the plain cell",
    "actor-critic": "The rollout without gradients is `inference`; the squashed action is an output",
    "DPO with LoRA": "The sum of base and branch is the base's; the reference is `inference`",
    "sparse autoencoder": "The latents, named by the parameter",
}


def watched(name: str) -> ns.Scope:
    package = PACKAGES.get(name)
    if package is not None:
        pytest.importorskip(package, exc_type=ImportError)
    torch.manual_seed(0)
    model, loss = CLIENTS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ns.watch(model, every_n_steps=1) as scope:
            for _ in range(STEPS):
                loss(model).backward()
                scope.step()
                model.zero_grad()
    return scope


def found(scope: ns.Scope, phase: str) -> dict[str, tuple[int, float]]:
    return {site: (tally.neurons, tally.positions / STEPS) for site, tally in scope.census(phase).items()}


@pytest.mark.parametrize("name", CLIENTS)
def test_the_sites_of_a_client_are_those_that_a_person_would_name(name: str) -> None:
    expected = EXPECTED[name]
    with ending_operators() as ended_by:
        scope = watched(name)
    assert set(ended_by.values()) == ENDED_BY.get(name, set())
    if expected.sites:
        assert found(scope, "train") == dict(expected.sites)
        assert {tally.axis_source for tally in scope.census("train").values()} == {
            f"layer ({tally.layer})" for tally in scope.census("train").values()
        }
    if expected.inference:
        assert found(scope, "inference") == dict(expected.inference)
        assert not any(tally.gradient_positions for tally in scope.census("inference").values())
    report = scope.report()
    assert {layer.name for layer in report.layers if layer.output} == expected.outputs
    assert {each.name for each in report.not_measured} == expected.not_measured
    assert set(scope.not_neurons()) == expected.not_neurons


def test_every_client_has_an_expectation() -> None:
    assert list(EXPECTED) == list(CLIENTS) == list(FOUND)


#: Sites whose input is what the layer gave, unchanged, at all of its calls: there a plain hook can count.
DIRECT = {
    "RetinaNet": [
        "backbone.stem.1",
        *(f"head.{h}_head.conv.{n}.0" for h in ("classification", "regression") for n in range(4)),
    ],
    "DETR": ["model.encoder.layers.0.mlp.fc1", "model.decoder.layers.1.mlp.fc1", "bbox_predictor.layers.0"],
    "T5": ["encoder.block.0.layer.1.DenseReluDense.wi", "decoder.block.0.layer.2.DenseReluDense.wi"],
    "graph network": ["conv1.nn.0", "conv2.nn.0"],
}


@pytest.mark.parametrize("name", DIRECT)
def test_the_zeros_of_a_clients_relus_are_those_that_plain_hooks_on_its_layers_count(name: str) -> None:
    """Hooks on the layers themselves, no function mode: a layer that runs at several levels is counted over all."""
    package = PACKAGES.get(name)
    if package is not None:
        pytest.importorskip(package, exc_type=ImportError)
    counts: dict[str, Tensor] = {}

    def count(layer: str, module: nn.Module) -> Any:
        axis = 1 if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) else -1

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            rows = output.detach().movedim(axis, -1).flatten(0, -2)
            counts[layer] = counts.get(layer, 0) + (rows <= 0).sum(0)

        return hook

    torch.manual_seed(0)
    model, loss = CLIENTS[name]()
    modules = dict(model.named_modules())
    for layer in DIRECT[name]:
        modules[layer].register_forward_hook(count(layer, modules[layer]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ns.watch(model, every_n_steps=1) as scope:
            for _ in range(STEPS):
                loss(model).backward()
                scope.step()
    for layer in DIRECT[name]:
        assert scope.census("train")[f"{layer}/relu"].zero_outputs.tolist() == counts[layer].tolist()


def test_the_table_of_clients_in_the_docs_names_all_of_them() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
    section = page.partition("## Real clients")[2]
    assert [name for name in CLIENTS if f"| {name} |" not in section] == []


def test_each_expert_of_mixtral_has_sites_and_each_token_is_counted_at_two_of_them() -> None:
    sites = found(watched("Mixtral"), "train")
    names = {
        f"model.layers.{layer}.mlp.experts.gate_up_proj.{{}}(0:24)/{act}"
        for layer in range(2)
        for act in ("silu", "swiglu")
    }
    assert set(sites) == {name.format(expert) for name in names for expert in range(3)}
    assert {neurons for neurons, _ in sites.values()} == {24}
    for name in names:
        assert sum(sites[name.format(expert)][1] for expert in range(3)) == 2 * 14
