"""Neurons that training on the same data cannot revive: which layers qualify, how far momentum reaches, the proof."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.data.fixed_data import find_first_layers
from neuronscope.checkpoints.file.parameter_matching import ParameterState
from neuronscope.checkpoints.file.remaining_motion import RemainingMotion, remaining_motion
from neuronscope.checkpoints.model.example_inputs import Example
from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.errors import UsageError


class Given(nn.Module):
    """A network of one hidden layer whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], rows: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, rows)
        self.out = nn.Linear(rows, 2)
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def ahead(before: Callable[[Any, Tensor], Tensor]) -> Given:
    """A network whose layer reads what a function makes of the input."""
    return Given(lambda net, x: net.out(F.relu(net.layer(before(net, x)))))


def behind(after: Callable[[Any, Tensor], Tensor]) -> Given:
    """A network whose layer's output goes through a function."""
    return Given(lambda net, x: net.out(after(net, net.layer(x))))


def _updated(net: Any, x: Tensor) -> Tensor:
    centred = x - net.mean
    net.mean.lerp_(x.mean(0), 0.1)
    return centred


def _replaced(net: Any, x: Tensor) -> Tensor:
    centred = x - net.mean
    net.mean = net.mean * 0.9 + 0.1 * x.detach().mean(0)
    return centred


def _penalised(net: Any, x: Tensor) -> Tensor:
    net.penalty = net.layer.weight.abs().sum()
    return net.out(F.relu(net.layer(x)))


def _by_place(net: Any, x: Tensor) -> Tensor:
    return x + torch.arange(float(len(x)))[:, None]


PICTURE = torch.zeros(1, 1, 8, 8)
ROW = torch.zeros(1, 4)
QUALIFY: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), ROW),
    "no bias": (nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU()), ROW),
    "relu6": (nn.Sequential(nn.Linear(4, 3), nn.ReLU6()), ROW),
    "in place": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), ROW),
    "flattened": (nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU()), PICTURE),
    "convolution": (nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2)), PICTURE),
    "pooled": (nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)), PICTURE),
    "dropout behind": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2)), ROW),
    "norm behind": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)), ROW),
    "scaled": (ahead(lambda net, x: (x / 255 - net.mean.view(1, -1)).clamp(-3, 3)), ROW),
    "tokens": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 5, 4)),
    "circular": (nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()), PICTURE),
}
REFUSED: dict[str, tuple[nn.Module, Tensor]] = {
    "dropout before": (nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 3), nn.ReLU()), ROW),
    "norm before": (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.ReLU()), ROW),
    "layer norm before": (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.ReLU()), ROW),
    "norm between": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()), ROW),
    "leaky": (nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU()), ROW),
    "gelu": (nn.Sequential(nn.Linear(4, 3), nn.GELU()), ROW),
    "weight norm": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU()), ROW),
    "learned scale": (ahead(lambda net, x: x * net.gain), ROW),
    "computed scale": (ahead(lambda net, x: x * net.gain.exp()), ROW),
    "noise": (ahead(lambda net, x: x + torch.rand_like(x)), ROW),
    "noise in training": (ahead(lambda net, x: x + torch.rand_like(x) if net.training else x), ROW),
    "python's random": (ahead(lambda net, x: x * random.random()), ROW),
    "running mean": (ahead(_updated), ROW),
    "replaced mean": (ahead(_replaced), ROW),
    "batch mean": (ahead(lambda net, x: x - x.mean(0)), ROW),
    "examples merged": (ahead(lambda net, x: x.view(1, -1)[:, :4].expand(len(x), 4)), ROW),
    "examples turned": (ahead(lambda net, x: x.flip(0)), ROW),
    "example's place": (ahead(_by_place), ROW),
    "read elsewhere": (behind(lambda net, z: F.relu(z) + F.relu(-z)), ROW),
    "gate": (behind(lambda net, z: F.relu(z) * z), ROW),
    "returned": (Given(lambda net, x: (z := net.layer(x), net.out(F.relu(z)))), ROW),
    "half": (Given(lambda net, x: F.relu(net.layer(x).chunk(2, 1)[0]), 6), ROW),
    "tied": (behind(lambda net, z: F.relu(z) @ net.layer.weight @ net.layer.weight.T), ROW),
    "tied, directly": (behind(lambda net, z: (F.relu(z) @ net.layer.weight)[:, :3]), ROW),
    "penalty": (Given(_penalised), ROW),
    "looks at numbers": (ahead(lambda net, x: x if x.max() > 3 else -x), ROW),
    "several axes": (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(4)),
    "needs one example": (ahead(lambda net, x: x.view(1, 4)), ROW),
}


