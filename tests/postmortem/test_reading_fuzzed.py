"""Whatever is there, the reader gives a checkpoint or one plain sentence: damage of every kind, in every place."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.errors import CheckpointError
from tests.postmortem.files import FORMATS, distributed, trained


def examined(path: Path) -> Checkpoint | str:
    """The checkpoint, read to its last number, or the sentence that says why there is none."""
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.tensors.values():
            assert tuple(tensor.read().shape) == tensor.shape
        for optimizer in checkpoint.optimizers:
            for slot in optimizer.slots.values():
                for kept in slot.values():
                    assert isinstance(kept, float | int) or tuple(kept.read().shape) == kept.shape
    except CheckpointError as error:
        sentence = str(error)
        assert sentence.endswith(".")
        assert sentence.isprintable(), sentence
        assert len(sentence) < 1000
        return sentence
    for name in (*checkpoint.tensors, *checkpoint.notes):
        name.encode("utf-8")  # what is shown later must be text
    return checkpoint


@contextmanager
def folder_of(files: dict[str, bytes]) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, dict[str, bytes]]]:
    """By format: the path to open, within the folder, and the folder's files."""
    made: dict[str, tuple[str, dict[str, bytes]]] = {}

    def of(name: str) -> tuple[str, dict[str, bytes]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("written")
            path = FORMATS[name].write(folder, trained())
            files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
            made[name] = (path.relative_to(folder).as_posix(), files)
        return made[name]

    return of


def _cut(content: bytes, at: int, _: bytes) -> bytes:
    return content[:at]


def _flip(content: bytes, at: int, new: bytes) -> bytes:
    at = min(at, len(content) - 1)
    return content[:at] + bytes([content[at] ^ (1 << new[0] % 8)]) + content[at + 1 :]


def _overwrite(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def _insert(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at:]


def _drop(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + content[at + len(new) :]


DAMAGES = (_cut, _flip, _overwrite, _insert, _drop)
FUZZED = (
    *("state_dict", "state_dict, older", "training", "training, older", "training, protocol 4", "safetensors"),
    *("sharded safetensors", "sharded torch files", "Hugging Face Trainer", "distributed"),
)


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=100)
@given(st.data())
def test_a_file_damaged_anywhere_is_read_or_refused_with_a_clear_error(
    name: str, written: Callable[[str], tuple[str, dict[str, bytes]]], data: st.DataObject
) -> None:
    path, files = written(name)
    victim = data.draw(st.sampled_from(sorted(files)))
    damage = data.draw(st.sampled_from(DAMAGES))
    content = files[victim]
    at = data.draw(st.integers(0, len(content)))
    new = data.draw(st.binary(min_size=1, max_size=16) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4]))
    with folder_of(files | {victim: damage(content, at, new)}) as folder:
        examined(folder / path)


