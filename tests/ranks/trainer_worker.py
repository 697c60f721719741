"""What each of two ranks runs under Hugging Face's Trainer and Accelerate; called as ``worker.py`` is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.callbacks.transformers import DeadNeuronCallback
from tests.callbacks.hugging import Noting, gpt2, trainer, weights
from tests.ranks.worker import data, network, watched_counts

#: As one process with batches of 8 has them. Nothing is learnt, so that both meet the same network.
STILL: dict[str, Any] = {"learning_rate": 0.0, "eval_strategy": "epoch", "per_device_train_batch_size": 4}


def trainer_counts(rank: int, folder: Path) -> dict[str, Any]:
    callback, noting = DeadNeuronCallback(every_n_steps=1, window_steps=2), Noting()
    trainer(folder, callback, noting, model=gpt2(0.0), **STILL).train()
    told = [logs for _, logs in noting.given if "neuronscope/dead_pct" in logs]
    offered = [logs["eval_neuronscope/dead_pct"] for _, logs in noting.given if "eval_neuronscope/dead_pct" in logs]
    counts = {phase: counts_of(callback, phase) for phase in ("train", "val")}
    return {**counts, "told": len(told), "offered": offered}


def trainer_resumes(rank: int, folder: Path) -> dict[str, Any]:
    """Saved in the middle of a window, where each rank has counts that the other has not, and taken up again."""
    saving = {**STILL, "save_strategy": "steps", "save_steps": 2}
    first, second = (DeadNeuronCallback(every_n_steps=1, window_steps=4) for _ in range(2))
    trainer(folder / "first", first, model=gpt2(0.0), **saving).train()
    run = trainer(folder / "second", second, model=gpt2(0.0), **saving)
    run.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    return {"first": counts_of(first, "train"), "second": counts_of(second, "train")}


def trainer_learns(rank: int, folder: Path) -> dict[str, Any]:
    """The weights that are learnt with the callback, and those that are learnt without."""
    plain = trainer(folder, max_steps=6, gradient_accumulation_steps=2)
    plain.train()
    watched = trainer(folder, DeadNeuronCallback(every_n_steps=1), max_steps=6, gradient_accumulation_steps=2)
    watched.train()
    return {"plain": weights(plain.model), "watched": weights(watched.model)}


def counts_of(callback: DeadNeuronCallback, phase: str) -> dict[str, Any]:
    fields = ("zero_outputs", "zero_gradients", "last_active_step", "positions", "gradient_positions", "examples")
    return {name: {field: getattr(tally, field) for field in fields} for name, tally in callback.census(phase).items()}


def accelerate_loops(rank: int, folder: Path) -> dict[str, Any]:
    """Watched before and after ``prepare``, in float32 and in bfloat16; two batches a step, and nothing is learnt."""
    return {
        f"{precision}, {'before' if before else 'after'}": accelerated(rank, precision, before=before)
        for precision in ("no", "bf16")
        for before in (True, False)
    }


def accelerated(rank: int, precision: str, *, before: bool) -> dict[str, Any]:
    AcceleratorState._reset_state()  # it has one precision for the whole process
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = network(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    early = ns.watch(model) if before else None
    prepared, optimizer = accelerator.prepare(model, optimizer)
    with early or ns.watch(prepared) as scope:
        for x, y in data(rank):
            with accelerator.accumulate(prepared):
                accelerator.backward(F.cross_entropy(prepared(x), y))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scope.step()
    return watched_counts(scope)


TASKS = (trainer_counts, trainer_resumes, trainer_learns, accelerate_loops)


def main(rank: str, world: str, folder: str, *tasks: str) -> None:
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(world))
    known = {each.__name__: each for each in TASKS}
    found = {task: known[task](int(rank), Path(folder) / task) for task in tasks}
    torch.save(found, Path(folder) / f"{rank}_of_{world}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an interpreter that takes itself down in order


if __name__ == "__main__":
    main(*sys.argv[1:])
