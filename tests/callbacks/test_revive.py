"""Callbacks revive neurons when asked to, with the trainer's optimizer, and change nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import neuronscope as ns
from neuronscope.act.rules import Rule
from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.callbacks.transformers import DeadNeuronCallback
from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import Policy
from tests.callbacks import hugging
from tests.callbacks.networks import batches, network, trainer

OPTIONS: dict[str, Any] = {"every_n_steps": 1, "window_steps": 3}
SIZE = 100  # examples a batch: three steps make a window sure


class Nobody(Rule):
    """Chooses no neuron."""

    def choose(self, site: Any) -> Any:
        return np.zeros(site.window.neurons, dtype=np.bool_)


def fit(framework: str = "pytorch_lightning", **options: Any) -> tuple[DeadNeuronMonitor, Any]:
    monitor, model = DeadNeuronMonitor(**OPTIONS, **options), network(framework)
    torch.manual_seed(5)
    trainer(monitor, framework=framework, max_epochs=1).fit(model, batches(8, SIZE), batches(1))
    return monitor, model


def acts_of(monitor: Any) -> list[tuple[int, str, tuple[int, ...]]]:
    assert monitor.scope is not None
    return [(act.step, act.site, act.neurons) for act in monitor.scope.acts]


@pytest.mark.parametrize("framework", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_revives_at_the_end_of_a_window_and_goes_on(framework: str) -> None:
    monitor, model = fit(framework, revive="dead")
    assert (3, "first/relu", (0, 1, 2)) in acts_of(monitor)
    assert (model.first.bias[:3] > -1).all()
    assert (model.second.weight[:, :3] != 0).any()  # they learn
    census = monitor.census(window="last")["first/relu"]
    assert (census.zero_output_fraction[:3] < 1).all()
    assert monitor.report().acts == monitor.scope.acts  # type: ignore[union-attr]


def test_a_rule_whose_measure_goes_out_of_date_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    measured = ns.representation(model, torch.randn(9, 4), lambda output, batch: output.square().mean())
    with pytest.raises(UsageError, match=r"call `ns\.revive` yourself"):
        DeadNeuronMonitor(revive=ns.GraMa(measured))


def test_a_rule_that_chooses_nobody_changes_no_bit_and_no_random_number() -> None:
    left = []
    for options in ({}, {"revive": Nobody()}):
        _, model = fit(**options)
        left.append((model.state_dict(), torch.get_rng_state()))
    (one, random), (other, same) = left
    assert torch.equal(random, same)
    assert [name for name, each in one.items() if not torch.equal(each, other[name])] == []


def test_dropout_and_data_stay_as_they_were() -> None:
    (_, plain), (_, revived) = fit(), fit(revive="dead")
    for before, after in zip(plain.notes, revived.notes, strict=True):
        if before.site == "first/relu" and before.stage == "train" and before.step < 3:
            assert torch.equal(before.y, after.y)
    _, first = fit()
    random = torch.get_rng_state()
    _, second = fit(revive="dead")
    assert torch.equal(random, torch.get_rng_state())
    assert not torch.equal(first.first.weight, second.first.weight)


def test_revivals_keep_their_distance() -> None:
    class Some(Rule):
        def choose(self, site: Any) -> Any:
            return np.arange(site.window.neurons) == 5

    every, seldom = (fit(revive=Some(), revive_every=steps)[0] for steps in (1, 5))
    assert sorted({step for step, *_ in acts_of(every)}) == [3, 6]
    assert sorted({step for step, *_ in acts_of(seldom)}) == [3]


def test_checkpoints_and_tensorboard_have_the_acts(tmp_path: Path) -> None:
    monitor, logger = DeadNeuronMonitor(**OPTIONS, revive="dead", drawing_share=1.0), TensorBoardLogger(tmp_path)
    run, saved = trainer(monitor, logger=logger, max_epochs=1), tmp_path / "saved.ckpt"
    run.fit(network(), batches(8, SIZE), batches(1))
    run.save_checkpoint(saved)
    acts = acts_of(monitor)
    assert acts

    again = DeadNeuronMonitor(**OPTIONS, revive="dead")
    resumed = trainer(again, max_epochs=2)
    resumed.fit(network(), batches(8, SIZE), batches(1), ckpt_path=saved, weights_only=True)
    assert acts_of(again)[: len(acts)] == acts

    def read(folder: Path) -> EventAccumulator:
        return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()

    numbers = read(Path(logger.log_dir)).Scalars("neuronscope/revived_total")
    assert numbers[0].value == sum(len(neurons) for step, _, neurons in acts if step == 3)
    texts = read(Path(logger.log_dir) / "neuronscope")
    shown = [
        value.tensor_proto.string_val[0].decode()
        for tag in texts.Tags()["tensors"]
        for value in texts.Tensors(tag)
        if value.tensor_proto.string_val
    ]
    assert any("Revived so far" in text for text in shown)


def test_hugging_face_revives(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1, window_steps=3, revive="dead", policy=Policy(max_rate=0.3))
    model = hugging.gpt2()
    hugging.trainer(tmp_path, callback, model=model, save_strategy="steps", save_steps=6).train()
    acts = acts_of(callback)
    assert (3, hugging.ACTS[0], (0, 1, 2)) in acts
    assert (3, hugging.ACTS[1], (0, 1, 2)) in acts
    for block in model.transformer.h:
        assert (block.mlp.c_fc.bias[:3].abs() < 5).all()
        assert (block.mlp.c_proj.weight[:3] != 0).any()
    again = DeadNeuronCallback(every_n_steps=1, window_steps=3, revive="dead", policy=Policy(max_rate=0.3))
    resumed = hugging.trainer(tmp_path, again, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert acts_of(again)[:2] == acts[:2]
