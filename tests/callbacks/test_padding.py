"""Padding of a batch is not counted: under ``watch`` and in a Hugging Face training, counts are those of real tokens.

The truth is found without masks: each sentence runs alone and without its padding, and its activations are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import neuronscope as ns
from neuronscope.callbacks.transformers import DeadNeuronCallback
from tests.callbacks.hugging import ACTS, HIDDEN, LENGTH, PLACES, VOCABULARY, arguments, gpt2

#: The compiler asks for the gradient of a tensor that has none.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]
LENGTHS = [1, 6, 3, 2, 5, 4, 6, 2]
ROWS = 4  # of a batch
TOKENS = sum(LENGTHS)
PADDED = LENGTH * len(LENGTHS)


def padded_texts() -> list[dict[str, Tensor]]:
    """Sentences of several lengths, padded on the right, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(3)
    texts = []
    for length in LENGTHS:
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < length).long()
        labels = tokens.masked_fill(mask == 0, -100)
        texts.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
    return texts


def truth(model: nn.Module) -> dict[str, npt.NDArray[np.int64]]:
    """The zero outputs of each site on the real tokens, from sentences that run one by one without padding."""
    zeros = {act: np.zeros(HIDDEN, np.int64) for act in ACTS}

    def hook(act: str) -> Any:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            zeros[act] += (output == 0).flatten(0, 1).sum(0).numpy()

        return count

    handles = [model.get_submodule(place).register_forward_hook(hook(act)) for act, place in zip(ACTS, PLACES)]
    model.eval()
    with torch.no_grad():
        for text, length in zip(padded_texts(), LENGTHS):
            model(input_ids=text["input_ids"][None, :length])
    model.train()
    for handle in handles:
        handle.remove()
    return zeros


def batches() -> Iterator[dict[str, Tensor]]:
    texts = padded_texts()
    for first in range(0, len(texts), ROWS):
        yield {name: torch.stack([text[name] for text in texts[first : first + ROWS]]) for name in texts[0]}


def assert_real_tokens(census: ns.Census, zeros: dict[str, npt.NDArray[np.int64]]) -> None:
    assert list(census) == ACTS
    for act in ACTS:
        tally = census[act]
        assert (tally.positions, tally.gradient_positions, tally.examples) == (TOKENS, TOKENS, len(LENGTHS))
        np.testing.assert_array_equal(tally.zero_outputs, zeros[act])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_watch_with_a_mask_counts_exactly_the_real_tokens(compiled: bool) -> None:
    model = gpt2(0.0)
    zeros = truth(model)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with ns.watch(run, mask="attention_mask") as scope:
        for batch in batches():
            run(**batch).loss.backward()
            scope.step()
        assert_real_tokens(scope.census(), zeros)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_hugging_face_training_counts_exactly_the_real_tokens(tmp_path: Path, compiled: bool) -> None:
    compiler = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    model = gpt2(0.0)
    zeros = truth(model)
    callback = DeadNeuronCallback(every_n_steps=1)
    options = {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": ROWS, **compiler}
    told = arguments(tmp_path, **options)
    Trainer(model, told, train_dataset=padded_texts(), callbacks=[callback]).train()
    assert_real_tokens(callback.census(), zeros)


def test_a_training_that_is_told_to_counts_padding_too(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1, mask=None)
    told = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=ROWS)
    Trainer(gpt2(0.0), told, train_dataset=padded_texts(), callbacks=[callback]).train()
    assert [callback.census()[act].positions for act in ACTS] == [PADDED, PADDED]
