"""Silent neurons: zero output at every position, while a gradient from elsewhere keeps them trainable."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.judge.diagnosis import diagnose
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import LEVEL_DEAD, LEVEL_SILENT, Report, SiteReport
from neuronscope.report.run_facts import facts_from_report
from neuronscope.writers.tensorboard import scalars

#: Two examples make a window sure: .5 ** 2 = .25 < 1 - .7.
SOON = ns.Policy(confidence=0.7, max_rate=0.5)
NAMES = [name.replace(" ", "_") for name in LABELS if name not in ("alive", "not finite")]


class Autoencoder(nn.Module):
    """Four latents: 0 always fires, 1 to 3 never do unless their bias is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.decoder = nn.Linear(4, 4)
        nn.init.eye_(self.encoder.weight)
        nn.init.constant_(self.encoder.bias, -9.0)
        self.encoder.bias.data[0] = 9.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.encoder(x)
        return self.decoder(self.relu(before)), before


def trained(steps: int, auxiliary: dict[int, list[int]]) -> Report:
    """Watch some steps; those in ``auxiliary`` add a loss on the pre-activations of the latents that it names."""
    torch.manual_seed(0)
    model = Autoencoder()
    with ns.watch(model, policy=SOON, every_n_steps=1, window_steps=2) as scope:
        for step in range(steps):
            output, before = model(torch.rand(2, 4))
            loss = output.square().sum() + before[:, auxiliary.get(step, [])].sum()
            loss.backward()
            model.zero_grad()
            scope.step()
    return scope.report()


def of_relu(report: Report) -> SiteReport:
    return next(site for site in report.layers if site.activation == "relu")


def test_a_latent_that_an_auxiliary_loss_keeps_trainable_is_silent_and_the_others_are_dead():
    report = trained(4, {step: [1, 2] for step in range(4)})
    site = of_relu(report)
    assert [LABELS[code] for code in site.judgement.labels()] == ["linear", "silent", "silent", "dead"]
    assert (report.dead, report.silent, report.dormant, report.tau_dormant) == (1, 2, 0, 3)
    assert (report.silent_percent, report.dormant_percent, report.tau_dormant_percent) == (50.0, 0.0, 75.0)
    assert site.zero_output_fraction[1] == 1.0
    assert site.zero_gradient_fraction[1] < 1.0
    assert site.worst() == [3, 1, 2], "dead ones first, then silent ones"


def test_one_gradient_in_a_window_is_enough_and_the_history_tells_silent_windows_from_dead_ones():
    report = trained(6, {3: [1], 4: [1]})  # windows: steps 0 and 1, 2 and 3, 4 and 5
    history = of_relu(report).history
    assert history.silent.tolist() == [0, 1, 1]
    assert history.dead.tolist() == [3, 2, 2]
    assert history.levels[:, 1].tolist() == [LEVEL_DEAD, LEVEL_SILENT, LEVEL_SILENT]
    assert (history.levels[:, 2] == LEVEL_DEAD).all()
    assert history.deaths[1] == history.revivals[1] == 0, "it never fired: it neither died nor revived"
    assert scalars(report, since=0)["neuronscope.more/revivals"] == 0.0


def test_without_gradients_no_neuron_is_called_silent():
    model = Autoencoder()
    report = ns.scan(model, [torch.rand(4, 4)])
    assert (report.dead, report.silent) == (3, 0)
    assert not [tag for tag in scalars(report) if "silent" in tag]
    assert "silent and cut off are not known" in str(report)


def test_counts_of_labels_add_up_to_the_neurons_in_every_form():
    report = trained(4, {step: [1, 2] for step in range(4)})
    plain = report.to_dict()
    for site in plain["layers"]:
        counted = {name.replace("_", " "): site[name] for name in NAMES}
        for label, number in counted.items():
            assert site["labels"].count(label) == number
        assert sum(counted.values()) + site["labels"].count("alive") + site["labels"].count("not finite") == 4
    assert (plain["summary"]["silent"], plain["summary"]["tau_dormant"]) == (2, 3)
    assert scalars(report)["neuronscope.more/silent_pct"] == 50.0
    assert "2 neurons are silent" in str(report)
    silent = [verdict for verdict in report.verdicts() if verdict.label == "silent"]
    assert [verdict.neuron for verdict in silent] == [1, 2]
    assert all(verdict.bound is not None for verdict in silent), "that it never fired is as sure as of a dead one"


def test_the_diagnosis_says_what_silence_means_and_what_to_do():
    report = trained(4, {step: [1, 2] for step in range(4)})
    (found,) = (each for each in diagnose(facts_from_report(report)) if each.sign == "silent neurons")
    assert found.neurons == 2
    assert found.layers == (of_relu(report).name,)
    assert "auxiliary loss" in found.remedy
    assert "exactly zero" not in found.remedy, "a ReLU passes no gradient at zero"
    assert not [each for each in diagnose(facts_from_report(trained(4, {}))) if each.sign == "silent neurons"]


def test_a_smooth_neuron_whose_weights_are_zero_is_silent():
    model = nn.Sequential(nn.Linear(3, 2), nn.GELU(), nn.Linear(2, 1))
    nn.init.zeros_(model[0].weight[0])
    nn.init.zeros_(model[0].bias)
    with ns.watch(model, policy=SOON, every_n_steps=1) as scope:
        model(torch.randn(8, 3)).sum().backward()
        scope.step()
    report = scope.report()
    assert np.flatnonzero(report.layers[0].judgement.silent).tolist() == [0]
    (found,) = (each for each in diagnose(facts_from_report(report)) if each.sign == "silent neurons")
    assert "exactly zero" in found.remedy


def test_a_gelu_whose_output_underflows_before_its_gradient_is_silent_and_one_further_down_is_dead():
    model = nn.Sequential(nn.Linear(1, 3), nn.GELU())
    nn.init.zeros_(model[0].weight)
    model[0].bias.data.copy_(torch.tensor([-5.8, -30.0, 1.0]))
    with ns.watch(model, policy=SOON, every_n_steps=1) as scope:
        model(torch.ones(8, 1)).sum().backward()
        scope.step()
    assert [LABELS[code] for code in scope.report().layers[0].judgement.labels()] == ["silent", "dead", "alive"]


def test_a_history_saved_before_and_after_silence_counts_it_alike():
    torch.manual_seed(0)
    model = Autoencoder()
    with ns.watch(model, policy=SOON, every_n_steps=1, window_steps=1) as scope:
        for _ in range(2):
            output, before = model(torch.rand(2, 4))
            (output.sum() + before[:, 1].sum()).backward()
            scope.step()
        state = scope.state_dict()
    with ns.watch(Autoencoder(), policy=SOON, every_n_steps=1, window_steps=1) as resumed:
        resumed.load_state_dict(state)
    assert of_relu(resumed.report()).history.silent.tolist() == [1, 1]
