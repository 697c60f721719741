"""What the callback counts in a Hugging Face training is what the slow twin counts, however the training is set up."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from neuronscope.callbacks.transformers import DeadNeuronCallback
from tests.agreement.slow_twin import assert_same
from tests.callbacks.hugging import ACTS, TwinTrainer, assert_same_weights, gpt2, llama, texts, trainer, weights
from tests.callbacks.test_no_harm import hooks

AXIS: dict[str | None, int] = {None: 2}
pytestmark = pytest.mark.usefixtures("fresh_compiler")

#: 24 sentences, 4 at a time: 6 batches an epoch. By 4, a step has 4 of them, and the epoch's second the 2 left.
ACCUMULATION = {"plain": {}, "accumulation": {"gradient_accumulation_steps": 4}}
PRECISION = {"float32": {}, "bfloat16": {"bf16": True}}
#: The twin knows neither: it counts the same numbers without them.
MEMORY = {"kept": {}, "checkpointing": {"gradient_checkpointing": True}}
COMPILER = {"eager": {}, "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"}}


def options_of(*names: str) -> dict[str, Any]:
    tables = (ACCUMULATION, PRECISION, MEMORY, COMPILER)
    found: dict[str, Any] = {"eval_strategy": "epoch"}
    for table, name in zip(tables, names):
        found.update(table[name])
    return found


@pytest.mark.parametrize("names", list(itertools.product(ACCUMULATION, PRECISION, MEMORY)), ids="-".join)
def test_counts_equal_the_twins_and_weights_those_of_an_unwatched_training(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    twin = trainer(tmp_path, kind=TwinTrainer, **options_of(*names[:2])).counted(AXIS)
    options = options_of(*names)
    plain = trainer(tmp_path, **options)
    plain.train()
    plain_rng = torch.get_rng_state()
    callback = DeadNeuronCallback(every_n_steps=1)
    watched = trainer(tmp_path, callback, **options)
    watched.train()
    assert list(callback.census()) == ACTS
    assert_same(callback.census("train"), twin.tallies("train"))
    assert_same(callback.census("val"), twin.tallies("val"))
    # 2 epochs of 24 sentences, and each followed by an evaluation of 8.
    assert (callback.census("train").examples, callback.census("val").examples) == (48, 16)
    assert_same_weights(weights(watched.model), weights(plain.model))
    assert torch.equal(torch.get_rng_state(), plain_rng)
    assert hooks(watched.model) == hooks(plain.model)  # transformers has one of its own where it recomputes


# torch's compiler asks for the gradient of a tensor that has none, and hides its own warning only where it is printed.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("names", [("plain", "float32", "kept"), ("accumulation", "bfloat16", "checkpointing")])
def test_a_compiled_training_is_counted_exactly(tmp_path: Path, names: tuple[str, ...]) -> None:
    # The compiler rounds otherwise than eager code: so the twin's network has no dropout and takes steps too small to
    # turn a sign, and its counts are the compiled network's.
    options = {"learning_rate": 1e-9}
    twin_options = {**options_of(*names[:2]), **options}
    twin = trainer(tmp_path, model=gpt2(0.0), kind=TwinTrainer, **twin_options).counted(AXIS)
    options = {**options_of(*names, "compiled"), **options}
    plain = trainer(tmp_path, model=gpt2(0.0), **options)
    plain.train()
    callback = DeadNeuronCallback(every_n_steps=1)
    watched = trainer(tmp_path, callback, model=gpt2(0.0), **options)
    watched.train()
    assert_same(callback.census("train"), twin.tallies("train"))
    assert_same(callback.census("val"), twin.tallies("val"))
    assert_same_weights(weights(watched.model), weights(plain.model))
    assert hooks(watched.model) == hooks(plain.model)


def test_gated_products_of_a_language_model_are_counted(tmp_path: Path) -> None:
    twin = trainer(tmp_path, model=llama(), kind=TwinTrainer).counted(AXIS)
    callback = DeadNeuronCallback(every_n_steps=1)
    trainer(tmp_path, callback, model=llama()).train()
    gates = [f"model.layers.{layer}.mlp.gate_proj" for layer in range(2)]
    assert list(callback.census()) == [name for gate in gates for name in (f"{gate}/silu", f"{gate}/swiglu")]
    assert_same(callback.census(), twin.tallies())


@pytest.mark.parametrize("accumulation", ACCUMULATION)
def test_counts_on_every_third_step_equal_the_twins(tmp_path: Path, accumulation: str) -> None:
    options = {**ACCUMULATION[accumulation], "num_train_epochs": 4}
    twin = trainer(tmp_path, kind=TwinTrainer, **options).counted(AXIS, every=3)
    callback = DeadNeuronCallback(every_n_steps=3, window_steps=4)
    trainer(tmp_path, callback, **options).train()
    assert_same(callback.census(), twin.tallies())
    # 24 steps: 0, 3, … 21; or, by 4, 8 steps: 0, 3, 6.
    assert callback.census().steps == (8 if accumulation == "plain" else 3)


def test_neurons_that_never_fire_are_dead_and_carry_their_bound(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1, window_steps=12)
    run = trainer(tmp_path, callback, per_device_train_batch_size=24, num_train_epochs=13)
    run.train()
    report = callback.report()
    # 13 steps of 24 sentences: 312, and 299 are enough.
    assert report.window.long_enough
    for act in ACTS:
        assert report[act].judgement.dead[:3].all()


def test_predictions_and_what_other_callbacks_run_do_not_count(tmp_path: Path) -> None:
    class Busy(TrainerCallback):
        """Runs the model wherever it can, as one that prints samples would, and predicts at the end of an epoch."""

        def sample(self, *event: Any, model: Any, **kwargs: Any) -> None:
            training = model.training
            model.eval()
            with torch.no_grad():
                model(torch.zeros(7, 3, dtype=torch.int64))
            model.train(training)

        on_train_begin = on_epoch_begin = on_optimizer_step = on_step_end = sample

        def on_epoch_end(self, *event: Any, **kwargs: Any) -> None:
            self.trainer.predict(texts(5, seed=3))

    expected, callback = DeadNeuronCallback(every_n_steps=1), DeadNeuronCallback(every_n_steps=1)
    trainer(tmp_path, expected, eval_strategy="epoch").train()
    for callbacks in ((first := Busy(), callback), (callback, first)):
        run = trainer(tmp_path, *callbacks, eval_strategy="epoch")
        first.trainer = run
        run.train()
        for phase in ("train", "val"):
            for act in ACTS:
                assert callback.census(phase)[act].positions == expected.census(phase)[act].positions > 0


def test_what_a_callback_runs_between_the_batches_of_one_step_counts_with_it(tmp_path: Path) -> None:
    """The Trainer says that such a batch is over, but not when the next begins; the documentation says so."""

    class Busy(TrainerCallback):
        def on_substep_end(self, *event: Any, model: Any, **kwargs: Any) -> None:
            model(torch.zeros(7, 3, dtype=torch.int64))

    callback = DeadNeuronCallback(every_n_steps=1)
    trainer(tmp_path, callback, Busy(), gradient_accumulation_steps=4).train()
    # 2 epochs of 6 batches, by 4: steps of 4 and 2 batches, with 3 + 1 ends in between. 48 sentences, and 7 at each.
    assert callback.census().examples == 48 + 2 * (3 + 1) * 7


@pytest.mark.parametrize("ours_first", [True, False])
def test_every_evaluation_in_training_is_a_pass_whoever_asks_for_it(tmp_path: Path, ours_first: bool) -> None:
    class Asking(TrainerCallback):
        """Asks for an evaluation after the first step, when all others have had their say, and runs one by itself."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate |= state.global_step == 1
            if state.global_step == 3:
                self.trainer.evaluate(texts(12, seed=4), metric_key_prefix="mine")

    asking, callback = Asking(), DeadNeuronCallback(every_n_steps=1)
    run = trainer(tmp_path, *((callback, asking) if ours_first else (asking, callback)), eval_on_start=True)
    run.eval_dataset = {"one": texts(8, seed=2), "two": texts(4, seed=5)}
    asking.trainer = run
    run.train()
    # At the start and after step 1: 8 + 4 sentences; 12 by itself. Each set is a window of its own.
    assert callback.census("val").examples == 2 * (8 + 4) + 12
    assert callback.report("val").global_step == 12
    assert callback.census("train").examples == 48
    assert callback.census("val", "last").examples == 12


def test_evaluations_outside_of_training_are_not_counted(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1)
    run = trainer(tmp_path, callback)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert callback.census("val").neurons == 0
    assert not any("neuronscope" in name for name in (*before, *after))
    assert hooks(run.model) == 0
