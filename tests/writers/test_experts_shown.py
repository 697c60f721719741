"""How tokens are spread over experts: as metrics and on the page."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope.report.expert_layers import expert_layers
from neuronscope.writers import page_experts
from neuronscope.writers.page_experts import mixtures
from neuronscope.writers.tensorboard.scalars import scalars
from tests.attach.test_experts import DEAD, EXPERTS, IDLE, WAYS, WIDTH, Mixture, batches, loss_of

from . import sample_reports as samples


def report_of(way: str = "bmm", *, sure: bool = True) -> tuple[ns.Report, Counter[int]]:
    """A report on a mixture, and how many tokens each expert was given."""
    model, tokens = Mixture(WAYS[way]), Counter[int]()
    with ns.watch(model, policy=ns.Policy(max_rate=0.5) if sure else None) as scope:
        for x in batches():
            tokens.update(model.choose(x.flatten(0, 1)).flatten().tolist())
            loss_of(model(x)).backward()
            scope.step()
    return scope.report("train"), tokens


@pytest.mark.parametrize("way", ["bmm", "torch._grouped_mm", "joined", "bmm of all"])
def test_the_tokens_of_each_expert_and_their_entropy_are_found(way: str) -> None:
    report, tokens = report_of(way)
    (layer,) = expert_layers(report.headline_layers)
    assert (layer.name, layer.numbers, layer.idle) == ("experts.w1.*/relu", tuple(range(EXPERTS)), (IDLE,))
    assert layer.tokens.tolist() == [tokens[number] for number in range(EXPERTS)]
    entropy = sum(-count / tokens.total() * math.log2(count / tokens.total()) for count in tokens.values())
    assert layer.routing_entropy == pytest.approx(entropy / math.log2(EXPERTS))
    values = scalars(report)
    assert values["neuronscope.experts/routing_entropy_pct"] == pytest.approx(100 * entropy / math.log2(EXPERTS))
    assert values["neuronscope.experts/fewest_tokens"] == 0
    assert values["neuronscope.experts/most_tokens"] == max(tokens.values())


@pytest.mark.parametrize("path", ["experts", "moe.0.experts", "block_sparse_moe.experts"])
def test_experts_that_are_lists_of_layers_are_told_by_the_number_after_their_name(path: str) -> None:
    # The last number of `experts.5.0` is that of a layer of the expert.
    experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4)) for _ in range(4))

    class Routed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([experts[number](x[number:]) for number in (0, 1, 3)])

    model = Routed()
    home: nn.Module = model
    *parts, last = path.split(".")
    for part in parts:
        home.add_module(part, nn.Module())
        home = home.get_submodule(part)
    home.add_module(last, experts)
    with ns.watch(model) as scope:
        model(torch.randn(10, 4))
        scope.step()
    (layer,) = expert_layers(scope.report().layers)
    assert (layer.name, layer.numbers, layer.idle) == (f"{path}.*.0/relu", (0, 1, 2, 3), (2,))
    assert layer.tokens.tolist() == [10, 9, 0, 7]  # expert 2 has never run
    assert not scope.report().not_measured
    assert "4 experts were given 26 tokens." in scope.report().to_markdown()


def test_an_expert_is_called_dead_only_where_the_window_is_long_enough() -> None:
    sure, unsure = report_of(sure=True)[0], report_of(sure=False)[0]
    assert (sure.provisional, unsure.provisional) == (False, True)
    assert scalars(sure)["neuronscope.experts/dead_experts"] == 1
    assert "neuronscope.experts/dead_experts" not in scalars(unsure)
    ((drawn,), _), ((open_,), _) = mixtures(sure), mixtures(unsure)
    assert "1 expert got no token: dead." in drawn.sentence
    assert "too short to call them dead" in open_.sentence


def test_the_page_has_a_row_for_each_expert_and_a_place_for_each_neuron() -> None:
    report, tokens = report_of()
    ((drawn,), left_out) = mixtures(report)
    assert [row.tokens for row in drawn.rows] == [str(tokens[number]) for number in range(EXPERTS)]
    assert left_out == drawn.left_out == ""
    strips = [row.strip for row in drawn.rows]
    assert all(f'viewBox="0 0 {WIDTH} 12"' in strip for strip in strips)
    assert re.findall('fill-([a-z]+)"', strips[IDLE]) == ["unknown"]
    judged = {layer.layer: layer.judgement for layer in report.layers}
    for number, strip in enumerate(strips):
        path = re.search('fill-dead" d="([^"]*)"', strip)
        runs = re.findall(r"M(\d+) 0h(\d+)v", path[1]) if path else []
        shown = {place for start, length in runs for place in range(int(start), int(start) + int(length))}
        assert shown == {*judged[f"experts.w1.{number}"].dead.nonzero()[0].tolist()}
    assert drawn.rows[DEAD[0]].dead != "0"
    page = report.to_html()
    assert '<h2 id="h-experts">Experts</h2>' in page
    assert page.count('<svg class="strip"') == EXPERTS


def test_a_network_without_experts_has_no_such_numbers_and_no_such_section() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.ReLU())
    with ns.watch(model) as scope:
        model(torch.randn(5, 3)).sum().backward()
        scope.step()
    report = scope.report("train")
    assert expert_layers(report.layers) == []
    assert not [tag for tag in scalars(report) if "experts" in tag]
    assert "h-experts" not in report.to_html()


def test_a_place_of_many_neurons_shows_the_most_serious_of_them() -> None:
    report, _ = report_of()
    with mock.patch.object(page_experts, "PLACES", 2):
        ((drawn,), _) = mixtures(report)
    (layer,) = expert_layers(report.headline_layers)
    for expert, row in zip(layer.experts, drawn.rows, strict=True):
        halves = [bool(half.any()) for half in expert.judgement.dead.reshape(2, -1)]
        path = re.search('fill-dead" d="([^"]*)"', row.strip)
        expected = {(True, True): "M0 0h2", (True, False): "M0 0h1", (False, True): "M1 0h1"}.get(tuple(halves))
        assert (path is None) == (expected is None)
        assert path is None or expected is None or path[1].startswith(expected)
    assert any(expert.judgement.dead.any() for expert in layer.experts)


def test_an_expert_of_several_modules_is_one_expert() -> None:
    """The number of the expert is the first after `experts`, not that of the module in it."""
    sites = [
        replace(samples.site(f"moe.{block}.experts.{expert}.0/relu", 8), layer=f"moe.{block}.experts.{expert}.0")
        for block in range(2)
        for expert in range(3)
    ]
    found = expert_layers(sites)
    assert [(one.name, one.numbers) for one in found] == [
        ("moe.0.experts.*.0/relu", (0, 1, 2)),
        ("moe.1.experts.*.0/relu", (0, 1, 2)),
    ]
