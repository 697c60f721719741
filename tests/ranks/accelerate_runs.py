"""Accelerate on several ranks: the network of :mod:`tests.ranks.parallel`, prepared by ``Accelerator.prepare``.

On CPUs Accelerate 1.15 makes ``DistributedDataParallel`` of every model and takes no notice of a plugin for FSDP, which
it reads where the kind of its devices is a GPU's. :func:`as_on_gpus` tells it that the kind is one: the device stays
the CPU, and all that follows, ``fully_shard`` included, is its own code and torch's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.nn import functional as F

import neuronscope as ns
from tests.agreement.slow_twin import hook_tables
from tests.ranks.parallel import CASES, SITES, Case, Network, as_fsdp, data, outcome, tried, whole
from tests.ranks.recorded import Recorder
from tests.ranks.worker import data as two_halves
from tests.ranks.worker import network, watched_counts


@contextlib.contextmanager
def afresh() -> Iterator[None]:
    """Accelerate has one state for the whole process, and writes into its environment."""
    with mock.patch.dict(os.environ):
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def as_on_gpus() -> None:
    """Have a plugin for FSDP taken up; call it before an Accelerator is made."""
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )


def accelerator_of(case: Case, **options: Any) -> Accelerator:
    precision = "bf16" if case.autocast else "no"
    return Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=case.micro_batches, **options)


def by_ddp(case: Case) -> tuple[Accelerator, Any, Any]:
    accelerator = accelerator_of(case)
    return accelerator, *accelerator.prepare(*network_and_optimizer(case))


def by_fsdp(case: Case) -> tuple[Accelerator, Any, Any]:
    as_on_gpus()
    accelerator = accelerator_of(case, fsdp_plugin=plugin())
    return accelerator, *accelerator.prepare(*network_and_optimizer(case))


def by_hand(case: Case) -> tuple[Accelerator, Any, Any]:
    """``fully_shard`` by the user; ``evaluation_mode`` keeps Accelerate from wrapping the model once more."""
    accelerator = accelerator_of(case)
    model = as_fsdp(Network(case.checkpointed), case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return accelerator, accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)


def network_and_optimizer(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Network(case.checkpointed)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(prepared: tuple[Accelerator, Any, Any], case: Case, rank: int, step: Any) -> None:
    accelerator, model, optimizer = prepared
    for x, y in (pair for micro_batches in data(rank, case) for pair in micro_batches):
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten()))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step()


def run(prepare: Any, case: Case, rank: int) -> dict[str, Any]:
    """Recorded and not watched, then watched and not recorded."""
    with afresh():
        plain = prepare(case)
        recorder = Recorder(getattr(plain[1], "module", plain[1]), SITES)
        train(plain, case, rank, recorder.next_step)
    with afresh():
        watched = prepare(case)
        before = hook_tables(watched[1])
        with ns.watch(watched[1], window_steps=2) as scope:
            train(watched, case, rank, scope.step)
    same_hooks = hook_tables(watched[1]) == before
    return outcome(recorder, scope, (whole(plain[1]), whole(watched[1])), same_hooks=same_hooks)


def accelerate_ddp(rank: int, folder: Path) -> dict[Case, Any]:
    return {case: run(by_ddp, case, rank) for case in CASES}


def accelerate_fsdp(rank: int, folder: Path) -> dict[Case, Any]:
    return {case: run(by_fsdp, case, rank) for case in CASES}


def accelerate_by_hand(rank: int, folder: Path) -> dict[Case, Any]:
    return {case: run(by_hand, case, rank) for case in CASES}


def accelerate_tried(rank: int, folder: Path) -> dict[str, str]:
    """Without telling it that its devices were GPUs."""
    ways = {
        "a plugin for FSDP2 in Accelerate": lambda: prepared_with_plugin(Network()),
        "a model under fully_shard in Accelerator.prepare": lambda: accelerator_of(Case()).prepare(
            as_fsdp(Network(), Case())
        ),
    }
    found = {}
    for name, way in ways.items():
        with afresh():
            found[name] = tried(way)
    return found


def prepared_with_plugin(model: nn.Module) -> nn.Module:
    accelerator = accelerator_of(Case(), fsdp_plugin=plugin())
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[0]


def accelerate_before_and_after(rank: int, folder: Path) -> dict[str, Any]:
    """Watched before and after ``prepare``, in float32 and in bfloat16; two batches a step, and nothing is learnt."""
    return {
        f"{precision}, {'before' if before else 'after'}": still(rank, precision, before=before)
        for precision in ("no", "bf16")
        for before in (True, False)
    }


def still(rank: int, precision: str, *, before: bool) -> dict[str, Any]:
    with afresh():
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = network(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        early = ns.watch(model) if before else None
        prepared, optimizer = accelerator.prepare(model, optimizer)
        with early or ns.watch(prepared) as scope:
            for x, y in two_halves(rank):
                with accelerator.accumulate(prepared):
                    accelerator.backward(F.cross_entropy(prepared(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    scope.step()
    return watched_counts(scope)