@pytest.mark.parametrize("name", QUALIFY)
def test_a_layer_that_reads_the_input_qualifies(name: str) -> None:
    found = find_first_layers(QUALIFY[name][0], Example((QUALIFY[name][1],), {}, ""))
    assert [layer.weight_name for layer in found] == [
        next(n for n, _ in QUALIFY[name][0].named_parameters() if "w" in n)
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_whose_pre_activation_has_other_causes_does_not(name: str) -> None:
    model, x = REFUSED[name]
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert isinstance(find_first_layers(model, Example((x,), {}, "")), str)
    assert not model.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def stored(tensor: Tensor) -> Any:
    """The tensor as a checkpoint holds it."""
    return SimpleNamespace(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), read=tensor.clone)


def state_of(optimizer: torch.optim.Optimizer) -> ParameterState:
    """What a checkpoint holds of an optimizer's only parameter."""
    saved = optimizer.state_dict()
    slots = {
        name: value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
        for name, value in saved["state"].get(0, {}).items()
    }
    kept = {name: stored(value) if isinstance(value, Tensor) else value for name, value in slots.items()}
    return ParameterState(0, saved["param_groups"][0], {name: one for name, one in kept.items() if one is not None})


MAKERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam, other betas": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9)),
    "Adam, long momentum": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.85), eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "NAdam, decay": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.02, dampening=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
}
NO_BOUND: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], str]] = {
    "Adam, coupled decay": (lambda p: torch.optim.Adam(p, weight_decay=0.01), "steps of full length"),
    "RAdam": (lambda p: torch.optim.RAdam(p), "RAdam"),
    "RMSprop, momentum": (lambda p: torch.optim.RMSprop(p, momentum=0.9), "RMSprop"),
    "Adagrad, decay": (lambda p: torch.optim.Adagrad(p, weight_decay=0.1), "Adagrad"),
    "Adamax": (lambda p: torch.optim.Adamax(p), "Adamax"),
    "heavy decay": (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1), "no bound"),
    "no ε": (lambda p: torch.optim.Adam(p, eps=0.0), "no bound"),
    "unknown setting": (lambda p: torch.optim.Adam([{"params": p, "trust_ratio": 0.1}]), "trust_ratio"),
}


def trained(make: Callable[[list[Tensor]], torch.optim.Optimizer], seed: int) -> tuple[Tensor, torch.optim.Optimizer]:
    """Elements that got gradients of many scales, then none for 0 to 40 steps; the first element never got any."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, generator=generator, dtype=torch.float64).abs().add(0.5).requires_grad_()
    optimizer = make([weight])
    scale = 10.0 ** torch.empty(200, dtype=torch.float64).uniform_(-6, 2, generator=generator)
    last = torch.randint(10, 50, (200,), generator=generator)
    scale[0] = 0.0
    for step in range(50):
        weight.grad = torch.where(step < last, torch.randn(200, generator=generator, dtype=torch.float64) * scale, 0.0)
        optimizer.step()
    group, kept = optimizer.param_groups[0], optimizer.state[weight]
    if group["weight_decay"] and kept.get("momentum_buffer") is not None:  # exactly what decay alone makes in the end
        ratio = group["weight_decay"] * (1 - group["dampening"]) / (1 - group["momentum"])
        kept["momentum_buffer"][0] = ratio * weight.detach()[0]
    return weight, optimizer


@pytest.mark.parametrize("schedule", ["constant", "falling", "random"])
@pytest.mark.parametrize("name", MAKERS)
def test_no_element_moves_farther_than_the_bound(name: str, schedule: str) -> None:
    for seed in range(3):
        weight, optimizer = trained(MAKERS[name], seed)
        before, motion = weight.detach().clone(), remaining_motion(state_of(optimizer), weight.detach())
        assert isinstance(motion, RemainingMotion)
        rate, farthest = motion.rate, torch.zeros_like(before)
        rates = random.Random(seed)
        for step in range(300):
            factor = {"constant": 1.0, "falling": 1 - step / 300, "random": rates.random()}[schedule]
            optimizer.param_groups[0]["lr"] = rate * factor
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            now = weight.detach()
            shrunk = now[0] / before[0]  # the element that never got a gradient shows decay alone
            farthest = torch.maximum(farthest, (now / shrunk - before).abs())
        decayed = motion.group is not None
        assert decayed == (float(shrunk) < 1 - 1e-9)
        # In float64 nothing is rounded to speak of, for which half of the bound is kept.
        assert (farthest <= motion.reach / 2 + 1e-12).all(), (farthest / motion.reach).max()
        if schedule == "constant" and farthest.max() > 0:
            assert (motion.reach / farthest.clamp_min(1e-9)).median() < 20


@pytest.mark.parametrize("name", NO_BOUND)
def test_an_optimizer_without_a_bound_is_named(name: str) -> None:
    weight, optimizer = trained(NO_BOUND[name][0], 0)
    assert NO_BOUND[name][1] in str(remaining_motion(state_of(optimizer), weight.detach()))
    assert "not known" in str(remaining_motion(None, weight.detach()))


def data() -> list[Tensor]:
    """400 examples between 0 and 1."""
    return list(torch.rand(400, 4, generator=torch.Generator().manual_seed(0)).split(64))


def network() -> nn.Sequential:
    """Of the first layer, neuron 0 fires, and 1 to 3 are far, just and hardly below zero on every example."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1))
    top = 0.2 * float(torch.cat(data()).sum(1).max())
    with torch.no_grad():
        model[0].weight.fill_(0.2)
        model[0].weight[4] = 0.0
        model[0].bias.copy_(torch.tensor([0.0, -2.0, -0.015 - top, -0.002 - top, 0.0]))
        model[2].bias.copy_(torch.tensor([-9.0, 1.0, 1.0]))
    return model


