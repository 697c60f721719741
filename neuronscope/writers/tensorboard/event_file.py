"""Write an event file of Neuronscope's own, so that its pictures do not pass through the writer that training uses.

A ``SummaryWriter`` keeps an error of its writing thread and raises it from the next call of anyone: a picture that did
not fit on the disk would end the user's ``add_scalar``. Here a report is encoded in memory and appended at once,
without a thread; only the caller sees an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronscope.arrays import ByteArray
from neuronscope.errors import UsageError

try:
    import resource as _resource
except ImportError:  # Windows has no such limits
    _resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = [
    "EVENT_FOLDER",
    "SPARE_BYTES",
    "EncodedEvents",
    "EventFile",
    "folder_of",
    "require_room",
    "require_room_in_file",
]

#: Folder of the event file, inside the run's folder. TensorBoard shows it as a run of its own, ``<run>/neuronscope``:
#: its Python loader reads the files of one folder one after the other and never returns to an earlier one, so a
#: second file in the run's folder would stop the user's own charts (docs/mechanisms.md).
EVENT_FOLDER = "neuronscope"
#: Bytes that stay free on the disk for what the training itself still writes.
SPARE_BYTES = 4 << 20
#: Bytes that a number takes in an event file, with a tag of some length.
_NUMBER_BYTES = 100


def folder_of(writer: Any) -> str | None:
    """Return the folder of a ``SummaryWriter`` of torch or tensorboardX; ``None`` if it has none."""
    folder = getattr(writer, "log_dir", None) or getattr(writer, "logdir", None)
    return os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None


def require_room(folder: str, size: int = 0) -> None:
    """Check that a run's folder exists and that its disk has room. Remote folders (``s3://…``) are not checked.

    Args:
        folder: The folder.
        size: Bytes to be written; :data:`SPARE_BYTES` more must be free.

    Raises:
        OSError: The folder is missing, or the disk is full.
    """
    if "://" in folder:
        return
    if not Path(folder).is_dir():
        raise FileNotFoundError(errno.ENOENT, "The log folder is gone", folder)
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < size + SPARE_BYTES:  # some network disks give no sizes
        raise OSError(errno.ENOSPC, "The disk of the log folder is full", folder)


def require_room_in_file(folder: str, numbers: int = 0) -> None:
    """Check that the event files of a run stay below half of what a file may hold, if the system has such a limit.

    The other half (of ``ulimit -f``) is left to the training's own numbers: once the file that both write is full, the
    next number of the training's own ends it.

    Args:
        folder: The folder of the event files.
        numbers: How many numbers are to be written.

    Raises:
        OSError: A file is too large.
    """
    limit = -1 if _resource is None else _resource.getrlimit(_resource.RLIMIT_FSIZE)[0]
    if limit < 0 or "://" in folder:  # -1 = no limit
        return
    for file in Path(folder).glob("*tfevents*"):
        if 2 * (file.stat().st_size + numbers * _NUMBER_BYTES) > limit:
            raise OSError(errno.EFBIG, "The event file is near the limit on the size of files", str(file))


class EncodedEvents:
    """Encodes pictures, text and summaries as records of an event file in memory; stands in for a ``SummaryWriter``.

    Attributes:
        data: The records so far.
    """

    def __init__(self) -> None:
        self.data = b""

    @property
    def file_writer(self) -> EncodedEvents:
        """The object that takes whole summaries, as in a ``SummaryWriter``."""
        return self

    def add_image(self, tag: str, img_tensor: ByteArray, global_step: int, *, dataformats: str) -> None:
        """Add a picture.

        Args:
            tag: The tag.
            img_tensor: uint8 ``(H, W, C)``.
            global_step: The step.
            dataformats: ``HWC``; nothing else is supported.

        Raises:
            UsageError: ``dataformats`` is not ``HWC``.
        """
        if dataformats != "HWC":
            raise UsageError(f"Expected argument `dataformats` to be 'HWC', but got {dataformats!r}.")
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, channels = img_tensor.shape
        png = io.BytesIO()
        Image.fromarray(img_tensor).save(png, format="PNG")
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue())
        self.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), global_step)

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """Add a text.

        Args:
            tag: The tag; ``/text_summary`` is appended, as a ``SummaryWriter`` does.
            text_string: Markdown.
            global_step: The step.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.plugins.text.metadata import create_summary_metadata

        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[text_string.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = create_summary_metadata(display_name="", description="")
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self.add_summary(Summary(value=[value]), global_step)

    def add_summary(self, summary: Summary, global_step: int) -> None:
        """Add a summary.

        Args:
            summary: A proto of TensorBoard's.
            global_step: The step.
        """
        self.data += _record(summary=summary, step=global_step)


class EventFile:
    """An event file in the subfolder ``neuronscope`` of a run. It is open only while something is appended.

    A copy writes a file of its own. The run's folder is never created here: what a user removed stays removed.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        now = time.time_ns()
        place = f"{socket.gethostname()}.{os.getpid()}.{now % 10**9:09d}"
        self._name = f"events.out.tfevents.{now // 10**9:010d}.{place}.neuronscope"
        self._remote: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.run,)

    def append(self, data: bytes) -> None:
        """Append records from :class:`EncodedEvents`: all of them, or none.

        Raises:
            OSError: They cannot be written, or would leave too little room on the disk.
        """
        if "://" in self.run:
            self._append_remote(data)
            return
        require_room(self.run, len(data))
        folder = Path(self.run) / EVENT_FOLDER
        folder.mkdir(exist_ok=True)
        with (folder / self._name).open("ab", buffering=0) as file:
            size = file.tell()
            rest = memoryview(data if size else _header() + data)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                error.filename = file.name
                with contextlib.suppress(OSError):
                    file.truncate(size)  # readers stop at half a record, and training needs the space
                raise

    def _append_remote(self, data: bytes) -> None:
        from tensorboard.compat import tf

        if self._remote is None:
            folder = f"{self.run.rstrip('/')}/{EVENT_FOLDER}"
            tf.io.gfile.makedirs(folder)
            self._remote = tf.io.gfile.GFile(f"{folder}/{self._name}", "wb")
            self._remote.write(_header())
        self._remote.write(data)
        self._remote.flush()


def _header() -> bytes:
    from tensorboard.compat.proto.event_pb2 import SourceMetadata

    return _record(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="neuronscope"))


def _record(**fields: Any) -> bytes:
    """Return an event with the current time, its length and checksums."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    made = io.BytesIO()
    RecordWriter(made).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return made.getvalue()
