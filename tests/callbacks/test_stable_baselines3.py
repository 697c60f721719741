"""The callback for Stable-Baselines3 counts what plain hooks count, and the agent trains as if nobody watched."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("stable_baselines3")

from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger

from neuronscope.callbacks.stable_baselines3 import DeadNeuronCallback
from neuronscope.errors import NeuronscopeWarning
from neuronscope.judge.verdicts import Policy, rate_bound
from neuronscope.report.report import Report
from neuronscope.scope import Scope
from tests.callbacks.agents import (
    ALGORITHMS,
    BATCH,
    ENVIRONMENT_STEPS,
    ON_POLICY,
    TARGETS,
    Twin,
    TwinEvaluation,
    agent,
    evaluation,
    hooked,
    weights,
)


def assert_equals_twin(callback: DeadNeuronCallback, twin: Twin, phase: str) -> None:
    census, counts = callback.census(phase), twin.counts[phase]
    sites = {name for name in census if name.endswith("/relu")}  # the actor's tanh is an output
    assert sites == set(counts)
    for name in sites:
        tally, expected = census[name], counts[name]
        assert tally.zero_outputs.tolist() == expected.zero_outputs.tolist(), (phase, name)
        assert tally.positions == expected.positions, (phase, name)
        assert tally.gradient_positions == expected.gradient_positions, (phase, name)
        if expected.gradient_positions:
            assert tally.zero_gradients.tolist() == expected.zero_gradients.tolist(), (phase, name)


def plainly(report: Report) -> str:
    """Return a printed report as one line."""
    return " ".join(str(report).split())


@pytest.mark.parametrize("picture", [False, True], ids=["mlp", "cnn"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_counts_equal_plain_hooks_and_weights_those_of_an_unwatched_training(name: str, picture: bool) -> None:
    plain = agent(name, picture=picture)
    twin = Twin(plain)
    measure: Any = evaluation(name, picture=picture, kind=TwinEvaluation)
    measure.twin = twin
    plain.learn(ENVIRONMENT_STEPS, callback=twin.callbacks(measure))
    plain_rng = torch.get_rng_state()

    watched, callback = agent(name, picture=picture), DeadNeuronCallback(every_n_steps=1)
    watched.learn(ENVIRONMENT_STEPS, callback=[callback, evaluation(name, picture=picture)])
    for key, value in weights(plain).items():
        assert torch.equal(value, watched.policy.state_dict()[key]), key
    assert torch.equal(torch.get_rng_state(), plain_rng)
    assert not list(hooked(watched.policy))

    assert callback.scope is not None
    assert callback.scope.global_step == twin.gradient_steps > 0
    # SAC's actor says its next actions without gradients, and so TD3's critic sees pictures for the actor's loss.
    inference = name == "SAC" or (name == "TD3" and picture)
    phases = {"train", "rollout", "val", *(["inference"] if inference else [])}
    assert set(callback.scope.phases) == phases == set(twin.counts)
    for phase in phases:
        assert_equals_twin(callback, twin, phase)
    report = callback.report()
    assert report.dead >= 2  # those that are silenced in each network
    listed = [*report.not_measured, *callback.report("rollout").not_measured]
    targets = TARGETS.get(name, ("-",))
    assert not any(site.startswith(targets) for phase in phases for site in callback.census(phase))
    assert not any(item.name.startswith(targets) for item in listed)


@pytest.mark.parametrize("name", ["PPO", "SAC"])
def test_every_third_gradient_step_and_environment_step_is_observed(name: str) -> None:
    plain = agent(name)
    twin = Twin(plain, every=3)
    plain.learn(ENVIRONMENT_STEPS, callback=twin.callbacks())
    watched, callback = agent(name), DeadNeuronCallback(every_n_steps=3)
    watched.learn(ENVIRONMENT_STEPS, callback=callback)
    for phase in ("train", "rollout"):
        assert_equals_twin(callback, twin, phase)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_of_a_replay_buffer_are_examples_once_a_gradient_step_and_those_of_rollouts_are_none(name: str) -> None:
    watched, callback = agent(name), DeadNeuronCallback(every_n_steps=1)
    watched.learn(ENVIRONMENT_STEPS, callback=[callback, evaluation(name)])
    report = callback.report()
    assert callback.scope is not None
    for phase in ("rollout", "val"):
        assert callback.census(phase).examples == 0
        assert "the steps of one trajectory, are no independent examples" in plainly(callback.report(phase))
    if name in ON_POLICY:
        assert callback.census().examples == 0
        assert all(verdict.bound is None for verdict in report.verdicts())
        assert any("No bound is claimed" in note for note in report.notes)
        assert "the steps of one trajectory, are no independent examples" in plainly(report)
        return
    steps = callback.scope.global_step
    census = callback.census()
    assert not any("No bound is claimed" in note for note in report.notes)
    for site, tally in census.items():
        if site.startswith("actor.mu") and name == "SAC":
            continue  # a tanh that runs in rollouts only
        # TD3's actor is trained in every second gradient step. Its critic meets both batches of such a pair between two
        # steps of the actor, which therefore count as one, but for the first of each call of train(): 2 of 2.
        acts = steps // 2 if name == "TD3" and site.startswith("actor") else steps
        assert tally.examples <= acts * BATCH
        assert tally.examples >= acts * BATCH // 2
        if name != "TD3":
            assert tally.examples == acts * BATCH
        # The critic of SAC also rates the actor's actions in the same states: twice the positions, not the examples.
        if name == "SAC" and site.startswith("critic"):
            assert tally.positions == 2 * tally.examples


def test_the_bound_that_is_claimed_of_a_replay_buffer_is_true_and_one_of_a_trajectory_would_not_be() -> None:
    # An agent that learns nothing, so that a neuron is one number: the share of the buffer's states in which it fires.
    # A window of 6 batches of 8 claims that a dead one fires in less than 1 - .05^(1/48) = 6 %. Of neurons that fire
    # more often, at most 5 % may be called dead. In 48 states that follow each other far more are silent.
    watched = agent("DQN", learning_rate=0.0, gradient_steps=6, buffer_size=400, train_freq=8)
    layer = watched.policy.q_net.q_net[0]  # type: ignore[union-attr]
    with torch.no_grad():
        layer.weight[:] = torch.cat([torch.eye(4)] * 4)  # fires where one of the four numbers is above a threshold
        layer.bias[:] = -torch.linspace(1.5, 3.5, 16)
    callback = DeadNeuronCallback(every_n_steps=1, window_steps=6, policy=Policy(max_rate=0.07))
    bound = rate_bound(6 * BATCH)
    often, wrong, in_a_row = 0, 0, 0

    class Check(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            nonlocal often, wrong, in_a_row
            if callback.scope is None or not callback.scope.closed_window:
                return
            buffer = watched.replay_buffer  # type: ignore[attr-defined]
            with torch.no_grad():
                fires = layer(torch.tensor(buffer.observations[: buffer.size(), 0])) > 0
            site = callback.scope.closed_window["q_net.q_net.0/relu"]
            assert site.examples == site.positions == 6 * BATCH
            frequent = fires.double().mean(0) >= bound
            often += int(frequent.sum())
            wrong += int((torch.tensor(site.zero_outputs == site.positions) & frequent).sum())
            in_a_row += int((~fires[-48:].any(0) & frequent).sum())

    watched.learn(800, callback=[callback, Check()])
    assert often > 300
    assert wrong / often <= 0.05
    assert in_a_row / often > 0.10


class Recorded(KVWriter):
    """Keeps what a logger writes."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", ["PPO", "SAC"])
