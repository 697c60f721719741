"""Runs whose ranks revive neurons."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import neuronscope as ns
from neuronscope.act.revival import Revival
from neuronscope.callbacks import Monitor
from neuronscope.errors import NeuronscopeWarning, UsageError
from tests.agreement.slow_twin import state_of
from tests.ranks.uneven import POLICY, batch, small

DEAD, APART = 2, (0, 1)  # neurons of the first layer


def network() -> nn.Sequential:
    """One neuron is dead; of two others, each fires on one rank only."""
    model = small()
    with torch.no_grad():
        model[0].bias[DEAD] = -100.0
        model[0].weight[list(APART)] = 0.0
        model[0].bias[list(APART)] = -1.0
        model[0].weight[APART[0], 0], model[0].weight[APART[1], 0] = 1.0, -1.0
    return model


def data(rank: int, step: int) -> torch.Tensor:
    x = batch(step, rank, 2)
    x[:, 0] = 5.0 if rank == 0 else -5.0
    return x


def found(model: nn.Module, optimizer: torch.optim.Optimizer, scope: ns.Scope) -> dict[str, Any]:
    return {
        "acts": scope.acts,
        "weights": state_of(model),
        "moments": [optimizer.state[each]["exp_avg"] for each in model.parameters()],
        "step": scope.global_step,
    }


def revives_by_hand(rank: int) -> dict[str, Any]:
    """Replicas of DDP, with random numbers of their own for dropout, revive after three steps and go on."""
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    with ns.watch(wrapped, policy=POLICY) as scope:
        for step in range(6):
            wrapped(data(rank, step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
            if step == 2:
                ns.revive(scope, optimizer)
    return found(model, optimizer, scope)


def monitored(rank: int, *, retired: bool = False, fewer: bool = False, without_rule: bool = False) -> dict[str, Any]:
    """A monitor revives whenever a window closes; on the last rank something may be amiss."""
    amiss = rank == dist.get_world_size() - 1
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rule = None if amiss and without_rule else "dead"
    monitor = Monitor(every_n_steps=1, window_steps=2, policy=POLICY, revive=rule)
    monitor.optimizers = [optimizer]
    monitor.attach(model)
    scope = monitor.scope
    assert scope is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NeuronscopeWarning)
        for step in range(1 if amiss and fewer else 6):
            monitor.begin_batch()
            model(data(rank, step)).square().mean().backward()
            if amiss and retired and step == 0:
                monitor.suppress_errors._on_error(RuntimeError("a fault of ours"))  # type: ignore[misc]
            for each in model.parameters():  # as DDP does
                if not fewer:
                    _average(each)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step + 1)
        monitor.finish()
    return found(model, optimizer, scope)


def _average(weight: nn.Parameter) -> None:
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    weight.grad /= dist.get_world_size()


def revives_monitored(rank: int) -> dict[str, Any]:
    return monitored(rank)


def revives_with_a_retired_rank(rank: int) -> dict[str, Any]:
    return monitored(rank, retired=True)


def revives_with_fewer_batches(rank: int) -> dict[str, Any]:
    return monitored(rank, fewer=True)


def revives_on_one_rank_only(rank: int) -> dict[str, Any]:
    return monitored(rank, without_rule=True)


def revives_sharded(rank: int) -> dict[str, Any]:
    """FSDP2 shards rows: the first layer's 7 and the second one's 9 are 4 and 3, 5 and 4 of two ranks."""
    model = network()
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = data(rank, 0)
    with ns.watch(model, policy=POLICY) as scope:
        for step in range(3):
            model(data(rank, step)).square().mean().backward()
            optimizer.step()
            scope.step()  # gradients stay
        states = []
        for act in (lambda: None, lambda: ns.revive(scope, optimizer)):
            with torch.no_grad():
                output = model(x)  # the root's weights are whole after it
            done = act()
            with torch.no_grad():
                again = model(x)
            states.append({"output": output, "again": again, **whole(model, optimizer)})
        assert isinstance(done, Revival)
        model(data(rank, 3)).square().mean().backward()  # goes on
        optimizer.step()
        scope.step()
        try:
            ns.revive(scope, optimizer, ns.ContinualBackprop(maturity=0))
        except UsageError as error:
            refused = str(error)
    try:
        ns.shrink(model, scope.report())
    except UsageError as error:
        uncut = str(error)
    return {"acts": scope.acts, "left": dict(done.left), "states": states, "refused": refused, "uncut": uncut}


def resamples_by_own_examples(rank: int) -> dict[str, Any]:
    """Each rank would turn neurons to an example of its own."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = data(rank, 0)
    with ns.watch(model, policy=POLICY) as scope:
        model(x).square().mean().backward()
        scope.step()
        done = ns.revive(scope, optimizer, ns.Resampling(x, torch.ones(len(x))))
    return {"acts": scope.acts, "left": dict(done.left)}


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The weights, their moments and gradients, gathered from all ranks."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    weights = dict(model.named_parameters())
    return {
        "weights": {name: each.full_tensor().detach().clone() for name, each in weights.items()},
        "moments": {name: optimizer.state[each]["exp_avg_sq"].full_tensor().clone() for name, each in weights.items()},
        "gradients": {name: each.grad.full_tensor().clone() for name, each in weights.items()},
    }


ACTING = (
    revives_sharded,
    resamples_by_own_examples,
    revives_by_hand,
    revives_monitored,
    revives_with_a_retired_rank,
    revives_with_fewer_batches,
    revives_on_one_rank_only,
)
