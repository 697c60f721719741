"""Runs whose ranks have other numbers of batches, and runs that are saved by some ranks and go on with others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import neuronscope as ns
from tests.ranks.parallel import Network, counted
from tests.ranks.recorded import Recorder

BATCH, WIDTH = 40, 6
POLICY = ns.Policy(max_rate=0.1)  # sure from 29 examples on: every window closes
SITES = {"0/relu": ("1", "1"), "2/relu": ("3", "3")}
FROM_STEP, SILENCED = 5, 2


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 2))


def batch(step: int, share: int, shares: int) -> Tensor:
    """The share of one rank of what all ranks are given in a step."""
    everything = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    return everything.chunk(shares)[share]


def steps(model: nn.Sequential, scope: Any, numbers: range, share: int, shares: int) -> None:
    """Forward and backward; no weight changes but one bias, that silences a neuron from some step on."""
    for number in numbers:
        with torch.no_grad():
            model[0].bias[SILENCED] = -100.0 if number >= FROM_STEP else 5.0
        model(batch(number, share, shares)).square().sum().backward()
        scope.step()


class Steps:
    """Tells a recorder of the steps."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def step(self) -> None:
        self.recorder.step += 1


def recorded(numbers: range, share: int, shares: int) -> dict[str, Any]:
    model = small()
    recorder = Recorder(model, SITES)
    recorder.step = numbers.start
    steps(model, Steps(recorder), numbers, share, shares)
    return recorder.counts()


def windows(scope: ns.Scope, phase: str = "train") -> dict[str, Any]:
    """All that a report tells of each site's past, as lists."""
    sites = scope.report(phase).layers
    return {
        site.name: {name: getattr(site.history, name).tolist() for name in site.history.__dataclass_fields__}
        for site in sites
    }


def uneven(rank: int, validate: bool = False) -> dict[str, Any]:
    """The last rank has no batch at all, the first most."""
    world = dist.get_world_size()
    numbers = range(7 * (world - 1 - rank))
    model = small()
    with ns.watch(model, window_steps=3, policy=POLICY) as scope:
        steps(model, scope, numbers, rank, world)
        if validate:
            with scope.phase("val", join=True):
                model(batch(99, rank, world))
    return {
        "recorded": recorded(numbers, rank, world),
        "counted": counted(scope),
        "validated": counted(scope, phase="val"),
        "last": counted(scope, "last"),
        "windows": {name: past["steps"] for name, past in windows(scope).items()},
    }


def uneven_and_validated(rank: int) -> dict[str, Any]:
    """The same, and each validates when it is through, while others still train."""
    return uneven(rank, validate=True)


def fault(rank: int) -> dict[str, Any]:
    """A fault of ours on the last rank, in its third step: it counts no more, and keeps nobody waiting."""
    return stopped(rank, lambda scope: scope._hooks.fail(RuntimeError("a fault of ours")))


def retired(rank: int) -> dict[str, Any]:
    """The same, where the caller met the fault."""

    def retire(scope: ns.Scope) -> None:
        scope.retire()
        assert scope.detached

    return stopped(rank, retire)


def stopped(rank: int, stop: Callable[[ns.Scope], None]) -> dict[str, Any]:
    """The last rank is stopped in its third step; all go on for three more."""
    world = dist.get_world_size()
    model = small()
    with ns.watch(model, window_steps=2, policy=POLICY) as scope:
        steps(model, scope, range(3), rank, world)
        if rank == world - 1:
            stop(scope)
        steps(model, scope, range(3, 6), rank, world)
    seen = range(3) if rank == world - 1 else range(6)
    return {"recorded": recorded(seen, rank, world), "counted": counted(scope)}


def other_widths(rank: int) -> dict[str, Any]:
    """An activation of the input has as many neurons as the data of a rank: such a site is left out, and said to be."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 5), nn.ReLU())
    with ns.watch(model) as scope:
        model(torch.ones(3, WIDTH + rank)).sum().backward()
        scope.step()
    return counted(scope)


STAGES = {4: range(5), 2: range(5, 9), 1: range(9, 12)}
WINDOW = 2  # steps 0 to 4: the checkpoint of the first stage falls into the middle of a window


def elastic(rank: int, folder: Path) -> dict[str, Any]:
    """One stage of a run: goes on from what more ranks saved before, and saves for fewer."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    model = small()
    scope = ns.watch(model, window_steps=WINDOW, policy=POLICY)
    before = folder / f"elastic_{2 * world}.pt"
    if before.exists():
        scope.load_state_dict(torch.load(before, weights_only=True))
    steps(model, scope, STAGES[world], rank, world)
    state = scope.state_dict(join=True)
    if rank == 0:
        torch.save(state, folder / f"elastic_{world}.pt")
    result = {"counted": counted(scope), "windows": windows(scope), "step": scope.global_step}
    scope.detach(join=False)
    return result


def killed(rank: int, folder: Path) -> dict[str, Any]:
    """The last rank dies without a word in the fifth step; the others get torch's own error."""
    model = nn.parallel.DistributedDataParallel(Network())
    shares = dist.get_world_size()
    scope = ns.watch(model, window_steps=2)
    error = None
    try:
        for number in range(8):
            if number == 3:
                state = scope.state_dict(join=True)
                if rank == 0:
                    torch.save(state, folder / "killed.pt")
            if number == 4 and rank == shares - 1:
                os._exit(1)
            model(batch(number, rank, shares)).sum().backward()
            scope.step()
    except RuntimeError as caught:
        error = str(caught)
    scope.detach(join=error is None)
    return {"error": error, "detached": scope.detached, "counted": counted(scope)}
