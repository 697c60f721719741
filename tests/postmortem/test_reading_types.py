"""One tensor of a type that torch cannot read: it is left out with a note, and the rest is examined."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.formats.safe_globals import find_safe_global
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.errors import CheckpointError

#: Types that torch can store and cannot compute with on a CPU; not every torch has all.
UNREADABLE = [
    getattr(torch, name) for name in ("bits8", "bits16", "bits4x2", "float4_e2m1fn_x2") if hasattr(torch, name)
]
#: Types that torch can read, and that hold no real numbers.
UNUSUAL = [torch.complex64, torch.complex32, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.bool]
#: Types of real numbers in a byte.
SMALL = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
]


def zeros(dtype: torch.dtype, rows: int = 3) -> torch.Tensor:
    """Rows of 4 elements of a type, whatever torch can do with it."""
    return torch.zeros(rows, 4 * dtype.itemsize, dtype=torch.uint8).view(dtype)


def tensors(odd: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights with one odd tensor before an ordinary layer, whose second row is zero."""
    weight = torch.ones(2, 3)
    weight[1] = 0
    return {"odd.weight": odd, "plain.weight": weight, "plain.bias": torch.tensor([1.0, -1.0])}


def torch_file(held: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(held, folder / "net.pt")
    return folder / "net.pt"


def older_file(held: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save({"state_dict": held}, folder / "net.pth", _use_new_zipfile_serialization=False)
    return folder / "net.pth"


def unpickled_file(held: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save({"state_dict": held, "code": print}, folder / "code.pt")
    return folder / "code.pt"


def distributed_folder(held: dict[str, torch.Tensor], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: no process group, a single process is meant
        dcp.save({"model": held}, checkpoint_id=folder / "shards", no_dist=True)
    return folder / "shards"


WAYS = [torch_file, older_file, unpickled_file, distributed_folder]


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("dtype", UNREADABLE, ids=str)
def test_a_dtype_that_cannot_be_read_is_left_out_with_a_note(
    dtype: torch.dtype, write: Callable[..., Path], tmp_path: Path
) -> None:
    if write is distributed_folder and not dtype.is_floating_point:
        pytest.skip("torch itself cannot write such a folder")
    report = ns.postmortem(write(tensors(zeros(dtype)), tmp_path), trust=write is unpickled_file)
    assert [(layer.name, layer.neurons, layer.count("zero row")) for layer in report.layers] == [("plain", 2, 1)]
    name = str(dtype).removeprefix("torch.")
    assert f"Tensors that are of type {name} are not read: 'odd.weight'." in report.notes
    assert "odd.weight" in str(report)


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("dtype", UNUSUAL, ids=str)
def test_a_weight_without_real_numbers_is_noted(dtype: torch.dtype, write: Callable[..., Path], tmp_path: Path) -> None:
    report = ns.postmortem(write(tensors(zeros(dtype)), tmp_path), trust=write is unpickled_file)
    assert [layer.name for layer in report.layers] == ["plain"]
    name = str(dtype).removeprefix("torch.")
    assert f"Weights and biases of type {name} are not examined: 'odd.weight'." in report.notes


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_eight_bit_floating_point_weights_are_examined(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.ones(4, 2).to(dtype)
    held = {"0.weight": torch.ones(2, 3).to(dtype), "2.weight": weight, "2.bias": torch.ones(4)}
    report = ns.postmortem(torch_file(held, tmp_path))
    assert [(layer.name, layer.neurons) for layer in report.layers] == [("0", 2), ("2", 4)]
    assert report.notes == ()


def test_quantised_tensors_are_left_out_too(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: quantised types are deprecated
        odd = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
        path = torch_file(tensors(odd), tmp_path)
    report = ns.postmortem(path)
    assert [layer.name for layer in report.layers] == ["plain"]
    assert any("'odd.weight'" in note for note in report.notes)


def test_dtypes_of_a_later_torch_are_left_out(tmp_path: Path) -> None:
    """What the installed torch has no name for: the file is one of torch.save with the name changed."""
    path = torch_file(tensors(zeros(torch.bits16)), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"bits16", b"bits99"))
    report = ns.postmortem(path)
    assert report.neurons == 2
    assert "Tensors that are of type bits99 are not read: 'odd.weight'." in report.notes


@pytest.mark.parametrize("name", ["load", "int8x.load", "uint8__reduce__", "hub", "bits8()"])
def test_only_names_of_dtypes_are_read_as_dtypes(name: str) -> None:
    with pytest.raises(CheckpointError, match="would have to be imported"):
        find_safe_global("torch", name)


def test_dtypes_are_read_by_any_of_their_names() -> None:
    assert (find_safe_global("torch", "float"), find_safe_global("torch", "half")) == (torch.float32, torch.float16)


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F99"])
def test_unknown_dtypes_of_safetensors_are_left_out(code: str, tmp_path: Path) -> None:
    header = json.dumps(
        {
            "odd.weight": {"dtype": code, "shape": [3, 8], "data_offsets": [0, 12]},
            "plain.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [12, 36]},
        }
    ).encode()
    numbers = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]).numpy().tobytes()
    path = tmp_path / "net.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12) + numbers)
    report = ns.postmortem(path)
    assert [(layer.name, layer.count("zero row")) for layer in report.layers] == [("plain", 1)]
    assert f"Tensors that are of type '{code}' are not read: 'odd.weight'." in report.notes


def trained() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(8, 4)).sum().backward()
        optimizer.step()
    return model, optimizer.state_dict()


@pytest.mark.parametrize("dtype", [*UNREADABLE[:1], torch.complex64, torch.uint16, *SMALL[:1]], ids=str)
@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq", "step"])
def test_an_unreadable_tensor_in_an_optimizer_state_is_left_out(dtype: torch.dtype, slot: str, tmp_path: Path) -> None:
    model, state = trained()
    state["state"][0][slot] = zeros(dtype, 6) if slot != "step" else zeros(dtype).flatten()[0]
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "net.pt")
    report = ns.postmortem(tmp_path / "net.pt")
    assert report.neurons == 6  # and two outputs
    assert report.global_step == 3
    # The other layer's state is read as ever: its clock says itself that three steps are too few.
    assert [one.source for one in report.abstentions if one.layer == "2"] == ["adam state"]
    if dtype in UNREADABLE:
        said = f"Tensors of an optimizer's state that are of type bits8 are not read: '0.{slot}'."
        assert said in report.notes


def test_an_optimizer_state_in_tensors_of_torchao_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their class decides what their numbers are; the weights beside them are read."""

    class OptimState8bit(torch.Tensor):
        @staticmethod
        def __new__(cls, codes: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes = codes
            return made

        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> Any:
            raise NotImplementedError

    name = "torchao.optim.subclass_8bit"
    OptimState8bit.__module__, OptimState8bit.__qualname__ = name, "OptimState8bit"
    for part in ("torchao", "torchao.optim", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].OptimState8bit = OptimState8bit
    model, state = trained()
    for slot in ("exp_avg", "exp_avg_sq"):
        state["state"][0][slot] = OptimState8bit(torch.zeros(6, 4, dtype=torch.uint8))
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "net.pt")
    report = ns.postmortem(tmp_path / "net.pt")
    assert report.neurons == 6
    assert [one.layer for one in report.abstentions if "no clock for its optimizer" in one.reason] == ["0"]
    assert (
        "Tensors of an optimizer's state that are of the type OptimState8bit of torchao are not read: '0.exp_avg', "
        "'0.exp_avg_sq'."
    ) in report.notes


def test_a_file_with_only_unreadable_tensors_says_what_is_left_out(tmp_path: Path) -> None:
    torch.save({"odd": zeros(torch.bits8)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"holds no weights.*type bits8 are not read: 'odd'"):
        open_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("dtype", [torch.bits8, torch.complex64], ids=str)
def test_a_model_that_needs_an_unreadable_tensor_is_not_loaded(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    torch.save({**network.state_dict(), "0.weight": zeros(dtype)}, "net.pt")
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        ns.postmortem("net.pt", network)
    (tmp_path / "small_nets.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())\n"
    )
    assert cli.main(["postmortem", "net.pt", "--model", "small_nets:net"]) == 2
    assert "0.weight" in capsys.readouterr().err


def test_unpickled_code_that_exits_raises_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(2, 2), "code": ExitsWhenRead()}, tmp_path / "net.pt")
    assert cli.main(["postmortem", str(tmp_path / "net.pt"), "--trust"]) == 2
    assert "could not be unpickled: SystemExit" in capsys.readouterr().err


class ExitsWhenRead:
    """Unpickled, it ends the program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (0,)