def test_numbers_go_through_the_logger_of_the_library(name: str, tmp_path: Path) -> None:
    recorded, text = Recorded(), tmp_path / "log.txt"
    watched = agent(name)
    callback = DeadNeuronCallback(every_n_steps=1, window_steps=6, policy=Policy(max_rate=0.2))
    watched.set_logger(Logger(str(tmp_path), [recorded, HumanOutputFormat(str(text))]))
    watched.learn(ENVIRONMENT_STEPS, callback=[callback, evaluation(name)], log_interval=1)
    watched.logger.close()
    found = {key for _, row in recorded.rows for key in row}
    some = "mlp_extractor.policy_net.2" if name == "PPO" else "critic.qf0.2"
    assert {"neuronscope/dead_pct", "neuronscope/val_dead_pct", f"neuronscope.dead_pct/{some}/relu"} <= found
    step, last = recorded.rows[-1]
    assert step == watched.num_timesteps
    assert last["neuronscope/dead_pct"] == pytest.approx(callback.report().dead_percent)
    steps = [step for step, row in recorded.rows if "neuronscope/dead_pct" in row]
    assert steps == sorted(steps)
    assert len(steps) > 1
    shown = text.read_text()
    assert "dead_pct" in shown
    assert f"{some}/relu" not in shown
    assert {"learning_rate", "loss"} >= set(callback.report().series) > set()


def test_the_page_and_pictures_go_to_tensorboards_folder(tmp_path: Path) -> None:
    watched, callback = agent("DQN", tensorboard_log=str(tmp_path)), DeadNeuronCallback(every_n_steps=1, window_steps=6)
    watched.learn(ENVIRONMENT_STEPS, callback=callback)
    run = tmp_path / "DQN_1"
    assert "DQNPolicy" in (run / "neuronscope" / "train.html").read_text()
    assert list((run / "neuronscope").glob("events*"))


