"""The monitor's own record, read back from a checkpoint: the same neurons, dates and bounds as the run's own report."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import neuronscope as ns
from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.checkpoints.file.examine_file import examine_file
from neuronscope.checkpoints.file.monitor_record import recorded_report
from scripts.dying_networks import as_checkpoint


def watched() -> tuple[nn.Module, ns.Scope]:
    """Six gates: 0 and 5 fire, 1 never, 2 until step 9, 3 has no way to the loss, 4 is NaN at the end."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU())
    nn.init.eye_(model[0].weight)
    scope = ns.watch(model, window_steps=10)
    for step in range(20):
        x = torch.ones(40, 6)
        x[:, 1] = -1
        x[:, 2] = 1 if step < 10 else -1
        if step == 19:
            model[0].weight.data[4, 4] = float("nan")
        y = model(x)
        torch.where(torch.tensor([1, 1, 1, 0, 1, 1]).bool(), y, y.detach()).sum().backward()
        scope.step()
    scope.detach()
    return model, scope


class Module(pl.LightningModule):
    """One of four neurons is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.net[0].weight.data.fill_(0.1)
        self.net[0].bias.data.copy_(torch.tensor([1.0, 1.0, -100.0, 1.0]))

    def training_step(self, batch, index):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.fixture(scope="module")
def run() -> tuple[nn.Module, ns.Scope]:
    return watched()


def of_record(model, state):
    """Evidence and abstentions of the record alone."""
    answers = examine_file(as_checkpoint(model, records={"DeadNeuronMonitor{}": state}))
    return tuple([piece for piece in answer if piece.source == "monitor record"] for answer in answers)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"version": 1, "model": "Sequential", "scope": s, "published": {}}]
)
def test_evidence_from_a_record_equals_the_report_of_the_run(run, wrap):
    model, scope = run
    state = wrap(scope.state_dict())
    found, said = of_record(model, state)
    assert said == []
    by_claim = {piece.claim: piece for piece in found}
    assert {claim: piece.neurons.tolist() for claim, piece in by_claim.items()} == {
        "not finite": [4],
        "dead": [1, 2],
        "no gradient": [3],
        "alive": [0, 5],
    }
    dead = by_claim["dead"]
    assert (dead.layer, dead.width, dead.source, dead.basis) == ("0/relu", 6, "monitor record", "measured")
    assert dead.since.tolist() == [-1, 10]  # never fired; first seen silent at step 10
    # The last window: 10 steps of 40 examples. 1 − .05^(1/400) = .0074612
    assert dead.numbers == pytest.approx([0.0074612] * 2, rel=1e-4)
    assert "400 examples" in dead.text
    verdicts = [v for v in scope.report().verdicts() if v.label == "dead"]
    assert [(v.neuron, v.since, v.bound) for v in verdicts] == list(zip(dead.neurons, dead.since, dead.numbers))


def test_the_state_of_the_monitor_is_read(tmp_path):
    """What a callback writes into a checkpoint, and not what this test thinks that it writes."""
    monitor = DeadNeuronMonitor(every_n_steps=1)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(400, 3), batch_size=40))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (state,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].values()
    report = recorded_report(state)
    assert (report.dead, report["net.0/relu"].examples, report.global_step) == (1, 400, 10)


def test_a_short_record_says_so():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].bias.data[0] = -100
    with ns.watch(model) as scope:
        model(torch.ones(5, 2)).sum().backward()
        scope.step()
    found, _ = of_record(model, scope.state_dict())
    (dead,) = [piece for piece in found if piece.claim == "dead"]
    assert dead.basis == "suspected"
    assert "Silent on 5 examples only: fewer than the 299" in dead.text
    assert dead.numbers[0] == pytest.approx(1 - 0.05 ** (1 / 5))


def test_validation_alone_is_better_than_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].bias.data[0] = -100
    with ns.watch(model) as scope, scope.phase("val"), torch.no_grad():
        model(torch.ones(500, 2))
    found, _ = of_record(model, scope.state_dict())
    assert ["phase val" in piece.text for piece in found if piece.claim == "dead"] == [True]


def test_a_record_of_short_passes_describes_the_newest_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].bias.data.fill_(100)
    with ns.watch(model) as scope:
        for bias in (100, 100, -100):
            model[0].bias.data[0] = bias
            with scope.phase("val"), torch.no_grad():
                model(torch.ones(200, 2))
    found, _ = of_record(model, scope.state_dict())
    (dead,) = [piece for piece in found if piece.claim == "dead"]
    assert dead.neurons.tolist() == [0]
    assert "over 200 examples of phase val" in dead.text
    assert dead.basis == "suspected"
    assert "Silent on 200 examples only" in dead.text
    assert dead.numbers[0] == pytest.approx(1 - 0.05 ** (1 / 200))


def test_a_neuron_that_died_after_its_record_is_no_fault_of_a_proof(tmp_path):
    """The record is of steps before the file's weights, which are what the proof is about."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    nn.init.ones_(model[0].weight)
    with ns.watch(model, every_n_steps=1) as scope:
        model(torch.ones(400, 2)).sum().backward()
        scope.step()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([-1.0, 1.0]))
    torch.save({"model": model.state_dict(), "scope": scope.state_dict()}, tmp_path / "last.pt")
    report = ns.postmortem(tmp_path / "last.pt", model, example=torch.ones(1, 2))
    assert [verdict.basis for verdict in report.verdicts() if verdict.label == "dead"] == ["proved"]
    assert report.notes == ()


def _damaged(state: dict, how: str) -> object:
    phase = state["phases"]["train"]
    site = phase["closed"]["tallies"]["0/relu"]
    damages = {
        "version": lambda: state.update(version=99),
        "no version": lambda: state.pop("version"),
        "phases": lambda: state.update(phases=[1, 2]),
        "history": lambda: phase.update(history=None),
        "steps": lambda: phase.update(open_steps="x"),
        "counts": lambda: site.update(zero_outputs=torch.zeros(3)),
        "a count gone": lambda: site.pop("zero_outputs"),
        "trail": lambda: phase["history"]["trails"].update({"0/relu": {}}),
    }
    damages[how]()
    return state


@pytest.mark.parametrize(
    "how", ["version", "no version", "phases", "history", "steps", "counts", "a count gone", "trail"]
)
def test_a_damaged_record_is_reported_in_one_sentence(run, how):
    model, scope = run
    found, (said,) = of_record(model, _damaged(scope.state_dict(), how))
    assert found == []
    assert "damaged, or of another version" in said.reason
    assert "\n" not in said.reason


@pytest.mark.parametrize("state", [{}, {"scope": {}}, {"scope": 3}, {"scope": None}])
def test_a_value_that_is_not_a_record_is_reported_in_one_sentence(state):
    found, said = of_record(nn.Linear(2, 2), state)
    assert found == []
    assert len(said) == 1


def test_an_empty_record_is_reported(run):
    with ns.watch(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) as scope:
        pass
    _, (said,) = of_record(nn.Linear(2, 2), scope.state_dict())
    assert "nothing was counted" in said.reason


def test_steps_of_a_record_are_int64(run):
    model, scope = run
    found, _ = of_record(model, scope.state_dict())
    assert all(piece.since is None or piece.since.dtype == np.int64 for piece in found)
