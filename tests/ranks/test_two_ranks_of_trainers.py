"""Hugging Face's Trainer and Accelerate on two gloo processes: counts are those of one process over all the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import neuronscope as ns
from tests.callbacks.hugging import ACTS, TwinTrainer, gpt2, trainer

from .assertions import assert_equal_counts
from .hugging_runs import STILL
from .worker import BATCH, STEPS, data, network, watched_counts

Runs = dict[int, list[dict[str, Any]]]


def assert_twin(found: dict[str, Any], twin: dict[str, Any]) -> None:
    assert list(found) == list(twin) == ACTS
    for name, fields in found.items():
        for field, value in fields.items():
            np.testing.assert_array_equal(value, twin[name][field], err_msg=f"{name} {field}")


def test_a_hugging_face_training_on_two_ranks_is_counted_exactly(runs: Runs, tmp_path: Path) -> None:
    options = {**STILL, "per_device_train_batch_size": 8}
    twin = trainer(tmp_path, model=gpt2(0.0), kind=TwinTrainer, **options).counted({None: 2})
    first, second = (rank["hugging_counts"] for rank in runs[2])
    for found in (first, second):
        assert_twin(found["train"], twin.tallies("train"))
        assert_twin(found["val"], twin.tallies("val"))
    # The first rank reports, and what it finds goes into the metrics of both: they must agree on the best model.
    assert (first["told"] > 0, second["told"]) == (True, 0)
    assert first["offered"] == second["offered"] != []


def test_a_resumed_hugging_face_training_on_two_ranks_is_counted_exactly(runs: Runs) -> None:
    for found in (rank["hugging_resumes"] for rank in runs[2]):
        assert_equal_counts(found["second"], found["first"])
        # 2 epochs of 24 sentences.
        assert found["second"][ACTS[0]]["examples"] == 48


def test_a_model_may_be_watched_before_and_after_accelerate_prepares_it(runs: Runs) -> None:
    found = [rank["accelerate_before_and_after"] for rank in runs[2]]
    assert list(found[0]) == ["no, before", "no, after", "bf16, before", "bf16, after"]
    for name in found[0]:
        wanted = one_process(bfloat16=name.startswith("bf16"))
        assert wanted["0/relu"]["examples"] == 2 * STEPS * BATCH
        for rank in found:
            assert_equal_counts(rank[name], wanted)


def one_process(*, bfloat16: bool) -> dict[str, Any]:
    """The counts over both ranks' data, each batch by itself, two pairs of batches a step."""
    model = network(dropout=0.0)
    with ns.watch(model) as scope:
        for number, halves in enumerate(zip(data(0), data(1), strict=True), start=1):
            for x, y in halves:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                    scores = model(x)
                F.cross_entropy(scores.float(), y).backward()
            if number % 2 == 0:
                scope.step()
    return watched_counts(scope)
