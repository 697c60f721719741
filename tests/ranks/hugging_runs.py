"""Hugging Face's Trainer on several ranks, and what it does itself of DDP, FSDP2, bfloat16 and checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback

from neuronscope.callbacks.transformers import DeadNeuronCallback
from tests.agreement.slow_twin import hook_tables
from tests.callbacks.hugging import ACTS, PLACES, Noting, arguments, gpt2, texts, trainer
from tests.ranks.accelerate_runs import afresh, as_on_gpus
from tests.ranks.parallel import CASES, Case, outcome, tried, whole
from tests.ranks.recorded import WRAPPED, Recorder

STEPS, BATCH, EVALUATED = 3, 2, 8

#: As one process with batches of 8 has them. Nothing is learnt, so that both meet the same network.
STILL: dict[str, Any] = {"learning_rate": 0.0, "eval_strategy": "epoch", "per_device_train_batch_size": 4}


class Records(TrainerCallback):
    """Attaches a recorder, and tells it of the steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.recorder = Recorder(model, {act: (place, place) for act, place in zip(ACTS, PLACES)})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.step = state.global_step


class Tables(TrainerCallback):
    """Looks at the hook tables before anybody watches."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = hook_tables(model)


def options_of(case: Case, strategy: str) -> dict[str, Any]:
    """What a user sets for it; for checkpointing under FSDP, what the Trainer asks for in place of its own."""
    options: dict[str, Any] = {"bf16": case.autocast, "gradient_accumulation_steps": case.micro_batches}
    if strategy == "fsdp":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        config = {**wrapped, "activation_checkpointing": case.checkpointed}
        return {**options, "fsdp": True, "fsdp_config": config}
    kept = {"use_reentrant": False} if case.checkpointed else None
    return {**options, "gradient_checkpointing": case.checkpointed, "gradient_checkpointing_kwargs": kept}


def fit(case: Case, strategy: str, folder: Path, *callbacks: TrainerCallback, on_gpus: bool = True) -> Any:
    """A training of 3 steps with dropout, evaluated after the second and the last; its FSDP is told of GPUs."""
    world = dist.get_world_size()
    with afresh():
        told = arguments(
            folder,
            **options_of(case, strategy),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            eval_strategy="steps",
            eval_steps=2,
        )
        if strategy == "fsdp" and on_gpus:
            as_on_gpus()
        run = Trainer(
            gpt2(),
            told,
            train_dataset=texts(world * case.micro_batches * BATCH * STEPS),
            eval_dataset=texts(EVALUATED, seed=2),
            callbacks=list(callbacks),
        )
        run.train()
    return run


def run(case: Case, strategy: str, folder: Path) -> dict[str, Any]:
    """Recorded and not watched, then watched and not recorded."""
    records, tables, callback = Records(), Tables(), DeadNeuronCallback(every_n_steps=1, window_steps=2)
    plain = fit(case, strategy, folder, records)
    watched = fit(case, strategy, folder, tables, callback)
    return {
        **outcome(
            records.recorder,
            callback.scope,
            (weights_of(plain), weights_of(watched)),
            same_hooks=hook_tables(watched.model) == tables.before,
            phases=("train", "val"),
        ),
        "wrapped": type(watched.model_wrapped).__name__,
    }


class After(TrainerCallback):
    """Does something on the last rank, after the first step."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            self.do()


def hugging_fault(rank: int, folder: Path) -> dict[str, Any]:
    """A fault of ours on the last rank: it counts no more, trains on, and keeps nobody waiting."""
    records, tables, callback = Records(), Tables(), DeadNeuronCallback(every_n_steps=1, window_steps=2)
    plain = fit(Case(), "ddp", folder, records, After(lambda: records.recorder.stop()))
    fail = After(lambda: callback.scope._hooks.fail(RuntimeError("a fault of ours")))
    watched = fit(Case(), "ddp", folder, tables, callback, fail)
    return outcome(
        records.recorder,
        callback.scope,
        (weights_of(plain), weights_of(watched)),
        same_hooks=hook_tables(watched.model) == tables.before,
        phases=("train", "val"),
    )


def weights_of(run: Any) -> dict[str, Tensor]:
    return {WRAPPED.sub("", name): value for name, value in whole(run.model).items()}


def hugging_ddp(rank: int, folder: Path) -> dict[Case, Any]:
    return {case: run(case, "ddp", folder) for case in CASES}


def hugging_fsdp(rank: int, folder: Path) -> dict[Case, Any]:
    return {case: run(case, "fsdp", folder) for case in CASES}


def hugging_tried(rank: int, folder: Path) -> dict[str, str]:
    """Without telling it that its devices were GPUs."""
    found = tried(lambda: fit(Case(), "fsdp", folder, on_gpus=False).model_wrapped)
    return {"fsdp=True in TrainingArguments": found}


def hugging_counts(rank: int, folder: Path) -> dict[str, Any]:
    callback, noting = DeadNeuronCallback(every_n_steps=1, window_steps=2), Noting()
    trainer(folder, callback, noting, model=gpt2(0.0), **STILL).train()
    told = [logs for _, logs in noting.given if "neuronscope/dead_pct" in logs]
    offered = [logs["eval_neuronscope/dead_pct"] for _, logs in noting.given if "eval_neuronscope/dead_pct" in logs]
    counts = {phase: counts_of(callback, phase) for phase in ("train", "val")}
    return {**counts, "told": len(told), "offered": offered}


def hugging_resumes(rank: int, folder: Path) -> dict[str, Any]:
    """Saved in the middle of a window, where each rank has counts that the other has not, and taken up again."""
    saving = {**STILL, "save_strategy": "steps", "save_steps": 2}
    first, second = (DeadNeuronCallback(every_n_steps=1, window_steps=4) for _ in range(2))
    trainer(folder / "first", first, model=gpt2(0.0), **saving).train()
    run = trainer(folder / "second", second, model=gpt2(0.0), **saving)
    run.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    return {"first": counts_of(first, "train"), "second": counts_of(second, "train")}


def counts_of(callback: DeadNeuronCallback, phase: str) -> dict[str, Any]:
    fields = ("zero_outputs", "zero_gradients", "last_active_step", "positions", "gradient_positions", "examples")
    return {name: {field: getattr(tally, field) for field in fields} for name, tally in callback.census(phase).items()}
