"""A scan leaves the model as it was, sees gradients in a frozen one, and knows how many examples it was given."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach()[:1, 0]
        return F.relu(self.norm(self.fc(x)))


def test_a_scan_leaves_flags_gradients_and_buffers_unchanged() -> None:
    model = Counting()
    model.fc.bias.requires_grad_(False)
    model(torch.randn(3, 4)).sum().backward()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = model.fc.weight.grad.clone()
    ns.scan(model, [torch.randn(5, 4)] * 2, loss=lambda output, batch: output.sum())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model.fc.weight.grad, gradient)
    assert (model.training, model.norm.training) == (True, False)
    assert (model.fc.weight.requires_grad, model.fc.bias.requires_grad) == (True, False)


def test_gradients_of_a_frozen_model_are_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    report = ns.scan(model, [torch.randn(10, 4)], loss=lambda output, batch: output.sum())
    assert report["0/relu"].gradient_positions == report["0/relu"].positions == 10
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_single_tensor_is_scanned_as_one_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    assert ns.scan(model, torch.randn(100, 4))["0/relu"].examples == 100


def test_a_named_tuple_is_accepted_as_a_batch() -> None:
    class Batch(NamedTuple):
        x: Tensor
        y: Tensor

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    batch = Batch(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))
    report = ns.scan(model, [batch], loss=lambda output, given: F.cross_entropy(output, given.y))
    assert report["0/relu"].gradient_positions == 6


def test_a_report_says_that_parts_ran_without_the_whole_model() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2)

        def step(self, x: Tensor) -> Tensor:
            return F.relu(self.head(self.net(x))).sum()

    model = Parts()
    with ns.watch(model) as scope:
        model.step(torch.randn(4, 4)).backward()
        scope.step()
    assert list(scope.census()) == ["net.0/relu"]
    (missing,) = scope.report().not_measured
    assert missing.name == "(root)"
    assert "`head` was not seen to run" in missing.reason
    assert "open_step" in missing.reason
    with ns.watch(model) as scope:
        scope.open_step()
        model.step(torch.randn(4, 4)).backward()
        scope.close_step()
        scope.step()
    assert list(scope.census()) == ["net.0/relu", "head/relu"]
    assert not scope.report().not_measured


@pytest.mark.parametrize("part", ["whole", "submodule"])
@pytest.mark.parametrize("kind", ["scan", "scan with a loss", "representation"])
def test_a_scope_that_watches_the_model_counts_nothing_of_a_scan(kind: str, part: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
    scanned = model if part == "whole" else model[0]
    data = [torch.randn(50, 4)]

    def total(output: Tensor, batch: Tensor) -> Tensor:
        return output.sum()

    scans = {
        "scan": lambda: ns.scan(scanned, data),
        "scan with a loss": lambda: ns.scan(scanned, data, total),
        "representation": lambda: ns.representation(scanned, data, total),
    }
    with ns.watch(model) as scope:
        for _ in range(2):
            loss = model(torch.randn(10, 4)).sum()
            scans[kind]()  # between a forward and its backward pass
            loss.backward()
            scans[kind]()
            scope.step()
            scans[kind]()
    tally = scope.census()["0.0/relu"]
    assert (tally.positions, tally.gradient_positions, tally.examples) == (20, 20, 20)
    assert not scope.census("inference")


@pytest.mark.parametrize("option", ["every_n_steps", "window_steps", "join_ranks"])
def test_a_scan_refuses_options_of_training(option: str) -> None:
    with pytest.raises(ns.NeuronscopeError, match=f"`{option}`, which applies to training only"):
        ns.scan(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), [torch.randn(2, 3)], **{option: 1})


def test_a_scan_refuses_an_option_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="sights"):
        ns.scan(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), [torch.randn(2, 3)], sights="1")