def save(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")


def after_steps(
    model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], tmp_path: Path
) -> torch.optim.Optimizer:
    """Train a network for three steps that move neuron 2 upwards, then save it with its optimizer."""
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.cat(data())).square().mean() - model[0].bias[2]).backward()
        optimizer.step()
    save(tmp_path, model, optimizer)
    return optimizer


def report(tmp_path: Path, batches: Any = None, **options: Any) -> PostmortemReport:
    return ns.postmortem(tmp_path / "a.pt", network(), data() if batches is None else batches, **options)


def test_momentum_decides_who_is_permanent(tmp_path: Path) -> None:
    model = network()
    optimizer = after_steps(model, lambda p: torch.optim.Adam(p, lr=0.003), tmp_path)
    found = report(tmp_path, fixed_data=True)["0"]
    assert [found.label_of(neuron) for neuron in range(5)] == ["alive", "dead", "dead", "dead", "dead"]
    assert found.permanent.tolist() == [False, True, False, False, False]
    assert found.verdict(1).permanent
    assert "no gradient · proved · fixed data" in found.verdict(1).supports
    for _ in range(30):  # neuron 2 is revived by what Adam remembers, without any gradient
        optimizer.zero_grad()
        model(torch.cat(data())).square().mean().backward()
        assert not model[0].weight.grad[1].any()
        optimizer.step()
    fires = (model[:2](torch.cat(data())) > 0).any(0)
    assert fires.tolist()[1:3] == [False, True]


def test_only_one_layer_is_proved_and_only_if_the_user_says_so(tmp_path: Path) -> None:
    after_steps(network(), lambda p: torch.optim.SGD(p, lr=1e-4), tmp_path)
    found = report(tmp_path, fixed_data=True)
    assert found["2"].label_of(0) == "dead"
    assert not found["2"].permanent.any()
    assert found["0"].permanent.tolist() == [False, True, True, False, False]  # 3 is within rounding of coarse types
    assert not report(tmp_path)["0"].permanent.any()


def test_a_bias_that_does_not_shrink_with_the_weights_must_be_below_zero_alone(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = -9.0, 0.01
    examples = [batch + 0.1 for batch in data()]

    def saved(**weight_group: Any) -> list[bool]:
        groups = [
            {"params": [("0.weight", model[0].weight)], **weight_group},
            {"params": [("0.bias", model[0].bias)], "weight_decay": 0.0},
        ]
        save(tmp_path, model, torch.optim.SGD(groups, lr=0.1))
        found: list[bool] = report(tmp_path, examples, fixed_data=True)["0"].permanent.tolist()
        return found

    assert saved(weight_decay=0.01) == [False, True, False, False, False]
    assert saved(weight_decay=0.0) == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ("augmented", "it gave other examples"),
        ("iterator", "UsageError"),
        ("infinite number", None),
    ],
)
def test_data_that_is_not_fixed(tmp_path: Path, batches: str, said: str | None) -> None:
    after_steps(network(), lambda p: torch.optim.SGD(p, lr=1e-4), tmp_path)

    class Augmented:
        def __iter__(self) -> Iterator[Tensor]:
            return (batch + torch.rand(()) * 1e-3 for batch in data())

    if batches == "iterator":
        with pytest.raises(UsageError, match="read twice"):
            report(tmp_path, iter(data()), fixed_data=True)
        return
    examples = Augmented() if batches == "augmented" else [*data(), torch.full((1, 4), torch.inf)]
    found = report(tmp_path, examples, fixed_data=True)
    assert not found["0"].permanent.any()
    assert said is None or any(said in one.reason for one in found.abstentions)


