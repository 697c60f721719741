"""A small language model for a Hugging Face Trainer, and Trainers that nobody, Neuronscope or the slow twin watches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.agreement.slow_twin import Twin

VOCABULARY, LENGTH, WIDTH = 31, 6, 8
#: The two sites of GPT-2, and the modules that apply their activations.
ACTS = ["transformer.h.0.mlp.c_fc/relu", "transformer.h.1.mlp.c_fc/relu"]
PLACES = ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
#: Neurons of an act: GPT-2's feed-forwards are four times as wide as the rest.
HIDDEN = 4 * WIDTH
QUIET = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}


def gpt2(dropout: float = 0.1) -> Any:
    """GPT-2 with ReLU, always with the same weights; the first three neurons of each feed-forward never fire."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(
        GPT2Config(**QUIET, **shape, **rates, activation_function="relu", loss_type="ForCausalLM", use_cache=False)
    )
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.bias[:3] = -100.0
    return model


def llama() -> Any:
    """Llama, whose neurons are the products of a gate and what it lets through."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**QUIET, **shape, loss_type="ForCausalLM", use_cache=False, pad_token_id=0))


def texts(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Sentences of random tokens, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": row, "labels": row} for row in torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    ]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments of a training of 2 epochs of 6 batches that reports to nobody and saves nothing, unless told."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 2,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def trainer(folder: Path, *callbacks: Any, model: Any = None, kind: type[Any] = Trainer, **options: Any) -> Any:
    """A Trainer of 24 sentences, with 8 to evaluate."""
    return kind(
        gpt2() if model is None else model,
        arguments(folder, **options),
        train_dataset=texts(24),
        eval_dataset=texts(8, seed=2),
        callbacks=list(callbacks),
    )


class TwinTrainer(Trainer):
    """A Trainer whose training the slow twin counts."""

    def counted(self, axis: dict[str | None, int], every: int = 1) -> Twin:
        """Train; every batch and every pass of evaluation is kept by the twin."""
        self.twin = Twin(axis, every=every)
        self.add_callback(_Steps(self.twin))
        self.accelerator.backward = self.twin.backward
        with self.twin.attach(self.model):
            self.train()
        return self.twin

    def evaluation_loop(self, dataloader: Any, description: str, *rest: Any, **options: Any) -> Any:
        with self.twin.phase("val" if description == "Evaluation" else "nothing"):
            return super().evaluation_loop(dataloader, description, *rest, **options)


class _Steps(TrainerCallback):
    def __init__(self, twin: Twin) -> None:
        self.twin = twin

    def on_step_end(self, *event: Any, **kwargs: Any) -> None:
        self.twin.step()


class Noting(TrainerCallback):
    """A callback that keeps what it is given to log, as the tool of a user would."""

    def __init__(self) -> None:
        self.given: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.given.append((state.global_step, dict(logs)))

    def steps(self, tag: str) -> list[int]:
        return [step for step, logs in self.given if tag in logs]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, copied."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@contextlib.contextmanager
def counted_calls(model: nn.Module, at: Sequence[str]) -> Any:
    """How often modules are called; for what must not be counted, to know that it ran."""
    calls = dict.fromkeys(at, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in at]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
