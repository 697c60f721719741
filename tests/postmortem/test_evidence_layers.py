"""Layers from names and shapes: row i leads into neuron i, however the weight is stored; the rest is left out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from neuronscope.checkpoints.file.layers import NEURON_KINDS, find_layers, find_projections
from scripts.dying_networks import Held


class Conv1D(nn.Module):
    """As in GPT-2: the weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


class Gpt(nn.Module):
    """A square `c_proj` beside one that is not: the square one is transposed as its namesake is."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_proj = Conv1D(6, 6)
        self.mlp.c_fc, self.mlp.c_proj = Conv1D(6, 24), Conv1D(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp.c_proj(self.mlp.c_fc(self.attn.c_proj(x)))


def held(model: nn.Module) -> dict[str, Held]:
    return {name: Held(tensor) for name, tensor in model.state_dict().items()}


#: label, layer, its input, its kind
STORED = [
    ("linear", nn.Linear(5, 3), (2, 5), "linear"),
    ("linear, no bias", nn.Linear(5, 3, bias=False), (2, 5), "linear"),
    ("conv1d", nn.Conv1d(4, 6, 3), (2, 4, 9), "conv"),
    ("conv2d", nn.Conv2d(4, 6, 3), (2, 4, 5, 5), "conv"),
    ("conv2d, grouped", nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), "conv"),
    ("conv3d", nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3), "conv"),
    ("transposed conv2d", nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), "conv"),
    ("GPT-2's Conv1D", Conv1D(5, 3), (2, 5), "linear"),
    ("weight norm", parametrizations.weight_norm(nn.Linear(5, 3)), (2, 5), "linear"),
    ("weight norm, convolution", parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), (2, 4, 5, 5), "conv"),
    ("weight norm of old", old_weight_norm(nn.Linear(5, 3)), (2, 5), "linear"),
    ("spectral norm", parametrizations.spectral_norm(nn.Linear(5, 3)), (2, 5), "linear"),
]


@pytest.mark.parametrize(("layer", "shape", "kind"), [row[1:] for row in STORED], ids=[row[0] for row in STORED])
def test_row_i_gets_the_gradient_of_neuron_i_and_no_other(layer, shape, kind):
    model = nn.Sequential(layer)
    (found,) = find_layers(held(model))
    assert (found.path, found.kind) == ("0", kind)
    parameters = dict(model.named_parameters())
    assert set(found.incoming) == set(parameters)  # nothing of the layer is missed
    x = torch.randn(shape)
    for neuron in range(found.width):
        model.zero_grad()
        model(x).select(1, neuron).square().sum().backward()
        for name in found.incoming:
            rows = found.rows(parameters[name].grad)
            assert rows.shape[0] == found.width
            if "spectral" in str(type(layer)) or "Spectral" in str(layer):
                continue  # its norm is one of the whole matrix: every row gets a share of the gradient
            assert torch.nonzero(rows.ne(0).any(dim=1)).flatten().tolist() == [neuron], name


def test_a_square_weight_goes_by_its_namesakes():
    model = Gpt()
    found = {layer.path: layer for layer in find_layers(held(model))}
    assert [(path, layer.axis, layer.width, layer.inputs) for path, layer in found.items()] == [
        ("attn.c_proj", 1, 6, 6),  # square: told by mlp.c_proj
        ("mlp.c_fc", 1, 24, 6),
        ("mlp.c_proj", 1, 6, 24),
    ]
    assert all(layer.axis_known for layer in found.values())


def test_without_a_namesake_a_square_weight_is_taken_as_usual_and_said_to_be_unsure():
    (layer,) = find_layers(held(nn.Sequential(nn.Linear(4, 4))))
    assert (layer.axis, layer.axis_known) == (0, False)


def test_the_columns_of_a_weight_are_the_inputs_of_its_layer():
    reader = nn.Conv2d(3, 5, 2)
    reader.weight.data[:, 1] = 0
    (layer,) = find_layers(held(nn.Sequential(reader)))
    assert (layer.columns(reader.weight) == 0).all(dim=1).tolist() == [False, True, False]
    reader = Conv1D(3, 5)
    reader.weight.data[2] = 0
    (layer,) = find_layers(held(nn.Sequential(reader)))
    assert (layer.columns(reader.weight) == 0).all(dim=1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("wte.weight", (50, 8), "embedding"),
        ("transformer.wpe.weight", (50, 8), "embedding"),
        ("model.embed_tokens.weight", (50, 8), "embedding"),
        ("bert.embeddings.word_embeddings.weight", (50, 8), "embedding"),
        ("tok_embeddings.weight", (50, 8), "embedding"),
        ("embedding.weight", (50, 8), "embedding"),
        ("shared.weight", (50, 8), "embedding"),  # T5's
        ("block.0.SelfAttention.relative_attention_bias.weight", (32, 8), "embedding"),
        ("lm_head.weight", (50, 8), "linear"),
        ("remember.weight", (50, 8), "linear"),  # "ember" is no embedding
        ("norm.weight", (8,), "norm"),
        ("block.experts.up.weight", (4, 8, 16), "experts"),
        ("block.experts.gate_up_proj", (4, 8, 16), "experts"),
        ("attention.in_proj_weight", (24, 8), None),
        ("lstm.weight_ih_l0", (24, 8), None),
        ("q_proj.lora_A.default.weight", (4, 8), None),
        ("scale.weight", (), None),
        ("void.weight", (0, 8), None),
        ("sevenfold.weight", (2,) * 7, None),
    ],
)
def test_layers_are_recognised_by_the_names_of_their_weights(name, shape, kind):
    found = find_layers({name: Held(torch.zeros(shape))})
    assert [layer.kind for layer in found] == ([] if kind is None else [kind])
    assert (kind in NEURON_KINDS) == (kind in ("linear", "conv"))


def test_integer_tensors_are_not_weights():
    assert find_layers({"fc.weight": Held(torch.zeros(3, 4, dtype=torch.int8))}) == ()


def test_a_bias_that_fits_no_dimension_is_not_a_layer():
    tensors = {"fc.weight": Held(torch.zeros(3, 4)), "fc.bias": Held(torch.zeros(7))}
    assert find_layers(tensors) == ()


SORTED = {
    "names before the layers'": ({"classifier": (3, 6), "embeddings": (9, 4), "layers.0": (6, 4)}, "classifier"),
    "a flattened picture": (
        {"classifier": (10, 576), "features.0": (8, 3, 3, 3), "features.2": (64, 8, 3, 3)},
        "classifier",
    ),
    "a fused gate": ({"lm_head": (97, 8), "mlp.down_proj": (8, 24), "mlp.gate_up_proj": (48, 8)}, "lm_head"),
    "a tied embedding": ({"embed_tokens": (97, 8), "mlp.down_proj": (8, 24), "mlp.gate_up_proj": (48, 8)}, None),
    "attention": ({"attn.qkv_proj": (20, 8), "attn.v_proj": (4, 8), "lm_head": (97, 8)}, "lm_head"),
    "as many outputs as divide the inputs": ({"fc1": (50, 800), "fc2": (10, 50)}, "fc2"),
}


@pytest.mark.parametrize("case", SORTED)
def test_in_sorted_names_the_layer_that_no_other_one_reads_gives_the_outputs(case: str) -> None:
    """The names of a safetensors file are sorted: the last layer of the file may be any of the network."""
    shapes, output = SORTED[case]
    layers = find_layers({f"{name}.weight": Held(torch.zeros(shape)) for name, shape in shapes.items()})
    found = find_projections(layers, is_ordered=False)
    assert [path for path, kind in found.items() if kind == "output"] == ([] if output is None else [output])
