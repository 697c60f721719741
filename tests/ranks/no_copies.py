"""Runs whose ranks hold copies of one network, or other networks; and runs that say which ranks count together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import neuronscope as ns
from tests.ranks.hand_split import hand_split
from tests.ranks.parallel import counted
from tests.ranks.recorded import Recorder
from tests.ranks.uneven import POLICY, WIDTH, batch

STEPS, WINDOW, NEURONS = 5, 2, 7
SITES = {"0/relu": ("1", "1")}


def stage(seed: int, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.ReLU(), nn.Linear(NEURONS, outputs))


def with_norm() -> nn.Sequential:
    """Its running statistics become those of each rank's own data."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.ReLU(), nn.BatchNorm1d(NEURONS), nn.Linear(NEURONS, 3))


def changed(model: nn.Sequential, rank: int) -> nn.Sequential:
    """Return the model with one weight of one rank's own."""
    with torch.no_grad():
        model[0].bias[rank] = -100.0
    return model


class TwoCalls(nn.Module):
    """A loop that calls two parts of it, and never itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.last = stage(seed), stage(seed)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, TwoCalls):
        return (model.first(x) * model.last(x)).sum()
    output: Tensor = model(x)
    return output.square().sum()


def train(model: nn.Module, rank: int, step: Callable[[], Any]) -> None:
    """Each rank for itself: nothing is averaged, as between two rounds of local SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(number, rank, dist.get_world_size())).backward()
        optimizer.step()
        step()


def run(rank: int, build: Callable[[], nn.Module], **options: Any) -> dict[str, Any]:
    """What a rank counted by itself, what it was given, and the report's words on it."""
    with ns.watch(alone := build(), join_ranks=False) as own:
        train(alone, rank, own.step)
    recorder = None
    if isinstance(alone, nn.Sequential):
        recorder = Recorder(twin := build(), SITES)
        train(twin, rank, recorder.next_step)
    with ns.watch(model := build(), window_steps=WINDOW, policy=POLICY, **options) as scope:
        train(model, rank, scope.step)
    report = scope.report()
    return {
        "own": counted(own) if recorder is None else recorder.counts(),
        "counted": {name: found for name, found in counted(scope).items() if name in SITES or recorder is None},
        "notes": [note for note in report.notes if "rank" in note],
        "windows": len(report.layers[0].history.steps),
        "same_weights": all(map(torch.equal, alone.state_dict().values(), model.state_dict().values())),
    }


def other_weights(rank: int) -> dict[str, Any]:
    """Members of an ensemble."""
    return run(rank, lambda: stage(rank))


def one_other_weight(rank: int) -> dict[str, Any]:
    return run(rank, lambda: changed(stage(1), rank))


def other_layers(rank: int) -> dict[str, Any]:
    """An actor and a learner, say: the first layer has one name and one width on all ranks."""
    return run(rank, lambda: stage(1, outputs=3 + rank))


class Experts(nn.Module):
    """A stack of experts, of which data picks one for each row."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.router, self.last = nn.Linear(WIDTH, 2), nn.Linear(NEURONS, 3)
        torch.manual_seed(rank)
        self.w = nn.Parameter(torch.randn(2, NEURONS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        picked = self.router(x).argmax(-1)
        output: Tensor = self.last(torch.bmm(self.w[picked], x[:, :, None])[..., 0].relu())
        return output


def other_experts(rank: int) -> dict[str, Any]:
    """Expert parallelism by hand: each rank has experts of its own under one name, and copies of all else."""
    return run(rank, lambda: Experts(rank))


def experts_of_copies(rank: int) -> dict[str, Any]:
    return run(rank, lambda: Experts(1))


def stages_of_copies(rank: int) -> dict[str, Any]:
    """A pipeline of two stages, each of which two ranks hold."""
    return run(rank, lambda: stage(rank // 2))


def only_parts_run(rank: int) -> dict[str, Any]:
    return run(rank, lambda: TwoCalls(rank))


def local_steps(rank: int) -> dict[str, Any]:
    """Copies whose weights drift apart from the first step on."""
    return run(rank, lambda: stage(1))


def local_statistics(rank: int) -> dict[str, Any]:
    return run(rank, with_norm)


def tried_before(rank: int) -> dict[str, Any]:
    """The network runs once with weights that the ranks do not share yet."""
    model = stage(rank)
    with ns.watch(model, window_steps=WINDOW, policy=POLICY) as scope:
        with scope.paused():
            model(batch(0, 0, 1))
        model(batch(0, 0, 1))
        for weight in model.parameters():
            dist.broadcast(weight.data, 0)
        train(model, rank, scope.step)
    return {"counted": counted(scope), "notes": [note for note in scope.report().notes if "copy" in note]}


def given_group(rank: int, later: bool = False) -> dict[str, Any]:
    """Two groups of two ranks, each of which counts for itself."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    own = groups[rank // 2]
    return run(rank, lambda: stage(1), process_group=(lambda: own) if later else own)


given_group_later = partial(given_group, later=True)
given_group_later.__name__ = "given_group_later"  # type: ignore[attr-defined]


def not_in_the_group(rank: int) -> dict[str, Any]:
    """The last rank is in no group: it counts for itself, and nobody waits for it."""
    group = dist.new_group([0, 1, 2])
    return run(rank, lambda: stage(1), process_group=lambda: group)


NO_COPIES = (
    *(other_weights, one_other_weight, other_layers, stages_of_copies, only_parts_run),
    *(other_experts, experts_of_copies),
    *(local_steps, local_statistics, tried_before),
    *(given_group, given_group_later, not_in_the_group),
    hand_split,
)
