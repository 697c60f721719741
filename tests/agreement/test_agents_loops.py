"""What agents need of a scope: passes that come in parts, one batch for several networks, parts that begin a pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuronscope as ns


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def test_a_pass_that_has_not_ended_is_continued_by_the_next_one() -> None:
    model = net()
    ends = [False, False, True, False]
    with ns.watch(model, policy=ns.Policy(max_rate=0.9)) as scope:
        for rows, last in zip((2, 3, 4, 5), ends):
            with scope.phase("rollout", ends=lambda last=last: last), torch.no_grad():
                model(torch.randn(rows, 3))
            model(torch.randn(7, 3)).sum().backward()
            scope.step()
    windows = {window: scope.census("rollout", window)["0/relu"].positions for window in ("last", "open", "all")}
    assert windows == {"last": 2 + 3 + 4, "open": 5, "all": 14}
    assert len(scope.report("rollout").layers[0].history.steps) == 1
    assert scope.census("train")["0/relu"].positions == 4 * 7


def test_networks_that_are_given_the_same_batch_count_its_examples_once_each() -> None:
    model = nn.ModuleDict({"actor": net(), "critic": net()})
    with ns.watch(model, examples=None) as scope:
        for _ in range(3):
            scope.share_examples(8)
            x = torch.randn(8, 3)
            loss = model["actor"](x).sum() + model["critic"](x).sum() + model["critic"](x + 1).sum()
            with torch.no_grad():
                model["actor"](torch.randn(5, 3))  # inference: no examples of these
            loss.backward()
            scope.step()
        scope.share_examples(None)
        model["actor"](torch.randn(8, 3)).sum().backward()
        scope.step()
    actor, critic = scope.census()["actor.0/relu"], scope.census()["critic.0/relu"]
    assert (actor.positions, actor.examples) == (4 * 8, 3 * 8)
    assert (critic.positions, critic.examples) == (3 * 16, 3 * 8)
    assert scope.census("inference").examples == 0


@pytest.mark.parametrize("restarts", [False, True])
def test_a_part_that_runs_again_begins_a_pass_where_that_is_said(restarts: bool) -> None:
    model = nn.ModuleDict({"body": net()[:2], "head": nn.Linear(4, 1)})
    with ns.watch(model) as scope:
        if restarts:
            scope.restart_at_parts()
        for _ in range(3):
            with torch.no_grad():
                model["head"](model["body"](torch.randn(2, 3)))
        model["head"](model["body"](torch.randn(2, 3))).sum().backward()
        scope.step()
    tally = scope.census()["body.0/relu"]
    assert ("more than once in a forward" in tally.weights_unknown) is not restarts


def test_a_report_says_why_no_bound_is_claimed() -> None:
    notes = {}
    for examples in (None, "auto"):
        model = net()
        with ns.watch(model, examples=examples) as scope:
            model(torch.randn(5, 3)).sum().backward()
            scope.step()
        notes[examples] = [note for note in scope.report().notes if "steps of one trajectory" in note]
    assert len(notes[None]) == 1
    assert notes["auto"] == []
