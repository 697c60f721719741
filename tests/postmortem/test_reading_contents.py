"""Where training loops put things: weights, optimizers, Neuronscope's own records, the step."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import neuronscope as ns
from neuronscope.callbacks import DeadNeuronMonitor
from neuronscope.checkpoints.formats.byte_range import ByteRange
from neuronscope.checkpoints.formats.torch_distributed import ShardedTensor, _TensorPart
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.errors import CheckpointError, UsageError
from tests.postmortem.files import distributed, trained, trainer_folder, wrapped


class Net(LightningModule):
    def __init__(self, width: int = 4, where: str = "here") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.module = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.module(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])}


def test_the_checkpoint_of_a_watched_lightning_run_is_read(tmp_path: Path) -> None:
    monitor, model = DeadNeuronMonitor(every_n_steps=1), Net()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor, ModelCheckpoint(dirpath=tmp_path, save_last=True)],
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=4))
    checkpoint = open_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.format == "Lightning checkpoint"
    assert checkpoint.step == 6  # 12 examples in batches of 4, twice
    # `module` is an attribute of this network and no wrapper's.
    assert all(torch.equal(checkpoint.tensors[name].read(), value) for name, value in model.state_dict().items())
    assert [slot["step"] for slot in checkpoint.optimizers[0].slots.values()] == [6, 6, 6, 6]
    (key,) = checkpoint.records
    assert key == monitor.state_key
    scope = ns.watch(nn.Sequential(nn.ReLU()))
    scope.load_state_dict(checkpoint.records[key])
    census, expected = scope.census("train"), monitor.census("train")
    assert list(census) == list(expected) == ["module.0/relu"]
    assert census["module.0/relu"].zero_outputs.tolist() == expected["module.0/relu"].zero_outputs.tolist()
    assert census["module.0/relu"].positions == expected["module.0/relu"].positions == 24


def _watched() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with ns.watch(model) as scope:
        model(torch.randn(5, 3)).sum().backward()
        scope.step()
    return scope.state_dict()


@pytest.mark.parametrize(
    ("place", "key"),
    [
        (lambda state: {"model": {"w": torch.ones(2)}, "neuronscope": state}, "neuronscope"),
        (lambda state: {"w": torch.ones(2), "scopes": {"teacher": state}}, "scopes.teacher"),
        (lambda state: {"state_dict": {"w": torch.ones(2)}, "callbacks": {"Mine": {"scope": state}}}, "Mine"),
        (lambda state: state, ""),
    ],
)
def test_the_state_of_a_scope_is_found_wherever_a_loop_saved_it(place: Any, key: str, tmp_path: Path) -> None:
    state = _watched()
    torch.save(place(state), tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert list(checkpoint.records) == [key]
    again = ns.watch(nn.Sequential(nn.ReLU()))
    again.load_state_dict(checkpoint.records[key])
    assert again.census("train")["0/relu"].positions == 5


def test_weights_nested_two_levels_deep_are_found(tmp_path: Path) -> None:
    """As an agent keeps them: each with its own name in front, and nothing of the optimizers or a trainer's state."""
    actor, critic = nn.Linear(4, 2), nn.Linear(4, 1)
    content = {
        "agent": {"actor": actor.state_dict(), "critic": critic.state_dict(), "tau": 0.01},
        "optimizer": trained().optimizer.state_dict(),
        "step": 7,
    }
    torch.save(content, tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    assert shapes == {
        "agent.actor.weight": (2, 4),
        "agent.actor.bias": (2,),
        "agent.critic.weight": (1, 4),
        "agent.critic.bias": (1,),
    }
    assert (len(checkpoint.optimizers), checkpoint.step) == (1, 7)


def test_networks_in_a_list_and_beside_recorded_inputs_are_found(tmp_path: Path) -> None:
    networks = [nn.Linear(4, 2).state_dict(), nn.Linear(4, 1).state_dict()]
    torch.save({"agents": networks, "replay": {"observations": torch.ones(9, 4)}}, tmp_path / "w.pt")
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(tmp_path / "w.pt").tensors.items()}
    assert shapes == {
        "agents.0.weight": (2, 4),
        "agents.0.bias": (2,),
        "agents.1.weight": (1, 4),
        "agents.1.bias": (1,),
    }


