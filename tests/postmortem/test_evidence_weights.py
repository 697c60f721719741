"""Zero rows, rows that are not finite, neurons that nobody reads; no sound weight is accused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import neuronscope as ns
from neuronscope.checkpoints.file.layers import find_layers
from neuronscope.checkpoints.file.weights import examine_weights, sequential_readers
from neuronscope.checkpoints.model.examine_model import examine_model
from scripts.dying_networks import as_checkpoint


def examined(model: nn.Module):
    tensors = as_checkpoint(model).tensors
    return {(e.layer, e.claim): e for e in examine_weights(tensors, find_layers(tensors))}


def test_normal_weights_give_no_evidence():
    assert examined(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))) == {}


@pytest.mark.parametrize(
    ("layer", "rank"), [(nn.Linear(3, 4), 2), (nn.Conv2d(3, 4, 2), 4), (nn.ConvTranspose2d(3, 4, 2), 4)]
)
def test_rows_of_zeros_and_rows_that_are_not_finite_are_found(layer, rank):
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    with torch.no_grad():
        layer.weight.select(axis, 1).zero_()
        layer.bias[1] = -2.5
        layer.weight.select(axis, 2)[0] = math.nan
        layer.bias[3] = math.inf
    found = examined(nn.Sequential(layer))
    assert set(found) == {("0", "zero row"), ("0", "not finite")}
    zero, broken = found["0", "zero row"], found["0", "not finite"]
    assert (zero.neurons.tolist(), zero.numbers.tolist(), zero.measure) == ([1], [-2.5], "bias")
    assert broken.neurons.tolist() == [2, 3]
    # One input's weights: one of a linear layer, 2 × 2 of a convolution. And a bias.
    assert broken.numbers.tolist() == [1 if rank == 2 else 4, 1]


def with_scales(layers: list[nn.Module], scales: list[float], shifts: list[float]) -> nn.Sequential:
    """The layers, of which the second is a norm with these parameters."""
    with torch.no_grad():
        layers[1].weight.copy_(torch.tensor(scales))
        layers[1].bias.copy_(torch.tensor(shifts))
    return nn.Sequential(*layers)


def test_neurons_that_a_norm_makes_constant_are_suspected_from_the_file_and_proved_with_the_model():
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    model = with_scales(layers, [0.0, 0.0, 0.0, 1e-9], [0.0, -1.0, 0.5, -1.0])
    found = examined(model)
    assert set(found) == {("0", "dead")}
    constant = found["0", "dead"]
    assert (constant.basis, constant.neurons.tolist(), constant.numbers.tolist()) == ("suspected", [0, 1], [0.0, -1.0])
    assert (model(1e3 * torch.randn(64, 1, 3, 3)) == 0).all((0, 2, 3)).tolist()[:3] == [True, True, False]
    proved = [one for one in examine_model(model.eval()).evidence if (one.claim, one.basis) == ("dead", "proved")]
    assert [(one.site, one.neurons.tolist()) for one in proved] == [("1/relu", [0, 1])]


@pytest.mark.parametrize(
    ("activation", "is_dead"), [(nn.Hardtanh(0, 2), True), (nn.Hardswish(), False), (nn.LeakyReLU(), False)], ids=str
)
def test_with_the_model_its_activation_decides_whether_a_constant_is_death(activation, is_dead, tmp_path):
    """A norm that gives −1 is followed by zero, by −1/3 or by −1/100."""
    layers = [nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), activation, nn.Flatten(), nn.Linear(2, 2)]
    model = with_scales(layers, [0.0, 1.0], [-1.0, 1.0])
    torch.save(model.state_dict(), tmp_path / "net.pt")
    alone, known = (
        ns.postmortem(tmp_path / "net.pt", *more, **given)
        for more, given in (((), {}), ((model,), {"example": torch.zeros(2, 1, 3, 3)}))
    )
    assert (alone.dead, alone.suspected) == (0, 1)
    assert (known.dead, known.suspected) == (int(is_dead), 0)


@pytest.mark.parametrize(
    ("layers", "scales"),
    [
        ([nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)], [0.0, 0.0]),  # as residual branches are initialised
        ([nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)], [0.0, 1.0]),  # the layer has a bias of its own
        ([nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(3)], [0.0, 1.0, 1.0]),  # another width
        ([nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)), nn.BatchNorm2d(2)], [0.0, 1.0]),  # another module
        ([nn.Embedding(5, 2), nn.LayerNorm(2)], [0.0, 1.0]),
    ],
    ids=["initial", "bias", "width", "module", "embedding"],
)
def test_a_scale_of_zero_that_may_mean_something_else_is_no_death(layers, scales):
    assert examined(with_scales(layers, scales, [-1.0] * len(scales))) == {}


def test_a_magnitude_of_zero_makes_a_zero_row():
    layer = parametrizations.weight_norm(nn.Linear(3, 4))
    layer.parametrizations.weight.original0.data[2] = 0
    assert examined(nn.Sequential(layer))["0", "zero row"].neurons.tolist() == [2]


def test_a_row_of_zeros_with_a_nan_bias_is_not_finite_only():
    layer = nn.Linear(3, 4)
    layer.weight.data[0] = 0
    layer.bias.data[0] = math.nan
    assert set(examined(nn.Sequential(layer))) == {("0", "not finite")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
        lambda: nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 2)),
        lambda: nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2))}),
    ],
)
def test_neurons_that_no_layer_reads_are_found(make):
    model = make()
    _, reader = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    reader.weight.data[:, [1, 4]] = 0
    (evidence,) = examined(model).values()
    assert (evidence.claim, evidence.basis, evidence.neurons.tolist()) == ("unread", "suspected", [1, 4])
    assert evidence.width == 5


@pytest.mark.parametrize(
    "model",
    [
        nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),  # parallel, perhaps
        nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(5, 2)),  # of other sizes
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2)),  # channels are not features
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2)),  # two of the four channels each
        nn.ModuleDict({"w1": nn.Linear(3, 5), "w2": nn.Linear(5, 3), "w3": nn.Linear(3, 5)}),  # a gated block
        nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 5)), "b": nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Linear(5, 2))}),
    ],
)
def test_a_reading_layer_is_not_guessed_where_names_do_not_show_it(model):
    assert sequential_readers(find_layers(as_checkpoint(model).tensors)) == []


def test_each_tensor_is_read_once_and_none_is_kept():
    reads: list[str] = []
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    tensors = dict(as_checkpoint(model).tensors)
    for name, held in tensors.items():
        held.read = lambda name=name, read=held.read: (reads.append(name), read())[1]
    list(examine_weights(tensors, find_layers(tensors)))
    assert sorted(reads) == sorted(tensors)
