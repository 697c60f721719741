"""A rank of a training that does not end well: ``python -m tests.ranks.endings RANK HOW WATCHED``.

Unlike :mod:`tests.ranks.worker` it ends as a script does, with the exit code that it comes to.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import neuronscope as ns
from tests.ranks.uneven import batch, small

LIMIT_S, STEPS, WINDOW, END = 20, 12, 5, 7
ALONE = ("killed_alone", "raises_alone", "leaves_alone")  # the ranks are no copies and make no collectives


def train(rank: int, how: str, watched: bool) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_S))
    network = small()
    model = network if how in ALONE else nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ns.watch(model, window_steps=WINDOW) if watched else nullcontext() as scope:
        for number in range(STEPS):
            if rank == 1 and number == END:
                if "killed" in how:
                    os.kill(os.getpid(), signal.SIGKILL)
                if "raises" in how:
                    raise ValueError("of the user's own")
                if "leaves" in how:
                    os._exit(0)
                if "early" in how:
                    break
            optimizer.zero_grad()
            model(batch(number, rank, 2)).square().mean().backward()
            optimizer.step()
            if rank == 1 and number == WINDOW - 1 and how == "slow":
                time.sleep(LIMIT_S / 5)
            if scope is not None:
                scope.step()
    if scope is not None:
        report = scope.report()
        print(report.layers[0].name, max(tally.examples for tally in scope.census().values()), *report.notes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = 0
    try:
        train(int(sys.argv[1]), sys.argv[2], sys.argv[3] == "watched")
    except Exception:  # noqa: BLE001, it is shown
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort an interpreter that takes itself down in order
