"""Drawing beside the training: nothing is lost, whatever ends the run, and what fails is told once, where it can be."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from neuronscope.callbacks import DeadNeuronMonitor, background, publishing
from neuronscope.callbacks.background import MOST_WAITING, BackgroundDrawer
from neuronscope.errors import NeuronscopeWarning
from tests.callbacks.networks import batches, network, trainer
from tests.callbacks.test_faults import ours
from tests.callbacks.test_publishing import drawings, events, read

IMAGE, SCALAR = "neuronscope/overview", "neuronscope/dead_pct"


class Held:
    """A job that waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.free = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.free.wait(30)


def drawers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "neuronscope drawing"]


def test_drawing_jobs_run_in_order_in_one_thread_that_ends_with_them() -> None:
    drawer, done = BackgroundDrawer(), []
    for number in range(50):
        drawer.draw(lambda number=number: done.append((number, threading.current_thread().name)))
    drawer.finish()
    assert done == [(number, "neuronscope drawing") for number in range(50)]
    assert drawers() == []


def test_adding_a_drawing_job_waits_only_when_many_are_queued() -> None:
    drawer, first, done = BackgroundDrawer(), Held(), []
    drawer.draw(first)
    assert first.begun.wait(30)
    for number in range(MOST_WAITING):
        drawer.draw(lambda number=number: done.append(number))
    assert done == []  # all were taken while the first one is at work
    late = threading.Thread(target=drawer.draw, args=(lambda: done.append("late"),))
    late.start()
    late.join(0.1)
    assert late.is_alive()  # one too many: it waits for room
    first.free.set()
    late.join(30)
    drawer.finish()
    assert done == [*range(MOST_WAITING), "late"]


def test_a_failed_drawing_job_is_reported_once_and_the_others_are_done() -> None:
    drawer, done = BackgroundDrawer(), []

    def fail() -> None:
        raise OSError("the disk is full")

    drawer.draw(fail)
    with pytest.raises(OSError, match="the disk is full"):
        drawer.finish()
    drawer.draw(lambda: done.append(1))
    drawer.finish()
    assert done == [1]


def test_where_no_thread_can_start_drawing_jobs_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(background.threading.Thread, "start", refuse)
    drawer, done = BackgroundDrawer(), []
    drawer.draw(lambda: done.append(threading.current_thread() is threading.main_thread()))
    assert done == [True]
    drawer.finish()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda drawer: pickle.loads(pickle.dumps(drawer))])
def test_a_copy_of_the_drawing_queue_is_empty_and_works(copied: Any) -> None:
    drawer, job, done = BackgroundDrawer(), Held(), []
    drawer.draw(job)
    other = copied(drawer)
    other.draw(lambda: done.append(1))
    other.finish()
    assert done == [1]  # while the first one's job is still at work
    job.free.set()
    drawer.finish()


def test_every_window_is_drawn_when_asked_for_and_all_is_there_when_fit_returns(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=1, drawing_share=1.0)
    trainer(monitor, logger=board, log_every_n_steps=1, max_epochs=1).fit(network(), batches(12, size=512), batches(1))
    assert drawers() == []
    assert [event.step for event in drawings(board).Images(IMAGE)] == list(range(12))
    assert [event.step for event in events(board).Scalars(SCALAR)] == list(range(12))


