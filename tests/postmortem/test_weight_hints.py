"""Hints in weights alone: only suspected, only where nothing else speaks, and in no total."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.file.layers import find_layers
from neuronscope.checkpoints.file.weights import HINTS, hint_scores
from scripts.dying_networks import as_checkpoint
from scripts.weight_hints import distance_to_nearest


def network(*layers: nn.Module) -> nn.Sequential:
    """Neuron 3 of layer 0 has nearly only negative weights, 5 a small row, 7 a small column."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layers or (nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))))
    with torch.no_grad():
        model[0].weight[3].abs_().neg_()
        model[0].weight[3, 0] = 0.01
        model[0].weight[5] *= 0.01
        if len(model) > 2 and isinstance(model[2], nn.Linear):
            model[2].weight[:, 7] *= 0.01
    return model


def report(tmp_path: Path, model: nn.Module, **more: object) -> ns.PostmortemReport:
    torch.save({"model": model.state_dict(), **more}, tmp_path / "a.pt")
    return ns.postmortem(tmp_path / "a.pt")


def hinted(found: ns.PostmortemReport) -> dict[str, list[int]]:
    found_in = {
        layer.name: {at for one in layer.evidence if one.source == "weights alone" for at in one.neurons.tolist()}
        for layer in found.layers
    }
    return {name: sorted(neurons) for name, neurons in found_in.items() if neurons}


def test_each_hint_makes_a_neuron_suspected_and_in_no_total(tmp_path: Path) -> None:
    found = report(tmp_path, network())
    assert hinted(found) == {"0": [3, 5, 7]}
    assert {verdict.neuron: (verdict.label, verdict.basis) for verdict in found.verdicts()} == dict.fromkeys(
        (3, 5, 7), ("dead", "suspected")
    )
    assert [found["0"].verdict(neuron).measure for neuron in (3, 5, 7)] == [hint.measure for hint in HINTS]
    assert (found.dead, found.suspected, found.neurons) == (0, 3, 50)
    assert "3 more may be dead; they are not included in the totals." in str(found)
    assert cli.main(["postmortem", str(tmp_path / "a.pt"), "--fail-above", "0"]) == 0


def test_an_ordinary_network_shows_no_hint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    assert hinted(report(tmp_path, nn.Sequential(*layers))) == {}


def test_hints_are_silent_where_an_optimizer_or_a_record_speaks(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert hinted(report(tmp_path, model, optimizer=optimizer.state_dict())) == {}
    scope = ns.watch(model)
    model(torch.rand(3, 40)).sum().backward()
    scope.step()
    scope.detach()
    assert hinted(report(tmp_path, model, scope=scope.state_dict())) == {}


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Linear(40, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 4)),
        (nn.Linear(40, 30),),  # the outputs
    ],
    ids=["beside a norm", "outputs"],
)
def test_layers_where_weights_say_nothing_are_left_out(layers: tuple[nn.Module, ...], tmp_path: Path) -> None:
    assert hinted(report(tmp_path, network(*layers))) == {}


def test_zero_rows_and_columns_are_no_hints(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[5] = 0.0
        model[2].weight[:, 7] = 0.0
    found = report(tmp_path, model)
    assert hinted(found) == {"0": [3]}
    assert [found["0"].label_of(neuron) for neuron in (5, 7)] == ["zero row", "unread"]


def test_scores_of_layers_too_small_to_compare_are_unknown() -> None:
    for layer in (nn.Linear(15, 30), nn.Linear(40, 7)):
        tensors = as_checkpoint(nn.Sequential(layer)).tensors
        (found,) = find_layers(tensors)
        assert all(score.isnan().all() for score in hint_scores(found, tensors, None).values())


def test_a_row_that_is_not_finite_spoils_no_other(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[9, 2] = float("nan")
        model[0].weight[10, 2] = float("inf")
    found = report(tmp_path, model)
    assert hinted(found) == {"0": [3, 5, 7]}
    assert found.not_finite == 2


def test_a_duplicate_is_scored_near_zero_whatever_its_length() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[11] = 3.0 * model[0].weight[20]
        model[0].bias[11] = 3.0 * model[0].bias[20]
    tensors = as_checkpoint(model).tensors
    score = distance_to_nearest(find_layers(tensors)[0], tensors)
    assert torch.nonzero(score < 1e-5).flatten().tolist() == [11, 20]
