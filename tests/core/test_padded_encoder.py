"""nn.TransformerEncoder in evaluation packs padded input into nested tensors: a watched one must go on doing so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuronscope as ns


@pytest.mark.parametrize("every_n_steps", [1, 1000])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_watched_encoder_with_padding_gives_the_outputs_of_an_unwatched_one(every_n_steps: int) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        alone = encoder(x, src_key_padding_mask=padding)
        with ns.watch(encoder, every_n_steps=every_n_steps) as scope, scope.phase("val"):
            watched = encoder(x, src_key_padding_mask=padding)
    assert (alone[padding] == 0).all()  # what nested tensors leave where the input is padding
    torch.testing.assert_close(watched, alone)
    assert not scope.census("val")
    assert [item.name for item in scope.report("val").not_measured] == ["(root)"]


def test_functional_activations_of_an_encoder_without_padding_are_counted() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    with torch.no_grad(), ns.watch(encoder) as scope, scope.phase("val"):
        encoder(torch.randn(3, 5, 16))
    tally = scope.census("val")["layers.0.linear1/relu"]
    assert (tally.neurons, tally.positions, tally.examples) == (32, 15, 3)
