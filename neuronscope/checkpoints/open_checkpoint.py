"""Open a checkpoint of any supported format as a :class:`~neuronscope.checkpoints.checkpoint.Checkpoint`.

The format is recognised by the content. No code that a checkpoint names is imported or run, unless the user trusts it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.formats.build_checkpoint import RawCheckpoint, build_checkpoint
from neuronscope.checkpoints.formats.byte_range import quoted
from neuronscope.checkpoints.formats.folders import read_folder
from neuronscope.checkpoints.formats.optimizer_state import find_optimizers
from neuronscope.checkpoints.formats.single_file import read_file
from neuronscope.errors import CheckpointError

__all__ = ["open_checkpoint"]


def open_checkpoint(
    path: str | Path, *, optimizer: str | Path | None = None, step: int | None = None, trust: bool = False
) -> Checkpoint:
    """Open a checkpoint without loading its tensors; each tensor is read when it is needed.

    Supported are files of ``torch.save`` (a ``state_dict``, a training checkpoint, Lightning's), safetensors, sharded
    weights with an index file, folders of Hugging Face and of ``torch.distributed.checkpoint``: see
    ``docs/checkpoints.md``.

    Args:
        path: The checkpoint file or folder.
        optimizer: A file or folder with the optimizer's state, if it lies apart from the weights.
        step: Number of optimizer steps taken, if it is known better than from the files.
        trust: Allow full unpickling. **This runs code in the file.** Without it, a file that needs this is refused.

    Raises:
        CheckpointError: The checkpoint does not exist, is damaged, has an unknown format, or needs full unpickling.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict(), "global_step": 7}, f"{folder}/last.ckpt")
    ...     checkpoint = open_checkpoint(f"{folder}/last.ckpt")
    ...     print(checkpoint.format, checkpoint.step, {name: t.shape for name, t in checkpoint.tensors.items()})
    torch file 7 {'weight': (2, 3), 'bias': (2,)}
    """
    path = Path(path)
    try:
        raw = _contents(path, trust=trust)
        raw.step = raw.step if step is None else step
        if optimizer is not None:
            raw.optimizer = _optimizer(Path(optimizer), trust=trust)
        return build_checkpoint(path, raw)
    except OSError as error:
        raise CheckpointError(f"Cannot read {quoted(error.filename or path)}: {error.strerror or error}.") from error
    except MemoryError as error:
        raise CheckpointError(f"Cannot read {quoted(path)}: there is not enough memory for it.") from error


def _contents(path: Path, *, trust: bool) -> RawCheckpoint:
    return (read_folder if path.is_dir() else read_file)(path, trust=trust)


def _optimizer(path: Path, *, trust: bool) -> Any:
    """Return the plain data of a file that holds an optimizer's state.

    Raises:
        CheckpointError: It cannot be read, or holds none.
    """
    raw = _contents(path, trust=trust)
    found = {**(raw.data if isinstance(raw.data, dict) else {}), **raw.other_files}
    if not find_optimizers(found):
        raise CheckpointError(f"{quoted(path)} holds no state of an optimizer.")
    return found
