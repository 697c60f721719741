"""Counts agree with counts that were made by brute force, elsewhere, on real networks (see data/README.md).

They equal, as integers, a recount in this process; the stored ones differ by no more positions than lie within rounding
of zero, of which processors see each its own (:mod:`tests.truth.recount`), and the same neurons are dead.

The networks are the hard cases: one in-place ReLU module used twice a block, GELU on NHWC, functional ReLU twice a
block with option-A shortcuts, activations that see flattened (tokens, features), and MLPs that really died.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.truth.recount import Recount, may_differ

DATA = Path(__file__).parent / "data"


def sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digits(activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), activation()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


class Block(nn.Module):
    """Basic block of a CIFAR ResNet: functional ReLU twice, a shortcut without weights (He et al. 2015, option A)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.pad = (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu(y)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(F.avg_pool2d(y, y.shape[3]).flatten(1))


def torchvision_net(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    return getattr(models, name)(weights=None)


def opt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=256,
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=128,
        dropout=0.0,
    )
    return transformers.OPTForCausalLM(config)


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[Any], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    dead: int


IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def images(z: Any) -> tuple[Tensor, Tensor]:
    x = (torch.from_numpy(z["x_uint8"]).float() / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return x, torch.from_numpy(z["y"])


def rows(z: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(z["x"]), torch.from_numpy(z["y"])


def tokens(z: Any) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(z["ids"])
    return ids, ids


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def language_model(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(input_ids=x, labels=y).loss


CASES = {
    "digits_relu_spike_seed0": Case(lambda: digits(nn.ReLU), rows, cross_entropy, 220),
    "digits_gelu_spike_seed0": Case(lambda: digits(nn.GELU), rows, cross_entropy, 0),
    "tv_resnet18_train": Case(lambda: torchvision_net("resnet18"), images, cross_entropy, 0),
    "tv_convnext_tiny": Case(lambda: torchvision_net("convnext_tiny"), images, cross_entropy, 0),
    "cifar_resnet20_pretrained": Case(ResNet20, images, cross_entropy, 18),
    "hf_opt": Case(opt, tokens, language_model, 4),
}


def place_of(truth: dict[str, Any]) -> str:
    """The place of a site of the truth, whose id is ``<innermost module path>#<call>``."""
    path, _, call = truth["site"].rpartition("#")
    functional = truth["functional"]
    base = f"{path}.relu()" if functional and path else "relu()" if functional else path
    return base if call == "0" else f"{base}#{call}"


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(size), y.split(size), strict=True)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Two runs have the same bits where the order of sums is the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", CASES)
def test_counts_equal_the_stored_counts(name: str) -> None:
    """Equal to a recount by the slow twin, and to the stored counts but for what lies within rounding of zero."""
    case = CASES[name]
    with np.load(DATA / f"{name}.npz") as file:
        truth = dict(file)
    meta = json.loads(str(truth["meta_json"]))
    torch.manual_seed(meta.get("seed", 0))
    model = case.build()
    weights = DATA / f"{name}_weights.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    counted = sha256(model) == meta["state_sha256"]
    assert counted or not weights.exists(), "the network is not the one that was counted"
    model.train(meta["mode"] == "train")
    with np.load(DATA / f"{name}_inputs.npz") as file:
        x, y = case.inputs(file)
    functional = name == "cifar_resnet20_pretrained"
    places = {place_of({**site, "functional": functional}): site for site in meta["sites"]}

    recount = Recount({place: site["unit_dim"] for place, site in places.items()})
    twin = copy.deepcopy(model)
    with recount.attach(twin):
        for inputs, targets in batches(x, y, meta["batch_size"]):
            recount.backward(case.loss(twin, inputs, targets))
    with ns.watch(model) as scope:
        for inputs, targets in batches(x, y, meta["batch_size"]):
            model.zero_grad()
            case.loss(model, inputs, targets).backward()
            scope.step()
        census = scope.census("train")
        report = scope.report("train")

    assert [*census] == [*recount.counts]
    for (known, tally), (place, site) in zip(census.items(), places.items(), strict=True):
        assert tally.info.place == place.partition("#")[0]
        assert tally.positions == site["n_positions"]
        assert tally.gradient_positions == site["grad_in_n"]
        assert tally.axis == site["unit_dim"] % len(site["shape_last_batch0"])
        assert not tally.axis_source.startswith("assumed")
        assert tally.examples == len(x)
        counts = recount.counts[known]
        for part, stored in (("zero_outputs", "zero_count"), ("zero_gradients", "gradin_zero_count")):
            ours = getattr(tally, part)
            np.testing.assert_array_equal(ours, counts[part], err_msg=f"{known}: {part}")
            if counted:
                assert_within(ours, truth[f"{site['id']}_{stored}"], counts[f"{part}_may_differ"])
        if counted:
            dead = truth[f"{site['id']}_zero_count"] == site["n_positions"]
            np.testing.assert_array_equal(tally.zero_outputs == tally.positions, dead, err_msg=known)
    if not counted:
        pytest.skip("agrees with the recount; other weights are drawn from the seed here than where it was counted")
    assert report.dead == case.dead


def assert_within(ours: np.ndarray, stored: np.ndarray, may_differ: np.ndarray) -> None:
    """No neuron's counts lie further apart than as many positions as may differ."""
    apart = np.abs(ours - stored)
    wrong = np.flatnonzero(apart > may_differ)
    assert not len(wrong), f"neurons {wrong}: {apart[wrong]} apart, where {may_differ[wrong]} may differ"


def test_a_layer_without_values_near_zero_has_no_tolerance() -> None:
    x = torch.tensor([[-3.0, -1.0, 2.0], [1.0, 4.0, -2.0]])
    for function in (F.relu, F.gelu):
        outputs, gradients = may_differ(function, x, torch.ones(2, 3))
        assert not outputs.any()
        assert not gradients.any()
    with pytest.raises(AssertionError, match=r"neurons \[1\]: \[1\] apart"):
        assert_within(np.array([4, 5]), np.array([4, 6]), np.zeros(2, dtype=np.int64))


def test_only_values_within_rounding_of_zero_may_be_counted_differently() -> None:
    x = torch.tensor([[-1e-7, 1e-7, 0.0, 1e-3, -3.0, 4.0]])
    outputs, gradients = may_differ(F.relu, x, torch.ones(1, 6))
    assert outputs.tolist() == gradients.tolist() == [[True, True, True, False, False, False]]
    # GELU is x times a difference that rounds to zero near -5.5; far below, every processor gives zero.
    x = torch.tensor([[-9.0, -5.52, -5.0, 3.0]])
    assert may_differ(F.gelu, x, torch.ones(1, 4))[0].tolist() == [[False, True, False, False]]
    # GELU's slope is a difference that rounds to zero at its minimum.
    x = torch.tensor([[-0.7517916, -0.75, -0.5, 3.0]])
    assert may_differ(F.gelu, x, torch.ones(1, 4))[1].tolist() == [[True, False, False, False]]
    # Gradients: a sum that all but cancels, and a product that all but underflows; not where no gradient can pass.
    x = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0]])
    gradient = torch.tensor([[1.0, 1e-8, 1e-8], [1e-40, 1e-9, 1e-9]])
    assert may_differ(F.relu, x, gradient)[1].tolist() == [[False, True, False], [True, False, False]]
