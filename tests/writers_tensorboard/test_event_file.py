"""The event file of our own: the same events as a SummaryWriter's, whole reports only, and no harm to a run's file."""

from __future__ import annotations

import copy
import errno
import pickle
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuronscope.errors import NeuronscopeWarning, UsageError
from neuronscope.writers.tensorboard import Dashboard, EventFile, append, event_file, folder_of, require_room, write
from neuronscope.writers.tensorboard.event_file import SPARE_BYTES, EncodedEvents

from . import samples
from .test_tensorboard import IMAGES, REPORT, SCALARS, read, summary_writer

multiplexer = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_multiplexer")
ALL = {"images": True, "text": True, "tab": True}
TEXT = {"images": False, "text": True, "tab": False}


def file_of(run: Path) -> Path:
    (found,) = (run / "neuronscope").iterdir()
    return found


def undated(events: list[Any]) -> list[dict[str, Any]]:
    """Events without the time at which they were written."""
    return [{**vars(event), "wall_time": None} for event in events]


def test_the_event_file_holds_what_a_summary_writer_would_write(tmp_path: Path) -> None:
    report = samples.conv_net()
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    with summary_writer("torch", tmp_path / "theirs") as writer:
        write(report, writer, 4000)
    append(report, EventFile(str(tmp_path / "ours")), 4000, **ALL)
    theirs, ours = read(tmp_path / "theirs"), read(tmp_path / "ours" / "neuronscope")
    assert set(ours.Tags()["images"]) == IMAGES
    assert set(ours.Tags()["tensors"]) == {REPORT, "neuronscope/diagnosis/text_summary"}
    assert ours.file_version == theirs.file_version
    for tag in ours.Tags()["images"]:
        assert undated(ours.Images(tag)) == undated(theirs.Images(tag)), tag
    for tag in ours.Tags()["tensors"]:
        assert undated(ours.Tensors(tag)) == undated(theirs.Tensors(tag)), tag
        assert ours.SummaryMetadata(tag) == theirs.SummaryMetadata(tag), tag


def test_the_dashboard_sends_only_numbers_to_the_users_writer(tmp_path: Path) -> None:
    for kind in ("torch", "tensorboardX"):
        with summary_writer(kind, tmp_path / kind) as writer:
            assert Dashboard(writer).write(samples.conv_net(), 4000)
        numbers, drawn = read(tmp_path / kind), read(tmp_path / kind / "neuronscope")
        assert (set(numbers.Tags()["scalars"]), numbers.Tags()["images"]) == (SCALARS, [])
        assert (drawn.Tags()["scalars"], set(drawn.Tags()["images"])) == ([], IMAGES)


def test_tensorboard_shows_both_files_while_both_grow(tmp_path: Path) -> None:
    # TensorBoard's Python loader, which serves where there is no data server: in one folder it never returns to a file.
    run = tmp_path / "run"
    shown = multiplexer.EventMultiplexer()
    with summary_writer("torch", run) as writer:
        dashboard = Dashboard(writer)
        for step in (1, 2, 3):
            writer.add_scalar("loss", 1.0, step)
            dashboard.write(samples.conv_net(10 + step), step, **TEXT)
            writer.flush()
            shown.AddRunsFromDirectory(str(tmp_path))
            shown.Reload()
            assert [event.step for event in shown.Tensors("run", "loss")] == list(range(1, step + 1))
            tag = "neuronscope/diagnosis/text_summary"
            assert [event.step for event in shown.Tensors("run/neuronscope", tag)] == list(range(1, step + 1))


@pytest.mark.parametrize("written", [0, 1, 100])
def test_a_report_that_does_not_fit_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    file = EventFile(str(tmp_path))
    append(samples.conv_net(10), file, 1, **TEXT)
    before = file_of(tmp_path).read_bytes()

    class Full:
        """Takes some bytes and then no more."""

        def __init__(self, raw: Any) -> None:
            self._raw, self._room = raw, written

        def __getattr__(self, name: str) -> Any:
            return getattr(self._raw, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self._raw.close()

        def write(self, data: memoryview) -> int:
            if not self._room:
                raise OSError(errno.ENOSPC, "No space left on device")
            took, self._room = self._raw.write(data[: self._room]), 0
            return int(took)

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: Full(opened(path, *args, **kwargs)))
    with pytest.raises(OSError, match=r"No space left on device: .*tfevents"):
        append(samples.conv_net(11), file, 2, **TEXT)
    monkeypatch.undo()
    assert file_of(tmp_path).read_bytes() == before
    append(samples.conv_net(12), file, 3, **TEXT)  # there is room again
    found = read(tmp_path / "neuronscope")
    assert [event.step for event in found.Tensors("neuronscope/diagnosis/text_summary")] == [1, 3]


