"""What a trace must not miss: changes behind our back, chance, other paths, readers that are not seen. And the ties."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.checkpoints.model.examine_model import Examination, examine_model
from neuronscope.checkpoints.model.example_inputs import examples_for
from neuronscope.checkpoints.verdict.evidence import Evidence


class Net(nn.Module):
    """``fc`` → ReLU → ``out``; the bias proves neuron 0 dead in the box (0, 1). Cases override :meth:`between`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.act = nn.ReLU()
        self.out = nn.Linear(3, 2)
        self.register_buffer("level", torch.zeros(3))
        with torch.no_grad():
            self.fc.weight.fill_(0.25)
            self.fc.bias.copy_(torch.tensor([-1.0, 0.0, 0.0]))
            self.out.weight[:, 2] = 0

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Any:
        return self.out(self.act(self.between(self.fc(x))))


def unseen(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():  # as a kernel of one's own would be
        return x * 2 + 5


class Nothing(Net):
    pass


class AliasChanged(Net):
    def between(self, h: Tensor) -> Tensor:
        h.view(-1).add_(5.0)  # h itself is another tensor now
        return h


class ItemChanged(Net):
    def between(self, h: Tensor) -> Tensor:
        h[:, 0] = 5.0
        return h


class DataChanged(Net):
    def between(self, h: Tensor) -> Tensor:
        h.data.add_(5.0)
        return h


class OutGiven(Net):
    def between(self, h: Tensor) -> Tensor:
        torch.add(h, 5.0, out=h)
        return h


class BufferChanged(Net):
    def between(self, h: Tensor) -> Tensor:
        self.level += h.abs().max() + 5
        return h + self.level


class BufferReplaced(Net):
    def between(self, h: Tensor) -> Tensor:
        self.level.fill_(5.0)
        return h + self.level


class BufferPartReplaced(Net):
    def between(self, h: Tensor) -> Tensor:
        self.level.view(-1).fill_(5.0)
        return h + self.level


class ScratchChanged(Net):
    def between(self, h: Tensor) -> Tensor:
        scratch = torch.full((3,), 5.0)
        h = h + scratch
        scratch.zero_()
        return h


class Branches(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + 5 if h.max() > 3 else h


class BranchesOnItem(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + round(h.sum().item())


class Chooses(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + 5 * len(h[h > 3])


class Slices(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + 5 * len(h[0, : (h > 3).sum()])


class Draws(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + 5 * torch.rand(3)


class DropsAlways(Net):
    def between(self, h: Tensor) -> Tensor:
        return F.dropout(-h, 0.5, training=True) + 1


class DrawsInNumpy(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + torch.tensor(5 * np.random.rand(), dtype=h.dtype)  # noqa: NPY002


class DrawsInPython(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + 5 * random.random()


class Unseen(Net):
    def between(self, h: Tensor) -> Tensor:
        return unseen(h)


class UnknownFunction(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.special.bessel_j0(h) * 3 + torch.logit(torch.sigmoid(h))


class NotWritten(Net):
    def between(self, h: Tensor) -> Tensor:
        return h + torch.empty(3)  # whatever lay there


NOT_PROVED = [
    *(
        AliasChanged,
        ItemChanged,
        DataChanged,
        OutGiven,
        BufferChanged,
        BufferReplaced,
        BufferPartReplaced,
        ScratchChanged,
        Branches,
        BranchesOnItem,
    ),
    *(Chooses, Slices, Draws, DropsAlways, DrawsInNumpy, DrawsInPython, Unseen, UnknownFunction, NotWritten),
]


def claims(model: nn.Module, **options: Any) -> dict[str, list[int]]:
    proved = [one for one in examine_model(model, **options).evidence if one.basis == "proved"]
    return {f"{one.layer} {one.claim}": one.neurons.tolist() for one in proved}


def layers_of_sites(found: Examination) -> dict[str, tuple[str, ...]]:
    return {site.name: tuple(layer for layer, *_ in site.units) for site in found.sites}


@pytest.mark.parametrize("kind", [Nothing, *NOT_PROVED], ids=lambda kind: kind.__name__)
def test_nothing_is_proved_of_a_tensor_that_was_changed_outside_of_the_trace(kind: type[Net]) -> None:
    model = kind()
    found = claims(model, box=(0.0, 1.0))
    assert found.get("fc/relu dead", []) == ([0] if kind is Nothing else [])
    fires = torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(20):
            fires |= (
                model.act(model.between(model.fc(torch.rand(64, 2) * 100 if kind is Branches else torch.rand(64, 2))))
                > 0
            ).any(0)
    assert kind in (Nothing, Branches, BranchesOnItem, Chooses, Slices, UnknownFunction, NotWritten) or bool(
        fires[0]
    )  # it was right to be careful


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branches, "__bool__"),
        (BranchesOnItem, "item"),
        (Chooses, "__getitem__"),
        (Slices, "__getitem__"),
        (DrawsInPython, "random"),
        (DataChanged, "__get__"),
    ],
)
def test_paths_that_the_example_did_not_take_are_reported(kind: type[Net], reason: str) -> None:
    found = examine_model(kind(), box=(0.0, 1.0))
    assert [
        one for one in found.abstentions if reason in one.reason and "another input may take another path" in one.reason
    ]
    assert layers_of_sites(found) == {"fc/relu": ("fc",)} or kind is not DataChanged


def test_with_consumers_that_were_not_traced_no_neuron_is_called_unread() -> None:
    class Reads(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.act(self.fc(x))
            return self.out(h), unseen(h)

    assert claims(Net())["fc/relu unread"] == [2]
    found = examine_model(Reads())
    assert not [one for one in found.evidence if one.claim == "unread"]
    assert [one for one in found.abstentions if one.source == "readers" and "not seen" in one.reason]


def test_tracing_leaves_the_model_unchanged() -> None:
    model = BufferChanged().train()
    model.fc.weight.grad = torch.ones(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    examine_model(model, example=torch.zeros(1, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert bool((model.fc.weight.grad == 1).all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())


# --- who reads whom --------------------------------------------------------------------------------------------------


class Readers(nn.Module):
    """Neuron 0 is read by zero weights only, 1 by a dead neuron only, 2 by an unread one only, 3 by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 1)
        with torch.no_grad():
            #                                          0    1    2    3
            self.second.weight.copy_(torch.tensor([[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]]))
            self.second.bias.copy_(torch.tensor([-0.5, 1.0, 1.0]))  # −h₁ − ½ < 0 whatever h₁ ≥ 0: dead
            self.third.weight.copy_(torch.tensor([[1.0, 0.0, 1.0]]))  # nobody reads the second's 1

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


def test_unread_neurons_of_linear_layers_equal_those_found_by_hand() -> None:
    found = claims(Readers())
    # Neuron 0 of the second is dead; its output, always 0, is read by the third's weight 1.
    assert found == {"second/relu dead": [0], "first/relu unread": [0, 1, 2], "second/relu unread": [1]}


class Convolutions(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=groups)
        self.fc = nn.Linear(4, 2)
        with torch.no_grad():
            self.norm.weight[1] = 0
            self.second.weight[:, 0] = 0  # input channel 0; with two groups also 2
            self.up.weight[3] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.relu(self.norm(x))
        x = F.relu(self.second(x))
        return self.fc(F.relu(self.up(x)).mean((2, 3)))


@pytest.mark.parametrize(("groups", "second"), [(1, [0]), (2, [0, 2])])
def test_unread_neurons_of_convolutions_are_found(groups: int, second: list[int]) -> None:
    found = claims(Convolutions(groups))
    # The first is read by the norm, whose γ₁ is 0, and behind it by what reads the norm; with β₁ = 0 it is dead there.
    assert found["norm/relu unread"] == second
    assert found["first/relu unread"] == sorted({1, *second})
    assert found["second/relu unread"] == [3]
    assert found["norm/relu dead"] == [1]


def test_a_dead_gate_makes_the_other_factor_unread() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
            self.up_act = nn.Tanh()
            self.gate.bias.data.copy_(torch.tensor([-9.0, 0.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.gate(x)) * self.up_act(self.up(x)))

    found = claims(Gated(), box=(-1.0, 1.0))
    assert found == {
        "gate/reglu dead": [0],  # the gate and its product are one neuron, judged by the product
        "up/tanh unread": [0],
    }


def test_unbatched_images_and_stacked_weights_read_all_neurons() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.stack = nn.Conv2d(3, 3, 1), nn.Parameter(torch.zeros(3, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(F.max_pool2d(F.relu(x), 2))) @ self.stack

    assert claims(Odd(), example=torch.zeros(3, 10, 10)) == {}


def test_a_site_that_did_not_run_is_reported() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.GELU()

    assert [one.layer for one in examine_model(Idle()).abstentions if "did not run" in one.reason] == ["other"]


# --- ties ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.branch = nn.Conv2d(4, 4, 1)
        self.flat = nn.Linear(4, 6)
        self.gate, self.up = nn.Linear(6, 5), nn.Linear(6, 5)
        self.again = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.relu(self.branch(x) + x)  # a sum: the branch alone is not what the neuron gets
        x = F.gelu(self.flat(x.mean((2, 3))) * 0.5)
        x = F.silu(self.gate(x)) * self.up(x)
        return torch.tanh(self.again(torch.sigmoid(self.again(x))))


def test_sites_know_their_layers_and_the_layers_that_norms_normalise() -> None:
    found = examine_model(Tied(), example=torch.zeros(1, 1, 8, 8))
    assert layers_of_sites(found) == {
        "norm/relu": ("norm",),
        "branch/relu": ("branch",),
        "flat/gelu": ("flat",),
        "gate/silu": ("gate",),
        "gate/swiglu": ("gate",),
        "again/sigmoid": ("again",),
        "again/tanh": ("again",),
    }
    assert {site.name: site.normalises for site in found.sites if site.normalises} == {"norm/relu": "conv"}


@pytest.mark.parametrize(
    "scale",
    [
        lambda x: x.mul(0.5),
        lambda x: x.multiply(0.5),
        lambda x: torch.multiply(x, 0.5),
        lambda x: torch.true_divide(x, 2),
        lambda x: torch.subtract(x, 1),
        lambda x: torch.negative(x),
    ],
    ids=["mul", "multiply", "torch.multiply", "true_divide", "subtract", "negative"],
)
def test_a_layer_is_found_before_every_spelling_of_a_scaling(scale: Callable[[Tensor], Tensor]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(3, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(scale(self.fc(x)))

    assert layers_of_sites(examine_model(Scaled())) == {"fc/relu": ("fc",)}


# --- example inputs --------------------------------------------------------------------------------------------------


class Own(nn.Sequential):
    example_input_array = torch.zeros(7, 2)


@pytest.mark.parametrize(
    ("model", "options", "origin"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), {}, "guessed from the first layer, Linear"),
        (nn.Sequential(nn.Conv1d(2, 3, 5), nn.ReLU()), {}, "guessed from the first layer, Conv1d"),
        (nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU()), {}, "guessed from the first layer, Conv3d"),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.ReLU()), {}, "guessed from the first layer, Embedding"),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()), {}, "guessed from the first layer, LayerNorm"),
        (
            nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU()),
            {},
            "guessed from the first layer, BatchNorm2d",
        ),
        (Own(nn.Linear(2, 3), nn.ReLU()), {}, "example_input_array"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.ReLU()), {"batch": (torch.zeros(2, 3, 4), 0)}, "first batch"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), {"example": torch.zeros(3, 2)}, "that was given"),
    ],
)
def test_an_example_input_is_found_for_common_models(model: nn.Module, options: dict[str, Any], origin: str) -> None:
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.fill_(-1e4)
    (dead,) = (one for one in examine_model(model, box=(-1.0, 1.0), **options).evidence if one.claim == "dead")
    assert origin in dead.text


def test_a_recurrent_network_is_traced_with_a_sequence() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc, self.relu = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(self.rnn(x)[1][-1]))

    found = examine_model(Encoder())
    assert layers_of_sites(found) == {"fc/relu": ("fc",)}
    assert [(one.layer, "fused kernel" in one.reason) for one in found.abstentions] == [("rnn", True)]


def test_when_no_example_fits_the_error_lists_what_was_tried() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.relu(self.fc(a + b))

    found = examine_model(Odd())
    assert (found.evidence, found.sites) == ((), ())
    (only,) = found.abstentions
    assert "1 × 2): TypeError" in only.reason
    assert "Give an example input" in only.reason
    for example in ((torch.zeros(1, 2), torch.zeros(1, 2)), {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}):
        assert layers_of_sites(examine_model(Odd(), example=example)) == {"fc/relu": ("fc",)}
    assert len(list(examples_for(nn.ReLU()))) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": 3}, "Expected argument `box` to be \\(low, high\\), but got 3"),
        ({"box": (1.0, 0.0)}, "low ≤ high"),
        ({"box": (torch.zeros(3), 1.0)}, "broadcast to the input's \\(1, 2\\)"),
    ],
)
def test_wrong_arguments_of_the_trace_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examine_model(Net(), example=torch.zeros(1, 2), **options)


def test_an_input_box_may_have_bounds_for_each_feature() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    model[0].weight.data.copy_(torch.tensor([[1.0, 1.0]]))
    model[0].bias.data.fill_(-1.5)
    low = torch.zeros(2)
    assert claims(model, box=(low, torch.tensor([1.0, 0.4]))) == {"0/relu dead": [0]}
    assert claims(model, box=(low, torch.tensor([1.0, 0.6]))) == {}


def test_the_evidence_of_a_traced_model_covers_every_neuron() -> None:
    found = examine_model(Net(), box=(0.0, 1.0))
    assert all(isinstance(one, Evidence) and one.width == 3 and one.layer == "fc/relu" for one in found.evidence)
    (dead,) = (one for one in found.evidence if one.claim == "dead")
    assert dead.numbers.tolist() == pytest.approx([-0.5], abs=1e-5)  # ¼ + ¼ − 1
    assert "between 0 and 1" in dead.text