def test_training_stops_when_too_many_neurons_are_dead() -> None:
    watched = agent("DQN", gradient_steps=24)
    callback = DeadNeuronCallback(
        every_n_steps=1, window_steps=6, on_dead="stop", threshold=5, policy=Policy(max_rate=0.1)
    )
    watched.learn(1000, callback=callback)
    # 28 environment steps, then 24 gradient steps of 8 examples: 29 are needed, so a window closes, and the first
    # environment step after it is the last.
    assert watched.num_timesteps == 29
    assert callback.stop_reason is not None
    assert "neurons are dead" in callback.stop_reason
    assert not callback.attached


def test_an_alarm_that_cannot_come_is_said() -> None:
    with pytest.warns(NeuronscopeWarning, match="PPO trains on the states of its rollouts"):
        agent("PPO").learn(24, callback=DeadNeuronCallback(on_dead="stop"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent("PPO").learn(24, callback=DeadNeuronCallback(on_dead="stop", examples="auto"))
        agent("DQN").learn(24, callback=DeadNeuronCallback(on_dead="stop"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_neurons_are_revived_in_every_network_that_is_trained(name: str) -> None:
    watched = agent(name)
    callback = DeadNeuronCallback(every_n_steps=1, window_steps=4, revive="dead", policy=Policy(max_rate=0.2))
    watched.learn(3 * ENVIRONMENT_STEPS, callback=[callback, evaluation(name)])
    assert callback.scope is not None
    revived = {(act.site, neuron) for act in callback.scope.acts for neuron in act.neurons}
    sites = [site for site in callback.census() if site.endswith(".2/relu")]
    assert len(sites) == {"A2C": 2, "DQN": 1, "PPO": 2, "SAC": 3, "TD3": 3}[name]
    assert {(site, neuron) for site in sites for neuron in (0, 1)} <= revived


def test_a_training_that_failed_leaves_nothing_behind() -> None:
    class Fails(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 40:
                raise RuntimeError("mine")
            return True

    watched, measure = agent("DQN"), evaluation("DQN")
    with DeadNeuronCallback(every_n_steps=1) as callback, pytest.raises(RuntimeError, match="mine"):
        watched.learn(ENVIRONMENT_STEPS, callback=[callback, measure, Fails()])
    assert not list(hooked(watched.policy))
    assert not watched.policy.optimizer._optimizer_step_post_hooks
    assert "on_step" not in vars(measure)
    assert callback.census()  # what was counted can be read
    watched.learn(ENVIRONMENT_STEPS, callback=callback)  # and it can be used again
    assert callback.report().global_step > 0


def test_an_error_of_ours_does_not_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = agent("SAC")
    plain.learn(ENVIRONMENT_STEPS)
    watched, callback = agent("SAC"), DeadNeuronCallback(every_n_steps=1)

    def broken(*_: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(Scope, "share_examples", broken)
    with pytest.warns(NeuronscopeWarning, match="ours"):
        watched.learn(ENVIRONMENT_STEPS, callback=callback)
    for key, value in weights(plain).items():
        assert torch.equal(value, watched.policy.state_dict()[key]), key
    assert "ours" in callback.report().fault
    assert not list(hooked(watched.policy))


def test_counts_go_on_where_the_same_agent_trains_on_and_begin_anew_for_another() -> None:
    watched, callback = agent("PPO"), DeadNeuronCallback(every_n_steps=1)
    watched.learn(48, callback=callback)
    first = callback.report().global_step
    assert first == 12  # 2 rollouts of 24, each in 2 epochs of 3 batches
    watched.learn(48, callback=callback, reset_num_timesteps=False)
    assert callback.report().global_step == 2 * first
    assert callback.census().steps == 2 * first
    agent("PPO").learn(48, callback=callback)
    assert callback.report().global_step == first
    assert callback.census().steps == first


def test_an_evaluation_inside_other_callbacks_is_found_and_the_agent_can_be_saved(tmp_path: Path) -> None:
    watched, callback, measure = agent("DQN"), DeadNeuronCallback(every_n_steps=1), evaluation("DQN")
    measure.eval_freq = 1
    watched.learn(ENVIRONMENT_STEPS, callback=[EveryNTimesteps(40, measure), callback])
    assert callback.census("val")["q_net.q_net.0/relu"].positions == 20  # one episode
    watched.save(tmp_path / "agent")
    assert DQN.load(tmp_path / "agent").num_timesteps == watched.num_timesteps
    copied = pickle.loads(pickle.dumps(copy.deepcopy(callback)))
    assert copied.state_dict()["scope"]["phases"].keys() == callback.state_dict()["scope"]["phases"].keys()