def test_a_write_that_takes_only_a_part_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def __init__(self, raw: Any) -> None:
            self._raw = raw

        def __getattr__(self, name: str) -> Any:
            return getattr(self._raw, name)

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *error: object) -> None:
            self._raw.close()

        def write(self, data: memoryview) -> int:
            return int(self._raw.write(data[:1000]))

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: Short(opened(path, *args, **kwargs)))
    append(samples.conv_net(), EventFile(str(tmp_path)), 4000, **ALL)
    monkeypatch.undo()
    assert set(read(tmp_path / "neuronscope").Tags()["images"]) == IMAGES


def test_a_removed_folder_stays_removed_and_one_that_is_back_is_written_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    file = EventFile(str(run))
    append(samples.conv_net(10), file, 1, **TEXT)
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError, match="The log folder is gone"):
        append(samples.conv_net(11), file, 2, **TEXT)
    assert not run.exists()
    run.mkdir()
    append(samples.conv_net(12), file, 3, **TEXT)
    found = read(run / "neuronscope")
    assert found.file_version == 2.0
    assert [event.step for event in found.Tensors("neuronscope/diagnosis/text_summary")] == [3]


@pytest.mark.parametrize(
    ("total", "free", "room"),
    [
        (1 << 40, SPARE_BYTES + 100, True),
        (1 << 40, SPARE_BYTES + 99, False),
        (1 << 40, 0, False),
        (0, 0, True),  # a network disk that gives no sizes
    ],
)
def test_no_event_is_written_when_the_disk_is_almost_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, room: bool
) -> None:
    disk = shutil.disk_usage(tmp_path)._replace(total=total, used=total - free, free=free)
    monkeypatch.setattr(event_file.shutil, "disk_usage", lambda folder: disk)
    if room:
        require_room(str(tmp_path), 100)
    else:
        with pytest.raises(OSError, match="The disk of the log folder is full"):
            require_room(str(tmp_path), 100)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda file: pickle.loads(pickle.dumps(file))])
def test_a_copy_of_the_writer_writes_a_file_of_its_own(
    copied: Callable[[EventFile], EventFile], tmp_path: Path
) -> None:
    file = EventFile(str(tmp_path))
    for each in (file, copied(file)):
        append(samples.conv_net(10), each, 1, **TEXT)
    names = [path.name for path in (tmp_path / "neuronscope").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("events.out.tfevents.") and name.endswith(".neuronscope") for name in names)


def test_remote_folders_are_written_to_as_tensorboard_does() -> None:
    fsspec = pytest.importorskip("fsspec")
    run = f"memory://{uuid.uuid4().hex}"
    file = EventFile(run)
    require_room(run)
    for step in (1, 2):
        append(samples.conv_net(10 + step), file, step, **TEXT)
    assert len(fsspec.filesystem("memory").ls(f"{run}/neuronscope")) == 1
    found = read(f"{run}/neuronscope")
    assert [event.step for event in found.Tensors("neuronscope/diagnosis/text_summary")] == [1, 2]


def test_the_folder_of_each_kind_of_writer_is_found() -> None:
    class Writer:
        log_dir: Any = Path("runs") / "one"

    class Foreign:
        logdir = "runs/two"

    assert [folder_of(writer) for writer in (Writer(), Foreign(), object())] == [str(Writer.log_dir), "runs/two", None]


def test_images_of_an_unsupported_layout_are_refused() -> None:
    with pytest.raises(UsageError, match="`dataformats`"):
        EncodedEvents().add_image("picture", np.zeros((3, 2, 2), np.uint8), 1, dataformats="CHW")


def test_a_dashboard_that_cannot_write_warns_once_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with summary_writer("torch", run) as writer:
        dashboard = Dashboard(writer)
        assert dashboard.write(samples.conv_net(10), 1, **TEXT)
        (run / "neuronscope").rename(tmp_path / "away")
        (run / "neuronscope").write_text("")
        with pytest.warns(NeuronscopeWarning, match="could not write to TensorBoard; training goes on"):
            assert not dashboard.write(samples.conv_net(11), 2, **TEXT)
        assert not dashboard.write(samples.conv_net(12), 3, **TEXT)  # a second warning would be an error here
    assert [event.step for event in read(run).Scalars("neuronscope/dead_pct")] == [1, 2, 3]
