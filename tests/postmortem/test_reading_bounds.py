"""What a file can make its reader cost: memory near the largest tensor, none for what a file merely claims, no waiting.

Every case runs in a process of its own whose memory is bounded, so that one that fails harms nobody.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from neuronscope.checkpoints.formats import restricted_pickle
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.errors import CheckpointError
from scripts import checkpoint_memory
from tests.postmortem.test_reading_fuzzed import archive

resource = pytest.importorskip("resource")
if not sys.platform.startswith("linux"):
    pytest.skip("limits and measures of memory are Linux's", allow_module_level=True)

MEBIBYTE = 1 << 20
CHILD = """
import resource, sys
import neuronscope.checkpoints.formats.torch_file
from neuronscope.errors import CheckpointError
from neuronscope.checkpoints.open_checkpoint import open_checkpoint

kilobytes = lambda what: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
room = kilobytes("VmSize:") * 1024 + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (room, room))
resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
for path in sys.argv[2:]:
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.tensors.values():
            tensor.read()
        print("read", len(checkpoint.tensors))
    except CheckpointError as error:
        print("refused:", error)
"""


def within(most: int, *paths: Path) -> list[str]:
    """What a process says of each that opens and reads them in turn, and may take so many bytes more than it has."""
    command = [sys.executable, "-c", CHILD, str(most), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_reading_a_sharded_checkpoint_needs_memory_near_its_largest_tensor(tmp_path: Path) -> None:
    # 256 MiB in four files of one matrix of 64 MiB each. One matrix at a time is 64 MiB; two would be 128.
    checkpoint_memory.write(tmp_path, 256 * MEBIBYTE)
    child = checkpoint_memory.measured(tmp_path)
    assert child["numbers"] == 256 * MEBIBYTE // 4
    assert child["opened_kb"] < 10 * 1024
    assert child["peak_kb"] < 100 * 1024


def test_reading_a_torch_file_needs_memory_near_its_largest_tensor(tmp_path: Path) -> None:
    # Eight matrices of 32 MiB, 256 MiB in all: more than there is room for, be it in a map of the file.
    torch.save({f"{at}.weight": torch.ones(8 * MEBIBYTE) for at in range(8)}, tmp_path / "w.pt")
    assert within(160 * MEBIBYTE, tmp_path / "w.pt") == ["read 8"]


def _header(length: int, text: bytes = b"{}") -> bytes:
    return length.to_bytes(8, "little") + text


def _entry(shape: list[int], end: int) -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return _header(len(text), text) + b"\0" * 16


def _packed(size: int) -> bytes:
    """A zip archive of one entry that unpacks to ``size`` zeros."""
    room = io.BytesIO()
    with (
        zipfile.ZipFile(room, "w", zipfile.ZIP_DEFLATED) as made,
        made.open("archive/data.pkl", "w", force_zip64=True) as entry,
    ):
        for _ in range(size // MEBIBYTE):
            entry.write(b"\0" * MEBIBYTE)
    return room.getvalue()


def _tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, numel: int = 16) -> bytes:
    """A torch file of one tensor with whatever shape, over a storage of 64 bytes."""
    head = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + _opcodes(numel) + b"tQ"
    rest = _opcodes(offset) + _opcodes(shape) + _opcodes(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return archive(head + storage + rest + b"tRs.")


def _stored_as(name: bytes) -> bytes:
    """A torch file that refers to a storage by what some opcodes make."""
    return archive(b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n" + name + b"X\x03\0\0\0cpuK\x10tQ.")


def _opcodes(value: object) -> bytes:
    """A value as part of a pickle: without head and end."""
    return pickle.dumps(value, 2)[2:-1]


def _claimed(opcodes: bytes) -> bytes:
    """A torch file whose last opcode claims to be followed by 2⁴⁰ bytes."""
    return archive(opcodes + (2**40).to_bytes(8, "little") + b"x.")


BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "header of 2^60 bytes": ("w.safetensors", lambda: _header(2**60), "its header is said to have"),
    "header of 2^64 - 1 bytes": ("w.safetensors", lambda: _header(2**64 - 1), "its header is said to have"),
    "nested JSON": ("w.safetensors", lambda: _header(2_000_001, b"{" + b"[" * 2_000_000), "not the JSON"),
    "nested keys": ("w.safetensors", lambda: _header(1_000_000, b'{"a":' * 200_000), "not the JSON"),
    "endless integer": ("w.safetensors", lambda: _header(1_000_005, b'{"a":' + b"9" * 1_000_000), "not the JSON"),
    "absurd shape": ("w.safetensors", lambda: _entry([2**40, 2**40], 16), "numbers of 4 bytes"),
    "absurd shape of nothing": ("w.safetensors", lambda: _entry([0, 2**62], 0), "its tensors take 0 bytes"),
    "packed pickle": ("w.pt", lambda: _packed(512 * MEBIBYTE), "packed entries"),
    "shape beyond the storage": ("w.pt", lambda: _tensor((2**40,), (1,)), "is larger than what is stored"),
    "offset beyond the storage": ("w.pt", lambda: _tensor((1,), (1,), 16), "is larger than what is stored"),
    "storage beyond the entry": ("w.pt", lambda: _tensor((17,), (1,), 0, 2**40), "is larger than what is stored"),
    "expanded": ("w.pt", lambda: _tensor((2**40,), (0,)), "repeats 1 stored numbers beyond measure"),
    "expanded and empty": ("w.pt", lambda: _tensor((0, 2**62), (0, 0)), "is larger than any tensor"),
    "negative stride": ("w.pt", lambda: _tensor((4,), (-1,)), "makes no sense"),
    "a thousand dimensions": ("w.pt", lambda: _tensor((1,) * 1000, (1,) * 1000), "makes no sense"),
    "string of 2^40 bytes": ("w.pt", lambda: _claimed(b"\x80\x04\x8d"), "no sense"),
    "bytearray of 2^40 bytes": ("w.pt", lambda: _claimed(b"\x80\x05\x96"), "no sense"),
    "memo of 2^32": ("w.pt", lambda: archive(b"\x80\x02}r\xff\xff\xff\xff."), "holds no weights"),
    "ten million containers": ("w.pt", lambda: archive(b"\x80\x02(" + b"\x8f" * 10_000_000 + b"l."), "containers"),
    "nested tuples as a key": ("w.pt", lambda: archive(b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."), "no sense"),
    "nested tuples as a storage's name": ("w.pt", lambda: _stored_as(b")" + b"\x85" * 1_000_000), "storage's name"),
    "doubling tuples as a storage's name": ("w.pt", lambda: _stored_as(b")" + b"2\x86" * 60), "storage's name"),
    "doubling tuples as a type of numpy's": (
        "w.pt",
        lambda: archive(
            b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n)" + b"2\x86" * 60 + b"\x85RC\x01x\x86R."
        ),
        "got a Placeholder",
    ),
    "nested lists": ("w.pt", lambda: archive(b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."), "no weights"),
    "copies of a copy": (
        "w.pt",
        lambda: archive(
            b"\x80\x04cbuiltins\nbytearray\nq\0B" + (8 * MEBIBYTE).to_bytes(4, "little") + b"x" * 8 * MEBIBYTE
            + b"q\x010(" + b"h\0h\x01\x85R" * 1000 + b"l."
        ),
        "again and again",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process says of all bombs in turn."""
    paths = []
    for file, make, _ in BOMBS.values():
        paths.append(tmp_path_factory.mktemp("bomb") / file)
        paths[-1].write_bytes(make())
    return dict(zip(BOMBS, within(1536 * MEBIBYTE, *paths), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_claims_too_much_is_refused_without_taking_memory(name: str, said: dict[str, str]) -> None:
    assert said[name].startswith("refused:")
    assert BOMBS[name][2] in said[name]


def test_a_legacy_file_that_claims_a_large_storage_is_refused(tmp_path: Path) -> None:
    room = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, room, _use_new_zipfile_serialization=False)
    content = room.getvalue()
    claim = (4).to_bytes(8, "little")
    assert content.endswith(claim + torch.arange(4.0).numpy().tobytes())
    (tmp_path / "w.pth").write_bytes(content.replace(claim, (2**40).to_bytes(8, "little")))
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        open_checkpoint(tmp_path / "w.pth")


def test_a_hundred_thousand_tensors_are_read_in_linear_time(tmp_path: Path) -> None:
    count = 100_000
    names = [f"layers.{at}.weight" for at in range(count)]
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [at * 4, at * 4 + 4]} for at, name in enumerate(names)}
    ).encode()
    (tmp_path / "w.safetensors").write_bytes(_header(len(header), header) + b"\0" * 4 * count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    assert list(checkpoint.tensors) == names
    # About 2 s of the processor's time; what grows with the square of the number takes many minutes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 60


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "No such file or directory"),
    "an empty file": (lambda path: path.touch(), "the file is empty"),
    "an empty folder": (lambda path: path.mkdir(), "is a folder without a checkpoint in it"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a pipe that nobody writes to": (lambda path: os.mkfifo(path), "a file was expected, not a folder, a pipe"),
    "an endless device": (lambda path: path.symlink_to("/dev/zero"), "a file was expected, not a folder, a pipe"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_path_that_is_not_a_readable_file_is_refused(name: str, tmp_path: Path) -> None:
    make, sentence = PLACES[name]
    make(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", [name for name in PLACES if "folder" not in name])
def test_a_folder_with_a_part_that_is_not_a_file_is_refused(name: str, tmp_path: Path) -> None:
    make, sentence = PLACES[name]
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    make(tmp_path / "optimizer.pt")
    if name == "nothing":
        assert open_checkpoint(tmp_path).tensors
        return
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("folder", [True, False])
def test_a_file_without_permission_to_read_is_refused(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir() if folder else path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(path)
    path.chmod(0o700)


def test_an_impossible_file_name_is_refused() -> None:
    for name in ("a\0b", "w" * 5000, "\ud800"):
        with pytest.raises(CheckpointError, match="Cannot read"):
            open_checkpoint(name)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_that_shrinks_after_it_was_opened_raises_a_clear_error(share: float, tmp_path: Path) -> None:
    """With a map of memory this would end the process."""
    for name, save in (("w.pt", torch.save), ("w.safetensors", None)):
        path = tmp_path / name
        if save:
            torch.save({"w": torch.ones(100_000)}, path)
        else:
            text = json.dumps({"w": {"dtype": "F32", "shape": [100_000], "data_offsets": [0, 400_000]}}).encode()
            path.write_bytes(_header(len(text), text) + b"\0" * 400_000)
        tensor = open_checkpoint(path).tensors["w"]
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(CheckpointError, match="has become shorter"):
            tensor.read()


def test_a_checkpoint_of_a_hundred_thousand_layers_with_adams_state_is_within_the_limits(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as saved:
        codes = [code.code.encode("latin-1") for code, _, _ in pickletools.genops(saved.read("w/data.pkl"))]
    containers = sum(code in restricted_pickle._CONTAINERS for code in codes)
    assert len(codes) / 50 * 100_000 < restricted_pickle._MAX_OPCODES
    assert containers / 50 * 100_000 < restricted_pickle._MAX_CONTAINERS
