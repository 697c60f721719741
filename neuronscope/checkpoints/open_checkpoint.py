"""Reading: from a path to a :class:`~neuronscope.checkpoints.checkpoint.Checkpoint`, whatever is there.

Formats are told by content. Nothing that a checkpoint names is imported or run unless the user says that it is trusted.
"""

from __future__ import annotations

from pathlib import Path

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.formats.build_checkpoint import RawCheckpoint, build_checkpoint
from neuronscope.checkpoints.formats.byte_range import ByteRange, quoted
from neuronscope.checkpoints.formats.folders import read_folder
from neuronscope.checkpoints.formats.sharded import read_index
from neuronscope.checkpoints.formats.single_file import read_single_file
from neuronscope.errors import CheckpointError

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """What lies in a checkpoint, without its numbers: those are read tensor by tensor when they are asked for.

    Files of ``torch.save`` (a ``state_dict``, a training checkpoint, Lightning's), safetensors, weights in several
    files with their index, folders of Hugging Face and ``torch.distributed.checkpoint``: see ``docs/checkpoints.md``.

    Args:
        path: A file, or a folder that is a checkpoint.
        trust: Unpickle what names code, **which runs it**. Without it such a file is refused.

    Raises:
        CheckpointError: It is not there, damaged, foreign, or would have to be unpickled; in one sentence or two.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict(), "global_step": 7}, f"{folder}/last.ckpt")
    ...     checkpoint = open_checkpoint(f"{folder}/last.ckpt")
    ...     print(checkpoint.format, checkpoint.step, {name: t.shape for name, t in checkpoint.tensors.items()})
    torch file 7 {'weight': (2, 3), 'bias': (2,)}
    """
    path = Path(path)
    try:
        return build_checkpoint(path, _contents(path, trust=trust))
    except OSError as error:
        raise CheckpointError(f"Cannot read {quoted(path)}: {error.strerror or error}.") from error
    except MemoryError as error:
        raise CheckpointError(f"Cannot read {quoted(path)}: there is not enough memory for it.") from error


def _contents(path: Path, *, trust: bool) -> RawCheckpoint:
    if path.is_dir():
        return read_folder(path, trust=trust)
    if path.name.endswith(".index.json"):
        return RawCheckpoint(*read_index(path, trust=trust))
    return RawCheckpoint(*read_single_file(ByteRange.of(path), trust=trust))
