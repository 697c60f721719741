"""The public interface that a callback for any trainer is written over, used here in plain loops."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import neuronscope.callbacks
from neuronscope.callbacks import Monitor, SummaryWriterLog, lightning, transformers
from neuronscope.errors import NeuronscopeWarning, UsageError
from tests.agreement.slow_twin import hook_tables

SIZE = 16


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def train(monitor: Monitor, model: nn.Module, steps: range) -> None:
    """Training batches, each with its optimizer step, and something between two batches that does not count."""
    for step in steps:
        monitor.begin_batch()
        model(torch.randn(SIZE, 4)).mean().backward()
        monitor.step(step)
        model(torch.randn(SIZE, 4))


def examples(monitor: Monitor, phase: str) -> int:
    census = monitor.census(phase)
    return census.examples if census else 0


def test_every_public_name_can_be_imported_and_is_documented() -> None:
    for name in neuronscope.callbacks.__all__:
        assert inspect.getdoc(getattr(neuronscope.callbacks, name))
        assert name in dir(neuronscope.callbacks)


@pytest.mark.parametrize("module", [lightning, transformers])
def test_the_callbacks_of_frameworks_use_no_private_name_of_the_monitor(module: Any) -> None:
    private = {name for name in (*vars(Monitor), *vars(Monitor())) if name.startswith("_") and not name.endswith("__")}
    assert private
    tree = ast.parse(inspect.getsource(module))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert (used | defined) & private == set()


def test_a_batch_counts_and_what_runs_between_two_batches_does_not() -> None:
    model, monitor = network(), Monitor(every_n_steps=1)
    monitor.attach(model)
    train(monitor, model, range(1, 4))
    assert examples(monitor, "train") == 3 * SIZE
    assert monitor.finish() is not None
    assert hook_tables(model) == hook_tables(network())


def test_accumulated_batches_are_one_step() -> None:
    model, monitor = network(), Monitor(every_n_steps=1)
    monitor.attach(model)
    for step in (0, 1, 1, 2):
        train(monitor, model, range(step, step + 1))
    monitor.finish()
    assert examples(monitor, "train") == 4 * SIZE
    assert monitor.census().steps == 2


def test_of_many_optimizer_steps_in_one_batch_those_that_are_due_are_observed() -> None:
    model, monitor = network(), Monitor(every_n_steps=4)
    monitor.attach(model)
    for begin in (0, 10):
        monitor.begin_batch()
        for step in range(begin, begin + 10):
            model(torch.randn(SIZE + step, 4)).sum().backward()
            monitor.note_step(step + 1)
        monitor.step(begin + 10)
        model(torch.randn(1000, 4))
    monitor.finish()
    observed = (0, 4, 8, 12, 16)
    assert monitor.census().steps == len(observed)
    assert examples(monitor, "train") == sum(SIZE + step for step in observed)


def test_an_evaluation_is_one_window_and_a_failed_or_discarded_one_is_none() -> None:
    model, monitor = network(), Monitor(every_n_steps=1)
    monitor.attach(model)
    train(monitor, model, range(1, 3))
    with monitor.evaluation("val"):
        model(torch.randn(10, 4))
    with pytest.raises(RuntimeError, match="the user's own"), monitor.evaluation("val"):
        model(torch.randn(100, 4))
        raise RuntimeError("the user's own mistake")
    monitor.begin_evaluation("val")
    monitor.begin_batch()
    model(torch.randn(1000, 4))
    monitor.discard_evaluation()
    monitor.begin_evaluation("val")
    model(torch.randn(7, 4))  # no batch runs
    monitor.begin_batch()
    model(torch.randn(5, 4))
    monitor.end_batch()
    model(torch.randn(7, 4))
    report = monitor.end_evaluation()
    assert report is not None
    assert report.phase == "val"
    assert monitor.end_evaluation() is None
    train(monitor, model, range(3, 4))
    monitor.finish()
    assert examples(monitor, "val") == 15
    assert examples(monitor, "train") == 3 * SIZE


def test_an_evaluation_outside_of_training_leaves_its_counts() -> None:
    model, monitor = network(), Monitor(every_n_steps=1)
    monitor.attach(model)
    train(monitor, model, range(1, 3))
    monitor.finish()
    monitor.attach_for_evaluation(model)
    with monitor.evaluation("test"):
        model(torch.randn(10, 4))
    monitor.detach()
    assert (examples(monitor, "train"), examples(monitor, "test")) == (2 * SIZE, 10)
    assert hook_tables(model) == hook_tables(network())


def test_before_it_is_attached_its_methods_do_nothing() -> None:
    monitor = Monitor()
    monitor.begin_batch()
    monitor.begin_optimizer_step()
    monitor.end_batch()
    monitor.move_to(3)
    assert monitor.step(1) is None
    with monitor.evaluation("val"):
        pass
    assert monitor.finish() is None
    assert not monitor.attached
    with pytest.raises(UsageError, match="call `attach"):
        monitor.report()


def test_a_model_without_activations_gives_a_warning_and_trains() -> None:
    model, monitor = nn.Linear(4, 1), Monitor(functional=False)
    with pytest.warns(NeuronscopeWarning, match="at least one activation"):
        monitor.attach(model)
    train(monitor, model, range(1, 3))
    assert monitor.finish() is None


def test_a_training_may_begin_at_a_later_step() -> None:
    model, monitor = network(), Monitor(every_n_steps=1)
    monitor.attach(model, step=100)
    train(monitor, model, range(101, 103))
    report = monitor.finish()
    assert report is not None
    assert report.global_step == 102
    assert monitor.census().steps == 2


def writers(folder: Path) -> Iterator[Any]:
    from tensorboardX import SummaryWriter as OtherWriter
    from torch.utils.tensorboard import SummaryWriter

    yield SummaryWriter(str(folder / "torch"))
    yield OtherWriter(str(folder / "tensorboardX"))


def test_a_summary_writer_gets_numbers_and_a_folder_beside_it_pictures(tmp_path: Path) -> None:
    for writer in writers(tmp_path):
        model, monitor = network(), Monitor(every_n_steps=1, window_steps=2)
        log = SummaryWriterLog(writer)
        folder = Path(str(log.event_folder()))
        assert log.key == f"SummaryWriter:{folder}"
        monitor.logs = [log]
        monitor.attach(model)
        for step in range(1, 6):
            monitor.begin_batch()
            model(torch.randn(256, 4)).mean().backward()
            monitor.step(step)
        monitor.finish()
        writer.add_scalar("loss", 1.0, 6)  # the writer is still open, and the user's
        writer.close()
        numbers, drawn = EventAccumulator(str(folder)), EventAccumulator(str(folder / "neuronscope"))
        numbers.Reload()
        drawn.Reload()
        assert [event.step for event in numbers.Scalars("neuronscope/dead_pct")] == [2, 4, 5]
        assert "loss" in numbers.Tags()["scalars"]
        assert [event.step for event in drawn.Images("neuronscope/overview")] == [5]


@pytest.mark.parametrize("kind", [Monitor, lightning.DeadNeuronMonitor, transformers.DeadNeuronCallback])
def test_every_callback_takes_a_process_group_which_is_no_part_of_its_saved_key(kind: Any) -> None:
    """A function gives it, since a trainer makes its groups later; where nothing is distributed it is not asked for."""

    def too_early() -> Any:
        raise AssertionError

    monitor = kind(process_group=too_early, every_n_steps=1)
    assert monitor.state_key == kind(every_n_steps=1).state_key
    if kind is Monitor:
        monitor.attach(model := network())
        train(monitor, model, range(1, 4))
        monitor.finish()
        assert examples(monitor, "train") == 3 * SIZE
    with pytest.raises(UsageError, match="Expected argument `process_group`"):
        kind(process_group="world")


def test_a_copy_has_the_counts_and_neither_logs_nor_hooks(tmp_path: Path) -> None:
    model, monitor = network(), Monitor(every_n_steps=1)
    monitor.logs = [SummaryWriterLog(next(writers(tmp_path)))]
    monitor.attach(model)
    train(monitor, model, range(1, 3))
    for other in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert (list(other.logs), other.attached) == ([], False)
        other.attach(model, step=2)
        assert examples(other, "train") == 2 * SIZE
        other.detach()
    monitor.detach()


def test_the_hooks_go_with_the_monitor_and_with_its_context() -> None:
    model = network()
    monitor = Monitor()
    monitor.attach(model)
    assert hook_tables(model) != hook_tables(network())
    del monitor
    assert hook_tables(model) == hook_tables(network())
    with Monitor() as monitor:
        monitor.attach(model)
    assert hook_tables(model) == hook_tables(network())


def test_the_reason_to_stop_is_that_of_this_training() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    monitor = Monitor(every_n_steps=1, window_steps=2, on_dead="stop", threshold=90)
    monitor.attach(model)
    for step in range(1, 3):
        assert monitor.stop_reason is None
        monitor.begin_batch()
        model(torch.randn(256, 4)).mean().backward()
        monitor.step(step)
    assert "8 of 8 neurons are dead (100 %)" in str(monitor.stop_reason)
    monitor.finish()
    monitor.attach(model, step=2)
    assert monitor.stop_reason is None
    monitor.detach()
