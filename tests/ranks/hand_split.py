"""A network whose layers two ranks share by hand, in plain tensors, and two such pairs that train on other data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.ranks.parallel import counted
from tests.ranks.recorded import Recorder
from tests.ranks.uneven import POLICY, WIDTH, batch

STEPS, WINDOW, HIDDEN, WHOLE = 5, 2, 12, 7
SITES = {"stem/relu": ("act0", "act0"), "fc1/relu": ("act1", "act1"), "fc2/relu": ("act2", "act2")}


class Copy(torch.autograd.Function):
    """The input as it is; its gradient is the sum over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Reduce(torch.autograd.Function):
    """The sum over the ranks of a group; the gradient goes to each as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class ColumnParallel(nn.Module):
    """A linear layer of which each rank computes some of the units."""

    def __init__(self, whole: nn.Linear, group: Any) -> None:
        super().__init__()
        place, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.weight = nn.Parameter(whole.weight.detach().chunk(ranks)[place].clone())
        self.bias = nn.Parameter(whole.bias.detach().chunk(ranks)[place].clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Copy.apply(x, self.group), self.weight, self.bias)  # type: ignore[no-untyped-call]


class RowParallel(nn.Module):
    """A linear layer of which each rank reads some of the inputs."""

    def __init__(self, whole: nn.Linear, group: Any) -> None:
        super().__init__()
        place, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        self.weight = nn.Parameter(whole.weight.detach().chunk(ranks, 1)[place].clone())
        self.bias = nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = Reduce.apply(F.linear(x, self.weight), self.group)  # type: ignore[no-untyped-call]
        return total + self.bias


class Split(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.act0 = nn.Linear(WIDTH, WHOLE), nn.ReLU()
        self.fc1, self.act1 = ColumnParallel(nn.Linear(WHOLE, HIDDEN), group), nn.ReLU()
        self.fc2, self.act2 = RowParallel(nn.Linear(HIDDEN, WHOLE), group), nn.ReLU()
        self.head = nn.Linear(WHOLE, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.fc1(self.act0(self.stem(x))))
        output: Tensor = self.head(self.act2(self.fc2(x)))
        return output


def train(model: nn.Module, rank: int, step: Any) -> None:
    """Both ranks of a pair are given the same data."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number in range(STEPS):
        optimizer.zero_grad()
        model(batch(number, rank // 2, 2)).square().sum().backward()
        optimizer.step()
        step()


def hand_split(rank: int) -> dict[str, Any]:
    """What a rank sees by hooks of its own, and what is counted if the watch is told of the shards, and if not."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    group = pairs[rank // 2]
    recorder = Recorder(twin := Split(group), SITES)
    train(twin, rank, recorder.next_step)
    result: dict[str, Any] = {"own": recorder.counts()}
    shards = ns.Shards(units="fc1", inputs=["fc2"], process_group=lambda: group)
    for name, options in (("told", {"shards": shards}), ("not_told", {})):
        with ns.watch(model := Split(group), window_steps=WINDOW, policy=POLICY, **options) as scope:
            train(model, rank, scope.step)
        report = scope.report()
        result[name] = {site: found for site, found in counted(scope).items() if site in SITES}
        result[f"{name}, notes"] = [note for note in report.notes if "copy" in note]
        result[f"{name}, weights"] = [site.weights_unknown for site in report.layers if site.name in SITES]
        result[f"{name}, same"] = all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))
    return result
