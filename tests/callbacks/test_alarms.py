"""What happens when a network loses too many neurons: nothing more, a warning, or a clean end of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.callbacks.alarms import DeadThreshold
from neuronscope.errors import NeuronscopeWarning
from neuronscope.report.report import Report
from tests.callbacks.networks import batches, network, trainer

# 128 examples a step and windows of 3 steps: each is sure. 3 of the net's 22 neurons never fire (13.6 %).
OPTIONS: dict[str, Any] = {"every_n_steps": 1, "window_steps": 3}


def fit(monitor: DeadNeuronMonitor, **options: Any) -> Any:
    model = network()
    with torch.no_grad():
        model.last.weight.abs_()
    run = trainer(monitor, **options)
    run.fit(model, batches(8, size=128), batches(1))
    return run


def test_the_alarm_named_log_only_logs() -> None:
    assert fit(DeadNeuronMonitor(**OPTIONS, threshold=1)).global_step == 16


def test_the_alarm_named_warn_warns_once_and_names_the_site() -> None:
    with pytest.warns(
        NeuronscopeWarning, match=r"neurons are dead .* the threshold is 10 %. Worst is first/relu"
    ) as caught:
        run = fit(DeadNeuronMonitor(**OPTIONS, on_dead="warn", threshold=10))
    assert len([warning for warning in caught if issubclass(warning.category, NeuronscopeWarning)]) == 1
    assert run.global_step == 16


def test_the_alarm_named_stop_ends_the_training_cleanly() -> None:
    monitor = DeadNeuronMonitor(**OPTIONS, on_dead="stop", threshold=10)
    run = fit(monitor)
    assert run.global_step == 3  # the first window
    assert run.state.finished
    assert monitor.census().steps == 3
    # And for another run it is as good as new.
    assert fit(monitor, min_epochs=2).global_step == 16  # min_epochs is the Trainer's to keep


def test_below_the_threshold_no_alarm_is_raised() -> None:
    assert fit(DeadNeuronMonitor(**OPTIONS, on_dead="stop", threshold=90)).global_step == 16


def test_a_window_that_is_not_sure_stops_nothing() -> None:
    monitor = DeadNeuronMonitor(every_n_steps=8, window_steps=3, on_dead="stop", threshold=1)
    assert fit(monitor).global_step == 16  # two observed steps: 256 examples < 299


def report_of(monitor: DeadNeuronMonitor) -> Report:
    fit(monitor)
    return monitor.report()


def test_an_alarm_is_raised_at_each_crossing_of_the_threshold() -> None:
    report = report_of(DeadNeuronMonitor(**OPTIONS))
    none = report_without_deaths(report)
    alarm = DeadThreshold("warn", 10)
    assert [alarm.check(each) is not None for each in (none, report, report, none, report)] == [
        False, True, False, False, True,
    ]  # fmt: skip


def report_without_deaths(report: Report) -> Report:
    sites = []
    for site in report.layers:
        nobody = torch.zeros(site.neurons, dtype=torch.bool).numpy()
        sites.append(replace(site, judgement=replace(site.judgement, dead=nobody)))
    return replace(report, layers=tuple(sites))


def test_neurons_that_give_nan_count_as_lost() -> None:
    report = report_without_deaths(report_of(DeadNeuronMonitor(**OPTIONS)))
    first = report.layers[0]
    everybody = torch.ones(first.neurons, dtype=torch.bool).numpy()
    broken = replace(report, layers=(replace(first, judgement=replace(first.judgement, not_finite=everybody)),))
    message = DeadThreshold("warn", 50).check(broken)
    assert message is not None
    assert "and 12 give NaN or infinite outputs" in message
