"""No pickle runs, wherever it hides. Each case would make a folder if it did; that it would is shown too."""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neuronscope.checkpoints.formats.file_tensor import Storage
from neuronscope.checkpoints.formats.restricted_pickle import UnsafeGlobalError, read_pickle
from neuronscope.checkpoints.formats.safe_globals import AttributesPlaceholder, find_safe_global
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.errors import CheckpointError
from tests.postmortem.files import OLDER, Writes, distributed, pickled, sharded_bin, trained, trainer_folder


def _zip(folder: Path, bomb: Writes) -> Path:
    torch.save({"w": torch.ones(2), "extra": bomb}, folder / "w.pt")
    return folder / "w.pt"


def _lightning(folder: Path, bomb: Writes) -> Path:
    content = {
        "state_dict": {"w": torch.ones(2)},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"a": bomb},
    }
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def _older(folder: Path, bomb: Writes) -> Path:
    torch.save({"w": torch.ones(2), "extra": bomb}, folder / "w.pth", **OLDER)
    return folder / "w.pth"


def _first_pickle(folder: Path, bomb: Writes) -> Path:
    """In the place of the older layout's magic number, before it is known to be torch's."""
    (folder / "w.pth").write_bytes(pickled(bomb))
    return folder / "w.pth"


def _second_pickle(folder: Path, bomb: Writes) -> Path:
    (folder / "w.pth").write_bytes(pickled(0x1950A86A20F9469CFC6C) + pickled(bomb))
    return folder / "w.pth"


def _optimizer(folder: Path, bomb: Writes) -> Path:
    torch.save(
        {"state": {}, "param_groups": [{"params": [0], "lr": bomb}]}, trainer_folder(folder, trained()) / "optimizer.pt"
    )
    return folder


def _shard(folder: Path, bomb: Writes) -> Path:
    index = sharded_bin(folder, trained())
    torch.save({"3.weight": torch.ones(2), "extra": bomb}, folder / "model-00002-of-00002.bin")
    return index


def _plan(folder: Path, bomb: Writes) -> Path:
    distributed(folder, trained())
    (folder / ".metadata").write_bytes(pickled(bomb, 4))
    return folder


def _planned_object(folder: Path, bomb: Writes) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"w": torch.ones(2)}, "extra": bomb}, checkpoint_id=folder, no_dist=True)
    return folder


def _lightning_meta(folder: Path, bomb: Writes) -> Path:
    torch.save({"global_step": 1, "extra": bomb}, distributed(folder, trained()) / "meta.pt")
    return folder


def _record(folder: Path, bomb: Writes) -> Path:
    torch.save({"version": 1, "step": 1, "phases": {"a": bomb}}, trainer_folder(folder, trained()) / "neuronscope.pt")
    return folder


HIDDEN: dict[str, Callable[[Path, Writes], Path]] = {
    ".pt": _zip,
    "Lightning's hyperparameters": _lightning,
    "older layout": _older,
    "first of the older layout": _first_pickle,
    "second of the older layout": _second_pickle,
    "optimizer.pt": _optimizer,
    "a shard": _shard,
    ".metadata": _plan,
    "an object of a distributed checkpoint": _planned_object,
    "Lightning's meta.pt": _lightning_meta,
    "a record": _record,
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
def test_a_pickle_that_would_change_the_disk_is_refused(hide: Callable[[Path, Writes], Path], tmp_path: Path) -> None:
    written = tmp_path / "written"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    path = hide(folder, Writes(written))
    assert not written.exists()  # saving it does nothing
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert not written.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [".pt", "Lightning's hyperparameters", "older layout", "optimizer.pt", "a shard"])
def test_the_refusal_names_what_would_run_and_the_flag_and_trust_runs_it(name: str, tmp_path: Path) -> None:
    written = tmp_path / "written"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    path = HIDDEN[name](folder, Writes(written))
    with pytest.raises(CheckpointError, match=rf"names '{os.name}\.mkdir'.*`--trust`"):
        open_checkpoint(path)
    if name != "a shard":  # it lacks tensors that the index promises
        assert open_checkpoint(path, trust=True).tensors
        assert written.exists()  # so the case is a real one


