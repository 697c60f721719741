"""Data of few examples: silence on them is suspected, firing on them refutes, and nothing of it is in a total."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.postmortem_report import PostmortemReport

#: Examples that it takes by default to say that a silent neuron fires in fewer than 1 % of them, at 95 %.
ENOUGH = 299


def network() -> nn.Sequential:
    """Eight gates: 0 to 3 fire where the first input is positive, 4 to 6 where it is negative, 7 where below -9."""
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, 0] = torch.tensor([1.0] * 4 + [-1.0] * 4)
        model[0].bias.zero_()
        model[0].bias[7] = -9.0
    return model


def examined(folder: Path, data: Any, **saved: Any) -> PostmortemReport:
    model = network()
    torch.save({"model": model.state_dict(), **saved}, folder / "net.pt")
    return ns.postmortem(folder / "net.pt", model, data)


def positive(examples: int) -> list[torch.Tensor]:
    return [torch.ones(examples, 2)]


@pytest.mark.parametrize("examples", [1, ENOUGH - 1])
def test_silence_on_few_examples_is_suspected_and_in_no_total(tmp_path: Path, examples: int) -> None:
    report = examined(tmp_path, positive(examples))
    assert (report.dead, report.suspected) == (0, 4)
    verdict = report["0"].verdict(5)
    assert (verdict.label, verdict.basis, verdict.source) == ("dead", "suspected", "scan")
    text = str(report)
    assert f"Silent on {examples} example" in text
    assert "at least" not in text


def test_silence_on_enough_examples_is_measured(tmp_path: Path) -> None:
    report = examined(tmp_path, positive(ENOUGH))
    assert (report.dead, report.dead_by_basis()["measured"], report.suspected) == (4, 4, 0)


def test_positions_of_one_example_are_no_examples(tmp_path: Path) -> None:
    report = examined(tmp_path, [torch.ones(1, 400, 2)])
    assert (report.dead, report.suspected) == (0, 4)


def test_examples_are_no_more_than_the_positions_that_were_seen(tmp_path: Path) -> None:
    class First(nn.Module):
        """Gives its gates the first example of each batch alone."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x[:1])  # type: ignore[no-any-return]

    model = First()
    torch.save(model.state_dict(), tmp_path / "first.pt")
    report = ns.postmortem(tmp_path / "first.pt", model, [torch.ones(100, 2)] * 4)
    assert (report.dead, report.suspected) == (0, 4)


def with_gradient(examples: int) -> dict[str, Any]:
    """Data and a loss that sends every gate a gradient at its pre-activation, whether it fires or not."""
    return {"data": positive(examples), "loss": lambda output, batch: output.sum()}


class Auxiliary(nn.Module):
    """The network with a loss of its own on what its gates are given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.net[0](x)
        return self.net[2](self.net[1](before)) + 0.1 * before[:, 4:6].sum(dim=1, keepdim=True)  # type: ignore[no-any-return]


def test_neurons_that_get_a_gradient_without_firing_are_silent_and_not_dead(tmp_path: Path) -> None:
    model = Auxiliary()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    report = ns.postmortem(tmp_path / "net.pt", model, **with_gradient(ENOUGH))
    (layer,) = (layer for layer in report.layers if layer.neurons == 8)
    assert [layer.label_of(neuron) for neuron in range(8)] == ["alive"] * 4 + ["silent"] * 2 + ["dead"] * 2
    assert (report.dead, report.count("silent"), int(layer.contested.sum())) == (2, 2, 0)
    verdict = layer.verdict(4)
    assert (verdict.basis, verdict.source) == ("measured", "scan")
    assert verdict.number == pytest.approx(0.00997, abs=1e-5)  # 1 - .05 ** (1 / 299)
    assert report.to_dict()["layers"][report.layers.index(layer)]["labels"]["silent"] == 2
    assert "2 silent" in str(report)
    assert "silent neurons" in [cause.sign for cause in report.diagnoses]


def test_silence_with_a_gradient_on_few_examples_is_suspected(tmp_path: Path) -> None:
    model = Auxiliary()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    report = ns.postmortem(tmp_path / "net.pt", model, **with_gradient(ENOUGH - 1))
    (layer,) = (layer for layer in report.layers if layer.neurons == 8)
    assert (layer.verdict(4).label, layer.verdict(4).basis) == ("silent", "suspected")
    assert report.count("silent") == 0, "no total includes what is only suspected"


def test_suspected_silence_does_not_count_for_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(network().state_dict(), "net.pt")
    Path("few_examples_theirs.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "def one():\n    return [torch.ones(1, 2)]\n"
        f"def many():\n    return [torch.ones({ENOUGH}, 2)]\n"
    )
    line = ["postmortem", "net.pt", "--model", "few_examples_theirs:net", "--fail-above", "1", "--data"]
    assert cli.main([*line, "few_examples_theirs:one"]) == 0
    assert cli.main([*line, "few_examples_theirs:many"]) == 1


def test_one_example_refutes_a_death_and_confirms_none(tmp_path: Path) -> None:
    """By the optimizer 0 and 5 get no gradient; the one example wakes 0, and says nothing of 5."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for step in range(400):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.ones_like(parameter)
            if name.startswith("0.") and step > 50:
                parameter.grad[[0, 5]] = 0
        optimizer.step()
    report = examined(tmp_path, positive(1), optimizer=optimizer.state_dict(), step=400)
    layer = report["0"]
    found = [layer.verdict(neuron) for neuron in (0, 5)]
    assert [(one.label, one.basis) for one in found] == [("alive", "measured"), ("no gradient", "inferred")]
    assert found[1].contradictions == ()
    assert report.dead == 1
    held = [(one.held, one.refuted, one.untested) for one in report.confirmations if one.claim == "no gradient"]
    assert held == [(0, 1, 1)]


def test_a_proof_stands_on_few_examples(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[7] = 0
    torch.save(model.state_dict(), tmp_path / "net.pt")
    verdict = ns.postmortem(tmp_path / "net.pt", model, positive(1))["0"].verdict(7)
    assert (verdict.label, verdict.basis) == ("dead", "proved")


def test_a_short_record_counts_in_no_total(tmp_path: Path) -> None:
    model = network()
    with ns.watch(model) as scope:
        model(torch.ones(5, 2)).sum().backward()
        scope.step()
    torch.save({"model": model.state_dict(), "neuronscope": scope.state_dict()}, tmp_path / "net.pt")
    report = ns.postmortem(tmp_path / "net.pt")
    assert (report.dead, report["0"].suspected) == (0, 4)