@pytest.mark.parametrize(
    "beside",
    [
        lambda weights: {"ema": {"shadow": weights}, "early": {"best": [weights]}},
        lambda weights: {"config": {"loss": {"class_weights": torch.ones(3)}}, "sampler": [{"weights": torch.ones(9)}]},
        lambda weights: {"opt": {"m": {name: torch.zeros_like(each) for name, each in weights.items()}}},
        lambda weights: {"history": [{"norms": {name: each.double().norm() for name, each in weights.items()}}]},
    ],
    ids=["averages", "weights of a loss", "moments", "norms"],
)
def test_what_lies_deeper_and_is_a_copy_or_no_network_is_left_out(tmp_path: Path, beside: Any) -> None:
    weights = trained().model.state_dict()
    torch.save({"net": weights, **beside(weights)}, tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert checkpoint.tensors.keys() == weights.keys()
    assert "Not looked at" in " ".join(checkpoint.notes)


def test_networks_are_found_at_every_level_and_beside_other_tensors(tmp_path: Path) -> None:
    """As an agent with two critics and an entropy coefficient keeps them, each with its optimizer."""
    critics = [{"model": nn.Linear(4, 1).state_dict(), "optimizer": trained().optimizer.state_dict()} for _ in "ab"]
    content = {
        "agent": {"actor": nn.Linear(4, 2).state_dict(), "critics": critics, "log_alpha": torch.zeros(1)},
        "observation_mean": torch.zeros(4),
    }
    torch.save(content, tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        "agent.actor.weight": (2, 4),
        "agent.actor.bias": (2,),
        "agent.critics.0.model.weight": (1, 4),
        "agent.critics.0.model.bias": (1,),
        "agent.critics.1.model.weight": (1, 4),
        "agent.critics.1.model.bias": (1,),
    }
    assert len(checkpoint.optimizers) == 2
    assert "'observation_mean'" in " ".join(checkpoint.notes)


@pytest.mark.parametrize(
    "place",
    [
        lambda weights: {"trainer": {"ema": {"network": weights}}, "rng": torch.zeros(16, dtype=torch.uint8).tolist()},
        lambda weights: {"a": [{"b": ({"c": {"d": {"e": {"f": weights}}}},)}]},
        lambda weights: {"net": weights, "step": torch.tensor(7), "best": torch.tensor(0.5)},
    ],
    ids=["three levels", "eight levels", "beside numbers in tensors"],
)
def test_weights_under_names_of_a_users_own_are_found(
    place: Callable[[Mapping[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    run = trained()
    torch.save({**place(run.model.state_dict()), "optimizers": (run.optimizer.state_dict(),)}, tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert list(checkpoint.tensors) == list(run.model.state_dict())
    assert len(checkpoint.optimizers) == 1


def test_the_state_of_a_scope_is_found_beside_a_trainers_weights(tmp_path: Path) -> None:
    torch.save(_watched(), trainer_folder(tmp_path, trained()) / "neuronscope.pt")
    assert list(open_checkpoint(tmp_path).records) == ["neuronscope"]


def test_names_of_wrapped_networks_fit_their_optimizers(tmp_path: Path) -> None:
    """Fully sharded optimizers name parameters; names lose the same prefixes as the weights."""
    weights = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    prefix = "module._fsdp_wrapped_module._orig_mod."
    state = {name: {"exp_avg": value, "step": 4, "odd": None} for name, value in wrapped(weights, prefix).items()}
    group = {"lr": torch.tensor(0.5), "params": list(state), "param_names": list(state)}
    torch.save(
        {"model": wrapped(weights, prefix), "optim": {"state": state, "param_groups": [group]}}, tmp_path / "w.pt"
    )
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    (optimizer,) = checkpoint.optimizers
    assert set(checkpoint.tensors) == set(optimizer.slots) == set(weights)
    assert optimizer.groups[0] == {"lr": 0.5, "params": list(weights), "param_names": list(weights)}
    assert set(optimizer.slots["fc.weight"]) == {"exp_avg", "step"}
    assert checkpoint.step == 4


def test_a_lightning_folder_of_shards_is_read(tmp_path: Path) -> None:
    saved = trained()
    distributed(tmp_path, saved)
    meta = {
        "pytorch-lightning_version": "2.6.0",
        "global_step": 11,
        "callbacks": {"DeadNeuronMonitor{}": {"scope": _watched()}},
    }
    torch.save(meta, tmp_path / "meta.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(saved.weights)
    assert list(checkpoint.records) == ["DeadNeuronMonitor{}"]
    assert checkpoint.format == "Lightning's distributed checkpoint, 1 file"


def test_a_hugging_face_folder_of_shards_is_read(tmp_path: Path) -> None:
    saved = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": saved.weights}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": saved.optimizer.state_dict()}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(saved.weights)
    assert len(checkpoint.optimizers) == 1
    assert checkpoint.step == 3


REFUSED = {
    "DeepSpeed file": (
        lambda path: torch.save({"module": {"w": torch.ones(2)}, "ds_version": "0.1"}, path),
        "DeepSpeed",
    ),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no weights"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "a dictionary of tensors was expected, but got a list"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "a dictionary of tensors was expected"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"w": [1.0]})), "none that torch.save has written"),
    "numpy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\0"), "it is an array of numpy's"),
    "Keras": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "HDF5"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\x03\0\0\0"), "GGUF"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_content_that_is_not_understood_is_described_in_a_sentence(name: str, tmp_path: Path) -> None:
    write, sentence = REFUSED[name]
    write(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path / "x.bin")


def test_folders_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"give one of them, such as 'last\.ckpt'"):
        open_checkpoint(tmp_path)
    (tmp_path / "zero_to_fp32.py").write_text("")
    with pytest.raises(CheckpointError, match="DeepSpeed"):
        open_checkpoint(tmp_path)


def test_an_optimizer_alone_is_a_checkpoint_without_weights(tmp_path: Path) -> None:
    torch.save(trained().optimizer.state_dict(), tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path / "optimizer.pt")
    assert (len(checkpoint.optimizers), dict(checkpoint.tensors), checkpoint.step) == (1, {}, 3)
    assert checkpoint.notes == ("It holds no weights of a network.",)


# Parts of a tensor of 4 × 4: where they begin and their sizes; and whether they make up the whole.
PARTS = {
    "one": ([((0, 0), (4, 4))], True),
    "rows": ([((0, 0), (1, 4)), ((1, 0), (3, 4))], True),
    "columns": ([((0, 3), (4, 1)), ((0, 0), (4, 3))], True),
    "four": ([((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((2, 2), (2, 2))], True),
    "an empty one": ([((0, 0), (4, 4)), ((4, 0), (0, 4))], True),
    "none": ([], False),
    "a hole": ([((0, 0), (3, 4))], False),
    "overlap as large as the hole": ([((0, 0), (2, 4)), ((1, 0), (2, 4))], False),
    "crossing": ([((0, 0), (4, 2)), ((0, 1), (2, 4))], False),
    "beyond": ([((0, 0), (2, 4)), ((3, 0), (2, 4))], False),
    "twice": ([((0, 0), (2, 4)), ((0, 0), (2, 4))], False),
    "other dimensions": ([((0,), (16,))], False),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_make_up_a_tensor_or_are_refused(name: str, tmp_path: Path) -> None:
    told, whole = PARTS[name]
    expected = torch.arange(16.0).view(4, 4)
    parts = []
    for number, (offsets, sizes) in enumerate(told):
        room = io.BytesIO()
        part = (
            expected[tuple(slice(at, at + size) for at, size in zip(offsets, sizes))] if whole else torch.zeros(sizes)
        )
        torch.save(part.clone(), room)
        path = tmp_path / f"{number}.distcp"
        path.write_bytes(room.getvalue())
        parts.append(_TensorPart(offsets, sizes, ByteRange.of(path)))
    if whole:
        assert torch.equal(ShardedTensor("w", torch.float32, (4, 4), parts).read(), expected)
    else:
        with pytest.raises(CheckpointError, match="do not make up the whole"):
            ShardedTensor("w", torch.float32, (4, 4), parts)


def test_an_optimizer_of_fastai_is_read_by_name(tmp_path):
    """Its state is a list, and its hyperparameters are a list of one dictionary a group."""
    net = torch.nn.Linear(3, 2)
    kept = [{"grad_avg": torch.zeros_like(p), "sqr_avg": torch.zeros_like(p), "step": 3} for p in net.parameters()]
    torch.save({"model": net.state_dict(), "opt": {"state": kept, "hypers": [{"lr": 0.1}]}}, tmp_path / "fastai.pth")
    report = ns.postmortem(tmp_path / "fastai.pth")
    assert ["no clock for fastai's optimizers" in one.reason for one in report.abstentions] == [True]


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "step": 3}])
@pytest.mark.parametrize("averaged_factory", [False, True])
def test_the_weights_of_an_averaged_model_are_taken_with_the_network_itself(tmp_path, wrap, averaged_factory):
    """``AveragedModel`` adds ``module.`` to every name, and a counter without it."""

    def make():
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

    net = make()
    net[0].weight.data[1] = 0.0
    net[0].bias.data[1] = -1.0
    torch.save(wrap(AveragedModel(net).state_dict()), tmp_path / "averaged.pt")
    factory = (lambda: AveragedModel(make())) if averaged_factory else make
    report = ns.postmortem(tmp_path / "averaged.pt", model=factory, example="1x4")
    assert (report.neurons, report.dead) == (3, 1)
    assert [layer.name for layer in ns.postmortem(tmp_path / "averaged.pt").layers] == ["0", "2"]


@pytest.mark.parametrize("whole", [False, True], ids=["state", "inside a checkpoint"])
def test_an_optimizer_in_a_file_of_its_own_is_read_with_the_weights(tmp_path, whole):
    """The clock dates what the two files say together; ``step`` says what neither of them does."""
    model = nn.Sequential(nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(1, 401):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step > 100:
            model[0].weight.grad[2] = 0
            model[0].bias.grad[2] = 0
        optimizer.step()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = optimizer.state_dict()
    torch.save({"optimizer": state, "epoch": 3} if whole else state, tmp_path / "optimizer.pt")
    alone = ns.postmortem(tmp_path / "weights.pt")
    assert (alone.dead, alone.global_step) == (0, None)
    report = ns.postmortem(tmp_path / "weights.pt", optimizer=tmp_path / "optimizer.pt")
    (dead,) = report.verdicts()
    assert (report.global_step, dead.neuron, dead.label) == (400, 2, "no gradient")
    assert 50 <= dead.since <= 100
    later = ns.postmortem(tmp_path / "weights.pt", optimizer=tmp_path / "optimizer.pt", step=1003)
    assert (later.global_step, next(later.verdicts()).since) == (1003, dead.since + 603)
    with pytest.raises(CheckpointError, match="holds no state of an optimizer"):
        ns.postmortem(tmp_path / "weights.pt", optimizer=tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="step"):
        ns.postmortem(tmp_path / "weights.pt", step=-1)
