"""Runs in which the trainer makes collectives of its own, or makes its process group anew, beside a watch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join

import neuronscope as ns
from tests.ranks.parallel import counted
from tests.ranks.recorded import Recorder
from tests.ranks.uneven import POLICY, SITES, batch, small, steps

WINDOW = 2
JOIN_STEPS = (150, 260)


def still_under_way(rank: int) -> dict[str, Any]:
    """One rank starts a collective of its own before an exchange and ends it afterwards, the other makes it then."""
    model, theirs = small(), torch.full((3,), float(rank + 1))
    with ns.watch(model, window_steps=WINDOW, policy=POLICY) as scope:
        for number in range(2 * WINDOW):
            work = None if rank else dist.all_reduce(theirs, async_op=True)
            steps(model, scope, range(number, number + 1), rank, 2)
            if work is None:
                dist.all_reduce(theirs)
            else:
                work.wait()
    return {"counted": counted(scope), "theirs": theirs.tolist()}


def begun_anew(rank: int, folder: Path) -> dict[str, Any]:
    """The run ends its process group after each window and makes another one."""
    model = small()
    scope = ns.watch(model, window_steps=WINDOW, policy=POLICY)
    for number in range(2):
        steps(model, scope, range(number * WINDOW, (number + 1) * WINDOW), rank, 2)
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/group_{number}", rank=rank, world_size=2)
    steps(model, scope, range(2 * WINDOW, 2 * WINDOW + 1), rank, 2)
    scope.detach()
    return {"counted": counted(scope)}


def joined(rank: int, inner: bool = False, **options: Any) -> dict[str, Any]:
    """Ranks run out of data one after another in torch's ``Join``: unwatched and recorded, then watched.

    Args:
        rank: The rank.
        inner: Watch the network in ``DistributedDataParallel``, and not that.
        **options: Of the watch.
    """
    scope, weights = None, []
    for watched in (False, True):
        network = small()
        model = nn.parallel.DistributedDataParallel(network)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if watched:
            scope = ns.watch(network if inner else model, **options)
        else:
            recorder = Recorder(network, SITES)
        with Join([model]):
            for number in range(JOIN_STEPS[rank]):
                optimizer.zero_grad()
                model(batch(number, rank, 2)).square().mean().backward()
                optimizer.step()
                if scope is not None:
                    scope.step()
                else:
                    recorder.next_step()
        weights.append([weight.detach().clone() for weight in network.parameters()])
    scope.detach()
    same = all(one.equal(other) for one, other in zip(*weights, strict=True))
    return {"recorded": recorder.counts(), "counted": counted(scope), "same_weights": same}


def joined_inside(rank: int) -> dict[str, Any]:
    """The network in ``DistributedDataParallel`` is watched, at times."""
    return joined(rank, inner=True, window_steps=20)


#: The last one leaves another process group than it found.
OWN_GROUP = (still_under_way, joined, joined_inside, begun_anew)
