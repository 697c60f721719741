"""What ``neuronscope`` writes: whole or not at all, and where it cannot, the one sentence names the file."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.output import write_file

KINDS = ("html", "json", "markdown")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no device here that is always full")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files there")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint, a folder and a file."""
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict(), "net.pt")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("a file\n")
    return tmp_path


def run(*arguments: str, stdout: int = subprocess.DEVNULL, first: str = "") -> tuple[int, str]:
    """Run it in a process of its own, with a first statement; the exit code and what came on standard error."""
    code = f"import sys\n{first}\nfrom neuronscope.cli import main\nsys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("target", "words"),
    [
        pytest.param("/dev/full", "No space left on device", marks=needs_full),
        ("there", "Is a directory"),
        ("nowhere/a", "there is no folder"),
        ("file/a", "there is no folder"),
        ("dangling", "there is no folder"),
        ("n" * 300, "File name too long"),
        pytest.param("full", "No space left on device", marks=needs_full),
        pytest.param("pipe", "nothing reads from it", marks=needs_pipes),
        pytest.param("socket", "nothing reads from it", marks=needs_pipes),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    folder: Path, kind: str, target: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dangling").symlink_to("nowhere/a")
    (folder / "full").symlink_to(FULL)
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket")
    before = sorted(folder.rglob("*"))
    assert cli.main(["postmortem", "net.pt", f"--{kind}", target]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"neuronscope: Cannot write {target}: {words}")
    assert len(said.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is allowed to the superuser")
@pytest.mark.parametrize(("protected", "target"), [("there", "there/a.html"), ("file", "file")])
def test_a_file_without_permission_to_write_is_named(
    folder: Path, protected: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / protected).chmod(0o555)
    assert cli.main(["postmortem", "net.pt", "--html", target]) == 2
    assert capsys.readouterr().err == f"neuronscope: Cannot write {target}: Permission denied.\n"


@needs_full
def test_the_other_files_are_written_when_one_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "postmortem net.pt --html /dev/full --markdown a.md --json /dev/full"
    assert cli.main(line.split()) == 2
    said = capsys.readouterr()
    assert "8 neurons" not in said.err
    assert said.out.startswith("Neuronscope post-mortem · net.pt")
    assert (folder / "a.md").read_text(encoding="utf-8").startswith("## Neuronscope post-mortem")
    assert said.err.count("/dev/full: No space left on device") == 2


@needs_limits
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("earlier", [None, "an earlier report\n"])
def test_a_disk_that_fills_up_leaves_what_was_there(
    folder: Path, kind: str, earlier: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files ends the writing in the middle, as a full disk does."""
    import resource

    target = folder / f"report.{kind}"
    if earlier is not None:
        target.write_text(earlier)
    before = sorted(folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code = cli.main(["postmortem", "net.pt", f"--{kind}", target.name])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert capsys.readouterr().err == f"neuronscope: Cannot write {target.name}: {os.strerror(errno.EFBIG)}.\n"
    assert sorted(folder.iterdir()) == before
    assert earlier is None or target.read_text() == earlier


@needs_full
@pytest.mark.parametrize("line", ["postmortem net.pt --json a.json", "--version"])
def test_standard_output_that_is_full_ends_with_2(folder: Path, line: str) -> None:
    with FULL.open("wb") as full:
        ended = run(*line.split(), stdout=full.fileno())
    assert ended == (2, "neuronscope: Cannot write to standard output: No space left on device.\n")
    assert "json" not in line or (folder / "a.json").read_text(encoding="utf-8").startswith("{")


def test_a_closed_output_pipe_gives_no_message() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = run("--version", stdout=writing)
    os.close(writing)
    assert ended == (0, "")


@needs_full
def test_a_demo_that_cannot_print_ends_with_2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = (
        "import neuronscope.demo.program as program\n"
        "program.run_demo = lambda *_, **__: print('x' * 100_000, flush=True)"
    )
    with FULL.open("wb") as full:
        code, said = run("demo", first=first, stdout=full.fileno())
    assert code == 2
    assert said.startswith("neuronscope: Cannot write to standard output")
    assert len(said.splitlines()) == 1


def test_files_keep_their_mode_and_links_are_followed(folder: Path) -> None:
    (folder / "file").chmod(0o640)
    (folder / "link").symlink_to("file")
    write_file(folder / "link", "new\n")
    assert (folder / "link").is_symlink()
    assert (folder / "file").read_text() == "new\n"
    assert (folder / "file").stat().st_mode & 0o777 == 0o640
    (folder / "plain").write_bytes(b"")
    write_file(folder / "made", b"\xff\n")
    assert (folder / "made").read_bytes() == b"\xff\n"
    assert (folder / "made").stat().st_mode == (folder / "plain").stat().st_mode


@needs_full
@pytest.mark.parametrize("target", ["/dev/null", "/dev/stderr"])
def test_a_device_that_takes_what_it_is_given_stays_a_device(folder: Path, target: str) -> None:
    before = Path(target).stat()
    code, _ = run("postmortem", "net.pt", "--markdown", target)
    assert code == 0
    assert Path(target).stat().st_rdev == before.st_rdev


@needs_pipes
def test_a_named_pipe_with_a_reader_is_written_into(folder: Path) -> None:
    os.mkfifo("pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text(encoding="utf-8")))
    reader.start()
    torch.save({f"{at}.weight": torch.zeros(4, 4) for at in range(0, 200, 2)}, "large.pt")
    large = ns.postmortem("large.pt").to_html()
    while cli.main(["postmortem", "large.pt", "--html", "pipe"]) == 2:  # the reader has not opened it yet
        pass
    reader.join()
    assert len(large) > 1 << 16  # more than a pipe holds
    assert read == [large]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        pytest.param("/dev/full", "Not a directory", marks=needs_full),
        pytest.param("/dev/null", "Not a directory", marks=needs_full),
        ("file", "Not a directory"),
        ("file/a", "Not a directory"),
        pytest.param("pipe", "Not a directory", marks=needs_pipes),
        ("dangling", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_demo_whose_folder_cannot_be_made_names_it(
    folder: Path, out: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dangling").symlink_to("file/a")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
    assert cli.main(["demo", "--quick", "--seeds", "1", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"neuronscope: Expected a folder that can be written to, but got {out}: ")
    assert words in said
    assert len(said.splitlines()) == 1


def test_a_pipe_is_written_into(folder: Path) -> None:
    reading, writing = os.pipe()
    ns.postmortem("net.pt").to_json(f"/dev/fd/{writing}")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read().startswith("{")


@needs_full
@pytest.mark.parametrize("kind", ["html", "json"])
def test_in_python_the_error_names_the_file(folder: Path, kind: str) -> None:
    report = ns.postmortem("net.pt")
    with pytest.raises(OSError, match="/dev/full") as error:
        getattr(report, f"to_{kind}")("/dev/full")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")
