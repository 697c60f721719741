"""Every format gives the same network back, bit for bit, and reads no numbers before it is asked to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuronscope.checkpoints.formats.byte_range import ByteRange
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from tests.postmortem.files import FORMATS, STEPS, Format, trained


@pytest.mark.parametrize("case", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_back_the_weights(case: Format, tmp_path: Path) -> None:
    saved = trained()
    checkpoint = open_checkpoint(case.write(tmp_path, saved))
    assert checkpoint.format == case.format
    assert set(checkpoint.tensors) == set(saved.weights)
    for name, tensor in saved.weights.items():
        stored = checkpoint.tensors[name]
        assert (stored.shape, f"torch.{stored.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert torch.equal(stored.read(), tensor)
        assert stored.read().data_ptr() != stored.read().data_ptr() or tensor.numel() == 0
    assert len(checkpoint.optimizers) == case.optimizers
    assert checkpoint.step == case.step
    assert checkpoint.records == {}


@pytest.mark.parametrize("name", [name for name, case in FORMATS.items() if case.optimizers])
def test_an_optimizer_is_as_it_was_saved(name: str, tmp_path: Path) -> None:
    saved = trained()
    (optimizer,) = open_checkpoint(FORMATS[name].write(tmp_path, saved)).optimizers
    expected = saved.optimizer.state_dict()
    assert [group["params"] for group in optimizer.groups] == [[0, 1, 2, 3, 4, 5]]
    assert {key: optimizer.groups[0][key] for key in ("lr", "betas", "weight_decay")} == {
        key: expected["param_groups"][0][key] for key in ("lr", "betas", "weight_decay")
    }
    assert set(optimizer.slots) == set(expected["state"])
    for key, slot in expected["state"].items():
        assert optimizer.slots[key]["step"] == STEPS
        for kept in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.slots[key][kept].read(), slot[kept])


@pytest.mark.parametrize("case", FORMATS.values(), ids=FORMATS)
def test_tensors_are_read_from_the_file_only_when_needed(
    case: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = trained()
    path = case.write(tmp_path, saved)
    read: list[int] = []
    into = ByteRange.read_into

    def noted(self: ByteRange, room: memoryview) -> None:
        read.append(self.size)
        into(self, room)

    checkpoint = open_checkpoint(path)
    monkeypatch.setattr(ByteRange, "read_into", noted)
    assert all(stored.shape is not None and stored.dtype for stored in checkpoint.tensors.values())
    assert read == []
    checkpoint.tensors["0.weight"].read()
    assert read[-1] == 6 * 5 * 4  # 6 inputs of 5 neurons, 4 bytes each


ODD = {
    "transposed": torch.arange(6.0).view(2, 3).T,
    "every second": torch.arange(10)[2:8:2],
    "expanded": torch.ones(1).expand(5),
    "rows": torch.arange(12.0).view(4, 3)[1:3],
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "buffer": torch.nn.Buffer(torch.ones(2)),
    "bool": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.float16),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "float8": torch.ones(4).to(torch.float8_e4m3fn),
    "uint16": torch.arange(4).to(torch.uint16),
    "complex": torch.ones(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_every_kind_of_tensor_is_read(name: str, zipped: bool, tmp_path: Path) -> None:
    tensor = ODD[name]
    torch.save({"a": torch.zeros(2), name: tensor}, tmp_path / "odd.pt", _use_new_zipfile_serialization=zipped)
    stored = open_checkpoint(tmp_path / "odd.pt").tensors[name]
    read = stored.read()
    assert (stored.shape, read.dtype, read.is_contiguous()) == (tuple(tensor.shape), tensor.dtype, True)
    assert read.tolist() == tensor.tolist()


def test_tensors_that_are_not_weights_are_named_and_left_out(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2), "sparse": torch.eye(2).to_sparse(), "meta": torch.ones(2, device="meta")}
    torch.save(weights | {"_extra_state": {"version": 1}}, tmp_path / "odd.pt")
    checkpoint = open_checkpoint(tmp_path / "odd.pt")
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.notes == (
        "Tensors that are sparse are not read: 'sparse'.",
        "Tensors that are without numbers (of the meta device) are not read: 'meta'.",
        "Values that are not tensors are left out of the weights: '_extra_state'.",
    )


@pytest.mark.parametrize("under", [None, "model"])
def test_two_networks_in_one_file_keep_their_names_apart(under: str | None, tmp_path: Path) -> None:
    weights = {"w": torch.ones(2)}
    both = {"generator": weights, "critic": weights}
    torch.save({under: both, "epoch": 1} if under else both, tmp_path / "gan.pt")
    checkpoint = open_checkpoint(tmp_path / "gan.pt")
    assert set(checkpoint.tensors) == {"generator.w", "critic.w"}
    assert checkpoint.notes == ("The weights were found under 'generator', 'critic'.",)


def test_a_network_that_is_not_examined_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    assert checkpoint.tensors["w"].read().tolist() == [1, 1]
    assert checkpoint.notes == ("The weights are those under 'model'; not looked at: 'ema'.",)


def test_a_folder_gives_the_configuration_beside_the_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FORMATS["Hugging Face Trainer"].write(tmp_path, trained()))
    assert checkpoint.config == {"model_type": "tiny", "hidden_size": 5}
