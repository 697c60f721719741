"""``neuronscope postmortem`` on what frameworks really leave: Lightning, transformers, ``torch.distributed``."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer

import neuronscope as ns
from neuronscope import cli
from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.checkpoints.formats.build_checkpoint import find_hyperparameters
from neuronscope.checkpoints.open_checkpoint import open_checkpoint

#: Steps of training; at step HALF the first three neurons of the network are pushed below zero for good.
STEPS, HALF = 320, 60

THEIRS = f"""
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
IMAGES = torch.rand(300, 4)

class Lit(pl.LightningModule):
    def __init__(self, width, depths=(1,), optimizer=None, *, note="", loss=None):
        super().__init__()
        self.save_hyperparameters(ignore=["loss"])
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), *(nn.Linear(width, width) for _ in depths))
        self.rate = optimizer["lr"]

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        if self.global_step == {HALF}:
            self.net[0].bias.data[:3] = -50.0
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.rate)

class Whole(pl.LightningModule):
    def __init__(self, settings):
        super().__init__()
        self.save_hyperparameters(settings)
        self.net = nn.Linear(4, settings["width"])

def loader():
    return DataLoader(TensorDataset(IMAGES), batch_size=64)

def batches():
    return [IMAGES]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lit.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def report_of(line: str) -> dict[str, Any]:
    assert cli.main(["postmortem", *line.split(), "--json", "a.json"]) == 0
    plain: dict[str, Any] = json.loads(Path("a.json").read_text())
    return plain


def verdicts(plain: dict[str, Any], layer: str) -> dict[int, tuple[str, str]]:
    found = next(one for one in plain["layers"] if one["name"] == layer)["verdicts"]
    return dict(zip(found["neuron"], zip(found["label"], found["basis"], strict=True), strict=True))


def fit(model: Any, folder: Path, *callbacks: Any) -> None:
    trainer = Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, importlib.import_module("lit").loader())
    trainer.save_checkpoint(folder / "last.ckpt")


def test_a_lightning_module_is_built_from_its_own_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lit = importlib.import_module("lit")
    model = lit.Lit(9, [1, 1], {"lr": 1e-3, "name": "AdamW"}, note="a run", loss=torch.nn.MSELoss())
    fit(model, folder)
    assert open_checkpoint(folder / "last.ckpt").hyperparameters == {
        "width": 9,
        "depths": [1, 1],
        "optimizer": {"lr": 1e-3, "name": "AdamW"},
        "note": "a run",
    }
    plain = report_of("last.ckpt --model lit:Lit --data lit:batches")
    assert (plain["model"], plain["global_step"], plain["format"]) == ("Lit", STEPS, "Lightning checkpoint")
    found = verdicts(plain, "net.0")
    silent = (model.net[:2](lit.IMAGES) == 0).all(dim=0).nonzero().flatten().tolist()
    assert {neuron for neuron, (label, _) in found.items() if label == "dead"} == set(silent) >= {0, 1, 2}
    clock = next(one for one in plain["layers"] if one["name"] == "net.0")["evidence"]
    since = next(one for one in clock if one["claim"] == "no gradient" and one["since"])
    assert set(since["neuron"]) >= {0, 1, 2}
    assert all(HALF - 60 <= step <= HALF for step in since["since"][:3])  # the earliest step that it can have been
    assert "Nothing is known of" not in capsys.readouterr().out


def test_a_watched_lightning_run_gives_its_own_record(folder: Path) -> None:
    model = importlib.import_module("lit").Lit(9, [1], {"lr": 1e-3})
    fit(model, folder, DeadNeuronMonitor(every_n_steps=1))
    plain = report_of("last.ckpt --model lit:Lit")
    found = verdicts(plain, "net.0")
    assert [found[neuron] for neuron in (0, 1, 2)] == [("dead", "measured")] * 3
    assert "monitor record" in {one["source"] for layer in plain["layers"] for one in layer["evidence"]}
    layer = next(one for one in plain["layers"] if one["name"] == "net.0")["verdicts"]
    # The push comes in training_step of step HALF: what a count of steps from 0 or from 1 calls that step, or the last.
    assert set(layer["since"][:3]) <= {HALF - 1, HALF, HALF + 1}


def test_a_module_that_takes_one_dictionary_is_built(folder: Path) -> None:
    model = importlib.import_module("lit").Whole({"width": 5})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "last.ckpt")
    assert open_checkpoint(folder / "last.ckpt").hyperparameters == {"settings": {"width": 5}}
    assert report_of("last.ckpt --model lit:Whole")["model"] == "Whole"


def test_hyperparameters_that_are_not_plain_are_left_out() -> None:
    endless: list[Any] = []
    endless.append(endless)
    doubling: list[Any] = [1]
    for _ in range(60):
        doubling = [doubling, doubling]
    kept = {"a": 1, "b": (2, [None]), "c": object(), "d": {"e": {3: object()}}, "f": endless, "g": doubling, 7: 7}
    kept["many"] = [0] * 200_000
    assert find_hyperparameters({"hyper_parameters": kept}) == {"a": 1, "b": (2, [None])}
    assert find_hyperparameters({"hyper_parameters": [1]}) == {}


# --- transformers ----------------------------------------------------------------------------------------------------


def test_a_hugging_face_folder_is_checkpoint_and_model_in_one(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=20,
        hidden_size=8,
        word_embed_proj_dim=8,
        ffn_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    network = transformers.OPTForCausalLM(config)
    network.model.decoder.layers[1].fc1.bias.data[[5, 7]] = -1e3
    network.save_pretrained("opt")
    site = "model.decoder.layers.1.fc1"
    plain = report_of("opt --model opt")
    assert (plain["model"], plain["format"]) == ("OPTForCausalLM", "Hugging Face folder, safetensors")
    assert verdicts(plain, site) == {5: ("dead", "proved"), 7: ("dead", "proved")}

    # What a Trainer with our callback leaves beside the weights: its scope's state, under the callback's key.
    with ns.watch(network) as scope:
        for _ in range(3):
            network(torch.randint(20, (200, 8))).logits.sum().backward()
            scope.step()
    torch.save({"neuronscope.DeadNeuronCallback{}": {"scope": scope.state_dict()}}, "opt/neuronscope.pt")
    (Path("opt") / "trainer_state.json").write_text(json.dumps({"global_step": 3, "stateful_callbacks": {}}))
    record = report_of("opt")
    assert record["global_step"] == 3
    assert {neuron for neuron, said in verdicts(record, site).items() if said == ("dead", "measured")} >= {5, 7}


# --- torch.distributed -----------------------------------------------------------------------------------------------


def test_a_folder_of_shards_with_a_model_of_the_users(folder: Path) -> None:
    (folder / "nets.py").write_text(
        "from torch import nn\n\ndef network():\n"
        "    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU())\n"
    )
    network = importlib.import_module("nets").network()
    sys.modules.pop("nets")
    network[2].bias.data[3] = -100.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: no process group, a single process is meant
        dcp.save({"model": network.state_dict(), "step": 12}, checkpoint_id="shards", no_dist=True)
    plain = report_of("shards --model nets:network")
    assert (plain["global_step"], plain["format"]) == (12, "distributed checkpoint, 1 file")
    assert verdicts(plain, "2") == {3: ("dead", "proved")}
