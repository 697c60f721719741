"""A layer that has collapsed as a whole: told from one that was frozen, first in what is said, and it fails the check.

Gradients are made by hand where the optimizer's state is what matters, and by a real training where the whole is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.postmortem_report import PostmortemReport

STEPS, DEATH = 400, 150
Make = Callable[..., torch.optim.Optimizer]

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "sgd, decay": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-2),
}


def chain(*, bias: bool = True) -> nn.Sequential:
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 2, bias))


def norms() -> nn.Sequential:
    """Convolutions without bias, the shift of whose norms takes its place."""
    layers: list[nn.Module] = []
    for index in range(3):
        layers += [nn.Conv2d(2 if index == 0 else 4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2))


def saved(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    silent: Collection[str],
    *,
    death: int = DEATH,
    steps: int = STEPS,
    skipped: bool = False,
) -> Path:
    """A checkpoint after random gradients: from step ``death`` on those of ``silent`` are zero, or there are none."""
    random = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
            if step > death and name in silent:
                parameter.grad = None if skipped else torch.zeros_like(parameter)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}, folder / "last.pt")
    return folder / "last.pt"


#: What a collapse of layer 2 leaves without gradient: all up to it, and the weights of its reader.
CUT = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")


@pytest.mark.parametrize("death", [0, DEATH])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_layer_whose_reader_learns_only_its_bias_has_collapsed(tmp_path: Path, optimizer: str, death: int) -> None:
    model = chain()
    report = ns.postmortem(saved(tmp_path, model, OPTIMIZERS[optimizer](model.parameters()), CUT, death=death))
    assert report.collapsed == ("2",)
    assert (report.dead, report.suspected, report.idle) == (6, 0, 6)  # layer 0 is cut off, and may be as good as any
    assert "cut off by the collapse of 2" in report["0"].evidence[0].text


@pytest.mark.parametrize("hidden", [6, 4], ids=["all rows", "some rows"])
def test_a_layer_whose_own_clock_shows_nothing_has_collapsed_and_not_the_one_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hidden: int
) -> None:
    """The rounding of a bias of -1,000,000 under weight decay hides what the momentum buffer of layer 2 would show."""
    model = chain()
    nn.init.constant_(model[2].bias[:hidden], -1e6)
    path = saved(tmp_path, model, OPTIMIZERS["sgd, decay"](model.parameters()), CUT)
    report = ns.postmortem(path)
    assert (report.collapsed, report.dead, report.suspected, report.idle) == (("2",), 6, 0, 6)
    assert "cut off by the collapse of 2" in report["0"].evidence[0].text
    assert "own clock does not tell" in report["2"].evidence[0].text
    assert cli.main(["postmortem", str(path), "--fail-above", "90"]) == 1
    assert "layer 2 collapsed" in capsys.readouterr().err


def test_a_bias_that_stopped_after_learning_on_shows_a_collapse(tmp_path: Path) -> None:
    """The bias of the reader gets its last gradient 130 steps after the death; then the whole network is silent."""
    model = chain()
    optimizer = torch.optim.Adam(model.parameters())
    saved(tmp_path, model, optimizer, CUT, steps=DEATH + 150)
    path = saved(tmp_path, model, optimizer, dict(model.named_parameters()).keys(), death=0, steps=130)
    assert ns.postmortem(path).collapsed == ("2",)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_norm_layer_shows_a_collapse_like_a_bias(tmp_path: Path, optimizer: str) -> None:
    model = norms()
    cut = [name for name, _ in model.named_parameters() if name.split(".")[0] in "0134"] + ["6.weight", "7.weight"]
    report = ns.postmortem(saved(tmp_path, model, OPTIMIZERS[optimizer](model.parameters()), cut))
    assert report.collapsed == ("3",)
    assert report["0"].idle.all()
    assert "only its bias got gradients" in report["6"].evidence[0].text


class Gated(nn.Module):
    """A feed-forward block with two factors; as many inputs as neurons, so that widths do not tell what reads what."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


def test_a_gated_product_that_collapsed_is_not_lost_when_the_model_is_given(tmp_path: Path) -> None:
    """From the file alone, the nearest layer before the reader is blamed: a factor that is no neuron."""
    model = Gated()
    silent = [name for name, _ in model.named_parameters() if name.startswith(("gate", "up"))] + ["down.weight"]
    path = saved(tmp_path, model, torch.optim.AdamW(model.parameters()), silent)
    assert ns.postmortem(path).dead == 6
    report = ns.postmortem(path, model=model, example="1x6")
    assert (report.collapsed, report.dead, report.neurons) == (("gate",), 6, 6)


