"""Final numbers beside hyperparameters, as TensorBoard's own HParams backend finds them in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from neuronscope.callbacks import DeadNeuronMonitor, Monitor, SummaryWriterLog
from neuronscope.callbacks.transformers import DeadNeuronCallback
from tests.callbacks.hugging import trainer as hugging_trainer
from tests.callbacks.networks import batches, network, trainer

tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="TensorBoard is not installed")
api = pytest.importorskip("tensorboard.plugins.hparams.api_pb2")
backend = pytest.importorskip("tensorboard.plugins.hparams.backend_context")
groups = pytest.importorskip("tensorboard.plugins.hparams.list_session_groups")
provider = pytest.importorskip("tensorboard.backend.event_processing.data_provider")
multiplexer = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_multiplexer")
context = pytest.importorskip("tensorboard.context")
base_plugin = pytest.importorskip("tensorboard.plugins.base_plugin")

DEAD = "neuronscope/dead_pct"


def listed(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Hyperparameters and metrics by run, as the HParams tab of a TensorBoard over a folder shows them."""
    runs = multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    data = provider.MultiplexerDataProvider(runs, str(folder))
    found = backend.Context(base_plugin.TBContext(data_provider=data))
    of, request = context.RequestContext(), api.ListSessionGroupsRequest()
    experiment = found.experiment_from_metadata(of, "", True, found.hparams_metadata(of, ""), [])
    for info in experiment.metric_infos:
        request.col_params.add(metric=info.name)
    statuses = [api.STATUS_UNKNOWN, api.STATUS_SUCCESS, api.STATUS_FAILURE, api.STATUS_RUNNING]
    request.allowed_statuses.extend(statuses)
    request.start_index, request.slice_size = 0, 99
    answer = groups.Handler(of, found, "", request).run()
    rows = {}
    for group in answer.session_groups:
        (session,) = group.sessions
        hyperparameters = {name: value.number_value or value.string_value for name, value in group.hparams.items()}
        rows[session.name] = (hyperparameters, {one.name.tag: one.value for one in session.metric_values})
    return rows


def lightning_run(folder: Path, **options: Any) -> tuple[Any, DeadNeuronMonitor]:
    board = TensorBoardLogger(folder, name="", version="run", **options)
    monitor, model = DeadNeuronMonitor(every_n_steps=1, window_steps=4), network()
    model.save_hyperparameters({"lr": 0.25, "optimizer": {"name": "SGD"}})
    run = trainer(monitor, logger=board, max_epochs=1)
    run.fit(model, batches(8, size=128), batches(2))
    return run, monitor


@pytest.mark.parametrize("options", [{}, {"default_hp_metric": False}, {"prefix": "mine"}], ids=str)
def test_lightnings_run_is_listed_with_its_final_numbers_and_no_other(tmp_path: Path, options: dict[str, Any]) -> None:
    _, monitor = lightning_run(tmp_path, **options)
    rows = listed(tmp_path)
    assert list(rows) == ["run"], "the tab lists the run itself, and no folder was made for it"
    assert not any(tmp_path.glob("run/[0-9]*"))
    hyperparameters, metrics = rows["run"]
    assert hyperparameters == {"lr": 0.25, "optimizer/name": "SGD"}
    prefix = f"{options['prefix']}-" if "prefix" in options else ""
    report = monitor.report()
    assert metrics[f"{prefix}{DEAD}"] == pytest.approx(report.dead_percent)
    assert metrics[f"{prefix}neuronscope/val_dead_pct"] == pytest.approx(monitor.report("val").dead_percent)
    assert metrics[f"{prefix}neuronscope/deaths_total"] == sum(int(s.history.deaths.sum()) for s in report.layers)
    assert (f"{prefix}hp_metric" in metrics) is options.get("default_hp_metric", True)


def test_a_list_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    class Own(DeadNeuronMonitor):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            trainer.logger.log_hyperparams({"lr": 0.5}, {"own": 7.0})  # as Lightning's guide says

    board, model = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False), network()
    model.save_hyperparameters({"lr": 0.25})
    trainer(Own(every_n_steps=1), logger=board, max_epochs=1).fit(model, batches(2), batches(1))
    assert listed(tmp_path) == {"run": ({"lr": 0.5}, {"own": 7.0})}


def test_without_hyperparameters_nothing_is_listed(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="run")
    trainer(DeadNeuronMonitor(every_n_steps=1), logger=board, max_epochs=1).fit(network(), batches(2), batches(1))
    assert listed(tmp_path) == {}


def test_hugging_faces_run_is_listed_with_the_arguments_that_are_not_usual(tmp_path: Path) -> None:
    callback = DeadNeuronCallback(every_n_steps=1)
    hugging_trainer(tmp_path, callback, learning_rate=0.125, num_train_epochs=2, report_to="tensorboard").train()
    ((hyperparameters, metrics),) = listed(tmp_path / "runs").values()
    assert (hyperparameters["learning_rate"], hyperparameters["num_train_epochs"]) == (0.125, 2)
    assert "weight_decay" not in hyperparameters
    assert metrics[DEAD] == pytest.approx(callback.report().dead_percent)


@pytest.mark.parametrize("kind", ["torch", "tensorboardX"])
def test_a_loop_of_ones_own_names_its_hyperparameters(tmp_path: Path, kind: str) -> None:
    module = tensorboard if kind == "torch" else pytest.importorskip("tensorboardX")
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    nn.init.constant_(model[0].bias, -100.0)
    with module.SummaryWriter(str(tmp_path / "run")) as writer:
        monitor = Monitor(every_n_steps=1)
        monitor.logs, monitor.hyperparameters = [SummaryWriterLog(writer)], {"lr": 0.5, "nesterov": True, "seed": None}
        monitor.attach(model)
        monitor.begin_batch()
        model(nn.init.ones_(model[0].weight.new_empty(3, 2))).sum().backward()
        monitor.step(1)
        monitor.finish()
    hyperparameters, metrics = listed(tmp_path)["run"]
    assert hyperparameters["lr"] == 0.5
    assert set(hyperparameters) == {"lr", "nesterov", "seed"}
    assert metrics == {DEAD: 100.0, "neuronscope/worst_layer_dead_pct": 100.0, "neuronscope/dormant_pct": 0.0}