def test_a_part_of_a_distributed_tensor_cannot_hide_one(tmp_path: Path) -> None:
    written, folder = tmp_path / "written", tmp_path / "checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(1000)}, checkpoint_id=folder, no_dist=True)
    (data,) = folder.glob("*.distcp")
    size = data.stat().st_size
    part = io.BytesIO()
    torch.save(Writes(written), part)
    data.write_bytes(_padded(part.getvalue(), size))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UnsafeGlobalError):
        checkpoint.tensors["w"].read()
    assert not written.exists()


def _padded(archive: bytes, size: int) -> bytes:
    """A zip archive of that size: the rest in front, as its index is at its end."""
    room = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(room, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.comment = b"x" * 10
    with zipfile.ZipFile(room, "a") as new:
        new.writestr("archive/filler", b"")
        missing = size - len(room.getvalue()) - 200
    with zipfile.ZipFile(room, "a") as new:
        new.writestr("archive/more", b"x" * missing)
    with zipfile.ZipFile(room, "a") as new:
        new.comment = b"x" * (10 + size - len(room.getvalue()))
    assert len(room.getvalue()) == size
    return room.getvalue()


def test_files_that_are_not_needed_are_not_opened(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path, trained())
    for name in ("rng_state.pth", "training_args.bin", "scheduler.pt"):
        torch.save(Writes(tmp_path / "written"), folder / name)
    assert open_checkpoint(folder).tensors
    assert open_checkpoint(folder, trust=True).tensors
    assert not (tmp_path / "written").exists()


def test_a_whole_module_is_refused_and_read_when_it_is_trusted(tmp_path: Path) -> None:
    saved = trained()
    torch.save(saved.model, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"names 'torch\.nn\.modules\.container\.Sequential'.*`--trust`"):
        open_checkpoint(tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt", trust=True)
    assert checkpoint.format == "torch file, unpickled"
    assert all(torch.equal(checkpoint.tensors[name].read(), saved.weights[name]) for name in saved.weights)


def test_a_torchscript_archive_is_refused_and_read_when_it_is_trusted(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: TorchScript is deprecated
        torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript.*`--trust`"):
        open_checkpoint(tmp_path / "script.pt")
    assert set(open_checkpoint(tmp_path / "script.pt", trust=True).tensors) == {"weight", "bias"}


def test_trusted_code_that_fails_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "no").mkdir()
    torch.save({"a": Writes(tmp_path / "no" / "such" / "folder")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="could not be unpickled: FileNotFoundError"):
        open_checkpoint(tmp_path / "w.pt", trust=True)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "secret.bin")
    for name in (
        "../secret.bin",
        str(tmp_path / "secret.bin"),
        "..",
        "",
        "a/b",
        "a\\b",
        "C:secret",
        "a\0b",
        3,
        None,
        [],
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match="Expected the name of a file in"):
            open_checkpoint(folder)


def test_an_index_cannot_name_an_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": index.name}}))
    with pytest.raises(CheckpointError, match="is not understood"):
        open_checkpoint(index)


def test_a_plan_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = distributed(tmp_path / "checkpoint", trained())
    (data,) = folder.glob("*.distcp")
    assert len(data.name) == len("../x.distcp") + 1
    plan = (folder / ".metadata").read_bytes().replace(data.name.encode(), b"../xx.distcp")
    (folder / ".metadata").write_bytes(plan)
    data.rename(tmp_path / "xx.distcp")
    with pytest.raises(CheckpointError, match=r"Expected the name of a file in.*'\.\./xx\.distcp'"):
        open_checkpoint(folder)


FOREIGN = [
    *("os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__"),
    *("torch.load", "torch.storage._load_from_bytes", "torch.hub.load", "torch.ops", "torch.nn", "torch.jit.load"),
    *(
        "numpy.load",
        "numpy.core.multiarray.fromfile",
        "functools.partial",
        "operator.attrgetter",
        "copyreg._reconstructor",
    ),
    *("torch._utils._rebuild_device_tensor_from_numpy", "torch.distributed.checkpoint.metadata.Metadata"),
]


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_code_become_placeholders(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(UnsafeGlobalError, match=f"'{name}'"):
        find_safe_global(module, attribute)


ACTING = {
    "an extension code": b"\x82\x01.",
    "an extension code of two bytes": b"\x83\x01\0.",
    "an extension code of four bytes": b"\x84\x01\0\0\0.",
    "an instance by its class's name": b"(iargparse\nNamespace\n.",
    "an instance of a class on the stack": b"(cargparse\nNamespace\no.",
    "a persistent id in text": b"P0\n.",
    "a persistent id where none is expected": b"NQ.",
    "a buffer outside the pickle": b"\x97.",
    "a call of a type": b"ctorch\nfloat32\n)R.",
    "an object of a type": b"ctorch\nfloat32\n)\x81.",
    "a call of a placeholder": b"ctorch\nFloatStorage\n)R.",
    "a call with keywords": b"cargparse\nNamespace\n)}K\x01K\x01s\x92.",
    "a call with a list": b"cbuiltins\nset\n]R.",
    "attributes of a type": b"ctorch\nfloat32\n}X\x01\0\0\0aK\x01sb.",
    "slots of a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(K\0QK\0))tRN}X\x08\0\0\0_storageK\x01s\x86b.",
    "attributes of a function": b"ccollections\nOrderedDict\nN}X\x04\0\0\0makeK\x01s\x86b.",
}


@pytest.mark.parametrize("pickled", ACTING.values(), ids=ACTING)
def test_opcodes_that_act_on_objects_are_refused(pickled: bytes) -> None:
    storage = None if b"NQ" in pickled else lambda _: Storage(torch.float32, 1)
    copyreg.add_extension("torch", "float32", 1)
    try:
        with pytest.raises(ValueError):
            read_pickle(io.BytesIO(b"\x80\x02" + pickled), find_safe_global, storage)
    finally:
        copyreg.remove_extension("torch", "float32", 1)


def test_the_state_of_a_placeholder_sets_no_attribute() -> None:
    state = pickle.dumps({"cls": "a", "set_state": 1, "__class__": 2, "__setstate__": 3}, 2)[2:-1]
    made = read_pickle(io.BytesIO(b"\x80\x02cargparse\nNamespace\n)R" + state + b"b."), find_safe_global)
    assert type(made) is AttributesPlaceholder
    assert made.cls == "argparse.Namespace"
    assert made.state == {"cls": "a", "set_state": 1, "__class__": 2, "__setstate__": 3}
    assert set(vars(made)) == {"cls", "state"}
    ignored = read_pickle(io.BytesIO(b"\x80\x02cpathlib\nPath\n)R" + state + b"b."), find_safe_global)
    assert vars(ignored) == {}


# What plain pickles can hold. Keys are such as dictionaries of checkpoints have.
KEYS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    KEYS | st.integers(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS | st.tuples(KEYS, KEYS), inner)
        | st.lists(inner).map(tuple)
        | st.sets(KEYS)
        | st.frozensets(KEYS)
        | st.binary().map(bytearray)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_unpickled_as_by_pickle(value: Any, protocol: int) -> None:
    read = read_pickle(io.BytesIO(pickle.dumps(value, protocol)), find_safe_global)
    expected = pickle.loads(pickle.dumps(value, protocol))
    assert _comparable(read) == _comparable(expected)


def _comparable(value: Any) -> Any:
    """The value with its types; bytes that can be changed are read as bytes that cannot in old protocols."""
    if isinstance(value, list | tuple):
        return (type(value), [_comparable(inner) for inner in value])
    if isinstance(value, dict):
        return [(repr(key), _comparable(inner)) for key, inner in value.items()]
    if isinstance(value, set | frozenset):
        return (type(value), sorted(map(repr, value)))
    return ("bytes", bytes(value)) if isinstance(value, bytes | bytearray) else repr(value)