def normalised(*, before: bool, bias: bool) -> nn.Sequential:
    """Three layers with a batch norm each, before or behind their activation."""
    layers: list[nn.Module] = []
    for _ in range(3):
        middle = [nn.BatchNorm1d(12), nn.ReLU()]
        layers += [nn.Linear(12, 12, bias), *(middle if before else reversed(middle))]
    return nn.Sequential(*layers, nn.Linear(12, 2))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("before", [True, False], ids=["norm, ReLU", "ReLU, norm"])
@pytest.mark.parametrize("with_model", [False, True], ids=["file", "model"])
def test_the_layer_that_collapsed_is_named_wherever_its_batch_norm_stands(
    tmp_path: Path, before: bool, bias: bool, with_model: bool
) -> None:
    """The norm of the next layer makes zeros of the constants that it gets, so that this layer learns nothing either.

    It is trained for real: the second layer is thrown far below zero at step 100 of 500.
    """
    torch.manual_seed(0)
    model = normalised(before=before, bias=bias)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(500):
        if step == 100 and before:
            model[4].bias.data -= 100
        elif step == 100:
            model[2].bias.data += 10  # what layer 3 reads is above zero, and its weights are below
            model[3].weight.data = -model[3].weight.data.abs()
        x = torch.randn(64, 12)
        optimizer.zero_grad()
        (model(x) - x[:, :2] * x[:, 2:4]).square().mean().backward()
        optimizer.step()
    path = tmp_path / "last.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 500}, path)
    silent = (model[: 9 if before else 8](torch.randn(64, 12)) == 0).all(dim=0).numpy()
    report = ns.postmortem(path, model=model if with_model else None)
    assert report.collapsed == ("4" if before and with_model else "3",)
    third = report["7" if before and with_model else "6"]
    assert not (third.dead_mask & ~silent).any()
    assert 0 < silent.sum() < 12