def test_shuffled_data_is_the_same_data(tmp_path: Path) -> None:
    after_steps(network(), lambda p: torch.optim.SGD(p, lr=1e-4), tmp_path)
    examples = torch.utils.data.TensorDataset(torch.cat(data()), torch.arange(400))
    shuffled = torch.utils.data.DataLoader(examples, 32, shuffle=True)
    assert report(tmp_path, shuffled, fixed_data=True)["0"].permanent.sum() == 2
    dropped = torch.utils.data.DataLoader(examples, 32, shuffle=True, drop_last=True)
    assert report(tmp_path, dropped, fixed_data=True)["0"].permanent.sum() == 0


def test_what_the_network_does_in_training_counts(tmp_path: Path) -> None:
    save(tmp_path, network(), torch.optim.SGD(network().parameters(), lr=0.1))

    class Louder(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 1.5 if self.training else x)

    found = ns.postmortem(tmp_path / "a.pt", Louder(*network()), data(), fixed_data=True)["0"]
    assert found.permanent.tolist() == [False, True, False, False, False]
    assert found.label_of(2) == "dead"


def test_a_file_without_an_optimizer_proves_nothing(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "a.pt")
    found = report(tmp_path, fixed_data=True)
    assert not found["0"].permanent.any()
    assert any("optimizer's state of its weights is not known" in one.reason for one in found.abstentions)
    with pytest.raises(UsageError, match="`data` with `fixed_data`"):
        ns.postmortem(tmp_path / "a.pt", network(), fixed_data=True)


def test_averaged_weights_prove_nothing_of_those_that_training_goes_on_with(tmp_path: Path) -> None:
    model = network()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    optimizer = after_steps(model, lambda p: torch.optim.SGD(p, lr=1.0), tmp_path)
    with torch.no_grad():
        model[0].bias[1] = 1.0  # fires where training goes on, and not in the average
    torch.save({"model": averaged.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    found = report(tmp_path, fixed_data=True)
    assert found["0"].label_of(1) == "dead"
    assert not found["0"].permanent.any()
    assert any("averages" in one.reason for one in found.abstentions)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["Adam", "AdamW", "momentum, decay"])
def test_no_permanent_neuron_fires_again(tmp_path: Path, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(256, 8)
    y = x.square().sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = MAKERS[name](list(model.parameters()))
    usual = optimizer.param_groups[0]["lr"] / 5

    def epochs(count: int, rate: float) -> Tensor:
        optimizer.param_groups[0]["lr"] = rate
        fired = torch.zeros(64, dtype=torch.bool)
        for _ in range(count):
            for batch in torch.randperm(256).split(64):
                optimizer.zero_grad()
                F.smooth_l1_loss(model(x[batch]), y[batch]).backward()
                optimizer.step()
                fired |= (model[0](x) > 0).any(0)
        return fired

    epochs(3, usual)
    epochs(1, 20 * usual)
    epochs(3, usual)
    save(tmp_path, model, optimizer)
    found = ns.postmortem(tmp_path / "a.pt", model, x.split(64), fixed_data=True)["0"]
    assert found.permanent.sum() >= 3
    assert not epochs(30, usual)[torch.from_numpy(found.permanent)].any()


def test_every_form_of_the_report_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_steps(network(), lambda p: torch.optim.SGD(p, lr=1e-4), tmp_path)
    (tmp_path / "theirs_fixed.py").write_text("from tests.postmortem.test_fixed_data import data, network as net\n")
    monkeypatch.chdir(tmp_path)
    outputs = ["--json", "a.json", "--html", "a.html", "--markdown", "a.md"]
    cli.main(
        ["postmortem", "a.pt", "--model", "theirs_fixed:net", "--data", "theirs_fixed:data", "--fixed-data", *outputs]
    )
    said = "2 of 5 dead neurons are permanent on this data, proved"
    for name in ("a.html", "a.md"):
        assert said in (tmp_path / name).read_text().replace("\n", " ")
    plain = json.loads((tmp_path / "a.json").read_text())
    assert plain["summary"]["permanent"] == 2
    assert [layer["permanent"] for layer in plain["layers"]] == [[1, 2], [], []]
    text = next(one for one in plain["layers"][0]["evidence"] if one["source"] == "fixed data")["text"]
    assert "on each of the 400 examples" in text
    assert "1,000,000 steps" in text
    assert said in str(report(tmp_path, fixed_data=True)).replace("\n", " ")
