"""Give a run's files (the page, the overview picture) to Weights & Biases, MLflow or Comet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["attach_files", "tracker_of"]


#: By the name of a logger of Lightning or a callback of transformers: its tracker, and what takes the files.
_TRACKERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "WandbLogger": ("wandb", lambda logger: logger.experiment),
    "WandbCallback": ("wandb", lambda callback: getattr(getattr(callback, "_wandb", None), "run", None)),
    "MLFlowLogger": ("mlflow", lambda logger: (logger.experiment, logger.run_id)),
    "MLflowCallback": ("mlflow", lambda callback: (getattr(callback, "_ml_flow", None), None)),
    "CometLogger": ("comet", lambda logger: logger.experiment),
    "CometCallback": ("comet", lambda callback: getattr(callback, "_experiment", None)),
}


def tracker_of(logger: Any) -> tuple[str, Any] | None:
    """Return which tracker a logger of Lightning or a callback of transformers writes to, and what takes its files.

    Subclasses are known by their bases' names. That is ``wandb`` and a run, ``mlflow`` and a client with the run's id
    (``None`` = the active run), or ``comet`` and an experiment; ``None`` for every other logger.
    """
    for kind in type(logger).__mro__:
        if kind.__name__ in _TRACKERS:
            tracker, taker = _TRACKERS[kind.__name__]
            return tracker, taker(logger)
    return None


def attach_files(tracker: tuple[str, Any], files: Sequence[Path]) -> None:
    """Attach HTML pages and pictures to a run.

    Args:
        tracker: As :func:`tracker_of` returns it.
        files: Their paths; the folder may be deleted afterwards.
    """
    kind, target = tracker
    if kind == "mlflow":
        client, run = target
        for file in files:
            if client is not None:
                client.log_artifact(*(() if run is None else (run,)), str(file), "neuronscope")
    elif kind == "comet" and target is not None:
        for file in files:
            target.log_asset(str(file), file_name=f"neuronscope/{file.name}", copy_to_tmp=True)
    elif kind == "wandb" and target is not None:
        wandb = sys.modules["wandb"]
        media = {".html": lambda file: wandb.Html(file.read_text(encoding="utf-8"), inject=False)}
        shown = {
            f"neuronscope/{file.stem}_{file.suffix[1:]}": media.get(file.suffix, lambda at: wandb.Image(str(at)))(file)
            for file in files
        }
        target.log(shown)