FROZEN = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("skipped", [True, False], ids=["no gradient", "gradients of zero"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_frozen_layer_has_not_collapsed(tmp_path: Path, optimizer: str, skipped: bool) -> None:
    """It goes on giving numbers, so that the weights of its reader learn: with gradients of zero it looks cut off."""
    model = chain()
    report = ns.postmortem(saved(tmp_path, model, OPTIMIZERS[optimizer](model.parameters()), FROZEN, skipped=skipped))
    assert (report.collapsed, report.dead, report.suspected) == ((), 0, 0)
    assert report.idle == (0 if skipped else 12)
    assert "collaps" not in str(report).lower()


def test_layers_that_were_never_in_the_optimizer_have_not_collapsed(tmp_path: Path) -> None:
    model = chain()
    trained = [parameter for name, parameter in model.named_parameters() if name[0] in "46"]
    report = ns.postmortem(saved(tmp_path, model, torch.optim.Adam(trained), ()))
    assert (report.collapsed, report.dead) == ((), 0)
    assert "collaps" not in str(report).lower()


def test_a_head_that_is_not_used_has_not_collapsed(tmp_path: Path) -> None:
    model = nn.ModuleDict({"trunk": nn.Linear(4, 6), "aside": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    optimizer = torch.optim.Adam(model.parameters())
    report = ns.postmortem(saved(tmp_path, model, optimizer, ("aside.weight", "aside.bias")))
    assert (report.collapsed, report.dead, report.idle) == ((), 0, 6)


def test_without_a_bias_a_collapse_is_only_suspected(tmp_path: Path) -> None:
    """From layer 2 on nothing has a bias, so that the whole network stops: a collapse, or a loss of zero."""
    model = chain(bias=False)
    everything = dict(model.named_parameters()).keys()
    report = ns.postmortem(saved(tmp_path, model, torch.optim.Adam(model.parameters()), everything))
    assert (report.collapsed, report.dead) == ((), 0)
    assert report["4"].collapse == "suspected"
    (one,) = report.diagnoses
    assert one.sign == "a layer that may have collapsed"
    assert "Layer 4 may have collapsed" in str(report)


def test_layers_that_the_optimizer_left_out_in_the_end_may_have_been_frozen(tmp_path: Path) -> None:
    """Without a bias a collapse shows only where the optimizer goes on to update its layers."""
    model = chain(bias=False)
    optimizer, silent = torch.optim.Adam(model.parameters()), ("2.weight", "2.bias", "4.weight")
    report = ns.postmortem(saved(tmp_path, model, optimizer, silent))
    assert [report[name].collapse for name in ("0", "2", "4")] == ["", "suspected", ""]
    report = ns.postmortem(saved(tmp_path, model, optimizer, silent, death=0, steps=50, skipped=True))
    assert [report[name].collapse for name in ("0", "2", "4")] == ["", "", ""]
    assert "collaps" not in str(report).lower()


def trained(death: int, steps: int) -> tuple[nn.Sequential, torch.optim.Optimizer, torch.Tensor, ns.Scope]:
    """A watched training whose second layer is thrown far below zero at a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(320, 4)
    with ns.watch(model, every_n_steps=10, window_steps=10) as scope:
        for step in range(steps):
            if step == death:
                with torch.no_grad():
                    model[2].bias[:] = -100.0
            optimizer.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            optimizer.step()
            scope.step()
    return model, optimizer, x, scope


@pytest.fixture(scope="module")
def run() -> tuple[nn.Sequential, torch.optim.Optimizer, torch.Tensor, ns.Scope]:
    return trained(205, 480)


def said(report: PostmortemReport, layer: str) -> None:
    """What must be said of a training that collapsed at step 205, whatever it is told from."""
    assert layer in report.collapsed
    assert report[layer].dead == 16
    text = str(report)
    assert f"!! COLLAPSED: layer {layer}" in text
    assert f"COLLAPSED: layer {layer}" in report.to_markdown()
    assert f"COLLAPSED: layer {layer}" in report.to_html()
    found = next(one for one in report.diagnoses if one.sign == "a layer nearly all dead")
    assert layer in found.layers
    assert found.remedy.startswith("Go back to a checkpoint before step ")
    before = int(found.remedy.split("before step ")[1].split(".")[0])
    assert 150 <= before <= 206  # the state that step 204 left is the last sound one, saved as after 205 steps


def test_a_collapse_is_found_from_the_file_alone_and_with_the_model(run, tmp_path: Path) -> None:
    model, optimizer, x, _ = run
    assert int((model[:4](x) == 0).all(dim=0).sum()) == 16
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 480}
    torch.save(state, tmp_path / "last.pt")
    alone = ns.postmortem(tmp_path / "last.pt")
    said(alone, "2")
    assert not alone["0"].dead_mask.all()
    told = ns.postmortem(tmp_path / "last.pt", model)
    said(told, "2")
    remedy = next(one.remedy for one in told.diagnoses if one.sign == "a layer nearly all dead")
    assert "LeakyReLU" in remedy


def test_a_collapse_is_found_from_the_monitors_record(run, tmp_path: Path) -> None:
    model, _, _, scope = run
    torch.save({"model": model.state_dict(), "neuronscope": scope.state_dict()}, tmp_path / "last.pt")
    report = ns.postmortem(tmp_path / "last.pt")
    said(report, "2")
    # The first layer fires, and gets no gradient because the second passes none back: it is in no total.
    assert "0" not in report.collapsed
    assert report["0"].idle.sum() + report["0"].count("dead") == 16


def test_data_separates_a_collapsed_layer_from_the_one_that_it_cuts_off(run, tmp_path: Path) -> None:
    model, _, x, _ = run
    torch.save(model.state_dict(), tmp_path / "last.pt")
    report = ns.postmortem(
        tmp_path / "last.pt", model, [x], lambda output, batch: (output - batch[:, :1]).square().mean()
    )
    assert report.collapsed == ("2",)
    assert report["0"].idle.sum() + report["0"].count("dead") == 16


def test_a_collapse_fails_the_check_however_small_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = chain()
    saved(tmp_path, model, torch.optim.Adam(model.parameters()), CUT)
    assert cli.main(["postmortem", "last.pt", "--fail-above", "90"]) == 1
    assert "layer 2 collapsed" in capsys.readouterr().err
    assert cli.main(["postmortem", "last.pt"]) == 0
    model = chain()
    saved(tmp_path, model, torch.optim.Adam(model.parameters()), FROZEN)
    assert cli.main(["postmortem", "last.pt", "--fail-above", "1"]) == 0
