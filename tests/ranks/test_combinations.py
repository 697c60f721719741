"""Who trains × how many ranks × how the model is spread × precision × accumulation × checkpointing.

Counts are as integers those of the slow twin over all ranks, which is a training of its own that nobody watches, and
weights are bit for bit those of that training. With tensor parallelism: ``test_strategies.py``. What does not exist on
CPUs over gloo is listed in :data:`ABSENT`, and tested to be absent.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
from torch import nn

from tests.callbacks.hugging import gpt2
from tests.ranks import hugging_runs
from tests.ranks.parallel import BATCH, CASES, STEPS, Case, Network
from tests.ranks.test_strategies import check

Runs = dict[int, list[dict[str, Any]]]
WORLDS = (1, 2, 4)


class Way(NamedTuple):
    """How a task trains.

    Attributes:
        task: See :mod:`tests.ranks.worker`.
        network: As it is before any training.
        examples: Of all ranks, by phase.
    """

    task: str
    network: Callable[[], nn.Module]
    examples: Callable[[int, Case], dict[str, int]]


def own(world: int, case: Case) -> dict[str, int]:
    return {"train": world * STEPS * case.micro_batches * BATCH}


def and_validated(world: int, case: Case) -> dict[str, int]:
    return {**own(world, case), "val": own(world, case)["train"]}  # one pass, over as many batches


def hugging(world: int, case: Case) -> dict[str, int]:
    steps, batch, evaluated = hugging_runs.STEPS, hugging_runs.BATCH, hugging_runs.EVALUATED
    return {"train": world * steps * case.micro_batches * batch, "val": 2 * evaluated}  # after steps 2 and 3


WAYS = {
    "plain, DDP": Way("ddp", Network, own),
    "plain, FSDP2": Way("fsdp", Network, own),
    "plain, FSDP1": Way("fsdp1", Network, own),
    "Lightning, DDP": Way("lightning_ddp", Network, and_validated),
    "Lightning, FSDP2": Way("lightning_fsdp", Network, and_validated),
    "Hugging Face, DDP": Way("hugging_ddp", gpt2, hugging),
    "Hugging Face, FSDP2": Way("hugging_fsdp", gpt2, hugging),
    "Accelerate, DDP": Way("accelerate_ddp", Network, own),
    "Accelerate, FSDP2": Way("accelerate_fsdp", Network, own),
    "Accelerate, FSDP2 by the user": Way("accelerate_by_hand", Network, own),
}


TABLE = [
    (world, way, case)
    for world, way in product(WORLDS, WAYS)
    for case in CASES
    if world == 2 or way != "Accelerate, FSDP2 by the user"
]


@pytest.mark.parametrize(("world", "way", "case"), TABLE, ids=str)
def test_counts_equal_the_twins_and_weights_those_of_an_unwatched_run(
    runs: Runs, world: int, way: str, case: Case
) -> None:
    task, network, examples = WAYS[way]
    check([rank[task][case] for rank in runs[world]], 1, network().state_dict(), examples(world, case))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("way", "wrapped"), [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPGPT2LMHeadModel")])
def test_the_trainer_distributes_the_model_with_the_chosen_strategy(
    runs: Runs, world: int, way: str, wrapped: str
) -> None:
    for rank in runs[world]:
        assert {given["wrapped"] for given in rank[f"hugging_{way}"].values()} == {wrapped}


#: Ways that a user may try on CPUs, and what comes of them in torch 2.13, Accelerate 1.15, transformers 5.18 and
#: Lightning 2.6. A row that fails has begun to exist: then it belongs into the table above.
ABSENT = {
    "FullyShardedDataParallel, not told of a device": "RuntimeError: FSDP needs a non-CPU accelerator device",
    "Lightning's FSDPStrategy": "ValueError: The strategy `fsdp` requires a GPU accelerator",
    "a plugin for FSDP2 in Accelerate": "DistributedDataParallel",
    "a model under fully_shard in Accelerator.prepare": "RuntimeError: Cannot flatten unevenly sharded tensor",
    "fsdp=True in TrainingArguments": "DistributedDataParallel",
}


@pytest.mark.parametrize("tried", ABSENT)
def test_combinations_that_we_leave_out_are_refused_by_the_trainer_itself(runs: Runs, tried: str) -> None:
    for rank in runs[2]:
        found = {**rank["accelerate_tried"], **rank["hugging_tried"], **rank["lightning_tried"]}[tried]
        assert ABSENT[tried] in found