@pytest.mark.parametrize("name", FUZZED)
def test_a_file_that_is_cut_short_is_never_a_whole_checkpoint(
    name: str, written: Callable[[str], tuple[str, dict[str, bytes]]]
) -> None:
    path, files = written(name)
    for victim in files.keys() - {"rng_state.pth"}:  # which is not opened
        content = files[victim]
        for share in range(50):
            with folder_of(files | {victim: content[: len(content) * share // 50]}) as folder:
                assert isinstance(examined(folder / path), str), (victim, share)


@pytest.mark.parametrize("name", FUZZED)
def test_a_file_that_is_missing_is_named(name: str, written: Callable[[str], tuple[str, dict[str, bytes]]]) -> None:
    path, files = written(name)
    needed = {"weights.safetensors", "w.pt", "w.pth", "t.pt", "model.safetensors", "__0_0.distcp", ".metadata"}
    for victim in {name for name in files if name in needed or "-of-" in name or name.endswith(".index.json")}:
        with folder_of({name: content for name, content in files.items() if name != victim}) as folder:
            sentence = examined(folder / path)
            assert isinstance(sentence, str)
            assert victim in sentence or "is a folder" in sentence


def archive(pickled: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A file as torch.save would write it around that pickle."""
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w") as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", "little")
        for name, content in (storages or {"0": b"\0" * 64}).items():
            made.writestr(f"archive/data/{name}", content)
    return room.getvalue()


_WHOLE = io.BytesIO()
torch.save({"w": torch.ones(2, 3), "state": {0: torch.ones(2)}}, _WHOLE)
with zipfile.ZipFile(_WHOLE) as _opened:
    PICKLE = _opened.read("archive/data.pkl")


@settings(max_examples=400)
@given(st.integers(0, len(PICKLE)), st.binary(max_size=6), st.integers(0, 6))
def test_a_damaged_pickle_is_read_or_refused_with_a_clear_error(at: int, new: bytes, dropped: int) -> None:
    """The archive around it is whole, so that the damage gets as far as the unpickler."""
    with folder_of({"w.pt": archive(PICKLE[:at] + new + PICKLE[at + dropped :])}) as folder:
        examined(folder / "w.pt")


OPCODES = st.sampled_from([bytes([code]) for code in range(256)])


@settings(max_examples=400)
@given(st.lists(OPCODES | st.binary(max_size=4), max_size=40).map(b"".join))
def test_any_pickle_opcodes_are_read_or_refused_with_a_clear_error(opcodes: bytes) -> None:
    with folder_of({"w.pt": archive(b"\x80\x02" + opcodes + b"."), "w.pth": b"\x80\x02" + opcodes + b"."}) as folder:
        examined(folder / "w.pt")
        examined(folder / "w.pth")


NAMES = st.sampled_from(
    [
        "state_dict",
        "model",
        "optimizer",
        "state",
        "param_groups",
        "params",
        "callbacks",
        "version",
        "step",
        "phases",
        "w",
    ]
) | st.text(max_size=5)
THINGS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.ones(2, 3)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=4)
        | st.dictionaries(st.integers(0, 3), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(THINGS)
def test_any_nested_plain_data_beside_the_weights_is_read(thing: Any) -> None:
    room = io.BytesIO()
    torch.save(thing, room)
    with folder_of({"w.pt": room.getvalue()}) as folder:
        examined(folder / "w.pt")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "I64", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "weight_map"]), inner)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(JSON)
def test_any_json_in_a_format_is_read_or_refused_with_a_clear_error(thing: Any) -> None:
    text = json.dumps(thing).encode()
    header = len(text).to_bytes(8, "little") + text + b"\0" * 24
    files = {"model.safetensors": header, "x.index.json": text, "config.json": text, "trainer_state.json": text}
    with folder_of(files) as folder:
        for path in (folder, folder / "model.safetensors", folder / "x.index.json"):
            examined(path)


@settings(max_examples=200)
@given(st.binary(max_size=64), st.sampled_from([b"", b"PK\3\4", b"\x80\x02", b"{", b"\x89HDF\r\n\x1a\n", b"GGUF"]))
def test_any_bytes_are_read_or_refused_with_a_clear_error(content: bytes, head: bytes) -> None:
    with folder_of({"w.pt": head + content}) as folder:
        examined(folder / "w.pt")


def test_data_that_contains_itself_is_read(tmp_path: Path) -> None:
    ring: dict[str, Any] = {"w": torch.ones(2)}
    ring["state_dict"] = ring["callbacks"] = ring["model"] = ring
    ring["optimizer"] = [ring]
    lasting: list[Any] = []
    lasting.append(lasting)
    ring["state"], ring["param_groups"] = ring, lasting
    torch.save(ring, tmp_path / "ring.pt")
    checkpoint = examined(tmp_path / "ring.pt")
    assert isinstance(checkpoint, Checkpoint)
    assert list(checkpoint.tensors) == ["w"]


def test_a_monitor_record_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {"version": 1, "step": 1, "phases": {}}
    state["phases"]["train"] = state
    torch.save({"w": torch.ones(2), "neuronscope": state}, tmp_path / "ring.pt")
    assert "larger or nested deeper" in str(examined(tmp_path / "ring.pt"))


def test_nesting_that_doubles_at_every_level_is_read_in_bounded_time(tmp_path: Path) -> None:
    """Sixty lists of two times the one before: 2⁶⁰ parts to whoever walks them all."""
    thing: Any = ["a"]
    for _ in range(60):
        thing = [thing, thing]
    state = {"version": 1, "step": 1, "phases": {"a": thing}}
    group = {"params": [thing], "param_names": [thing], "lr": thing}
    optimizer = {"state": {0: {"exp_avg": thing}, "1": thing}, "param_groups": [group]}
    cases = (("a", {"w": torch.ones(2), "x": thing, "model": thing}), ("b", state), ("c", thing), ("d", optimizer))
    for name, saved in cases:
        (tmp_path / name).write_bytes(archive(pickle.dumps(saved, 2)) if name == "c" else _saved(saved))
        examined(tmp_path / name)


def test_objects_of_a_distributed_checkpoint_are_not_walked(tmp_path: Path) -> None:
    ring: dict[Any, Any] = {0: torch.ones(2)}
    ring[1] = ring
    thing: Any = {0: 1}
    for _ in range(60):
        thing = {0: thing, 1: thing}
    room = io.BytesIO()
    torch.save({"ring": ring, "thing": thing}, room)
    distributed(tmp_path, trained())
    (data,) = tmp_path.glob("*.distcp")
    plan = pickle.loads((tmp_path / ".metadata").read_bytes())
    info = next(info for index, info in plan.storage_data.items() if index.fqn == "global_step")
    info.offset, info.length = data.stat().st_size, len(room.getvalue())
    data.write_bytes(data.read_bytes() + room.getvalue())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(plan))
    checkpoint = examined(tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.step == 3  # Adam's own, as the plan's is none


def _saved(thing: Any) -> bytes:
    room = io.BytesIO()
    torch.save(thing, room)
    return room.getvalue()


ODD_NAMES = {
    "HTML": "<script>alert(1)</script>",
    "path": "../../etc/passwd",
    "control characters": "a\x1b[2J\x07\r\nb",
    "null": "a\0b",
    "half of a pair": "a\ud800b",
    "right to left": "a\u202eb",
    "empty": "",
    "long": "w" * 100_000,
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_tensors_with_odd_names_are_read(name: str, tmp_path: Path) -> None:
    tensors = {name: torch.ones(2), "w": torch.zeros(2)}
    torch.save(tensors, tmp_path / "w.pt")
    checkpoint = examined(tmp_path / "w.pt")
    assert isinstance(checkpoint, Checkpoint)
    assert [tensor.read().tolist() for tensor in checkpoint.tensors.values()] == [[1, 1], [0, 0]]
    header = json.dumps({name: {"dtype": "F8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    assert "of type 'F8' are not read" in str(examined(tmp_path / "w.safetensors"))
