"""What each rank runs: ``python -m tests.ranks.worker RANK WORLD FOLDER TASK…``; the results go to FOLDER."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched, hook_tables, state_of
from tests.ranks.acting import ACTING
from tests.ranks.exchanges import EXCHANGES
from tests.ranks.late import LATE
from tests.ranks.no_copies import NO_COPIES
from tests.ranks.own_group import OWN_GROUP
from tests.ranks.parallel import CASES, DEVICE, Case, run, sequence_parallel, sums, tensor_compiled
from tests.ranks.uneven import elastic, fault, killed, other_widths, retired, uneven, uneven_and_validated

STEPS, BATCH = 20, 8
Data = list[tuple[Tensor, Tensor]]


def network(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)),
    )
    with torch.no_grad():
        net[0].bias[:3] = -100.0
    return net


def data(rank: int) -> Data:
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (torch.randn(BATCH, 6, generator=generator), torch.randint(3, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def disjoint(model: nn.Module, rank: int) -> Data:
    """Each rank fires a unit of its own: of units 0 and 1, none is dead over both."""
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[0].bias[:2] = -100.0
        model[0].weight[0, 0] = model[0].weight[1, 1] = 200.0
    x = torch.zeros(BATCH, 6)
    x[:, rank] = 1.0
    return [(x, torch.zeros(BATCH, dtype=torch.int64))]


def watched_counts(scope: ns.Scope) -> dict[str, dict[str, Any]]:
    fields = ("zero_outputs", "zero_gradients", "last_active_step", "first_active_step")
    numbers = ("positions", "gradient_positions", "examples")
    return {
        name: {field: getattr(tally, field) for field in (*fields, *numbers)}
        for name, tally in scope.census("train").items()
    }


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, rank: int, watcher: Nobody) -> None:
    optimizer = adam(model)
    for x, y in data(rank):
        watcher.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


def both_train(rank: int, **options: Any) -> dict[str, Any]:
    """Unwatched, and watched: what was counted, and what each run left of itself."""
    result: dict[str, Any] = {"weights": [], "random": [], "hooks": []}
    for watcher in (Nobody(), Watched(**options)):
        model = DistributedDataParallel(network())
        torch.manual_seed(rank)  # for the dropout
        before = hook_tables(model)
        with watcher.attach(model):
            train(model, rank, watcher)
        result["weights"].append(state_of(model.module))
        result["random"].append(torch.get_rng_state())
        result["hooks"].append(hook_tables(model) == before)
    return {**result, "counts": watched_counts(watcher.scope)}


def fire_apart(rank: int) -> int:
    model = network()
    batches = disjoint(model, rank)
    with ns.watch(model) as scope:
        for x, y in batches:
            nn.functional.cross_entropy(model(x), y).backward()
            scope.step()
    return int((scope.census("train")["0/relu"].zero_output_fraction == 1).sum())


def one_sees_nothing(rank: int) -> dict[str, Any]:
    model = network()
    with ns.watch(model) as scope:
        if rank == 0:
            for x, y in data(rank):
                nn.functional.cross_entropy(model(x), y).backward()
                scope.step()
    return watched_counts(scope)


def one_scans(rank: int) -> int:
    """A scan on one rank alone waits for nobody."""
    return ns.scan(network(), [x for x, _ in data(rank)]).neurons if rank == 0 else 0


def both_train_in_short_windows(rank: int) -> dict[str, Any]:
    return both_train(rank, window_steps=2)


def both_train_observed_at_times(rank: int) -> dict[str, Any]:
    return both_train(rank, every_n_steps=3)


def spread(rank: int, strategy: str, shares: int | None = None) -> dict[Case, Any]:
    share = rank if shares is None else rank // (dist.get_world_size() // shares)
    return {case: run(strategy, case, share) for case in CASES}


def ddp(rank: int) -> Any:
    return spread(rank, "ddp")


def fsdp(rank: int) -> Any:
    return spread(rank, "fsdp")


def fsdp1(rank: int) -> Any:
    return spread(rank, "fsdp1")


def tensor(rank: int) -> Any:
    return spread(rank, "tensor", shares=1)


def both(rank: int) -> Any:
    return spread(rank, "both", shares=2)


def tensor_distributed(rank: int) -> Any:
    """Activations that stay distributed tensors."""
    return run("tensor", Case(local=False), 0)


TASKS = {
    task.__name__: task
    for task in (
        both_train,
        both_train_in_short_windows,
        both_train_observed_at_times,
        fire_apart,
        one_sees_nothing,
        one_scans,
        ddp,
        fsdp,
        fsdp1,
        tensor,
        tensor_distributed,
        tensor_compiled,
        both,
        sequence_parallel,
        sums,
        uneven,
        uneven_and_validated,
        fault,
        retired,
        other_widths,
        *ACTING,
        *EXCHANGES,
        *OWN_GROUP,
        *NO_COPIES,
        *LATE,
        elastic,
        killed,
    )
}
TRAINERS = ("lightning", "hugging", "accelerate")


def task_of(name: str) -> Any:
    """The function of that name: here, or, of a trainer whose name comes first, in the module of its runs."""
    trainer = name.partition("_")[0]
    if trainer in TRAINERS:
        return getattr(importlib.import_module(f"tests.ranks.{trainer}_runs"), name)
    return TASKS[name]


def main(rank: str, world: str, folder: str, *tasks: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=int(rank), world_size=int(world))
    found = {}
    for name in tasks:
        task = task_of(name)
        gc.freeze()  # imports stay: Accelerate collects garbage in each training, which would take most of its time
        places = (Path(folder),) if "folder" in inspect.signature(task).parameters else ()
        found[name] = task(int(rank), *places)
    torch.save(found, Path(folder) / f"{rank}_of_{world}.pt")
    if "killed" not in tasks:
        dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that takes itself down in order


if __name__ == "__main__":
    main(*sys.argv[1:])