def test_training_goes_on_while_a_report_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, steps = Held(), []
    append = publishing.append

    def slow(report: Any, *args: Any, **kwargs: Any) -> None:
        steps.append(report.global_step)
        if report.global_step == 1:
            held()
        append(report, *args, **kwargs)

    class Releasing(DeadNeuronMonitor):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if trainer.global_step == 4:
                assert held.begun.wait(30)
                assert steps == [1]  # windows 2 to 4 closed meanwhile
                held.free.set()

    monkeypatch.setattr(publishing, "append", slow)
    monkeypatch.setattr(publishing, "_USUAL_DRAWING_S", 0.0)  # the first window is drawn
    board = TensorBoardLogger(tmp_path)
    monitor = Releasing(every_n_steps=1, window_steps=1, drawing_share=0.5)
    trainer(monitor, logger=board, log_every_n_steps=1, max_epochs=1).fit(network(), batches(6, size=512), batches(1))
    images = [event.step for event in drawings(board).Images(IMAGE)]
    assert images[0] == 0
    assert images[-1] == 5  # the end is drawn, whatever the share
    assert not {1, 2} & set(images)  # one drawing of a phase at a time
    assert [event.step for event in events(board).Scalars(SCALAR)] == [0, 1, 2, 3, 4, 5]  # numbers of every window


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_everything_counted_is_on_the_disk(tmp_path: Path, ending: type[BaseException]) -> None:
    board = TensorBoardLogger(tmp_path)
    model = network()
    step = model.training_step

    def failing(batch: Any, batch_idx: int) -> Any:
        if model.trainer.global_step == 5:
            raise ending("the user's own")
        return step(batch, batch_idx)

    model.training_step = failing
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=3, drawing_share=1e-6)
    run = trainer(monitor, logger=board, log_every_n_steps=1, max_epochs=1)
    with pytest.raises((ending, SystemExit)):
        run.fit(model, batches(8, size=256), batches(1))
    assert drawers() == []
    # The window of steps 0 … 2, then what was seen of the next one: steps 3 and 4. A run as short is drawn at its end.
    assert [event.step for event in events(board).Scalars(SCALAR)] == [2, 4]
    assert [event.step for event in drawings(board).Images(IMAGE)] == [4]


def test_a_drawing_that_fails_warns_once_and_training_ends_as_it_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(publishing, "append", fail)
    board = TensorBoardLogger(tmp_path)
    monitor = DeadNeuronMonitor(every_n_steps=1, window_steps=1, drawing_share=1.0)
    run = trainer(monitor, logger=board, log_every_n_steps=1, max_epochs=1)
    with pytest.warns(NeuronscopeWarning, match="could not write to a logger; .* the disk is full") as caught:
        run.fit(network(), batches(5, size=512), batches(1))
    assert len(ours(caught)) == 1
    assert run.global_step == 5
    assert [event.step for event in events(board).Scalars(SCALAR)] == [0, 1, 2, 3, 4]


EXIT = """
import sys, torch
import neuronscope as ns
from neuronscope.callbacks.publishing import Publisher

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
with ns.watch(model) as scope:
    for _ in range(3):
        model(torch.randn(200, 4)).sum().backward()
        scope.step()
class Log:  # as far as a publisher sees one; Lightning takes seconds to load
    key = "run"
    def log_metrics(self, metrics, step): pass
    def event_folder(self): return sys.argv[1]
Publisher(images=True, text=True, tab=True, html=False, drawing_share=1.0).publish(scope.report(), [Log()], 3)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise RuntimeError('no')"], ids=["end", "exception"])
def test_a_program_that_ends_while_it_draws_loses_nothing(tmp_path: Path, end: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXIT.format(end=end), str(tmp_path)], check=False, capture_output=True
    )
    found = read(tmp_path / "neuronscope")
    assert [event.step for event in found.Images(IMAGE)] == [3]
    assert [event.step for event in found.Tensors("neuronscope/diagnosis/text_summary")] == [3]
    assert [event.step for event in found.Tensors("neuronscope/report")] == [3]


FORK = """
import importlib, os, sys, threading, time
from neuronscope.callbacks.background import BackgroundDrawer

sys.path.insert(0, sys.argv[1])
begun = threading.Event()
def job():
    begun.set()
    importlib.import_module("slow_module")
drawer = BackgroundDrawer()
drawer.draw(job)
begun.wait()
time.sleep(0.05)  # the import is under way
child = os.fork()
if not child:
    importlib.import_module("slow_module")
    os._exit(7)
deadline = time.monotonic() + 30
while not (ended := os.waitpid(child, os.WNOHANG))[0]:
    if time.monotonic() > deadline:
        os.kill(child, 9)
        sys.exit("the child waits for a lock that none of its threads holds")
    time.sleep(0.01)
assert os.waitstatus_to_exitcode(ended[1]) == 7
drawer.finish()
assert os.fork() or os._exit(0) is None  # nothing is drawn: a fork does not wait
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_while_a_drawing_imports_a_module_can_import_it_too(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(0.4)", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
